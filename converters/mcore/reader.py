"""Models in Megatron-Core's `torch_dist` checkpoints, by their canonical names.

The layers of a decoder are stacked: `decoder.layers.3.mlp.linear_fc1.weight` is row 3 of
the key `decoder.layers.mlp.linear_fc1.weight` with global shape [layers, ...]. fc1 is [gate; up] whatever the
tensor parallelism was. Keys of the optimizer contain `optimizer.`; only `embedding.`, `decoder.` and
`output_layer.` keys are the model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters.hf.reader import WEIGHT_DTYPES
from converters.mapping import Vocabulary, Weight
from converters.source import Source, new_or_given
from engine.errors import CheckpointError
from engine.storage.files import and_more, dtype_name, shown
from engine.storage.metadata import METADATA_FILE, DistTensor
from engine.storage.reader import TorchDistReader, check_files

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")

_MOST_LAYERS = 10_000
"""Of which surplus ones are named; a damaged file may claim any number."""
_LAYER = re.compile(r"(.*\bdecoder\.layers)\.(\d+)\.(.+)")


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


class DistReader(TorchDistReader):
    """The tensors of a torch_dist checkpoint by their canonical names, saved under any layout."""

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
                f"{self.directory}: {stacked.key} has shape {shown(list(tensor.shape))}, so no layer "
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
                f"{self.directory}: weight {name} has shape {shown(list(self.shape(name)))}, "
                f"the model's config.json asks for {list(weight.shape)}"
            )

    def read(self, name: str, weight: Weight) -> Tensor:
        """The full tensor of a canonical name in its stored dtype, without vocabulary padding."""
        self.check_shape(name, weight)
        return self.read_rows(name, 0, weight.shape[0])

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, stop) of the full tensor of a canonical name, contiguous; into `out` where given.

        Raises CheckpointError for a missing box, a truncated file or a box that is not what `.metadata` says.
        """
        tensor, layer = self.locate(name)
        shape = tensor.shape if layer is None else tensor.shape[1:]
        assert 0 <= start <= stop <= shape[0], f"rows [{start}, {stop}) of {name} {shape}"
        rows = new_or_given((stop - start, *shape[1:]), tensor.dtype, out)
        offsets = (start, *(0 for _ in shape[1:]))
        if layer is None:
            self.read_region(tensor.key, offsets, rows, named=name)
        else:
            self.read_region(tensor.key, (layer, *offsets), rows[None], named=name)
        return rows


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
            rows = range(min(tensor.shape[0], _MOST_LAYERS))
            names += [f"{head}decoder.layers.{i}.{tail}" for i in rows if i not in layers]
    return names


def check_checkpoint(
    reader: DistReader, weights: Mapping[str, Weight], *, prefixes: tuple[str, ...] = MODEL_PREFIXES
) -> None:
    """Raise CheckpointError unless the keys of the checkpoint that start with `prefixes` are exactly the map,
    in names and shapes, and of a float dtype.
    """
    for name, weight in weights.items():
        reader.check_shape(name, weight)
        if reader.dtype(name) not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{reader.directory}: weight {name} has dtype {dtype_name(reader.dtype(name))}; only "
                f"{', '.join(map(dtype_name, WEIGHT_DTYPES))} are read"
            )
    if surplus := surplus_names(reader, weights, prefixes=prefixes):
        raise CheckpointError(
            f"{reader.directory}: weight {shown(surplus[0])} has no place in the model{and_more(surplus)}; "
            f"this is a checkpoint of another model"
        )


def checked_source(
    reader: DistReader, weights: Mapping[str, Weight], *, prefixes: tuple[str, ...] = MODEL_PREFIXES
) -> "McoreSource":
    """The tensors of a checkpoint, once `check_checkpoint` and `check_files` have nothing against it."""
    check_checkpoint(reader, weights, prefixes=prefixes)
    check_files(reader)
    return McoreSource(reader, weights)


class McoreSource(Source):
    """The Hugging Face tensors that a checkpoint's Megatron tensors hold, by the mapping table `weights`."""

    def __init__(self, reader: DistReader, weights: Mapping[str, Weight]) -> None:
        self.directory, self._reader = reader.directory, reader
        self._weights = {tensor.name: weight for weight in weights.values() for tensor in weight.hf}
        self._places = {name: place for w in weights.values() for name, place in w.places().items()}

    def files(self) -> list[Path]:
        stored = (self._reader.locate(weight.name)[0] for weight in self._weights.values())
        names = dict.fromkeys(chunk.file for tensor in stored for chunk in tensor.chunks)
        return [self.directory / METADATA_FILE, *(self.directory / name for name in names)]

    def shape(self, name: str) -> tuple[int, ...]:
        return next(tensor.shape for tensor in self._weights[name].hf if tensor.name == name)

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._weights[name].name)

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        rows = new_or_given((stop - start, *self.shape(name)[1:]), self.dtype(name), out)
        for begin, part in self._places[name]:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                at = begin + first - part.start
                self._reader.read_rows(
                    self._weights[name].name, at, at + last - first, rows[first - start : last - start]
                )
        return rows
