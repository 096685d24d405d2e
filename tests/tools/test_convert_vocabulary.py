"""Converting with an existing vocabulary: old rows stay, new items are appended and counted."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.schema import MANIFEST, RESERVED_ROWS, VOCABULARY
from data.vocabulary import Vocabulary
from tests.tools.conversion_cases import check, digest, run, some_events, write
from tests.tools.reference_conversion import reference

MINIMA = {"min_user_events": 3, "min_item_events": 3}


def items_of(folder: Path) -> list[Any]:
    return Vocabulary.read(folder).item_ids.to_pylist()


@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize("bounds", [None, (18, 24)])
def test_old_rows_stay_and_new_items_are_appended(
    tmp_path: Path, kind: type, bounds: tuple[int, int] | None
) -> None:
    split = None
    if bounds:
        split = {"kind": "temporal", "validation_from": bounds[0], "test_from": bounds[1]}
    before, after = some_events(1, 300, kind), some_events(2, 500, kind)
    run(write(tmp_path / "before.parquet", before), tmp_path / "old", split, **MINIMA)
    known = items_of(tmp_path / "old")
    after = [event for event in after if event["item"] not in known[2:5]]
    log = write(tmp_path / "after.parquet", after)
    made = run(log, tmp_path / "new", split, vocabulary=tmp_path / "old", **MINIMA)

    expected = reference(after, 3, 3, bounds=bounds, known=known)
    check(tmp_path / "new", expected)
    items = items_of(tmp_path / "new")
    assert items[: len(known)] == known
    counts = made.manifest.counts
    assert counts["items_new"] == len(items) - len(known) > 0
    unseen = set(known) - {event["item"] for event in after}
    assert counts["items_unseen"] == len(unseen) > 0
    assert made.manifest.table_rows == RESERVED_ROWS + len(items)
    assert {item for item, count in expected["vocabulary"] if count == 0} >= unseen

    run(log, tmp_path / "again", split, vocabulary=tmp_path / "old" / VOCABULARY, **MINIMA)
    assert digest(tmp_path / "again") == digest(tmp_path / "new")


def test_the_own_vocabulary_changes_nothing_but_the_counts(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", some_events(1, 300))
    first = run(log, tmp_path / "a", **MINIMA).manifest
    second = run(log, tmp_path / "b", vocabulary=tmp_path / "a", **MINIMA).manifest
    assert (second.vocabulary, second.histories) == (first.vocabulary, first.histories)
    assert second.counts == first.counts | {"items_new": 0, "items_unseen": 0}
    assert second.options["vocabulary_sha256"] == first.vocabulary.sha256
    assert first.options["vocabulary_sha256"] is None


def test_a_data_set_is_replaced_with_its_own_vocabulary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(write(tmp_path / "1.parquet", some_events(1, 300)), out)
    known = items_of(out)
    log = write(tmp_path / "2.parquet", some_events(2, 300))
    run(log, out, vocabulary=out, overwrite=True)
    assert items_of(out)[: len(known)] == known


@pytest.fixture
def old(tmp_path: Path) -> Path:
    run(write(tmp_path / "old.parquet", some_events(1, 100)), tmp_path / "old")
    return tmp_path / "old"


def refused(tmp_path: Path, vocabulary: Path, message: str, kind: type = int, **more: Any) -> None:
    log = write(tmp_path / "log.parquet", some_events(2, 100, kind))
    with pytest.raises(InputError, match=message):
        run(log, tmp_path / "out", vocabulary=vocabulary, **more)
    assert not (tmp_path / "out").exists()


def test_vocabularies_that_cannot_be_used(tmp_path: Path, old: Path) -> None:
    refused(tmp_path, tmp_path / "none", "none does not exist")
    refused(tmp_path, tmp_path, "has no manifest.json")
    refused(tmp_path, old, "item ids are VARCHAR in the log but BIGINT in .*vocabulary", str)
    refused(tmp_path, tmp_path / "old.parquet", "is no readable vocabulary .*item")
    refused(tmp_path, old, r"leave vocabulary=.*old out", append=old)

    def rewritten(name: str, ids: list[int | None], rows: list[int]) -> Path:
        path = tmp_path / name
        pq.write_table(pa.table({"item_id": ids, "item": rows, "count": [0] * len(rows)}), path)
        return path

    refused(tmp_path, rewritten("a.parquet", [5, 6], [8, 10]), "does not count rows from 8")
    refused(tmp_path, rewritten("b.parquet", [5, 6], [9, 8]), "does not count rows from 8")
    refused(tmp_path, rewritten("c.parquet", [5, 5], [8, 9]), "null or repeated item_id")
    refused(tmp_path, rewritten("d.parquet", [5, None], [8, 9]), "null or repeated item_id")

    manifest = old / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema_version": 1', '"schema_version": 7'))
    refused(tmp_path, old, "schema version 7, this program reads 1")
    manifest.write_text(text)
    content = (old / VOCABULARY).read_bytes()
    (old / VOCABULARY).write_bytes(content[:-9] + b"x" + content[-8:])
    refused(tmp_path, old, r"vocabulary.parquet is damaged, its hash is not the manifest's")
