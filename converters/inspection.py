"""What `converters.inspect` finds out about a checkpoint, as data."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Kind = Literal["converted", "training", "adapter", "megatron", "huggingface", "peft"]
"""A Megatron checkpoint that braid converted, one of a run, one of LoRA adapters, one of another program; a
Hugging Face directory; a PEFT directory.
"""
Content = Literal["weights", "adapter", "optimizer", "other"]
CONTENTS: tuple[Content, ...] = ("weights", "adapter", "optimizer", "other")

_LAYER = re.compile(r"(.*\blayers\.)(\d{1,18})(\..+)")
_EXPERT = re.compile(r"(.*\bexperts\.)(\d{1,18})(\..+)")


@dataclass(frozen=True, kw_only=True)
class BoxShape:
    """Boxes of a tensor that have the same sizes."""

    sizes: tuple[int, ...]
    count: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor under the name and in the shape that it is stored in."""

    name: str
    content: Content
    shape: tuple[int, ...]
    dtype: str
    """As "bfloat16"; a dtype of safetensors that Braid does not know in its own word, as "F8_E4M3"."""
    layers: int | None
    """Layers that are stacked in the first dimension; None of a tensor that is one layer's, or no layer's."""
    experts: int | None
    """Experts that are stacked in the next dimension; None of a tensor that is one expert's, or none's."""
    boxes: tuple[BoxShape, ...]
    """How it is cut, the most frequent shape first; a safetensors file has one box a tensor."""
    bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors that differ in their layer and expert only: `name` has a star for their numbers."""

    name: str
    first: StoredTensor
    layers: int | None
    """How many there are, or are stacked in one; None of a tensor that is no layer's."""
    experts: int | None
    """The same of experts, in a layer."""
    bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ContentSummary:
    """All tensors of one kind of content."""

    content: Content
    keys: int
    """Tensors as they are stored."""
    tensors: int
    """The layers and experts of stacked ones counted."""
    boxes: int
    elements: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """The model, or the base of an adapter. None is what the description does not say."""

    described_by: Literal["config.json", "tensors"]
    architecture: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    """Padding included where the tensors are all there is to go by; so it is in `parameters`."""
    tied_embeddings: bool | None = None
    parameters: int | None = None
    num_experts: int | None = None
    """Of a layer that has any; None of a model without."""
    layers_with_experts: int | None = None
    experts_per_token: int | None = None
    expert_ffn_hidden_size: int | None = None
    shared_ffn_hidden_size: int | None = None
    """Of the expert that every token goes to."""


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """What `adapter_config.json` says."""

    method: str | None
    rank: int | None
    alpha: float | None
    target_modules: tuple[str, ...]
    base_model: str | None


