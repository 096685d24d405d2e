"""Versions that do not belong together end in one sentence that names both and the fix."""

import logging
import subprocess
import sys

import pytest

from configs.environment import _not_of_fbgemms_table, require_matching, versions
from data.errors import InputError
from tests.conftest import ROOT
from tools import check_env
from trainer.distributed import quiet_libraries

GOOD = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}


def test_both_supported_pairs_match():
    require_matching(GOOD)
    require_matching({"torch": "2.11.0+cu130", "fbgemm-gpu": "1.6.0", "torchrec": "1.6.1"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "2.12.0"}, "torch 2.12.0 and fbgemm-gpu 1.8.0 do not belong together"),
        ({"torch": "2.12.0"}, "install fbgemm 1.7 or torch 2.13"),
        ({"torchrec": "1.7.0"}, "torchrec 1.7.0 needs fbgemm-gpu 1.7, found 1.8.0"),
        ({"torchrec": None}, "torchrec is not installed; `make install`"),
        ({"fbgemm-gpu-cpu": None}, "fbgemm-gpu is not installed"),
    ],
)
def test_a_mismatch_is_one_sentence(changes, message):
    found = {name: one for name, one in {**GOOD, **changes}.items() if one is not None}
    with pytest.raises(InputError) as error:
        require_matching(found)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_fbgemms_word_on_its_own_version_is_dropped_and_no_other(caplog):
    quiet_libraries()
    quiet_libraries()
    logging.warning("_fbgemm_torch_compat_table has no entry for 1.6.0 of FBGEMM")
    logging.warning("something else")
    assert [one.message for one in caplog.records] == ["something else"]
    assert logging.getLogger().filters.count(_not_of_fbgemms_table) == 1


def test_this_environment_is_known():
    assert {"python", "torch", "torchrec", "pyarrow"} <= set(versions())


def test_a_library_that_does_not_import_is_named(monkeypatch, capsys):
    monkeypatch.setattr(check_env, "IMPORTS", ("json", "no_such_library"))
    with pytest.raises(SystemExit) as ended:
        check_env.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "error: no_such_library does not import (No module named" in said
    assert said.endswith("run `make install`\n")


def test_check_env_as_a_user_runs_it():
    done = subprocess.run(
        [sys.executable, "-m", "tools.check_env"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "these versions work together" in done.stdout
    assert f"torch            {versions()['torch']}" in done.stdout
