"""Megatron-Core's `torch_dist` checkpoints without Megatron and without a process group.

On disk: `.metadata` says which box of which tensor lies where, `__<rank>_<n>.distcp` hold the boxes as
torch.save archives one after another, `metadata.json` names the format, `common.pt` holds what is no tensor
(never read here). The layers of a decoder are stacked: `decoder.layers.3.mlp.linear_fc1.weight` is row 3 of
the key `decoder.layers.mlp.linear_fc1.weight` with global shape [layers, ...]. fc1 is [gate; up] whatever the
tensor parallelism was. Keys of the optimizer contain `optimizer.`; only `embedding.`, `decoder.` and
`output_layer.` keys are the model.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from converters.dist_metadata import METADATA_FILE, DistChunk, DistTensor, read_metadata, write_metadata
from converters.files import and_more, fsync, inside, map_bytes, shown, write_json
from converters.mapping import Vocabulary, Weight
from engine.errors import CheckpointError

CONFIG_FILE = "metadata.json"
COMMON_FILE = "common.pt"
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
DEFAULT_FILE_SIZE = 5_000_000_000

_LAYER = re.compile(r"(.*\bdecoder\.layers)\.(\d+)\.(.+)")
_ALIGNMENT = 64
"""torch.save aligns tensor data within its archive by this; archives start at multiples of it for the same
reason.
"""


@dataclass(frozen=True, kw_only=True)
class StackedKey:
    """A key of the checkpoint and, for a decoder layer's tensor, the row of it."""

    key: str
    layer: int | None


