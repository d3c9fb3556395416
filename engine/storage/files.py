"""Files as every reader and writer of weights handles them: safe names, byte ranges, durability, room on the
disk.
"""

import errno
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import OutputError, UserError
from engine.storage.durable import fsync

_MAX_SHOWN = 200


def shown(name: object) -> str:
    """A name from a file as one short printable line, fit for an error message."""
    text = str(name)
    return text if text.isprintable() and len(text) <= _MAX_SHOWN else repr(text)[:_MAX_SHOWN]


def and_more(names: Sequence[str]) -> str:
    """ " (and 3 more)" for the names behind the first; empty when there are none."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def inside(directory: Path, name: str, *, error: type[UserError]) -> Path:
    """The path of the regular file `name` in `directory`; raises `error` if it escapes, is missing or is no
    file.

    A symbolic link must stay inside the directory. The one exception is the Hugging Face hub cache, whose
    `snapshots/<revision>/<file>` are links to `blobs/<hash>` of the same repository.
    """
    # What cannot be printed (NUL, a line break, a lone surrogate) no file system or error message should get.
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise error(
            f"{directory}: {shown(name)} is not a plain file name; files outside the directory are not read"
        )
    path, base = directory / name, directory.resolve()
    if not os.path.exists(path):  # unlike Path.exists, no error where the name is too long
        raise error(f"{shown(path)} does not exist; the directory is incomplete, copy or download it again")
    target = path.resolve()
    blobs = base.parent.parent / "blobs"
    in_cache = base.parent.name == "snapshots" and target.is_relative_to(blobs.resolve())
    if not (target.is_relative_to(base) or in_cache):
        raise error(
            f"{shown(path)} is a link to {shown(target)}, outside its directory; replace it with the file"
        )
    if not target.is_file():  # a named pipe would block the open for ever
        raise error(f"{shown(path)} is not a regular file")
    return path


def read_into(path: Path, start: int, out: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of a file from `start` on.

    Read, not mapped: a file that is cut off meanwhile is an error and not a crash, and memory in use is the
    tensor's. Raises OSError, also if the file is shorter.
    """
    view = bytes_of(out)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], start + done)
            if count == 0:
                raise OSError(errno.EIO, f"it ends at {start + done} bytes, {len(view) - done} too early")
            done += count
    finally:
        os.close(descriptor)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class FileRange(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of their own, for readers of archives."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed with this object
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        count = os.preadv(
            self._file.fileno(), [memoryview(buffer).cast("B")[:wanted]], self._start + self._position
        )
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, durably."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(path)


def check_free_space(directory: Path, needed: int, *, what: str = "the output", remedy: str = "") -> None:
    """Raise OutputError when the file system has less than `needed` bytes left: better now than after an
    hour. `what` needs them; `remedy` is what else the user can do.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OutputError(
            f"disk full: {directory} has {free / 1e9:.3f} GB free, {what} needs {needed / 1e9:.3f} GB; "
            f"make room{remedy}"
        )
