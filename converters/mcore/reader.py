"""Models in Megatron-Core's `torch_dist` checkpoints, by their canonical names.

`converters.mcore.places` says what is stacked in which key. fc1 is [gate; up] whatever the tensor
parallelism was. Keys of the optimizer contain `optimizer.`; only `embedding.`, `decoder.` and `output_layer.`
keys are the model.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from converters.hf.reader import WEIGHT_DTYPES
from converters.mapping import Vocabulary, Weight
from converters.mcore.places import Place, name_at, place_of
from converters.source import Source, new_or_given
from engine.errors import CheckpointError
from engine.storage.files import and_more, dtype_name, shown
from engine.storage.metadata import METADATA_FILE, DistTensor
from engine.storage.reader import TorchDistReader, check_files

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")

_MOST = 10_000
"""Indices of an axis that are looked at for surplus ones, and names of those in a key; a damaged file may
claim any number.
"""


class DistReader(TorchDistReader):
    """The tensors of a torch_dist checkpoint by their canonical names, saved under any layout."""

    def find(self, name: str) -> Place | None:
        """Where a canonical name is, or would be if its key stacked enough; None if there is no such key."""
        if name in self.tensors:
            return Place(key=name)
        # Layers that differ from one another are saved one by one.
        places = (place_of(name, stacked=stacked) for stacked in (False, True))
        return next((place for place in places if place.key in self.tensors), None)

    def locate(self, name: str) -> tuple[DistTensor, tuple[int, ...]]:
        """The stored tensor of a canonical name, and the index of the part of it that is meant, () for all.
        Raises CheckpointError.
        """
        place = self.find(name)
        if place is None:
            raise CheckpointError(
                f"{self.directory}: weight {name} is missing; this is a checkpoint of another model"
            )
        tensor = self.tensors[place.key]
        sizes = (*tensor.shape, *(0 for _ in place.lead))
        for size, index, words in zip(sizes, place.lead, place.words, strict=False):
            if index >= size:
                raise CheckpointError(
                    f"{self.directory}: {place.key} has shape {shown(list(tensor.shape))}, so no {words}; "
                    f"this is a checkpoint of another model"
                )
        return tensor, place.lead

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor of a canonical name, vocabulary padding included."""
        tensor, lead = self.locate(name)
        return tensor.shape[len(lead) :]

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
        tensor, lead = self.locate(name)
        shape = tensor.shape[len(lead) :]
        assert 0 <= start <= stop <= shape[0], f"rows [{start}, {stop}) of {name} {shape}"
        rows = new_or_given((stop - start, *shape[1:]), tensor.dtype, out)
        offsets = (*lead, start, *(0 for _ in shape[1:]))
        self.read_region(tensor.key, offsets, rows[(None,) * len(lead)], named=name)
        return rows


def surplus_names(
    reader: DistReader, weights: Mapping[str, Weight], *, prefixes: tuple[str, ...] = MODEL_PREFIXES
) -> list[str]:
    """Tensors of the checkpoint's model that the map does not have, what is stacked by its canonical name."""
    wanted: dict[str, set[tuple[int, ...]]] = {}
    for place in map(reader.find, weights):
        if place is not None:
            wanted.setdefault(place.key, set()).add(place.lead)
    names: list[str] = []
    for key, tensor in reader.tensors.items():
        if not key.startswith(prefixes) or "._extra_state" in key:
            continue
        if key not in wanted:
            names.append(key)
        else:
            names += itertools.islice(_others(tensor, wanted[key]), _MOST)
    return names


def _others(tensor: DistTensor, leads: set[tuple[int, ...]]) -> Iterator[str]:
    """Canonical names of what a tensor stacks besides `leads`."""
    axes = tensor.shape[: len(next(iter(leads)))]
    for lead in itertools.product(*(range(min(size, _MOST)) for size in axes)):
        if lead not in leads:
            yield name_at(tensor.key, lead)


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
        located = (self._reader.locate(weight.name)[0] for weight in self._weights.values())
        stored = {tensor.key: tensor for tensor in located}  # one tensor is many weights
        names = dict.fromkeys(chunk.file for tensor in stored.values() for chunk in tensor.chunks)
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
                # A Megatron tensor may have more dimensions, of the same elements in a row.
                weight, part_rows = self._weights[name], rows[first - start : last - start]
                self._reader.read_rows(
                    weight.name, at, at + last - first, part_rows.view(-1, *weight.shape[1:])
                )
        return rows
