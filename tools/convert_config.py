"""The options of tools.convert_logs, checked once where the conversion starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.cores import check_threads
from data.errors import InputError
from data.log_query import LogRules

ENGINES = ("duckdb", "spark")


@dataclass(frozen=True)
class ConvertConfig:
    """The options of configs/convert.yaml, checked."""

    input: str | list[str]
    output: Path
    rules: LogRules
    split: dict[str, Any]
    min_user_events: int = 5
    min_item_events: int = 5
    max_bad_rows: int = 0
    vocabulary: Path | None = None
    append: Path | None = None
    shards: int | None = None
    row_group_events: int = 1_000_000
    engine: str = "duckdb"
    spark_master: str | None = None
    spark_conf: dict[str, str] = field(default_factory=dict)
    memory_limit: str = "4GB"
    threads: int | None = None
    overwrite: bool = False

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "ConvertConfig":
        """From the composed Hydra config."""
        rest = dict(options)
        columns, csv, spark = rest.pop("columns"), rest.pop("csv"), rest.pop("spark")
        features = columns["features"]
        if not isinstance(features, list):
            raise InputError(f"columns.features={features} is no list; write [{features}]")
        rules = LogRules(
            user=str(columns["user"]),
            item=str(columns["item"]),
            time=str(columns["time"]),
            features=tuple(str(name) for name in features),
            where=None if rest["where"] is None else str(rest["where"]),
            deduplicate=rest["deduplicate"],
            csv_delimiter=csv["delimiter"],
            csv_types=dict(csv["types"] or {}),
        )
        del rest["where"], rest["deduplicate"]
        for name in ("output", "vocabulary", "append"):
            rest[name] = None if rest[name] is None else Path(str(rest[name]))
        rest |= {"spark_master": spark["master"], "spark_conf": _flat(spark["conf"])}
        return cls(**rest | {"rules": rules})

    def __post_init__(self) -> None:
        least = {"min_user_events": 1, "min_item_events": 1, "max_bad_rows": 0}
        least |= {"row_group_events": 1, "shards": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if name == "shards" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise InputError(f"{name}={value} must be a whole number, {minimum} or more")
        if self.threads is not None:
            check_threads(self.threads)
        if not isinstance(self.overwrite, bool):
            raise InputError(f"overwrite={self.overwrite} must be true or false")
        if self.engine not in ENGINES:
            raise InputError(f"engine={self.engine} is unknown; choose {' | '.join(ENGINES)}")
        if self.engine != "spark" and (self.spark_master or self.spark_conf):
            raise InputError(f"spark.master and spark.conf are for engine=spark, not {self.engine}")
        if self.engine == "spark" and self.append:
            raise InputError(
                f"append={self.append} is for engine=duckdb; convert both logs with "
                f"vocabulary={self.append}, which gives the same"
            )
        if self.vocabulary and self.append:
            raise InputError(
                f"append={self.append} numbers items as that data set does; leave "
                f"vocabulary={self.vocabulary} out"
            )


def _flat(options: dict[str, Any], above: str = "") -> dict[str, str]:
    """Nested keys joined by dots, values as Spark writes them."""
    flat: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = str(value).lower() if isinstance(value, bool) else str(value)
    return flat
