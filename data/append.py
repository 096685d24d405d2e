"""An older data set's events as if its log were read again, in front of today's.

Its histories and its residual together are every good event of its log, in the order that decides
among events of one user and time. Nothing of the log itself is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.cores import on_all_cores
from data.engine import one_row, quoted, quoted_path
from data.errors import InputError
from data.events import LOG_EVENTS
from data.log_query import LogRules, payload
from data.logs import EARLIER_EVENTS
from data.numbering import KNOWN_ITEMS
from data.schema import DataFile, Manifest, damage

# `seq` of an earlier event, all below today's: among the user's events of its time, the kept ones
# before it, then the dropped ones before it since the last kept one.
_SEQ = "(kept_before::BIGINT - 2147483648) * 4294967296 + {}"
_LAST = 2**32 - 1  # a kept event stands behind the dropped ones that have as many kept before


@dataclass(frozen=True)
class EarlierData:
    """A converted data set to append to, its files checked."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, rules: LogRules) -> "EarlierData":
        """Raises InputError where it is damaged, or was made by other rules or without residual."""
        manifest = Manifest.read(folder)
        ours = {"events_duplicate", "events_below_minimum"} <= manifest.counts.keys()
        if not ours or "log" not in manifest.options:
            raise InputError(f"append={folder} was not made by tools.convert_logs; convert its log")
        made = LogRules.from_options(manifest.options)
        for option, before, now in (
            ("where", made.where, rules.where),
            ("columns.features", list(made.features), list(rules.features)),
        ):
            if before != now:
                raise InputError(
                    f"{option}={now}, but append={folder} was made with {before}; give the same, "
                    "or convert both logs"
                )
        dropped = manifest.counts["events_duplicate"] + manifest.counts["events_below_minimum"]
        if dropped != (manifest.residual.rows if manifest.residual else 0):
            raise InputError(
                f"append={folder} lacks the residual/ of the {dropped:,} events that its filters "
                "dropped; convert its log again with this version"
            )
        found = on_all_cores(lambda one: damage(folder, one), manifest.files)
        for one, what in zip(manifest.files, found, strict=True):
            if what:
                raise InputError(f"{folder / one.path} {what}; copy the data set again")
        return cls(folder, manifest)

    def add(self, connection: duckdb.DuckDBPyConnection, today: dict[str, int]) -> dict[str, int]:
        """Widen `events` and `bad_rows` by this data set's, and `today`'s counts of the reading.

        Needs KNOWN_ITEMS, its own vocabulary. The counts returned also have events_appended and
        events_late, which are earlier than their user's newest event here.
        Raises InputError where ids, times or features are of other types than today's.
        """
        self._load_events(connection)
        self._check_types(connection)
        connection.execute(
            f"CREATE OR REPLACE VIEW events AS FROM {EARLIER_EVENTS} UNION ALL FROM {LOG_EVENTS}"
        )
        if self.manifest.bad_rows:
            earlier = self._source(self.manifest.bad_rows)
            connection.execute(
                f"CREATE OR REPLACE TABLE bad_rows AS FROM {earlier} UNION ALL FROM bad_rows"
            )
        appended, late = one_row(
            connection,
            f"SELECT count(*), count(*) FILTER (time < newest) FROM {LOG_EVENTS} LEFT JOIN "
            f"(SELECT user_id, max(time) AS newest FROM {EARLIER_EVENTS} GROUP BY user_id) "
            "USING (user_id)",
        )
        before = self.manifest.counts
        reading = {name for name in before if name.startswith("events_bad")} | today.keys()
        sums = {name: before.get(name, 0) + today.get(name, 0) for name in sorted(reading)}
        return sums | {"events_appended": appended, "events_late": late}

    def _load_events(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Create EARLIER_EVENTS from the histories and the residual."""
        names = self.manifest.features
        query = (
            f"SELECT {_SEQ.format(_LAST)} AS seq, user_id, item_id, time{payload(names)} "
            f"FROM kept_rows JOIN {KNOWN_ITEMS} USING (item)"
        )
        if self.manifest.residual:
            named = "".join(f", {quoted(name)}" for name in names)
            query += (
                f" UNION ALL SELECT {_SEQ.format('dropped_before')}, user_id, item_id, "
                f"timestamp{named} FROM {self._source(self.manifest.residual)}"
            )
        schema, batches = self._kept_rows()
        connection.register("kept_rows", pa.RecordBatchReader.from_batches(schema, batches))
        connection.execute(f"CREATE TABLE {EARLIER_EVENTS} AS {query}")
        connection.unregister("kept_rows")

    def _source(self, file: DataFile) -> str:
        return f"read_parquet({quoted_path(str(self.folder / file.path))})"

    def _check_types(self, connection: duckdb.DuckDBPyConnection) -> None:
        earlier = connection.sql(f"FROM {EARLIER_EVENTS} LIMIT 0")
        names = ["", "columns.user", "columns.item", "columns.time", *self.manifest.features]
        today = connection.sql(f"FROM {LOG_EVENTS} LIMIT 0").types
        for name, before, now in zip(names, earlier.types, today, strict=True):
            if before != now:
                raise InputError(
                    f"{name} is {now} in the log but {before} in append={self.folder}; cast it in "
                    "the log"
                )

    def _kept_rows(self) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """The histories' events, flat, a row group at a time, and their schema."""
        columns = ["user_id", "items", "timestamps", *self.manifest.features]
        files = [self.folder / one.path for one in self.manifest.histories]
        stored = pq.read_schema(files[0])
        kinds = [stored.field("user_id").type]
        kinds += [stored.field(name).type.value_type for name in columns[1:]]
        names = ["user_id", "item", "time", *(f"f{place}" for place in range(len(columns) - 3))]
        fields = [*zip(names, kinds, strict=True), ("kept_before", pa.int32())]
        schema = pa.schema(fields)

        def batches() -> Iterator[pa.RecordBatch]:
            for path in files:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    for group in range(file.num_row_groups):
                        yield _flat(file.read_row_group(group, columns), schema)

        return schema, batches()


def _flat(histories: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    """One row an event; kept_before counts the user's events of the same time before it."""
    lists = [column.combine_chunks() for column in histories.columns[1:]]
    lengths_U = lists[0].value_lengths().to_numpy(zero_copy_only=False)
    user_L = np.repeat(np.arange(len(lengths_U)), lengths_U)
    place_L = np.arange(len(user_L))
    times_L = lists[1].flatten()
    tied_L = np.zeros(len(user_L), bool)
    tied_L[1:] = pc.equal(times_L[1:], times_L[:-1]).to_numpy(zero_copy_only=False)
    tied_L[1:] &= user_L[1:] == user_L[:-1]
    kept_before_L = place_L - np.maximum.accumulate(np.where(tied_L, 0, place_L))
    users = histories["user_id"].combine_chunks().take(pa.array(user_L))
    flat = [users, *(one.flatten() for one in lists), pa.array(kept_before_L, pa.int32())]
    return pa.RecordBatch.from_arrays(flat, schema=schema)
