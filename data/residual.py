"""Events that a conversion's filters dropped, kept so that a later log can be appended exactly.

An event below the minimum today may be above it with tomorrow's events, and what repeats today may
not repeat once a late event lies between. Histories keep no input order, which decides among events
of one user and time; a dropped event therefore says how many of those stood before it.
"""

from pathlib import Path

import pyarrow.parquet as pq

from data.events import Events, Rows
from data.k_core import DROPPED_ITEMS, DROPPED_USERS
from data.log_query import event_columns, payload
from data.schema import COMPRESSION, RESIDUAL, residual_schema

RESIDUAL_FILE = f"{RESIDUAL}/part-00000.parquet"
ROW_GROUP_EVENTS = 1 << 20


def write_residual(folder: Path, events: Events, features: tuple[str, ...]) -> None:
    """Write RESIDUAL_FILE: all of `repeats`, and what k-core dropped of `events`."""
    columns = event_columns(features)
    for table in (DROPPED_USERS, DROPPED_ITEMS):
        events.lend(table)
    events.keep(
        "dropped_events",
        f"""SELECT {columns} FROM repeats
        UNION ALL SELECT {columns} FROM events SEMI JOIN {DROPPED_USERS} USING (user_id)
        UNION ALL SELECT {columns} FROM events SEMI JOIN {DROPPED_ITEMS} USING (item_id)
            ANTI JOIN {DROPPED_USERS} USING (user_id)""",
    )
    events.keep(
        "tied_events",
        f"SELECT {columns} FROM events SEMI JOIN dropped_events USING (user_id, time)",
    )
    query = f"""SELECT user_id, item_id, time, CAST(kept_before AS INTEGER) AS kept_before,
            CAST(dropped_before AS INTEGER) AS dropped_before{payload(features)}
        FROM (
            SELECT {columns}, kept, count(CASE WHEN kept THEN 1 END) OVER before AS kept_before,
                count(CASE WHEN NOT kept THEN 1 END) OVER before - 1 AS dropped_before
            FROM (
                SELECT {columns}, false AS kept FROM dropped_events UNION ALL
                SELECT {columns}, true AS kept FROM tied_events
                    ANTI JOIN {DROPPED_USERS} USING (user_id)
                    ANTI JOIN {DROPPED_ITEMS} USING (item_id)
            )
            WINDOW before AS (PARTITION BY user_id, time ORDER BY seq ROWS UNBOUNDED PRECEDING)
        )
        WHERE NOT kept ORDER BY user_id, time, seq"""
    total = events.count("dropped_events")
    _write(folder, events.rows(query), total, features)
    for table in ("dropped_events", "tied_events"):
        events.drop(table)


def _write(folder: Path, rows: Rows, total: int, features: tuple[str, ...]) -> None:
    """Write `total` rows, whose columns are those of `residual_schema`."""
    user, item, time, _, _, *kinds = rows.types
    schema = residual_schema(user, item, time, dict(zip(features, kinds, strict=True)))
    (folder / RESIDUAL).mkdir()
    options = {"compression": COMPRESSION, "write_page_checksum": True}
    with pq.ParquetWriter(folder / RESIDUAL_FILE, schema, **options) as writer:
        for left in range(total, 0, -ROW_GROUP_EVENTS):
            batch = rows.take(min(left, ROW_GROUP_EVENTS))
            writer.write_batch(batch.rename_columns(schema.names).cast(schema))
