"""The SQL that reads a raw log: its columns by the user's names, typed, with bad rows marked."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data.engine import first_line, quoted, quoted_path
from data.errors import InputError
from data.log_files import LogFiles

DEDUPLICATE = ("none", "consecutive", "user_item")
TIES = "input_order"  # events of one user at one time keep the order of the input
OWN_COLUMNS = ("user_id", "items", "timestamps", "n_train", "n_validation")
FILTERED = 0  # a row's mark when `where` does not hold
BAD_REASONS = {  # a row's mark when it cannot be used
    1: "null_user",
    2: "null_item",
    3: "null_time",
    4: "unreadable_user",
    5: "unreadable_item",
    6: "unreadable_time",
}
NULL_TYPE = '"NULL"'  # of a Parquet column without any value
FILE_COLUMN = "__file"  # the source's column of the file that a row is in
_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
_INTEGERS |= {"U" + name for name in _INTEGERS}


def event_columns(features: Sequence[str]) -> str:
    """The columns of a table of events: seq, user_id, item_id, time, f0, f1, …"""
    return "seq, user_id, item_id, time" + payload(features)


def payload(features: Sequence[str]) -> str:
    """The columns of the features, each behind a comma: `, f0, f1, …`"""
    return "".join(f", f{place}" for place in range(len(features)))


@dataclass(frozen=True)
class LogRules:
    """How a raw log is read. Kept in the manifest, so that scoring reads a log the same way."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    features: tuple[str, ...] = ()
    where: str | None = None  # a SQL condition over the log's own columns
    deduplicate: str = "none"  # see data.logs
    csv_delimiter: str | None = None  # None: a comma, or a tab for .tsv
    csv_types: dict[str, str] = field(default_factory=dict)  # column: DuckDB type, else detected

    def __post_init__(self) -> None:
        roles = {"columns.user": self.user, "columns.item": self.item, "columns.time": self.time}
        for (option, name), (other, same) in itertools.combinations(roles.items(), 2):
            if name == same:
                raise InputError(f"{option} and {other} are both {name}; name two columns")
        if self.deduplicate not in DEDUPLICATE:
            raise InputError(
                f"deduplicate={self.deduplicate} is unknown; choose {' | '.join(DEDUPLICATE)}"
            )
        for name in self.features:
            if name in OWN_COLUMNS:
                raise InputError(
                    f"columns.features has {name!r}, a column that histories have already; "
                    f"rename it in the log (taken: {', '.join(OWN_COLUMNS)})"
                )
            if self.features.count(name) > 1:
                raise InputError(f"columns.features names {name!r} twice; name it once")

    def as_options(self) -> dict[str, Any]:
        """The rules as a manifest's `options` keep them; `from_options` reads them back."""
        return {"log": asdict(self) | {"features": list(self.features), "ties": TIES}}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "LogRules":
        """The rules that a manifest's `options` keep."""
        rules = {name: value for name, value in options["log"].items() if name != "ties"}
        return cls(**rules | {"features": tuple(rules["features"])})


@dataclass(frozen=True)
class LogQuery:
    """`events`: user_id, item_id, time, f0, f1, … and `mark`, null for a good row.

    `total` counts all rows where `events` leaves out those that `where` drops (Parquet, where the
    condition can skip row groups); for CSV it is None and they come marked FILTERED. `raw` is
    user, item, time as they stand in the log, file and mark; `types` are its columns' types.
    """

    events: str
    total: str | None
    raw: str
    types: dict[str, str]


def log_query(connection: duckdb.DuckDBPyConnection, files: LogFiles, rules: LogRules) -> LogQuery:
    """Build the query from the files' own schema.

    Raises InputError for columns that are missing or of an unusable type and for a `where` that
    is no condition; DuckDB's own errors are those of damaged files.
    """
    names = f"[{', '.join(quoted_path(path) for path in files.paths)}]"
    hive = f"hive_partitioning={str(bool(files.partitions)).lower()}, filename='{FILE_COLUMN}'"
    columns = "*"
    if files.partitions:
        _check_partitions(connection, files, names, rules)
        left_out = ", ".join(quoted(key) for key in dict.fromkeys(files.outer))
        columns = f"* EXCLUDE ({left_out})" if left_out else "*"
    if files.kind == "parquet":
        source = f"SELECT {columns} FROM read_parquet({names}, union_by_name=true, {hive})"
        types = _types(connection, source, rules)
        _check_ids_agree(files, types, rules)
        query, raw = select_rows(source, types, rules, False)
        total = f"SELECT sum(num_rows)::BIGINT FROM parquet_file_metadata({names})"
    else:
        options = f"{_csv_options(files, rules)}, {hive}"
        detected = f"SELECT {columns} FROM read_csv({names}, {options}, ignore_errors=true)"
        types = _types(connection, detected, rules) | rules.csv_types
        text = f"FROM read_csv({names}, {options}, all_varchar=true, store_rejects=true)"
        source = _from_text(text, types, rules)
        query, raw = select_rows(source, types, rules, True)
        total = None
    _check_where(connection, source, rules)
    return LogQuery(query, total, raw, types)


