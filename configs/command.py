"""Every command's entry: `key=value` arguments in, one sentence out when the user can fix it.

The config is composed with Hydra's compose API, not `hydra.main`: Hydra's own messages are several
lines long and its advice (`+key=value`) adds keys that nobody reads. So the options of a command
are exactly those of its YAML file, with or without Hydra's `+` in front, and what Hydra can do
besides (sweeps, removing keys, its own run folder) is refused. Two flags are ours: `--help` prints
the YAML file's header and the composed config, `--cfg job` the composed config alone.
"""

import difflib
import errno
import os
import re
import select
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import InputError

CONFIGS = Path(__file__).parent
ELEMENT = r"""(?:\s*"(?:[^"\\]|\\.)*"\s*|\s*'(?:[^'\\]|\\.)*'\s*|[^,"'\[\]{}]+)"""
LIST = re.compile(rf"\[{ELEMENT}(?:,{ELEMENT})*\]")  # of single values
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
UNREAD = 141  # of one whose output nobody reads any more (`| head`): a shell's for SIGPIPE
PATH_ERRORS = {  # what a path alone can be wrong with, wherever it is used, and the fix
    errno.EACCES: "give this user access to it, or name another",
    errno.ENAMETOOLONG: "name a shorter one",
}


def command(config_name: str) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[], None]]:
    """Make `main(config)` a command with the options of `configs/<config_name>.yaml`.

    `main` gets the composed and resolved config as plain dicts and lists, so that no module
    beyond this one knows Hydra. InputError becomes one line on stderr and exit status 1, as does
    a path of PATH_ERRORS; Ctrl-C the line "interrupted" and exit status 130. Where nobody reads
    stdout any more it ends in silence, with exit status 141.
    """

    def decorate(main: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        def start() -> None:
            try:
                flag, arguments = _flag(sys.argv[1:])
                if flag == "--help":
                    print(_header(config_name))
                if flag:
                    print(OmegaConf.to_yaml(_compose(config_name, arguments)[0]), end="")
                else:
                    main(plain_config(config_name, arguments))
                sys.stdout.flush()
            except BrokenPipeError:
                if not _stdout_is_unread():
                    raise
                # What is left to print would fail once more at exit (docs.python.org, SIGPIPE).
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(UNREAD) from None
            except InputError as error:
                _stop(f"error: {error}", 1)
            except OSError as error:
                fix = PATH_ERRORS.get(error.errno or 0)
                if fix is None or error.filename is None:
                    raise
                _stop(f"error: {error.filename}: {error.strerror}; {fix}", 1)
            except KeyboardInterrupt:
                _stop("interrupted", INTERRUPTED)

        return start

    return decorate


def plain_config(config_name: str, arguments: list[str]) -> dict[str, Any]:
    """The config of `configs/<config_name>.yaml` with `arguments`, as plain dicts and lists.

    Raises InputError for arguments that are not `key=value`, keys that the YAML file lacks, groups
    and their choices that do not exist, keys without a value, and a value where keys should be.
    """
    config, default = _compose(config_name, arguments)
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            keys = ", ".join(f"{key}=…" for key in missing)
            raise InputError(f"missing on the command line: {keys}")
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise InputError(f"cannot resolve a value with ${{…}}: {_first_line(error)}") from error
    _check_values(plain, default)
    return plain


def _compose(config_name: str, arguments: list[str]) -> tuple[DictConfig, dict[str, Any]]:
    """The config, and the defaults under the chosen groups: the options that there are."""
    overrides = [_parse(argument) for argument in arguments]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            _, choices = _defaults(config_name, [])
            groups = [_choice(one, choices) for one in overrides if _chooses(one, choices)]
            groups = [choice for choice in groups if choice]
            default, choices = _defaults(config_name, groups)
            values = [one for one in overrides if not _chooses(one, choices)]
            for override in values:
                key = str(override.get_key_element()).lstrip("+")
                for inner in _keys_within(key, override.value()):
                    _check_key(inner, default, choices)
            # ++ sets a key whether it is there or not: a free dict such as csv.types gets new ones.
            forced = ["++" + str(override.input_line).lstrip("+") for override in values]
            return compose(config_name, groups + forced), default
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(
            f"cannot compose the config: {_first_line(error)}; give a value of the kind that "
            "--cfg job shows for the key"
        ) from error


def _defaults(config_name: str, groups: list[str]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The config without values from the command line, and each group's choice."""
    config = compose(config_name, groups, return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    del plain["hydra"]
    return plain, choices


def _parse(argument: str) -> Override:
    key, equals, value = argument.partition("=")
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        if not equals:
            raise InputError(f"cannot read the argument {argument!r}: write key=value") from error
        raise InputError(
            f"cannot read the argument {argument!r}: a value with = ~ ( ) < > or anything else "
            "than ASCII letters, digits, spaces and / - + . $ % * @ ? | : \\ _ needs quotes inside "
            f"quotes, {_in_quotes(key, value)}"
        ) from error
    if override.is_delete():
        raise InputError(f"{argument} would remove an option; give it another value instead")
    if not override.key_or_group:
        raise InputError(f"the argument {argument!r} names no key; write key=value")
    if override.is_sweep_override():
        raise InputError(
            f"{argument} gives several values, and a command takes one; a list is {key}=[{value}], "
            f"and one value with a comma is {_in_quotes(key, value)}"
        )
    return override


def _in_quotes(key: str, value: str) -> str:
    """The argument as a shell takes it, for Hydra its value quoted, or the elements of a list."""
    if LIST.fullmatch(value):
        elements = [one.strip() for one in re.findall(ELEMENT, value[1:-1])]
        value = f"[{','.join(one if _is_readable(one) else _quoted(one) for one in elements)}]"
    else:
        value = _quoted(value)
    return shlex.quote(f"{key}={value}")


def _is_readable(value: str) -> bool:
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def _quoted(value: str) -> str:
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value)
    return f'"{escaped}"'


def _chooses(override: Override, choices: dict[str, str | None]) -> bool:
    """Whether it picks a file of a group (`model=causal`) rather than setting keys."""
    is_group = override.key_or_group in choices and override.package is None
    return is_group and not isinstance(override.value(), dict)


def _choice(override: Override, choices: dict[str, str | None]) -> str:
    group, value = override.key_or_group, override.value()
    if value is None and choices[group] is None:
        return ""  # as it is by default
    files = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    if value not in files:
        raise InputError(
            f"{group}={_shown(value)} is unknown; {group} is one of {', '.join(files)}"
        )
    return f"{group}={value}"


def _keys_within(key: str, value: Any) -> Iterator[str]:
    """`key`, and the keys that a dict as its value sets."""
    yield key
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _keys_within(f"{key}.{name}", inner)


def _check_key(key: str, default: dict[str, Any], choices: dict[str, str | None]) -> None:
    """Raise InputError unless `default` has the dotted key, or it lies in a free dict."""
    node: Any = default
    above: list[str] = []
    for part in key.split("."):
        name = ".".join(above)
        if above and node == {}:
            return
        if not isinstance(node, dict):
            raise InputError(f"{key} is no option; {name} is a single value")
        if part not in node:
            chosen = f" of {name}={choices[name]}" if choices.get(name) else ""
            siblings = ", ".join(".".join([*above, one]) for one in node)
            close = difflib.get_close_matches(key, _leaves(default), n=1, cutoff=0.7)
            hint = f"did you mean {close[0]}?" if close else f"there is {siblings}"
            raise InputError(f"{key} is no option{chosen}; {hint}")
        node = node[part]
        above.append(part)


def _leaves(node: dict[str, Any]) -> list[str]:
    keys = [key for name, value in node.items() for key in _keys_within(name, value)]
    return [key for key in keys if "." in key or not isinstance(node[key], dict)]


def _check_values(given: Any, default: Any, key: str = "") -> None:
    """Raise InputError where keys became a single value or the reverse, and where text is empty."""
    if isinstance(default, dict):
        if not isinstance(given, dict):
            names = f" ({', '.join(default)})" if default else ""
            raise InputError(
                f"{key}={_shown(given)} is a single value, but {key} holds keys{names}; write "
                f"{key}.KEY=VALUE"
            )
        for name in default:
            _check_values(given[name], default[name], f"{key}.{name}" if key else name)
    elif isinstance(given, dict):
        raise InputError(f"{key} holds a single value, and keys were given for it")
    elif isinstance(default, str) and default and (given is None or not str(given).strip()):
        raise InputError(f"{key} is empty; give it a value, {key}=…")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _flag(arguments: list[str]) -> tuple[str, list[str]]:
    """Our one flag, if any, and the arguments without it."""
    flags = [one for one in arguments if one.startswith("-")]
    if not flags:
        return "", arguments
    rest = [one for one in arguments if one not in flags]
    if flags[0] in ("--help", "-h"):
        return "--help", rest
    if flags[0] in ("--cfg", "-c") and rest[:1] == ["job"]:
        return "--cfg", rest[1:]
    raise InputError(f"{flags[0]} is no flag; there are --help and --cfg job, else key=value")


def _header(config_name: str) -> str:
    lines = (CONFIGS / f"{config_name}.yaml").read_text().splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line)
    return "\n".join([*header, f"#\n# The options, explained in configs/{config_name}.yaml:\n"])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _stdout_is_unread() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return bool(watch.poll(0))


def _stop(sentence: str, status: int) -> None:
    # Where all ranks fail alike torchrun ends the others before they repeat rank 0's sentence.
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(2.0)
    print(sentence, file=sys.stderr)
    raise SystemExit(status)
