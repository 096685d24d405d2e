"""Suite `scoring`: batch scoring from Parquet to Parquet, and its stages one by one.

The whole is `tools.score_histories`' own function on a random bundle and ML-1M-like histories, by
the bundle's model and by the trainer's kernels: wall clock from the first history read to the last
file written, without opening the bundle. Stages run alone; reading and writing on one core each, as
the tool does them in threads. Beyond the largest stage a whole is waiting.

Legend: T tokens, B users of a batch, U users, K = k.
"""

import io
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.bundle import Bundle
from data.bundle_manifest import MODEL, BundleManifest, encoder_hash, sealed
from data.item_filter import ItemFilter
from data.reader import HistoryDataset
from data.schema import RESERVED_ROWS, VOCABULARY
from data.score_output import ScoreFolder
from data.scoring import Answer, Batch, batches, score_batches, units_of
from modules.kernel_scorer import KernelScorer
from modules.ssd import sequence_of_tokens
from tools.benchmarks import layer
from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import write_data_set, write_first_groups
from tools.benchmarks.measure import Floor, Times
from tools.benchmarks.passes import new_encoder
from tools.score_histories import (
    KERNEL_BATCH_TOKENS,
    TORCHSCRIPT,
    ScoreConfig,
    describe_waits,
    score,
)
from trainer.config import ModelConfig
from trainer.export import write_rows
from trainer.model_files import scripted

K = 100
BLOCK_BYTES = 1 << 28  # of a rows file, as trainer.export cuts them
GROUP_USERS = 6_000  # of a row group: a million events, as tools.convert_logs cuts them
LINE = 96  # characters of a finding
UNITS = 8  # of a stage that is timed alone


def run(bench: Bench) -> None:
    items = bench.size(1_000_000, 20_000, 2_000)
    users = bench.size(60_000 if bench.quick else 300_000, 1_800, 300)
    group_users, groups = bench.size(GROUP_USERS, 300, 100), bench.size(3, 2, 1)
    model = bench.model(kind="causal")
    with tempfile.TemporaryDirectory(prefix="ssd4rec-benchmark-") as scratch:
        place = Path(scratch)
        many = write_data_set(place / "many", users, items, seed=1, group_users=group_users)
        few = write_first_groups(many, place / "few", groups)
        bundle = write_bundle(place / "bundle", many, model, items)
        precision = "bf16" if bench.precision == "bf16" else "fp32"  # scores know no tf32
        for kernels, data in ((TORCHSCRIPT, few), (precision, many)):
            with bench.case(kernels):
                _whole(bench, bundle, data, place / kernels, kernels, model, items)
        with bench.case("stages"):
            _stages(bench, bundle, many, place, precision, model, items)


