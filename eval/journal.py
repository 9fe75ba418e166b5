"""Finished work as lines of JSON in a file, so that a run that is killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from decal.eval.paths import disk_errors
from decal.samplers.errors import DecalError


class Journal:
    """Records with a ``key`` each, appended to a file and read back from it. One process at a time.

    A record is there once `add` returns, also after a power failure. A last line that was cut short is dropped on opening.

    Attributes:
        records: by key; of those with one key the first.

    Args:
        path: the file; made if need be, and its folder too.

    Raises:
        DecalError: the file can't be read or written, or has a line that is no record.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer, which would try again on closing what a full disk has refused.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self.records.setdefault(record["key"], record)
            except (ValueError, TypeError, KeyError, RecursionError):
                raise DecalError(f"{self.path}:{number}: not a record of earlier work; remove the line or the file") from None

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records, all in one piece."""
        added = [dict(record) for record in records]
        left = memoryview("".join(json.dumps(record, allow_nan=False) + "\n" for record in added).encode())
        with disk_errors(self.path.parent):
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        for record in added:
            self.records.setdefault(record["key"], record)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes that ask for it out of it.

    Raises:
        DecalError: another process is in it, or it can't be made.
    """
    from filelock import FileLock, Timeout

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise DecalError(f"another process works in {folder}; wait for it or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def digest(*parts: Any) -> str:
    """A key made of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:32]
