"""Reading Megatron-Core's `torch_dist` checkpoints without Megatron, and without running anything in them.

On disk: `.metadata` says which box of which tensor lies where, `__<rank>_<n>.distcp` hold the boxes as
torch.save archives one after another, `metadata.json` names the format, `common.pt` holds what is neither a
tensor nor an object of its own.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.storage.archive import Box, load_object
from engine.storage.files import inside
from engine.storage.metadata import METADATA_FILE, DistBytes, DistChunk, DistTensor, read_metadata

CONFIG_FILE = "metadata.json"
COMMON_FILE = "common.pt"

_BLOCK = 16_000_000
"""Bytes read at once where only columns of a box are wanted."""


def is_dist_checkpoint(directory: str | Path) -> bool:
    """Whether the directory looks like a torch_dist checkpoint, be it a damaged one."""
    return any((Path(directory) / name).exists() for name in (METADATA_FILE, CONFIG_FILE))


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """The boxes of a tensor by their index in its first `lead` dimensions."""

    lead: int
    boxes: dict[tuple[int, ...], list[DistChunk]]


class TorchDistReader:
    """The tensors and objects of a checkpoint, saved under any layout.

    Raises CheckpointError when a file of the format is missing or damaged. `tensors` has every tensor by its
    key, those of the optimizer too; `objects` what is no tensor.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.directory = Path(checkpoint_dir)
        if not self.directory.is_dir():
            raise CheckpointError(f"checkpoint {checkpoint_dir} does not exist")
        for name in (CONFIG_FILE, METADATA_FILE):
            if not (self.directory / name).is_file():
                raise CheckpointError(
                    f"checkpoint {checkpoint_dir} is incomplete: it has no {name}{self._hint()}"
                )
        metadata = read_metadata(self.directory / METADATA_FILE)
        self.tensors, self.objects = metadata.tensors, metadata.objects
        self._boxes: dict[tuple[str, DistChunk], Box] = {}
        self._stacks: dict[str, _Stack] = {}

    def _hint(self) -> str:
        """The user may have passed the directory of a run, whose checkpoints are one level down."""
        inner = [path.parent.name for path in self.directory.glob(f"*/{METADATA_FILE}")]
        newest = max(
            inner, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)], default=None
        )
        return f"; did you mean {self.directory / newest}?" if newest is not None else ""

    def tensor(self, key: str) -> DistTensor:
        """Raises CheckpointError if it is not there."""
        if key not in self.tensors:
            raise CheckpointError(
                f"{self.directory}: {key} is missing; this is a checkpoint of another model"
            )
        return self.tensors[key]

    def read_region(
        self, key: str, offsets: Sequence[int], out: Tensor, *, named: str | None = None
    ) -> Tensor:
        """Fill a contiguous tensor on the CPU with the region of a stored tensor that begins at `offsets` and
        has as many dimensions and the shape of `out`; returns it. Errors speak of it as `named`.

        Only what lies in the region is read, but for whole rows of boxes that were cut along columns. Raises
        CheckpointError for a missing box, a truncated file or a box that is not what `.metadata` says.
        """
        tensor, sizes = self.tensor(key), tuple(out.shape)
        assert len(offsets) == len(sizes) == len(tensor.shape), f"{key}: {offsets} {sizes} {tensor.shape}"
        parts = []
        for chunk in self._chunks_at(tensor, offsets, sizes):
            first = tuple(map(max, offsets, chunk.offsets))
            ends = (
                (o + s, c + n) for o, s, c, n in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            )
            last = tuple(map(min, ends))
            if all(a < b for a, b in zip(first, last, strict=True)):
                parts.append((chunk, first, last))
        self._check_complete(named or key, sizes, [(first, last) for _, first, last in parts])
        for chunk, first, last in parts:
            place = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offsets, strict=True))
            starts = tuple(a - c for a, c in zip(first, chunk.offsets, strict=True))
            self._read_box(tensor, chunk, starts, out[place])
        return out

    def _chunks_at(
        self, tensor: DistTensor, offsets: Sequence[int], sizes: Sequence[int]
    ) -> Sequence[DistChunk]:
        """The boxes among which those of a region are: of a tensor that stacks layers or experts, those of
        the one that the region lies in. A model may have ten thousand, and as many regions to be read.
        """
        if tensor.key not in self._stacks:
            # Axes of which every box has one index.
            widths = (max(chunk.sizes[axis] for chunk in tensor.chunks) for axis in range(len(tensor.shape)))
            lead = (
                sum(1 for _ in itertools.takewhile(lambda width: width <= 1, widths)) if tensor.chunks else 0
            )
            boxes: dict[tuple[int, ...], list[DistChunk]] = {}
            for chunk in tensor.chunks:
                boxes.setdefault(chunk.offsets[:lead], []).append(chunk)
            self._stacks[tensor.key] = _Stack(lead=lead, boxes=boxes)
        stack = self._stacks[tensor.key]
        if any(size != 1 for size in sizes[: stack.lead]):
            return tensor.chunks
        return stack.boxes.get(tuple(offsets[: stack.lead]), [])

    def _check_complete(
        self, key: str, sizes: tuple[int, ...], parts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> None:
        """The parts must tile the region: as many elements as it has, and no two of them overlapping."""
        filled = sum(math.prod(b - a for a, b in zip(*part, strict=True)) for part in parts)
        overlap = any(
            all(a < d and c < b for a, b, c, d in zip(*first, *second, strict=True))
            for first, second in itertools.combinations(parts, 2)
        )
        if filled != math.prod(sizes) or overlap:
            raise CheckpointError(
                f"{self.directory}: {key} is incomplete, its parts hold {filled} of {math.prod(sizes)} "
                f"elements; use another checkpoint"
            )

    def _read_box(self, tensor: DistTensor, chunk: DistChunk, starts: tuple[int, ...], out: Tensor) -> None:
        """The part of a box that begins at `starts` into `out`, which may be a view."""
        box = self._boxes.setdefault((tensor.key, chunk), Box(self.directory, tensor, chunk))
        if not chunk.sizes:
            box.read_rows(0, 1, out.view(1))
            return
        # Dimensions of which one index is wanted only say where the rows of the next one begin.
        lead = next((d for d, size in enumerate(out.shape[:-1]) if size > 1), max(0, out.dim() - 1))
        begin = 0
        for start, size in zip(starts[: lead + 1], chunk.sizes[: lead + 1], strict=True):
            begin = begin * size + start
        rows, columns = out.shape[lead], chunk.sizes[lead + 1 :]
        target = out.reshape(out.shape[lead:]) if out.is_contiguous() else out[(0,) * lead]
        if tuple(out.shape[lead + 1 :]) == columns and target.is_contiguous():
            box.read_rows(begin, begin + rows, target)
            return
        step = max(1, _BLOCK // max(1, math.prod(columns) * tensor.dtype.itemsize))
        narrow = tuple(
            slice(a, a + n) for a, n in zip(starts[lead + 1 :], out.shape[lead + 1 :], strict=True)
        )
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = torch.empty((count, *columns), dtype=tensor.dtype)
            box.read_rows(begin + first, begin + first + count, part)
            target[first : first + count] = part[(slice(None), *narrow)]

    def read_object(self, key: str) -> Any:
        """An object of the checkpoint: what torch.load with `weights_only` makes of it. Raises
        CheckpointError.
        """
        if key not in self.objects:
            raise CheckpointError(f"{self.directory}: {key} is missing; use another checkpoint")
        item = self.objects[key]
        path = inside(self.directory, item.file, error=CheckpointError)
        return load_object(path, item.start, item.length, what=key)

    def read_common(self) -> Any:
        """The content of `common.pt`, by torch.load with `weights_only`. Raises CheckpointError."""
        path = inside(self.directory, COMMON_FILE, error=CheckpointError)
        return load_object(path, 0, path.stat().st_size, what=COMMON_FILE)


def _ends(offsets: Sequence[int], sizes: Sequence[int]) -> list[int]:
    return [offset + size for offset, size in zip(offsets, sizes, strict=True)]


def check_files(reader: TorchDistReader) -> None:
    """Raise CheckpointError if a file of the checkpoint is missing or cut off, whatever it holds."""
    ends: dict[str, int] = {}
    places: list[DistChunk | DistBytes] = list(reader.objects.values())
    places += [chunk for tensor in reader.tensors.values() for chunk in tensor.chunks]
    for place in places:
        ends[place.file] = max(ends.get(place.file, 0), place.start + place.length)
    for file, end in ends.items():
        path = inside(reader.directory, file, error=CheckpointError)
        size = path.stat().st_size
        if size < end:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes of {end}; use another checkpoint"
            )
