"""Events counted by user and by item, and the k-core over those counts.

`count_events` scans the view `events` (data.logs) once a key; the k-core then only looks at the
events of what it drops and takes them off the counts, so that its result needs no further scan.
"""

from data.engine import scalar
from data.errors import InputError
from data.events import Events
from data.split import Split

USER_COUNTS, ITEM_COUNTS = "user_counts", "item_counts"
DROPPED_USERS, DROPPED_ITEMS = "dropped_users", "dropped_items"
_TABLES = {"user_id": USER_COUNTS, "item_id": ITEM_COUNTS}
_DROPPED = {"user_id": DROPPED_USERS, "item_id": DROPPED_ITEMS}
_OTHER = {"user_id": "item_id", "item_id": "user_id"}


def count_events(events: Events, key: str, split: Split, among: str = "") -> None:
    """Create USER_COUNTS(user_id, …) or ITEM_COUNTS(item_id, …) of the view `events`.

    key: user_id | item_id. among: a join that narrows the events. Columns: events, trained and
    validated of `Split.tallies`, and `judged`: whether there is a training event, so that the
    k-core may drop it.
    """
    events.fetch(
        _TABLES[key],
        f"SELECT {key}, events, trained, validated, trained > 0 AS judged FROM "
        f"(SELECT {key}, {split.tallies} FROM events {among} GROUP BY {key})",
    )


def k_core(events: Events, min_user_events: int, min_item_events: int, split: Split) -> None:
    """Narrow both counts to users and items with enough training events of each other.

    Runs to the fixpoint, and leaves what went in DROPPED_USERS and DROPPED_ITEMS. Under a temporal
    split only training events count, and users and items that have none (first seen later) stay.
    Raises InputError when nothing is left.
    """
    connection = events.connection
    for key, table in _DROPPED.items():
        connection.execute(f"CREATE TABLE {table} AS SELECT {key} FROM {_TABLES[key]} LIMIT 0")
    dropped = 1
    while dropped:
        dropped = _drop(events, "user_id", min_user_events, split)
        dropped += _drop(events, "item_id", min_item_events, split)
    if not scalar(connection, f"SELECT count(*) FROM {ITEM_COUNTS} WHERE judged"):
        raise InputError(
            f"nothing is left: no user has {min_user_events} training events on items that have "
            f"{min_item_events} themselves; lower min_user_events or min_item_events"
        )
    for table in _TABLES.values():  # what was never judged, and only met what was dropped
        connection.execute(f"DELETE FROM {table} WHERE events = 0")


def _drop(events: Events, key: str, minimum: int, split: Split) -> int:
    """Drop each `key` below the minimum, and its events from the other counts. Returns how many."""
    counts, other, other_counts = _TABLES[key], _OTHER[key], _TABLES[_OTHER[key]]
    connection = events.connection
    connection.execute(
        f"CREATE OR REPLACE TABLE dropped AS SELECT {key} FROM {counts} "
        f"WHERE judged AND trained < {minimum}"
    )
    many = int(scalar(connection, "SELECT count(*) FROM dropped"))
    if many:
        connection.execute(f"INSERT INTO {_DROPPED[key]} FROM dropped")
        connection.execute(
            f"CREATE OR REPLACE TABLE {counts} AS FROM {counts} ANTI JOIN dropped USING ({key})"
        )
        events.lend("dropped")
        events.fetch(
            "lost",
            f"SELECT {other}, {split.tallies} FROM events SEMI JOIN dropped USING ({key}) "
            f"GROUP BY {other}",
        )
        rest = ", ".join(
            f"c.{name} - coalesce(l.{name}, 0) AS {name}"
            for name in ("events", "trained", "validated")
        )
        connection.execute(
            f"CREATE OR REPLACE TABLE {other_counts} AS SELECT c.{other}, {rest}, judged "
            f"FROM {other_counts} c LEFT JOIN lost l USING ({other})"
        )
        connection.execute("DROP TABLE lost")
    connection.execute("DROP TABLE dropped")
    return many
