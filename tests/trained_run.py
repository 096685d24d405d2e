"""One tiny trained run and its bundle, made once a test session for all tests that need them."""

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from data.schema import RESERVED_ROWS, Manifest
from tests.data.datasets import random_histories, write_dataset
from trainer.export import ExportConfig, export

ROOT = Path(__file__).resolve().parent.parent
ITEMS, USERS = 50, 70
LOG_RULES = {  # data.log_query.LogRules as the converter leaves them, without importing DuckDB
    "user": "user_id",
    "item": "item_id",
    "time": "timestamp",
    "features": [],
    "where": None,
    "deduplicate": "none",
    "csv_delimiter": None,
    "csv_types": {},
    "ties": "input_order",
}


@dataclass(frozen=True)
class Trained:
    """data: the data set; run: the run's folder; bundle: its export with fp32 rows."""

    data: Path
    run: Path
    bundle: Path
    histories: list[list[int]]


@functools.cache
def trained() -> Trained:
    """Train two epochs on random histories in a process of its own, about ten seconds."""
    folder = Path(tempfile.mkdtemp(prefix="ssd4rec-trained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    histories = random_histories(USERS, 30, ITEMS, seed=3)
    data = write_dataset(
        folder / "data", histories, row_group_users=30, table_rows=RESERVED_ROWS + ITEMS
    )
    manifest = Manifest.read(data)
    replace(manifest, options={"log": LOG_RULES}).write(data)
    options = [
        f"data.path={data}",
        f"run_dir={folder / 'run'}",
        "data.batch_tokens=256",
        "model.width=16",
        "model.state=4",
        "model.head=8",
        "trainer.device=cpu",
        "trainer.max_epochs=2",
        "trainer.learning_rate=0.01",
        "trainer.warmup_steps=0",
        "trainer.log_every_steps=2",
        "embedding.optimizer=rowwise_adagrad",
        "embedding.learning_rate=0.1",
    ]
    run_command("trainer/main.py", *options)
    bundle = folder / "bundle"
    export(ExportConfig(checkpoint=str(folder / "run"), output=str(bundle)))
    return Trained(data, folder / "run", bundle, histories)


def run_command(*arguments: str, fails: bool = False) -> str:
    """Run `python …` at the project's root; its output, or the error line when it should fail."""
    module = ["-m"] if not arguments[0].endswith(".py") else []
    done = subprocess.run(
        [sys.executable, *module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == int(fails), done.stderr[-2000:]
    if fails:
        (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
        assert "Traceback" not in done.stderr
        return line
    return done.stdout
