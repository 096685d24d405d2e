"""Events grouped by user, out of core: sort flat, then cut the sorted stream at user changes.

Needs the views `events` (data.logs) and `vocabulary(item_id, item)`, and gives each user's events
in time order, ties in input order. Events of items that the vocabulary lacks are left out. (A list
aggregate in the engine is ten times slower than the sort.)

What memory cannot hold is sorted a range of users at a time: a spilled event takes five times its
place in the table, and one more scan for the next users costs little.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from data.engine import one_row, quoted_path
from data.errors import InputError
from data.events import FEATURE_BYTES, READ_ROWS, Events, Rows
from data.k_core import USER_COUNTS
from data.log_query import payload
from data.schema import VOCABULARY
from data.split import Split

MOST_EVENTS = 2**31 - 1  # of a table: its lists have 32-bit offsets
KEY_BYTES = 32  # of an event in the sort: place, time, seq, item in 4 to 8 bytes each, padded
# Users of a shard are spread by this odd multiplier (2^32 over the golden ratio): any stretch of
# a shard, so any row group, then holds the same mix of long and short histories.
SPREAD = 2_654_435_769


def use_vocabulary(events: Events, folder: Path) -> None:
    """Create the view `vocabulary` from a data set's or a bundle's file, to group another log.

    Raises InputError when its item ids are of another kind than those of `events`.
    """
    path = folder / VOCABULARY
    if not path.exists():
        raise InputError(f"{path} does not exist; make a data set with tools.convert_logs")
    source = f"read_parquet({quoted_path(str(path))})"
    connection = events.connection
    connection.execute(f"CREATE VIEW vocabulary AS SELECT item_id, item FROM {source}")
    (known,) = connection.sql("SELECT item_id FROM vocabulary").types
    met = events.kind("item_id")
    if str(known) != met:
        raise InputError(f"item ids are {met} in the log but {known} in {path}; cast them")


def group_users(connection: duckdb.DuckDBPyConnection, shards: int, split: Split) -> None:
    """Create the table `users(user_id, events, n_train, n_validation, shard)` in stream order.

    From the users and events of USER_COUNTS (data.k_core). Shards are dealt by length rank, to and
    fro, so their event counts differ by less than the longest history.
    """
    connection.execute(
        f"CREATE TABLE ranked_users AS SELECT user_id, events, {split.sizes} FROM {USER_COUNTS} "
        "ORDER BY events DESC, user_id"
    )
    connection.execute(
        f"""CREATE TABLE users AS SELECT user_id, events, n_train, n_validation,
            (CASE WHEN (rowid // {shards}) % 2 = 0 THEN rowid % {shards}
             ELSE {shards} - 1 - rowid % {shards} END)::INTEGER AS shard
        FROM ranked_users ORDER BY shard, (rowid // {shards} * {SPREAD}) % 4294967296, rowid"""
    )
    connection.execute("DROP TABLE ranked_users")


def stream_users(
    events: Events, features: tuple[str, ...], group_events: int
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (shard, histories) in the order of `users`; `features` names f0, f1, ….

    A table holds whole users of one shard, at most `group_events` events or one longer user, with
    the columns of `data.schema.history_schema`. Raises InputError for one above MOST_EVENTS.
    """
    connection = events.connection
    rows = _sorted(events, features)
    users = connection.cursor().sql("FROM users ORDER BY rowid").to_arrow_reader(READ_ROWS)
    waiting: pa.Table = users.schema.empty_table()
    done = False
    while not done or waiting.num_rows:
        end = _group_end(waiting, group_events)
        if end == waiting.num_rows and not done:  # the group may go on in the next batch
            batch = next(users, None)
            done = batch is None
            if batch is not None:
                waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
            continue
        group, waiting = waiting.slice(0, end), waiting.slice(end)
        yield group["shard"][0].as_py(), _histories(group, rows, features)


def _sorted(events: Events, features: tuple[str, ...]) -> Rows:
    """item, time, f0, f1, … of the events of `users`, in their order, then by time and seq.

    Users of a range of places are about as many events as those of another: see SPREAD.
    """
    connection = events.connection
    connection.execute("CREATE VIEW places AS SELECT user_id, rowid::INTEGER AS place FROM users")
    for name in ("vocabulary", "places"):
        events.lend(name)
    users, total = one_row(connection, "SELECT count(*), sum(events)::BIGINT FROM users")
    sorts = events.sorts(total, KEY_BYTES + FEATURE_BYTES * len(features))
    # The item decides nothing behind seq, but a row that is all key is sorted in half the time.
    order = "place, time, seq" if features else "place, time, seq, item"
    edges = [users * number // sorts for number in range(sorts + 1)]
    return events.rows(
        *(
            f"""SELECT item, time{payload(features)} FROM events
            JOIN vocabulary USING (item_id)
            JOIN (SELECT user_id, place FROM places WHERE place >= {first} AND place < {end})
                USING (user_id)
            ORDER BY {order}"""
            for first, end in itertools.pairwise(edges)
        )
    )


def _group_end(users: pa.Table, group_events: int) -> int:
    """How many of the first users form the next table."""
    if not users.num_rows:
        return 0
    shard_U = users["shard"].to_numpy()
    total_U = np.cumsum(users["events"].to_numpy())
    same_shard = int(np.searchsorted(shard_U, shard_U[0], side="right"))
    within = max(1, int(np.searchsorted(total_U, group_events, side="right")))
    return min(same_shard, within)


def _histories(users: pa.Table, rows: Rows, features: tuple[str, ...]) -> pa.Table:
    length_U = users["events"].to_numpy()
    total = int(length_U.sum())
    if total > MOST_EVENTS:
        raise InputError(
            f"{total:,} events of {len(users)} user(s) from {users['user_id'][0]} on make a row "
            f"group above {MOST_EVENTS:,} events; use a smaller row_group_events, or drop a user "
            "with where"
        )
    offsets_U1 = pa.array(np.concatenate([[0], np.cumsum(length_U)]), pa.int32())
    flat = rows.take(total)
    lists = [pa.ListArray.from_arrays(offsets_U1, column) for column in flat.columns]
    columns = {
        "user_id": users["user_id"],
        "items": lists[0],
        "timestamps": lists[1],
        "n_train": users["n_train"],
        "n_validation": users["n_validation"],
    }
    return pa.table(columns | dict(zip(features, lists[2:], strict=True)))