@dataclass(frozen=True, kw_only=True)
class LayoutSummary:
    """The layout that a Megatron checkpoint was saved under. Any other layout loads it too."""

    source: Literal["trainer_state.json", "deduced"]
    """Deduced from the boxes: nothing in them tells of the other degrees than tensor parallelism."""
    tp: int | None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    dp: int | None = None
    ep: int | None = None
    etp: int | None = None
    writers: int | None = None
    """Ranks that files are named after; None of a converted checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ManifestSummary:
    """What `braid-manifest.json` says."""

    kind: str
    created: str
    command: str
    versions: dict[str, str]
    source_path: str | None
    """What a conversion read; None of what a run saved."""
    source_sha256: str | None
    tensors: int
    """Tensors of the source of which it has the digest."""
    files: int


@dataclass(frozen=True, kw_only=True)
class FileOnDisk:
    """A file by its path within the directory."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is wrong with the checkpoint, in one line, and the file that it is wrong in."""

    file: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that `inspect_checkpoint` found."""

    path: str
    kind: Kind
    step: int | None
    step_source: Literal["trainer_state.json", "directory name"] | None
    total_steps: int | None
    model: ModelSummary | None
    adapter: AdapterSummary | None
    layout: LayoutSummary | None
    contents: tuple[ContentSummary, ...]
    """Those that there are, in the order of CONTENTS."""
    tensors: tuple[StoredTensor, ...]
    manifest: ManifestSummary | None
    files: tuple[FileOnDisk, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    """What is worth knowing and no damage, one line each."""

    @property
    def good(self) -> bool:
        """No problem was found."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields of this class and of those in it by their names, every one always there,
        `contents` as an object by content, and `good`, `bytes` (of all tensors) and `file_bytes` besides.
        """
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "model": _as_dict(self.model),
            "adapter": _as_dict(self.adapter),
            "layout": _as_dict(self.layout),
            "contents": {item.content: asdict(item) for item in self.contents},
            "tensors": [asdict(item) for item in self.tensors],
            "manifest": _as_dict(self.manifest),
            "files": [asdict(item) for item in self.files],
            "problems": [asdict(item) for item in self.problems],
            "good": self.good,
            "bytes": sum(item.bytes for item in self.contents),
            "file_bytes": sum(item.bytes for item in self.files),
        }


def _as_dict(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def layer_of(name: str) -> tuple[str, int] | None:
    """`model.layers.3.mlp.x` as its name with a star for the layer, and the layer; None of other names."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (f"{match[1]}*{match[3]}", int(match[2]))


@dataclass(frozen=True, kw_only=True)
class _Numbered:
    """A tensor's name with stars for numbers, and the numbers."""

    name: str
    layer: int | None
    expert: int | None


def _numbered(name: str) -> _Numbered:
    found = layer_of(name)
    starred, layer = (name, None) if found is None else found
    match = _EXPERT.fullmatch(starred)
    if match is None:
        return _Numbered(name=starred, layer=layer, expert=None)
    return _Numbered(name=f"{match[1]}*{match[3]}", layer=layer, expert=int(match[2]))


def grouped(tensors: Sequence[StoredTensor]) -> list[TensorGroup]:
    """Tensors that are the same but for their layer or expert as one, in the order in which they first
    come.
    """
    groups: dict[tuple[Any, ...], list[tuple[StoredTensor, _Numbered]]] = {}
    for tensor in tensors:
        number = _numbered(tensor.name)
        key = (number.name, tensor.content, tensor.dtype, tensor.shape, tensor.layers, tensor.boxes)
        groups.setdefault(key, []).append((tensor, number))
    found = []
    for key, group in groups.items():
        first, alone = group[0][0], len(group) == 1
        layers = {number.layer for _, number in group if number.layer is not None}
        experts = {number.expert for _, number in group if number.expert is not None}
        found.append(
            TensorGroup(
                name=first.name if alone else key[0],
                first=first,
                layers=first.layers if alone else first.layers or len(layers),
                experts=first.experts or (None if alone else len(experts) or None),
                bytes=sum(tensor.bytes for tensor, _ in group),
                files=tuple(dict.fromkeys(file for tensor, _ in group for file in tensor.files)),
            )
        )
    return found


def summed(tensors: Sequence[StoredTensor]) -> tuple[ContentSummary, ...]:
    """Totals by content, for every content that there is."""
    found = []
    for content in CONTENTS:
        if mine := [tensor for tensor in tensors if tensor.content == content]:
            found.append(
                ContentSummary(
                    content=content,
                    keys=len(mine),
                    tensors=sum(_count(tensor) for tensor in mine),
                    boxes=sum(box.count for tensor in mine for box in tensor.boxes),
                    elements=sum(math.prod(tensor.shape) for tensor in mine),
                    bytes=sum(tensor.bytes for tensor in mine),
                    dtypes=tuple(sorted({tensor.dtype for tensor in mine})),
                )
            )
    return tuple(found)


def _count(tensor: StoredTensor) -> int:
    """Tensors that are stacked in one."""
    return math.prod(size for size in (tensor.layers, tensor.experts) if size is not None)
