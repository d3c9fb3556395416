"""Writing that is whole and on the disk, with Python's standard library alone: the process that writes
checkpoints imports nothing else.
"""

import errno
import os
from pathlib import Path
from typing import Protocol


class _Sink(Protocol):
    def write(self, data: memoryview, /) -> int | None:
        """Write some of `data`; how many bytes."""


def fsync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: _Sink, data: memoryview) -> None:
    """Write all of `data` to an unbuffered file, which takes as much at once as it likes."""
    done = 0
    while done < len(data):
        done += file.write(data[done:]) or 0


def write_whole(path: Path, data: bytes) -> None:
    """Write a file durably, under its name only when it is whole. OSError comes from the disk."""
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
