"""Reading Megatron-Core's `torch_dist` checkpoints without Megatron and without a process group.

On disk: `.metadata` says which box of which tensor lies where, `__<rank>_<n>.distcp` hold the boxes as
torch.save archives one after another, `metadata.json` names the format, `common.pt` holds what is no tensor
(never read here). The layers of a decoder are stacked: `decoder.layers.3.mlp.linear_fc1.weight` is row 3 of
the key `decoder.layers.mlp.linear_fc1.weight` with global shape [layers, ...]. fc1 is [gate; up] whatever the
tensor parallelism was. Keys of the optimizer contain `optimizer.`; only `embedding.`, `decoder.` and
`output_layer.` keys are the model.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters.files import and_more, inside, shown
from converters.mapping import Vocabulary, Weight
from converters.mcore.archive import Box
from converters.mcore.metadata import METADATA_FILE, DistChunk, DistTensor, read_metadata
from converters.source import Source, new_or_given
from engine.errors import CheckpointError

CONFIG_FILE = "metadata.json"
COMMON_FILE = "common.pt"
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")

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
        self._tiled: dict[str, list[DistChunk]] = {}
        self._boxes: dict[tuple[str, DistChunk], Box] = {}

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
        """The full tensor of a canonical name in its stored dtype, without vocabulary padding."""
        self.check_shape(name, weight)
        return self.read_rows(name, 0, weight.shape[0])

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, stop) of the full tensor of a canonical name, contiguous; into `out` where given.

        Reads those rows of the boxes that hold them. Raises CheckpointError for a missing box, a truncated
        file or a box that is not what `.metadata` says.
        """
        tensor, layer = self.locate(name)
        lead = 0 if layer is None else 1
        shape = tensor.shape[lead:]
        assert 0 <= start <= stop <= shape[0], f"rows [{start}, {stop}) of {name} {shape}"
        rows = new_or_given((stop - start, *shape[1:]), tensor.dtype, out)
        for chunk in self._chunks(name):
            first = max(start, chunk.offsets[lead])
            last = min(stop, chunk.offsets[lead] + chunk.sizes[lead])
            if first >= last:
                continue
            box = self._boxes.get((name, chunk)) or Box(self.directory, tensor, chunk)
            self._boxes[name, chunk] = box
            # As rows of the box: a layer's rows of a stacked box lie behind those of the layers before it.
            skipped = 0 if layer is None else (layer - chunk.offsets[0]) * chunk.sizes[lead]
            begin = skipped + first - chunk.offsets[lead]
            target = rows[first - start : last - start]
            if chunk.sizes[lead + 1 :] == shape[1:]:
                box.read_rows(begin, begin + last - first, lead, target)
            else:
                part = torch.empty((last - first, *chunk.sizes[lead + 1 :]), dtype=tensor.dtype)
                box.read_rows(begin, begin + last - first, lead, part)
                place = zip(chunk.offsets[lead + 1 :], chunk.sizes[lead + 1 :], strict=True)
                target[(slice(None), *(slice(at, at + size) for at, size in place))] = part
        return rows

    def _chunks(self, name: str) -> list[DistChunk]:
        """The boxes of a canonical name, once it is known that they tile its tensor."""
        if name not in self._tiled:
            tensor, layer = self.locate(name)
            lead = 0 if layer is None else 1
            chunks = [
                c for c in tensor.chunks if layer is None or c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]
            ]
            self._check_complete(tensor, name, chunks, lead)
            self._tiled[name] = chunks
        return self._tiled[name]

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


def check_files(reader: DistReader) -> None:
    """Raise CheckpointError if a file of the checkpoint is missing or cut off, whatever it holds."""
    ends: dict[str, int] = {}
    for chunk in (chunk for tensor in reader.tensors.values() for chunk in tensor.chunks):
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
    for file, end in ends.items():
        path = inside(reader.directory, file, error=CheckpointError)
        size = path.stat().st_size
        if size < end:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes of {end}; use another checkpoint"
            )


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
