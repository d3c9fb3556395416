"""Laying out a torch_dist checkpoint: archives one after another in a file, and what makes a directory of
such files a checkpoint.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.storage.archive import archive_around
from engine.storage.durable import fsync
from engine.storage.files import write_json
from engine.storage.metadata import METADATA_FILE, DistBytes, DistChunk, DistTensor, write_metadata
from engine.storage.reader import COMMON_FILE, CONFIG_FILE

_ALIGNMENT = 64
"""torch.save aligns data within its archive by this; archives start at multiples of it for that reason."""
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, kw_only=True)
class PlacedBox:
    """A box in its file: `before` and `behind` are the bytes around its data."""

    before: bytes
    behind: bytes
    tensor: DistTensor
    """The tensor that it is of, with this box alone."""


class FileLayout:
    """Where things lie in one file, in the order in which they are placed."""

    def __init__(self, name: str) -> None:
        self.name, self._end = name, 0

    def box(
        self,
        key: str,
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> PlacedBox:
        """A box at `offsets` of a tensor of `shape`, as an archive. Raises ModelError for a size that no
        memory could hold.
        """
        before, behind = archive_around(dtype, sizes)
        length = len(before) + math.prod(sizes) * dtype.itemsize + len(behind)
        padding, start = self._place(length)
        chunk = DistChunk(offsets=offsets, sizes=sizes, file=self.name, start=start, length=length)
        tensor = DistTensor(key=key, shape=shape, dtype=dtype, chunks=(chunk,))
        return PlacedBox(before=padding + before, behind=behind, tensor=tensor)

    def object(self, key: str, content: bytes) -> tuple[bytes, DistBytes]:
        """An object that torch.save made `content` of: the bytes to write, and its entry."""
        padding, start = self._place(len(content))
        return padding + content, DistBytes(key=key, file=self.name, start=start, length=len(content))

    def _place(self, length: int) -> tuple[bytes, int]:
        """Padding, and the position behind it, at which something of `length` bytes begins."""
        padding = bytes(-self._end % _ALIGNMENT)
        start = self._end + len(padding)
        self._end = start + length
        return padding, start


def merge_boxes(parts: Iterable[DistTensor]) -> list[DistTensor]:
    """One tensor a key, with the boxes of all its parts, which must fill it."""
    groups: dict[str, list[DistTensor]] = {}
    for part in parts:
        groups.setdefault(part.key, []).append(part)
    merged = []
    for key, group in groups.items():
        first = group[0]
        same = all((part.shape, part.dtype) == (first.shape, first.dtype) for part in group)
        assert same, f"{key} differs from other layers, or ranks"
        chunks = tuple(chunk for part in group for chunk in part.chunks)
        filled = sum(math.prod(chunk.sizes) for chunk in chunks)
        assert filled == math.prod(first.shape), (
            f"{key}: not all layers are there, or ranks: {filled} elements"
        )
        merged.append(replace(first, chunks=chunks))
    return merged


def write_frame(
    checkpoint_dir: Path, tensors: Sequence[DistTensor], objects: Sequence[DistBytes], common: Any
) -> None:
    """Write, durably, everything but the data. `metadata.json` comes last, for it is what Megatron knows a
    checkpoint by. OSError comes from the disk.
    """
    write_metadata(checkpoint_dir / METADATA_FILE, tensors, objects)
    fsync(checkpoint_dir / METADATA_FILE)
    save_durably(common, checkpoint_dir / COMMON_FILE)
    write_json(checkpoint_dir / CONFIG_FILE, _CONFIG)


def save_durably(value: Any, path: Path) -> int:
    """torch.save that waits for the disk. Returns the size of the file in bytes."""
    with open(path, "wb") as file:
        torch.save(value, file)
    fsync(path)
    return path.stat().st_size
