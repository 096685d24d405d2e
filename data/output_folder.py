"""A command's output folder: whole or absent.

Everything is written into a hidden sibling, `.NAME.unfinished`, which is renamed at the end. What
a killed run left there is removed by the next run with the same output; a lock in the sibling
keeps two live runs apart.
"""

import errno
import fcntl
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import InputError

LOCK = "unfinished.lock"


@contextmanager
def new_folder(
    output: Path, ours: Collection[str], overwrite: bool | None = None
) -> Iterator[Path]:
    """Yield a folder to write in; it becomes `output` when the block ends without an exception.

    `ours` names every top-level entry that this command writes. With `overwrite`, an existing
    folder is replaced only if it holds nothing else; an empty folder is always replaced. None is
    for commands that have no such option.
    Raises InputError for an output that exists, cannot be written, or is being written by a run
    that is still alive.
    """
    output = output.absolute()
    unfinished = output.with_name(f".{output.name}.unfinished")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _recover(output, replaced)
        _check_free(output, ours, overwrite)
        _remove_leftover(unfinished, ours)
        unfinished.mkdir()
        lock = (unfinished / LOCK).open("w")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write output={output}: {reason}; name a writable place"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield unfinished
            (unfinished / LOCK).unlink()
            _swap(unfinished, output, replaced)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"the disk of {output} is full ({error.strerror}); free space or choose another"
                ) from error
            raise


def _check_free(output: Path, ours: Collection[str], overwrite: bool | None) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise InputError(f"output={output} exists and is not a plain folder; choose another name")
    entries = sorted(entry.name for entry in output.iterdir())
    if not entries:
        return
    foreign = [name for name in entries if name not in ours]
    if not overwrite:
        offer = ", or replace it with overwrite=true" if overwrite is False and not foreign else ""
        raise InputError(f"output={output} already exists; remove it or choose another name{offer}")
    if foreign:
        raise InputError(
            f"overwrite=true replaces only what this command wrote, but {output} holds "
            f"{foreign[0]!r}; remove the folder yourself or choose another name"
        )


def _remove_leftover(unfinished: Path, ours: Collection[str]) -> None:
    """Remove what a killed run left, unless its run is alive or the folder is not ours."""
    if not unfinished.exists():
        return
    if any(entry.name not in ours and entry.name != LOCK for entry in unfinished.iterdir()):
        raise InputError(f"{unfinished} is in the way and not an unfinished output; remove it")
    lock_path = unfinished / LOCK
    if lock_path.exists():
        with lock_path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another run is writing {unfinished}; wait for it or choose another output"
                ) from error
    shutil.rmtree(unfinished)


def _recover(output: Path, replaced: Path) -> None:
    """A run killed inside `_swap` left the old output aside: put it back, or drop it."""
    if not replaced.exists():
        return
    if output.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(output)


def _swap(unfinished: Path, output: Path, replaced: Path) -> None:
    if output.exists():
        output.rename(replaced)
    unfinished.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
