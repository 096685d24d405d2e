"""Arguments in, a plain config or one sentence out."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.command import CONFIGS, command, plain_config
from data.errors import InputError

ROOT = Path(__file__).parents[2]
NEEDED = {
    "train": ["data.path=D", "run_dir=R"],
    "convert": ["input=L", "output=D"],
    "score": ["bundle=B", "input=D", "output=S"],
    "benchmark": ["suite=ssd", "output=F"],
}


def config(name: str, *arguments: str) -> dict:
    return plain_config(name, [*NEEDED[name], *arguments])


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_values_groups_and_free_dicts() -> None:
    made = config("train", "+experiment=demo", "model=bidirectional", "+trainer.max_epochs=3")
    assert (made["trainer"]["max_epochs"], made["model"]["kind"]) == (3, "bidirectional")
    assert (
        config("train", "trainer={max_epochs: 4}", "experiment=null")["trainer"]["patience"] == 10
    )
    assert config("convert", "csv.types={a: VARCHAR}", "csv.types.b=DATE")["csv"]["types"] == {
        "a": "VARCHAR",
        "b": "DATE",
    }
    bounds = ["split=temporal", "split.validation_from=2", "split.test_from=3"]
    assert config("convert", *bounds)["split"]["test_from"] == 3
    assert config("convert", "csv.delimiter=null", "columns.features=[a,b]")["where"] is None
    assert config("benchmark")["run_dir"] == ""


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("train", "trainer.lerning_rate=1", r"did you mean trainer\.learning_rate\?"),
        ("train", "trainer={lerning_rate: 1}", r"did you mean trainer\.learning_rate\?"),
        ("train", "+trainer.zzz=1", r"trainer\.zzz is no option of trainer=default; there is"),
        (
            "train",
            "trainer.device.x=1",
            "trainer.device.x is no option; trainer.device is a single",
        ),
        ("train", "model=causel", "model=causel is unknown; model is one of bidirectional, causal"),
        ("train", "trainer=null", "trainer=null is unknown"),
        ("train", "trainer.max_epochs=1,2", r"several values.*trainer\.max_epochs=\[1,2\]"),
        ("train", "~trainer.patience", "would remove an option"),
        ("train", "model@x=causal", "model@x is no option"),
        ("train", "hydra.run.dir=x", r"hydra\.run\.dir is no option"),
        ("train", "seed", "write key=value"),
        ("train", "=3", "names no key"),
        ("train", "seed=${nope}", "cannot resolve a value"),
        ("train", "run_dir=", "run_dir is empty"),
        ("train", "data.path=' '", "data.path is empty"),
        ("convert", "input=", "input is empty"),
        ("convert", "output=null", "output is empty"),
        ("convert", "columns.user=null", "columns.user is empty"),
        ("convert", "+columns.usr=x", r"did you mean columns\.user\?"),
        ("convert", "columns={usr: x}", r"did you mean columns\.user\?"),
        ("convert", "csv=null", r"csv=null is a single value.*\(delimiter, types\)"),
        ("convert", "columns=null", "columns=null is a single value"),
        ("convert", "csv.types=foo", r"csv\.types=foo is a single value"),
        ("convert", "threads={}", "threads holds a single value"),
        (
            "convert",
            "csv.types=[1]",
            r"cannot compose .*csv\.types=\[1\]; give a value of",
        ),
        ("train", "seed=???", r"missing on the command line: seed=…$"),
        ("convert", "split.test_from=3", "split.test_from is no option of split=leave_one_out"),
        ("convert", "model=causal", "model is no option"),
        ("score", "+colums.user=foo", r"did you mean columns\.user\?"),
    ],
)
def test_what_is_no_option_is_one_sentence(name: str, argument: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        config(name, argument)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", ["event = 'buy'", 'a = "b"', "count(x) > 3", "/logs/day=*/x", "/ü", 'a = "\\"', "=\\"]
)
def test_the_advised_quotes_are_right(value: str) -> None:
    with pytest.raises(InputError, match="needs quotes inside quotes") as error:
        config("convert", f"where={value}")
    advice = str(error.value).split("inside quotes, ")[1]
    (argument,) = shlex.split(advice)
    assert config("convert", argument)["where"] == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[üser-188]", ["üser-188"]),
        ("[/a=1/x, 'b,=c',/d, 7]", ["/a=1/x", "b,=c", "/d", 7]),
        ('["ü,\\"",é]', ['ü,"', "é"]),
    ],
)
def test_the_advised_quotes_of_a_list_are_around_its_elements(value: str, expected: list) -> None:
    with pytest.raises(InputError, match="needs quotes inside quotes") as error:
        config("convert", f"columns.features={value}")
    (argument,) = shlex.split(str(error.value).split("inside quotes, ")[1])
    assert config("convert", argument)["columns"]["features"] == expected


def test_what_is_no_flag_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", "--verbose"])
    with pytest.raises(SystemExit) as ended:
        command("convert")(print)()
    assert ended.value.code == 1
    sentence = "error: --verbose is no flag; there are --help and --cfg job, else key=value\n"
    assert capsys.readouterr() == ("", sentence)


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: /x: .* access to it"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "error: /x: .*; name a shorter"),
        (OSError(errno.EIO, "Input/output error", "/x"), None),
        (PermissionError(errno.EACCES, "Permission denied"), None),
    ],
)
def test_a_path_that_cannot_be_used_ends_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: OSError,
    sentence: str | None,
) -> None:
    def main(options: dict) -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["convert", *NEEDED["convert"]])
    with pytest.raises(SystemExit if sentence else OSError) as ended:
        command("convert")(main)()
    if sentence is None:
        assert ended.value is raised, "with its traceback"
    else:
        assert re.match(sentence, capsys.readouterr().err)


def test_spaces_need_no_quotes_inside() -> None:
    assert config("convert", "where=rating is not null")["where"] == "rating is not null"


PROGRAM = """
from configs.command import command
from data.errors import InputError
@command("convert")
def main(config):
    raise {}
