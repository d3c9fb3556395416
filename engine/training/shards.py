"""What a rank contributes to a checkpoint, and what it takes out of one, in Megatron's `torch_dist` format.

Megatron says which box of which tensor a rank holds (its ShardedTensors). Writing and reading these boxes is
done here and in engine.storage: without collectives, with hashes, and without unpickling anything but plain
data.
"""

import io
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor

from engine.errors import CheckpointError
from engine.storage.layout import FileLayout
from engine.storage.metadata import DistBytes, DistTensor
from engine.storage.reader import TorchDistReader
from engine.storage.writer import Span, StagedFile


@dataclass(frozen=True, kw_only=True)
class Part:
    """A box of a tensor, as this rank holds it."""

    key: str
    data: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, item: ShardedTensor) -> "Part":
        """What Megatron describes."""
        return cls(
            key=item.key,
            data=item.data,
            shape=tuple(item.global_shape),
            offsets=tuple(item.global_offset),
            sizes=box_sizes(item),
        )


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A rank's part of a checkpoint, on paper."""

    tensors: tuple[Part, ...]
    """Those that this rank writes: of copies on several ranks, only one does."""
    objects: tuple[ShardedObject, ...]
    common: dict[str, Any]
    """What is the same on every rank; rank 0 writes it."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.data.nbytes for tensor in self.tensors)

    def split(self, nbytes: int) -> list["Shards"]:
        """The tensors in groups of at most `nbytes`, one tensor at least; objects go with the last."""
        groups: list[list[Part]] = [[]]
        used = 0
        for tensor in self.tensors:
            if groups[-1] and used + tensor.data.nbytes > nbytes:
                groups.append([])
                used = 0
            groups[-1].append(tensor)
            used += tensor.data.nbytes
        parts = [replace(self, tensors=tuple(group), objects=()) for group in groups]
        return [*parts[:-1], replace(parts[-1], objects=self.objects)]


@dataclass(frozen=True, kw_only=True)
class StagedShards:
    """A rank's file, ready to be written, and its entries in `.metadata`."""

    file: StagedFile
    tensors: tuple[DistTensor, ...]
    """One box each."""
    objects: tuple[DistBytes, ...]


def split_state(state: dict[str, Any]) -> Shards:
    """`state` is a Megatron sharded state dict; it is taken apart."""
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    values = [value for value in nested_values(sharded) if is_main_replica(value.replica_id)]
    return Shards(
        tensors=tuple(Part.of(value) for value in values if isinstance(value, ShardedTensor)),
        objects=tuple(value for value in values if isinstance(value, ShardedObject)),
        common=common,
    )


def stage_shards(shards: Shards, path: Path, memory: mmap) -> StagedShards:
    """Copy the tensors into `memory`, of at least `shards.nbytes` bytes, and lay out the file that they
    become.
    """
    layout, used = FileLayout(path.name), 0
    parts: list[bytes | Span] = []
    tensors, objects = [], []
    for item in shards.tensors:
        data = item.data
        placed = layout.box(
            item.key, dtype=data.dtype, shape=item.shape, offsets=item.offsets, sizes=item.sizes
        )
        target = torch.frombuffer(memory, dtype=torch.uint8, count=data.nbytes, offset=used)
        target.view(data.dtype).view(data.shape).copy_(data, non_blocking=True)
        parts += [placed.before, Span(start=used, stop=used + data.nbytes), placed.behind]
        used += data.nbytes
        tensors.append(placed.tensor)
    for thing in shards.objects:
        content = io.BytesIO()
        torch.save([thing.data], content)  # a list, as Megatron stores an object
        written, entry = layout.object(thing.unique_key, content.getvalue())
        parts.append(written)
        objects.append(entry)
    if torch.cuda.is_available() and any(item.data.is_cuda for item in shards.tensors):
        torch.cuda.synchronize()
    file = StagedFile(path=path, parts=tuple(parts))
    return StagedShards(file=file, tensors=tuple(tensors), objects=tuple(objects))


def box_sizes(item: ShardedTensor) -> tuple[int, ...]:
    """Shape of a rank's box in the whole tensor, stacked dimensions included."""
    return (*(1 for _ in range(item.prepend_axis_num)), *item.local_shape)


def load_state(reader: TorchDistReader, wanted: dict[str, Any]) -> dict[str, Any]:
    """Fill a Megatron sharded state dict from a checkpoint that was written under any layout.

    Raises CheckpointError for what is missing or damaged. Of pickled parts only plain data are loaded.
    """
    wanted, local, factories = load_preprocess(wanted)
    sharded, _ = extract_sharded_base(wanted)
    state = reader.read_common()
    merge(state, local)
    merge(state, dict_list_map_outplace(lambda item: _fetch(reader, item), sharded))
    return apply_factory_merges(state, factories)


def _fetch(reader: TorchDistReader, item: ShardedTensor | ShardedObject) -> Any:
    if isinstance(item, ShardedObject):
        if item.key.endswith("._extra_state") and item.unique_key not in reader.objects:
            return item.data  # of Transformer Engine's modules, which the torch layers do not have
        (value,) = reader.read_object(item.unique_key)
        return value
    stored = reader.tensor(item.key)
    wanted, offsets = box_sizes(item), tuple(item.global_offset)
    if tuple(item.global_shape) != stored.shape and not item.allow_shape_mismatch:
        raise CheckpointError(
            f"{reader.directory}: {item.key} has shape {list(stored.shape)}, not {list(item.global_shape)}; "
            f"this is a checkpoint of another model"
        )
    # Padding of the vocabulary depends on the layout: what is not stored is zero.
    there = tuple(max(0, min(n, end - at)) for n, end, at in zip(wanted, stored.shape, offsets, strict=True))
    region = torch.zeros(wanted, dtype=stored.dtype)
    if there == wanted:
        reader.read_region(item.key, offsets, region)
    elif all(there):
        part = reader.read_region(item.key, offsets, torch.empty(there, dtype=stored.dtype))
        region[tuple(slice(0, n) for n in there)] = part
    result: Tensor = region.view(item.local_shape)
    if item.data is None:
        return result.to(item.dtype)
    item.data.detach().copy_(result)
    return item.data.detach()