def stacked_key(name: str) -> StackedKey:
    """`decoder.layers.3.x` -> key `decoder.layers.x`, layer 3. Other names are their own key."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return StackedKey(key=name, layer=None)
    return StackedKey(key=f"{match[1]}.{match[3]}", layer=int(match[2]))


def is_dist_checkpoint(directory: str | Path) -> bool:
    """Whether the directory looks like a torch_dist checkpoint, be it a damaged one."""
    return any((Path(directory) / name).exists() for name in (METADATA_FILE, CONFIG_FILE))


class DistReader:
    """The tensors of a torch_dist checkpoint, saved under any layout.

    Raises CheckpointError when a file of the format is missing or damaged. `tensors` has every tensor by its
    key, those of the optimizer too.
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
        self.tensors = read_metadata(self.directory / METADATA_FILE)

    def _hint(self) -> str:
        """The user may have passed the directory of a run, whose checkpoints are one level down."""
        inner = sorted(path.parent.name for path in self.directory.glob(f"*/{METADATA_FILE}"))
        return f"; did you mean {self.directory / inner[-1]}?" if inner else ""

    def locate(self, name: str) -> tuple[DistTensor, int | None]:
        """The stored tensor of a canonical name, and the layer's row if it is stacked. Raises
        CheckpointError.
        """
        if name in self.tensors:  # layers that differ from one another are saved one by one
            return self.tensors[name], None
        stacked = stacked_key(name)
        tensor = self.tensors.get(stacked.key)
        if tensor is None:
            raise CheckpointError(
                f"{self.directory}: weight {name} is missing; this is a checkpoint of another model"
            )
        if stacked.layer is not None and (not tensor.shape or stacked.layer >= tensor.shape[0]):
            raise CheckpointError(
                f"{self.directory}: {stacked.key} has shape {list(tensor.shape)}, so no layer "
                f"{stacked.layer}; this is a checkpoint of another model"
            )
        return tensor, stacked.layer

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor of a canonical name, vocabulary padding included."""
        tensor, layer = self.locate(name)
        return tensor.shape if layer is None else tensor.shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a canonical name."""
        return self.locate(name)[0].dtype

    def has(self, name: str) -> bool:
        """Whether the canonical name is stored."""
        try:
            self.locate(name)
        except CheckpointError:
            return False
        return True

    def fits(self, name: str, weight: Weight) -> bool:
        """Whether the stored tensor has the weight's full shape; a vocabulary may be padded. Raises if it is
        missing.
        """
        shape, wanted = self.shape(name), tuple(weight.shape)
        if isinstance(weight, Vocabulary):
            return shape[1:] == wanted[1:] and shape[0] >= wanted[0]
        return shape == wanted

    def check_shape(self, name: str, weight: Weight) -> None:
        """Raise CheckpointError unless the stored tensor is there and fits the weight."""
        if not self.fits(name, weight):
            raise CheckpointError(
                f"{self.directory}: weight {name} has shape {list(self.shape(name))}, "
                f"the model's config.json asks for {list(weight.shape)}"
            )

    def read(self, name: str, weight: Weight) -> Tensor:
        """The full tensor of a canonical name in its stored dtype, without vocabulary padding.

        Reads the boxes of that layer only. Raises CheckpointError for a missing box, a truncated file or a
        shape that is not the weight's.
        """
        self.check_shape(name, weight)
        tensor, layer = self.locate(name)
        chunks = [
            c for c in tensor.chunks if layer is None or c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]
        ]
        lead = 0 if layer is None else 1
        self._check_complete(tensor, name, chunks, lead)
        shape, rows = tensor.shape[lead:], weight.shape[0]
        full: Tensor | None = None
        for chunk in chunks:
            part = self._load(tensor, chunk)
            if layer is not None:
                part = part[layer - chunk.offsets[0]]
            if part.shape == shape:
                return part[:rows]
            if full is None:
                full = torch.empty(shape, dtype=tensor.dtype)
            box = zip(chunk.offsets[lead:], chunk.sizes[lead:], strict=True)
            full[tuple(slice(start, start + size) for start, size in box)] = part
        assert full is not None
        return full[:rows]

    def _check_complete(self, tensor: DistTensor, name: str, chunks: Sequence[DistChunk], lead: int) -> None:
        """The boxes must tile the tensor: as many elements as it has, and no two of them overlapping."""
        boxes = [(chunk.offsets[lead:], chunk.sizes[lead:]) for chunk in chunks]
        filled = sum(math.prod(sizes) for _, sizes in boxes)
        overlap = any(
            all(a < b + m and b < a + n for a, n, b, m in zip(*first, *second, strict=True))
            for first, second in itertools.combinations(boxes, 2)
        )
        if filled != math.prod(tensor.shape[lead:]) or overlap:
            raise CheckpointError(
                f"{self.directory}: {name} is incomplete, its parts hold {filled} of "
                f"{math.prod(tensor.shape[lead:])} elements; use another checkpoint"
            )

    def _load(self, tensor: DistTensor, chunk: DistChunk) -> Tensor:
        """One box. Not a view of the file: archives start at any byte, which leaves the data unaligned."""
        path = inside(self.directory, chunk.file, error=CheckpointError)
        if chunk.start + chunk.length > path.stat().st_size:
            raise CheckpointError(f"{path} is truncated inside {shown(tensor.key)}; use another checkpoint")
        try:
            window = io.BufferedReader(_Window(map_bytes(path, chunk.start, chunk.length)))
            part = torch.load(window, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # damaged archives raise RuntimeError, UnpicklingError, EOFError, ValueError, ...
            raise CheckpointError(
                f"{path} is damaged at {shown(tensor.key)}; use another checkpoint"
            ) from error
        if not isinstance(part, Tensor) or tuple(part.shape) != chunk.sizes or part.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {shown(tensor.key)} at {chunk.offsets} is not what .metadata says of it"
            )
        return part


class _Window(io.RawIOBase):
    """Bytes in memory as a file, without the copy that BytesIO makes."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._position = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def surplus_names(
    reader: DistReader, weights: Mapping[str, Weight], *, prefixes: tuple[str, ...] = MODEL_PREFIXES
) -> list[str]:
    """Tensors of the checkpoint's model that the map does not have, layers of stacked keys by their index."""
    wanted = {stacked_key(name).key for name in weights} | set(weights)
    layers = {place.layer for place in map(stacked_key, weights) if place.layer is not None}
    names = []
    for key, tensor in reader.tensors.items():
        if not key.startswith(prefixes) or "._extra_state" in key:
            continue
        if key not in wanted:
            names.append(key)
        elif key not in weights:  # stacked
            head, _, tail = key.partition("decoder.layers.")
            names += [f"{head}decoder.layers.{i}.{tail}" for i in range(tensor.shape[0]) if i not in layers]
    return names


