"""How events are divided into training, validation and test, as SQL over the events."""

from dataclasses import dataclass

import duckdb

from data.engine import first_line, one_row
from data.errors import InputError
from data.events import Events
from data.log_query import finite


@dataclass(frozen=True)
class Split:
    """Which events train, validate and test; the bounds are SQL literals to compare time with.

    leave_one_out: a user's last event tests, the one before validates; with fewer than three
    events all train. temporal: events before `validation_from` train, from there on and before
    `test_from` validate, later ones test.
    """

    kind: str = "leave_one_out"
    validation_from: str = ""
    test_from: str = ""

    @property
    def in_training(self) -> str:
        """SQL condition on an event for what k-core and vocabulary order may look at."""
        return f"time < {self.validation_from}" if self.kind == "temporal" else "true"

    @property
    def tallies(self) -> str:
        """SQL aggregates events, trained and validated over the events of a user or item."""
        validated = "0"
        if self.kind == "temporal":
            inside = f"time >= {self.validation_from} AND time < {self.test_from}"
            validated = f"count(*) FILTER (WHERE {inside})"
        trained = f"count(*) FILTER (WHERE {self.in_training})"
        return f"count(*) AS events, {trained} AS trained, {validated} AS validated"

    @property
    def sizes(self) -> str:
        """SQL columns n_train, n_validation of a user, from its tallies."""
        train, validation = "trained", "validated"
        if self.kind == "leave_one_out":
            train = "CASE WHEN events < 3 THEN events ELSE events - 2 END"
            validation = "CASE WHEN events < 3 THEN 0 ELSE 1 END"
        return f"({train})::INTEGER AS n_train, ({validation})::INTEGER AS n_validation"


def temporal_split(events: Events, validation_from: object, test_from: object) -> Split:
    """The temporal split at two bounds, checked against the times of `events`.

    Raises InputError for a bound that is no such time, for bounds in the wrong order, and when no
    event lies before the first bound or none behind it.
    """
    connection, kind = events.connection, events.kind("time")
    first = _literal(connection, "split.validation_from", validation_from, kind)
    second = _literal(connection, "split.test_from", test_from, kind)
    range_of_times = "SELECT min(time) AS time FROM events UNION ALL SELECT max(time) FROM events"
    events.fetch("time_range", range_of_times)
    ordered, some_before, some_after, oldest, newest = one_row(
        connection,
        f"SELECT {first} <= {second}, min(time) < {first}, max(time) >= {first}, "
        "min(time)::VARCHAR, max(time)::VARCHAR FROM time_range",
    )
    if not ordered:
        raise InputError(
            f"split.validation_from={validation_from} lies after split.test_from={test_from}; "
            "validation comes first"
        )
    if not (some_before and some_after):
        raise InputError(
            f"split.validation_from={validation_from} leaves no event "
            f"{'before' if not some_before else 'after'} it; the log runs from {oldest} to {newest}"
        )
    return Split("temporal", events.literal(first), events.literal(second))


def _literal(connection: duckdb.DuckDBPyConnection, option: str, value: object, kind: str) -> str:
    text = str(value).replace("'", "''")
    literal = f"CAST('{text}' AS {kind})"
    try:
        exact = f"CAST('{text}' AS DOUBLE) = {literal}" if kind == "BIGINT" else "true"
        good = one_row(connection, f"SELECT {exact}, {finite(literal, kind)}")
    except duckdb.Error as error:
        reason = first_line(error)
    else:
        if good == (True, True):
            return literal
        reason = "not exact or not finite"
    raise InputError(
        f"{option}={value} is no {kind}, the type of the log's times ({reason}); give a number "
        "for numeric times, else a date such as 2024-01-31"
    )
