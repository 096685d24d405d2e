"""Every command's entry: Hydra's command line in, one sentence out when the user can fix it."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from data.errors import InputError

CONFIGS = Path(__file__).parent
# Hydra's own run folder and log handlers: under torchrun each rank would make its own, and a
# command's output goes where the command says.
NO_HYDRA_FILES = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
]


def command(config_name: str) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[], None]]:
    """Make `main(config)` a Hydra command with `configs/<config_name>.yaml`.

    `main` gets the composed and resolved config as plain dicts and lists, so that no module
    beyond this one knows Hydra. InputError becomes one line on stderr and exit status 1.
    """

    def decorate(main: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        def run(config: DictConfig) -> None:
            try:
                main(_plain(config))
            except InputError as error:
                _stop(str(error))

        entry = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)

        def start() -> None:
            _check_grammar(sys.argv[1:])
            sys.argv += NO_HYDRA_FILES
            entry(run)()

        return start

    return decorate


def _plain(config: DictConfig) -> dict[str, Any]:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError("missing on the command line: " + ", ".join(f"{key}=…" for key in missing))
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def _check_grammar(arguments: list[str]) -> None:
    """Hydra's own message for a value with `=`, `~` or parentheses is a parser's trace."""
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            parser.parse_override(argument)
        except (OverrideParseException, HydraException):
            key, _, value = argument.partition("=")
            _stop(
                f"cannot read the argument {argument!r}: a value with = ~ ( ) [ ] or spaces needs "
                f"quotes inside quotes, '{key}=\"{value}\"'"
            )


def _stop(sentence: str) -> None:
    # Where all ranks fail alike torchrun ends the others before they repeat rank 0's sentence.
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(2.0)
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(1)
