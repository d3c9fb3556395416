"""Laying out a torch_dist checkpoint that Megatron loads under any layout: which box lies where in which
file.

One box a Megatron tensor, or one of those stacked in it, so nothing depends on how many processes write.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from converters.mapping import Weight
from converters.mcore.places import Place, place_of
from converters.transfer import OutputFile, Piece, TensorData
from engine.storage.layout import FileLayout, PlacedBox, merge_boxes
from engine.storage.metadata import DistTensor, prepare_to_write

FILE_SIZE = 1_000_000_000
"""Bytes of tensor data in a file, about: files are what workers share, and what is kept when one is
interrupted.
"""


@dataclass(frozen=True, kw_only=True)
class DistPlan:
    """A checkpoint before it is written."""

    files: tuple[OutputFile, ...]
    tensors: tuple[DistTensor, ...]


@dataclass(frozen=True, kw_only=True)
class _Box:
    """A full Megatron tensor as the box of its key."""

    key: str
    shape: tuple[int, ...]
    """Shape of the key."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    data: TensorData


def plan_checkpoint(
    weights: Mapping[str, Weight],
    dtypes: Mapping[str, torch.dtype],
    *,
    stacked: bool = True,
    file_size: int = FILE_SIZE,
) -> DistPlan:
    """`dtypes` is by key of the checkpoint; `weights` in the order in which they are written; `stacked` says
    whether layers are.
    """
    prepare_to_write()
    places = {name: place_of(name, stacked=stacked) for name in weights}
    sizes = _StackSizes(
        layers=1 + max((place.layer for place in places.values() if place.layer is not None), default=0),
        experts=1 + max((place.expert for place in places.values() if place.expert is not None), default=0),
    )
    boxes = [_box(weight, dtypes[places[name].key], places[name], sizes) for name, weight in weights.items()]
    files: list[OutputFile] = []
    placed: list[PlacedBox] = []
    for number, group in enumerate(_fill(boxes, file_size)):
        file, parts = FileLayout(f"__0_{number}.distcp"), list[bytes | TensorData]()
        for box in group:
            placed.append(
                file.box(box.key, dtype=box.data.dtype, shape=box.shape, offsets=box.offsets, sizes=box.sizes)
            )
            parts += [placed[-1].before, box.data, placed[-1].behind]
        files.append(OutputFile(name=file.name, parts=tuple(parts)))
    tensors = merge_boxes(item.tensor for item in placed)
    return DistPlan(files=tuple(files), tensors=tuple(tensors))


@dataclass(frozen=True, kw_only=True)
class _StackSizes:
    """How many layers and experts are stacked."""

    layers: int
    experts: int

    def lead(self, place: Place) -> tuple[int, ...]:
        """The leading dimensions of a place's key."""
        axes = ((place.layer, self.layers), (place.expert, self.experts))
        return tuple(size for index, size in axes if index is not None)


def _box(weight: Weight, dtype: torch.dtype, place: Place, sizes: _StackSizes) -> _Box:
    data = _data(weight, dtype)
    own = (sum(piece.stop - piece.start for piece in data.pieces), *weight.shape[1:])
    return _Box(
        key=place.key,
        shape=(*sizes.lead(place), *own),
        offsets=(*place.lead, *(0 for _ in own)),
        sizes=(*(1 for _ in place.lead), *own),
        data=data,
    )


def _fill(boxes: Sequence[_Box], file_size: int) -> list[list[_Box]]:
    """Consecutive boxes in files of about equal size."""
    total = sum(box.data.nbytes for box in boxes)
    share = total / max(1, math.ceil(total / file_size))
    groups: list[list[_Box]] = [[]]
    used = 0
    for box in boxes:
        if groups[-1] and used >= share * len(groups):
            groups.append([])
        groups[-1].append(box)
        used += box.data.nbytes
    return groups


def _data(weight: Weight, dtype: torch.dtype) -> TensorData:
    pieces = tuple(
        Piece(name=rows.hf.name if rows.hf is not None else None, start=rows.start, stop=rows.stop)
        for rows in weight.rows()
    )
    return TensorData(pieces=pieces, dtype=dtype, row_elements=math.prod(weight.shape[1:]))