main()
"""


def test_exit_statuses() -> None:
    bad = run(PROGRAM.format("InputError('no')"), *NEEDED["convert"])
    assert (bad.returncode, bad.stderr) == (1, "error: no\n")
    stopped = run(PROGRAM.format("KeyboardInterrupt"), *NEEDED["convert"])
    assert (stopped.returncode, stopped.stderr) == (130, "interrupted\n")
    defect = run(PROGRAM.format("ValueError('ours')"), *NEEDED["convert"])
    assert defect.stderr.endswith("ValueError: ours\n")


@pytest.mark.parametrize("arguments", [["--help"], NEEDED["convert"]])
def test_output_that_nobody_reads_ends_the_command_in_silence(arguments: list[str]) -> None:
    program = PROGRAM.format("SystemExit(print('a line\\n' * 100_000))")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_a_defect() -> None:
    done = run(PROGRAM.format("BrokenPipeError(32, 'of a worker')"), *NEEDED["convert"])
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: [Errno 32] of a worker\n")


def test_help_and_composed_config() -> None:
    shown = run(PROGRAM.format("ValueError"), "--help")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith((CONFIGS / "convert.yaml").read_text().splitlines()[0])
    assert "min_user_events: 5" in shown.stdout
    composed = run(PROGRAM.format("ValueError"), "--cfg", "job", "min_user_events=7")
    assert "min_user_events: 7\n" in composed.stdout
    assert "input: ???" in composed.stdout
    other = run(PROGRAM.format("ValueError"), "--multirun", *NEEDED["convert"])
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert "--multirun is no flag" in other.stderr


def test_ctrl_c_in_a_query(tmp_path: Path) -> None:
    """The engine raises a RuntimeError of its own when a signal ends a query."""
    program = f"""
import signal
from pathlib import Path
from configs.command import command
from data.engine import open_engine
signal.signal(signal.SIGINT, signal.default_int_handler)
@command("convert")
def main(config):
    with open_engine(Path({str(tmp_path)!r}), "500MB") as connection:
        print("ready", flush=True)
        query = "SELECT range FROM range(10_000_000_000) WHERE range % 1_000_000 = 0"
        for _ in connection.sql(query).to_arrow_reader(100):
            pass
main()
"""
    command = [sys.executable, "-c", program, *NEEDED["convert"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
