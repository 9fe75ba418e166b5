"""Where decal keeps what it may delete again, and how it writes there without leaving halves behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from decal.samplers.errors import DecalError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "ENOENT", "EISDIR", "EINVAL", "ENAMETOOLONG", "ELOOP")
}


def cache_dir() -> Path:
    """The cache folder: the environment variable DECAL_CACHE, or else the user's cache folder of the system.

    The folder need not exist yet, and this function does not create it.
    """
    chosen = os.environ.get("DECAL_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("decal", appauthor=False))


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written, met while writing in `folder`, into a DecalError."""
    try:
        yield
    except OSError as error:
        elsewhere = " or set DECAL_CACHE to another folder" if folder.is_relative_to(cache_dir()) else ""
        if error.errno in _FULL:
            raise DecalError(f"disk full while writing in {folder}; free some space{elsewhere}") from error
        if error.errno in _FORBIDDEN:
            reason = error.strerror or type(error).__name__
            raise DecalError(f"cannot write in {folder}: {reason}; make it writable{elsewhere}") from error
        raise


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise DecalError unless the disk that holds `folder`, which must exist, has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DecalError(
            f"disk full: {purpose} needs {needed / 1e6:.0f} MB in {folder} and {free / 1e6:.0f} MB are free; "
            "free some space or set DECAL_CACHE"
        )


@contextlib.contextmanager
def scratch_dir(parent: Path) -> Iterator[Path]:
    """A fresh folder in `parent` (created if need be), removed at the end whatever happens, an interrupt included.

    Raises DecalError if `parent` cannot be written.
    """
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A fresh folder to fill, renamed to `path` if the block ends without an exception, else removed.

    If `path` is there by then, another process was quicker: its folder stays and this one is dropped.
    Raises DecalError if the parent of `path` cannot be written or the disk is full.
    """
    with scratch_dir(path.parent) as scratch, disk_errors(path.parent):
        # mkdtemp's own folder is readable by its owner only; the finished one follows the user's umask
        fresh = scratch / path.name
        fresh.mkdir()
        yield fresh
        try:
            os.replace(fresh, path)
        except OSError:
            if not path.is_dir():
                raise


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` so that a reader sees the old content or the new, never a part.

    The parent folder is created if need be. Raises DecalError if it cannot be written or the disk is full.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    with scratch_dir(path.parent) as scratch, disk_errors(path.parent):
        fresh = scratch / path.name
        fresh.write_bytes(content)
        os.replace(fresh, path)


def write_files(folder: Path, files: Mapping[str, Callable[[], bytes]]) -> list[Path]:
    """Make each of ``files``, by name, and write it to ``folder`` as `atomic_write` does."""
    for name, make in files.items():
        atomic_write(folder / name, make())
    return [folder / name for name in files]
