"""The one exception for what a user can put right, and what its sentences share."""

from typing import Any


class InputError(Exception):
    """Bad input, said in one sentence that names the file or value, the limit and the fix.

    Every command prints it without a traceback and exits with status 1 (`configs.command`).
    Anything else that escapes a command is a defect of ours and keeps its traceback.
    """


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise InputError unless option `name` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value} must be a whole number, {least} or more")


def reason(error: BaseException) -> str:
    """An exception as a clause: the first line of what it says, or its kind where it is silent."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