def check_checkpoint(
    reader: DistReader, weights: Mapping[str, Weight], *, prefixes: tuple[str, ...] = MODEL_PREFIXES
) -> None:
    """Raise CheckpointError unless the keys of the checkpoint that start with `prefixes` are exactly the map,
    in names and shapes.
    """
    for name, weight in weights.items():
        reader.check_shape(name, weight)
    if surplus := surplus_names(reader, weights, prefixes=prefixes):
        raise CheckpointError(
            f"{reader.directory}: weight {shown(surplus[0])} has no place in the model{and_more(surplus)}; "
            f"this is a checkpoint of another model"
        )


class DistWriter:
    """Writes a torch_dist checkpoint that Megatron loads under any layout, one full tensor at a time.

    Use as a context manager; leaving it writes `.metadata`, `common.pt` and `metadata.json` (last, for it
    makes the directory a checkpoint) and makes everything durable. OSError comes from the disk.
    """

    def __init__(
        self, checkpoint_dir: str | Path, *, num_layers: int, max_file_size: int = DEFAULT_FILE_SIZE
    ) -> None:
        self._directory, self._num_layers, self._max_file_size = (
            Path(checkpoint_dir),
            num_layers,
            max_file_size,
        )
        self._tensors: dict[str, DistTensor] = {}
        self._files = 0
        self._file: BufferedWriter | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the full Megatron tensor of a canonical name, vocabulary padding included."""
        stacked = stacked_key(name)
        data = tensor.detach().cpu().contiguous()
        shape: tuple[int, ...] = tuple(data.shape)
        offsets = (0,) * data.dim()
        if stacked.layer is not None:
            assert stacked.layer < self._num_layers, f"{name}: the model has {self._num_layers} layers"
            data, offsets, shape = data[None], (stacked.layer, *offsets), (self._num_layers, *shape)
        known = self._tensors.get(stacked.key)
        if known is not None:
            assert (known.shape, known.dtype) == (shape, data.dtype), f"{name} differs from other layers"
            assert offsets not in [chunk.offsets for chunk in known.chunks], f"{name} is written twice"
        chunk = self._write(data, offsets)
        self._tensors[stacked.key] = DistTensor(
            key=stacked.key,
            shape=shape,
            dtype=data.dtype,
            chunks=(*(known.chunks if known else ()), chunk),
        )

    def _write(self, data: Tensor, offsets: tuple[int, ...]) -> DistChunk:
        if data.untyped_storage().nbytes() != data.numel() * data.itemsize:
            data = data.clone()  # torch.save would write all of the storage behind a view
        file = self._open()
        file.write(bytes(-file.tell() % _ALIGNMENT))
        start = file.tell()
        _save(data, file)
        return DistChunk(
            offsets=offsets,
            sizes=tuple(data.shape),
            file=Path(file.name).name,
            start=start,
            length=file.tell() - start,
        )

    def _open(self) -> BufferedWriter:
        if self._file is not None and self._file.tell() >= self._max_file_size:
            self._close_file()
        if self._file is None:
            self._file = open(self._directory / f"__0_{self._files}.distcp", "wb")  # noqa: SIM115  kept open
            self._files += 1
        return self._file

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            fsync(Path(self._file.name))
            self._file = None

    def close(self) -> None:
        """Finish the checkpoint. Every layer of every stacked key must have been added."""
        for tensor in self._tensors.values():
            filled = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            assert filled == math.prod(tensor.shape), f"{tensor.key}: not all layers were written"
        self._close_file()
        write_metadata(self._directory / METADATA_FILE, list(self._tensors.values()))
        fsync(self._directory / METADATA_FILE)
        with open(self._directory / COMMON_FILE, "wb") as file:
            _save({"checkpoint_version": 3.0, "iteration": 0}, file)
        fsync(self._directory / COMMON_FILE)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_json(
            self._directory / CONFIG_FILE,
            {**backends, "common_backend": "torch", "common_backend_version": 1},
        )

    def __enter__(self) -> "DistWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:  # the directory is about to be thrown away
            with suppress(OSError):
                self._file.close()


def _save(value: Any, file: BufferedWriter) -> None:
    """torch.save that lets the disk's OSError through: the archive writer hides it behind a RuntimeError."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