def _check_partitions(
    connection: duckdb.DuckDBPyConnection, files: LogFiles, names: str, rules: LogRules
) -> None:
    """A partition replaces a column of its name, and the engine takes folders above for one too."""
    options = "union_by_name=true"
    if files.kind == "csv":
        options = f"{_csv_options(files, rules)}, ignore_errors=true"
    reader = f"FROM read_{files.kind}({names}, {options}, hive_partitioning=false)"
    columns = [str(row[0]) for row in connection.execute(f"DESCRIBE {reader}").fetchall()]
    taken = {name.lower(): f"the column {name} of the files" for name in columns}
    for key in files.partitions:
        if key.lower() in taken:
            raise InputError(
                f"the folders {key}=… of {files.paths[0]} would replace "
                f"{taken[key.lower()]}; rename the folders or the column"
            )
    taken |= {key.lower(): f"the partition {key} below it" for key in files.partitions}
    for key in files.outer:
        if key.lower() in taken:
            raise InputError(
                f"{files.paths[0]} lies in a folder {key}=… above the input, which would replace "
                f"{taken[key.lower()]}; move the log or rename that folder"
            )


def _csv_options(files: LogFiles, rules: LogRules) -> str:
    return f"header=true, quote='\"', escape='\"', delim='{_delimiter(files, rules)}'"


def _delimiter(files: LogFiles, rules: LogRules) -> str:
    tab = files.paths[0].lower().endswith((".tsv", ".tsv.gz"))
    given = rules.csv_delimiter or ("\t" if tab else ",")
    return "\t" if given in ("\\t", "tab") else given.replace("'", "''")


def _types(connection: duckdb.DuckDBPyConnection, source: str, rules: LogRules) -> dict[str, str]:
    """The types of the log's columns, once all that the rules name are there."""
    rows = connection.execute(f"DESCRIBE {source}").fetchall()
    types = {str(row[0]): str(row[1]) for row in rows if row[0] != FILE_COLUMN}
    wanted = [("columns.user", rules.user), ("columns.item", rules.item)]
    wanted += [("columns.time", rules.time)]
    wanted += [("columns.features", name) for name in rules.features]
    wanted += [("csv.types", name) for name in rules.csv_types]
    for option, name in wanted:
        if name not in types:
            raise InputError(
                f"{option}={name} is not a column of the log; it has {', '.join(types)}"
            )
    for name, kind in rules.csv_types.items():
        try:
            connection.execute(f"SELECT CAST(NULL AS {kind})")
        except duckdb.Error as error:
            raise InputError(f"csv.types.{name}={kind} is no DuckDB type; try VARCHAR") from error
    return types


def _check_ids_agree(files: LogFiles, types: dict[str, str], rules: LogRules) -> None:
    """Of integers in one file and text in another, DuckDB makes text."""
    names = [name for name in (rules.user, rules.item) if types[name] == "VARCHAR"]
    for path in files.paths if names and len(files.paths) > 1 else ():
        schema = pq.read_schema(path)
        for name in set(names).intersection(schema.names):
            if pa.types.is_integer(schema.field(name).type):
                raise InputError(
                    f"{name} is {schema.field(name).type} in {path} and text in another file; cast "
                    "it to one type in all"
                )


def _from_text(text: str, types: dict[str, str], rules: LogRules) -> str:
    """Read CSV cells as text and cast here: what does not parse is counted, at any thread count."""
    casts = ", ".join(f"TRY_CAST({quoted(c)} AS {types[c]}) AS {quoted(c)}" for c in types)
    roles = (("user", rules.user), ("item", rules.item), ("time", rules.time))
    kept = ", ".join(f"{quoted(column)} AS __text_{role}" for role, column in roles)
    return f"SELECT {casts}, {kept}, {FILE_COLUMN} {text}"