def write_bundle(folder: Path, data: Path, model: ModelConfig, items: int) -> Path:
    """A bundle of random weights and fp32 rows for the data set's items. Returns the folder."""
    folder.mkdir()
    encoder = new_encoder(model, torch.device("cpu")).eval()
    rows_VD = torch.randn(RESERVED_ROWS + items, model.width) * 0.02
    (folder / MODEL).write_bytes(scripted(encoder))
    parts = write_rows(folder, rows_VD.split(BLOCK_BYTES // (4 * model.width)), "fp32")
    (folder / VOCABULARY).write_bytes((data / VOCABULARY).read_bytes())
    nothing: dict[str, Any] = {}
    BundleManifest(
        files=[sealed(folder, path) for path in (folder / MODEL, *parts, folder / VOCABULARY)],
        rows="fp32",
        table_rows=len(rows_VD),
        model=asdict(model),
        data={"options": {}},
        checkpoint=nothing,
        protocol=nothing,
        parity=nothing,
        versions={},
        encoder_sha256=encoder_hash(asdict(model), encoder.state_dict()),
    ).write(folder)
    return folder


def _whole(
    bench: Bench,
    bundle: Path,
    data: Path,
    output: Path,
    kernels: str,
    model: ModelConfig,
    items: int,
) -> None:
    said = io.StringIO()
    with redirect_stdout(said):
        summary = score(
            ScoreConfig(
                bundle=str(bundle),
                input=str(data),
                output=str(output),
                k=K,
                device=bench.device.type,
                kernels=kernels,
                min_agreement=0.0,  # of random weights: what the agreement is, is shown
            )
        )
    assert summary is not None
    users, before = summary["users_scored"], summary["seconds_to_start"]
    milliseconds = 1e3 * (summary["seconds"] - before)
    precision = "fp32" if kernels == TORCHSCRIPT else kernels
    floor = encode_floor(model, users, summary["events"], precision)
    floor = _sum(floor, top_floor(model, users, items, precision))
    name = f"Parquet to Parquet, kernels={kernels}"
    bench.keep(name, Times.of([milliseconds]), work=users, unit="user", floor=floor)
    waited = describe_waits(summary["seconds_waiting"])
    bench.find(f"{users:,} users, after {before:.1f} s of starting; waited {waited}")
    for line in textwrap.wrap(said.getvalue(), LINE):
        bench.find(line)


def _stages(
    bench: Bench,
    bundle_path: Path,
    data: Path,
    place: Path,
    precision: str,
    model: ModelConfig,
    items: int,
) -> None:
    dataset = HistoryDataset(data)
    units = units_of(dataset, None)[:UNITS]
    users = sum(unit.users for unit in units)
    tokens = bench.size(KERNEL_BATCH_TOKENS, 16_384, 4_096)
    read, work = _clock(lambda: list(batches(dataset, units, "all", ItemFilter(), tokens)))
    each = [1e3 * read / users]
    bench.keep("read and cut batches, one core", Times.of([read]), work=users, unit="user")
    bundle = Bundle.open(bundle_path, bench.device, hashes=False)
    config = bundle.manifest.model
    scorer = KernelScorer(bundle.model, config, bench.device, precision)
    batch = work[0]
    each += _device_stages(bench, scorer, batch, precision, model, items)

    def launch(one: Batch) -> Callable[[], Answer]:
        return scorer.launch(one.items_T, one.offsets_B1, K, True)

    some = list(score_batches(work, launch, in_flight=0))
    folder = ScoreFolder(place / "stages", {}, "grouped")
    folder.begin(is_main=True)

    def write() -> None:
        for one in some:
            folder.write(one.users.unit.name, one.table(bundle.vocabulary, K))

    written, _ = _clock(write)
    each.append(1e3 * written / users)
    bench.keep("raw ids, Parquet, disk, one core", Times.of([written]), work=users, unit="user")
    names = ("read", "encode", "top", "write")
    shares = ", ".join(f"{name} {us:.2f}" for name, us in zip(names, each, strict=True))
    bench.find(f"us a user and stage, alone: {shares}")
    if scorer.rescored:
        bench.find(f"{scorer.rescored} users were ranked twice, without a proof")


def _device_stages(
    bench: Bench,
    scorer: KernelScorer,
    batch: Batch,
    precision: str,
    model: ModelConfig,
    items: int,
) -> list[float]:
    """Encoding and ranking one batch on the device; microseconds a user of each."""
    users, tokens = len(batch), len(batch.items_T)
    items_T, offsets_B1 = batch.items_T.to(bench.device), batch.offsets_B1.to(bench.device)
    h_BD = scorer.hidden(items_T, offsets_B1)
    users_N, items_N = sequence_of_tokens(offsets_B1, tokens), items_T.long()
    encode = bench.record(
        f"look up, encode {tokens:,} tokens",
        lambda: scorer.hidden(items_T, offsets_B1),
        work=users,
        unit="user",
        floor=encode_floor(model, users, tokens, precision),
    )
    rank = bench.record(
        f"top {K} of {items:,} items",
        lambda: scorer.catalogue.top(h_BD, K, items_N, users_N),
        work=users,
        unit="user",
        floor=top_floor(model, users, items, precision),
    )
    return [1e3 * row.median_ms / users for row in (encode, rank)]


def encode_floor(model: ModelConfig, users: int, tokens: int, precision: str) -> Floor:
    """Forward of all layers, the last one read at the last positions; fp32 rows looked up."""
    reads = [*[None] * (model.layers - 1), users]
    flops = sum(layer.floor(model, tokens, one, precision).flops / 3 for one in reads)
    return Floor(4 * model.width * (tokens + users), flops, precision)


def top_floor(model: ModelConfig, users: int, items: int, precision: str) -> Floor:
    """The product of all pairs; the table read once in fp16, answers written."""
    product = 2.0 * users * items * model.width
    return Floor(2.0 * items * model.width + 12.0 * users * K, product, precision)


def _sum(a: Floor, b: Floor) -> Floor:
    return Floor(a.bytes + b.bytes, a.flops + b.flops, a.precision)


def _clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of a call and its answer."""
    started = time.perf_counter()
    answer = call()
    return 1e3 * (time.perf_counter() - started), answer
