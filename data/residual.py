"""Events that a conversion's filters dropped, kept so that a later log can be appended exactly.

An event below the minimum today may be above it with tomorrow's events, and what repeats today may
not repeat once a late event lies between. Histories keep no input order, which decides among events
of one user and time; a dropped event therefore says how many of those stood before it.
"""

from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from data.engine import quoted
from data.k_core import DROPPED_ITEMS, DROPPED_USERS
from data.schema import COMPRESSION, RESIDUAL, residual_schema

RESIDUAL_FILE = f"{RESIDUAL}/part-00000.parquet"
ROW_GROUP_EVENTS = 1 << 20


def write_residual(
    folder: Path, connection: duckdb.DuckDBPyConnection, features: tuple[str, ...]
) -> None:
    """Write RESIDUAL_FILE: all of `repeats`, and what k-core dropped of `events`."""
    payload = "".join(f", f{place}" for place in range(len(features)))
    named = "".join(f", f{place} AS {quoted(name)}" for place, name in enumerate(features))
    columns = f"seq, user_id, item_id, time{payload}"
    connection.execute(
        f"""CREATE TABLE dropped AS FROM repeats
        UNION ALL FROM events SEMI JOIN {DROPPED_USERS} USING (user_id)
        UNION ALL FROM events SEMI JOIN {DROPPED_ITEMS} USING (item_id)
            ANTI JOIN {DROPPED_USERS} USING (user_id)"""
    )
    query = f"""
        WITH tied AS MATERIALIZED (FROM events SEMI JOIN dropped USING (user_id, time))
        SELECT user_id, item_id, time AS timestamp, kept_before::INTEGER AS kept_before,
            dropped_before::INTEGER AS dropped_before{named}
        FROM (
            SELECT *, count(*) FILTER (kept) OVER before AS kept_before,
                count(*) FILTER (NOT kept) OVER before - 1 AS dropped_before
            FROM (
                SELECT {columns}, false AS kept FROM dropped UNION ALL
                SELECT {columns}, true AS kept FROM tied
                    ANTI JOIN {DROPPED_USERS} USING (user_id)
                    ANTI JOIN {DROPPED_ITEMS} USING (item_id)
            )
            WINDOW before AS (PARTITION BY user_id, time ORDER BY seq ROWS UNBOUNDED PRECEDING)
        )
        WHERE NOT kept ORDER BY user_id, time, seq"""
    reader = connection.sql(query).to_arrow_reader(ROW_GROUP_EVENTS)
    user, item, time = (
        reader.schema.field(name).type for name in ("user_id", "item_id", "timestamp")
    )
    schema = residual_schema(
        user, item, time, {name: reader.schema.field(name).type for name in features}
    )
    (folder / RESIDUAL).mkdir()
    options = {"compression": COMPRESSION, "write_page_checksum": True}
    with pq.ParquetWriter(folder / RESIDUAL_FILE, schema, **options) as writer:
        for batch in reader:
            writer.write_batch(batch.cast(schema))
    connection.execute("DROP TABLE dropped")