def select_rows(source: str, types: dict[str, str], rules: LogRules, text: bool) -> tuple[str, str]:
    """The queries `events` and `raw` of LogQuery over `source`, which has FILE_COLUMN as well.

    types: of the source's columns. text: whether it is CSV.
    """
    columns = [quoted(rules.user), quoted(rules.item), quoted(rules.time)]
    raw = ["__text_user", "__text_item", "__text_time"] if text else columns
    user = _id_value("columns.user", rules.user, types)
    item = _id_value("columns.item", rules.item, types)
    time, time_is_good = _time_value(rules.time, types)
    tests = [f"{column} IS NULL" for column in raw]
    tests += [f"{user} IS NULL", f"{item} IS NULL", f"NOT coalesce({time_is_good}, false)"]
    marks = [f"WHEN {test} THEN {mark}" for mark, test in enumerate(tests, 1)]
    where = ""
    if rules.where and text:
        marks.insert(0, f"WHEN NOT coalesce(({rules.where}\n), false) THEN {FILTERED}")
    elif rules.where:
        where = f"WHERE ({rules.where}\n)"
    features = "".join(
        f", {_feature(name, types)} AS f{place}" for place, name in enumerate(rules.features)
    )
    rest = f"CAST(CASE {' '.join(marks)} END AS UTINYINT) AS mark FROM ({source}) {where}"
    values = f"{user} AS user_id, {item} AS item_id, {time} AS time{features}"
    names = zip((*raw, FILE_COLUMN), ("user", "item", "time", "file"), strict=True)
    texts = ", ".join(f"{column}::VARCHAR AS {name}" for column, name in names)
    return f"SELECT {values}, {rest}", f"SELECT {texts}, {rest}"


def _id_value(option: str, name: str, types: dict[str, str]) -> str:
    kind, column = types[name], quoted(name)
    if kind in _INTEGERS:
        return f"TRY_CAST({column} AS BIGINT)"
    if kind in ("VARCHAR", "UUID", NULL_TYPE) or kind.startswith("ENUM"):
        return f"CAST({column} AS VARCHAR)"
    raise InputError(f"{option}={name} has type {kind}; ids are integers or strings, so cast them")


def _time_value(name: str, types: dict[str, str]) -> tuple[str, str]:
    """The value, and the test that it can be sorted by."""
    kind, column = types[name], quoted(name)
    if kind in _INTEGERS:
        value = f"TRY_CAST({column} AS BIGINT)"
        return value, f"{value} IS NOT NULL"
    if kind in ("FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        value = f"CAST({column} AS DOUBLE)"
    elif kind.startswith("TIMESTAMP"):
        return column, finite(column, kind)
    elif kind in ("DATE", "VARCHAR", NULL_TYPE):
        value = f"TRY_CAST({column} AS TIMESTAMP)"
    else:
        raise InputError(
            f"columns.time={name} has type {kind}; times are integers, floats, dates or "
            "timestamps, so cast them"
        )
    return value, f"isfinite({value})"


def finite(value: str, kind: str) -> str:
    """SQL test that a number or timestamp of type `kind` is finite, for every kind of time."""
    if kind == "BIGINT":
        return f"{value} IS NOT NULL"
    with_zone = "ZONE" in kind or "TZ" in kind  # not every timestamp type has isfinite
    return f"isfinite(CAST({value} AS TIMESTAMPTZ))" if with_zone else f"isfinite({value})"


def _feature(name: str, types: dict[str, str]) -> str:
    kind = types[name]
    if kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION")):
        raise InputError(
            f"columns.features={name} has type {kind}; features are single values, so leave it out"
        )
    return f"CAST({quoted(name)} AS VARCHAR)" if kind.startswith("ENUM") else quoted(name)


def _check_where(connection: duckdb.DuckDBPyConnection, source: str, rules: LogRules) -> None:
    if not rules.where:
        return
    try:
        duckdb.SQLExpression(rules.where)
        connection.execute(f"EXPLAIN SELECT 1 FROM ({source}) WHERE ({rules.where}\n)")
    except duckdb.Error as error:
        raise InputError(
            f"where={rules.where} is no SQL condition over the log's columns "
            f"({first_line(error)}); write for example 'where=\"rating >= 4\"'"
        ) from error
