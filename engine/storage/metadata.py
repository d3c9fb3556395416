"""The `.metadata` file of a torch_dist checkpoint: read without running anything in it, written as Megatron
expects.

The file is a pickle. The reader admits only the classes of the format and replaces every one by an inert
record, so that a pickle can build records, containers, numbers and strings, and nothing else.
"""

import importlib
import io
import pickle
import pickletools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.storage.files import shown

METADATA_FILE = ".metadata"

_MAX_METADATA = 1_000_000_000
"""Bytes; that of 100,000 boxes has 14 million."""
_DCP = "torch.distributed.checkpoint."
_CLASSES: Mapping[str, tuple[str, ...]] = {
    _DCP + "metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    _DCP + "filesystem": ("_StorageInfo",),
    _DCP + "planner": ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    # StorageMeta.checkpoint_id, where the checkpoint was saved to a Path
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
}


@dataclass(frozen=True, kw_only=True)
class DistChunk:
    """A box of a tensor, saved by one rank: `offsets` and `sizes` in elements, one per dimension of the
    tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    """Bytes from the start of `file` to the torch.save archive."""
    length: int
    """Bytes of the archive."""


@dataclass(frozen=True, kw_only=True)
class DistTensor:
    """A tensor of the checkpoint under its global shape."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[DistChunk, ...]


@dataclass(frozen=True, kw_only=True)
class DistBytes:
    """An object of the checkpoint that is no tensor: a torch.save archive in a file."""

    key: str
    file: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class DistMetadata:
    """What a checkpoint holds, by key."""

    tensors: dict[str, DistTensor]
    objects: dict[str, DistBytes]


class _Record:
    """Stands in for a class of the format: keeps the state that the pickle gives it and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _Record
        if name in _CLASSES.get(module, ()):
            return type(name, (_Record,), {})
        raise CheckpointError(f"it names {shown(module)}.{shown(name)}, which has no place in a checkpoint")


def check_pickle(content: bytes) -> None:
    """Raise ValueError for a pickle that numbers its objects, or counts its bytes, beyond its own size: five
    bytes of it can make Python's unpickler reserve 64 GB.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError(f"object {argument} in a pickle of {len(content)} bytes")


def read_metadata(path: Path) -> DistMetadata:
    """Every tensor and object of the checkpoint by key.

    Raises CheckpointError if the file is unreadable, inconsistent, or holds anything but the format's
    classes.
    """
    try:
        if path.stat().st_size > _MAX_METADATA:
            raise CheckpointError(f"it has more than {_MAX_METADATA} bytes")
        content = path.read_bytes()
        check_pickle(content)
        return _contents(_Unpickler(io.BytesIO(content)).load())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; do not use this checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {shown(error)}); use another checkpoint"
        ) from error


def _contents(root: Any) -> DistMetadata:
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    objects: dict[str, Any] = {}
    for index, place in root.storage_data.items():
        if getattr(index, "offset", None) is not None:
            places[index.fqn, index.offset] = place
        else:  # objects have none
            objects[index.fqn] = place
    found = DistMetadata(tensors={}, objects={})
    for key, entry in root.state_dict_metadata.items():
        kind = type(entry).__name__
        if kind == "TensorStorageMetadata":
            found.tensors[_text(key)] = _tensor(key, entry, places)
        elif kind == "BytesStorageMetadata":
            if key not in objects:
                raise CheckpointError(f"the object {shown(key)} is in no file")
            start, length = _sizes((objects[key].offset, objects[key].length), 2)
            file = _text(objects[key].relative_path)
            found.objects[_text(key)] = DistBytes(key=key, file=file, start=start, length=length)
    return found


def _tensor(key: str, entry: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> DistTensor:
    dtype = entry.properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{shown(key)} has no dtype")
    shape = _sizes(entry.size, len(entry.size))
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = _sizes(chunk.offsets, len(shape)), _sizes(chunk.sizes, len(shape))
        if any(first + size > whole for first, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(f"{shown(key)} has a chunk at {offsets} outside its shape {shape}")
        place = places.get((key, offsets))
        if place is None:
            raise CheckpointError(f"the chunk of {shown(key)} at {offsets} is in no file")
        if place.__dict__.get("transform_descriptors"):
            raise CheckpointError(f"{shown(key)} is stored compressed, which is not supported")
        start, length = _sizes((place.offset, place.length), 2)
        file = _text(place.relative_path)
        chunks.append(DistChunk(offsets=offsets, sizes=sizes, file=file, start=start, length=length))
    return DistTensor(key=key, shape=shape, dtype=dtype, chunks=tuple(chunks))


def _sizes(value: Any, count: int) -> tuple[int, ...]:
    if (
        not isinstance(value, tuple)
        or len(value) != count
        or any(type(item) is not int or not 0 <= item < 2**63 for item in value)
    ):
        raise CheckpointError(f"{shown(value)} is not a list of {count} sizes")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{shown(value)} is not a name")
    return value


def prepare_to_write() -> None:
    """Import on another thread what `write_metadata` needs: it takes a second, which passes while the data
    are written.
    """
    names = ("torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.metadata")
    # No daemon: a command that ends early waits for it, instead of cutting an import short, with noise.
    threading.Thread(target=lambda: [importlib.import_module(name) for name in names]).start()


def write_metadata(path: Path, tensors: Sequence[DistTensor], objects: Sequence[DistBytes] = ()) -> None:
    """Write `.metadata` for plain contiguous tensors and for objects. OSError comes from the disk."""
    # Imported here: reading needs none of it, and it adds a second to the start of every command.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    size: Callable[[Sequence[int]], torch.Size] = torch.Size
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for tensor in tensors:
        entries[tensor.key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.dtype),
            size=size(tensor.shape),
            chunks=[
                ChunkStorageMetadata(offsets=size(c.offsets), sizes=size(c.sizes)) for c in tensor.chunks
            ],
        )
        for chunk in tensor.chunks:
            index = MetadataIndex(fqn=tensor.key, offset=chunk.offsets)
            places[index] = _StorageInfo(relative_path=chunk.file, offset=chunk.start, length=chunk.length)
    for item in objects:
        entries[item.key] = BytesStorageMetadata()
        places[MetadataIndex(fqn=item.key)] = _StorageInfo(
            relative_path=item.file, offset=item.start, length=item.length
        )
    metadata = Metadata(
        state_dict_metadata=entries, storage_data=places, storage_meta=StorageMeta(), version="1.0.0"
    )
    with open(path, "wb") as file:
        pickle.dump(metadata, file)
