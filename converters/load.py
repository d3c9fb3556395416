"""Stored weights into the Megatron model of a running rank; only the bytes of its own part are read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from converters.adapter import PeftAdapter
from converters.mapping import Weight
from converters.model import open_model
from converters.source import Source
from engine.model.spec import ModelSpec

if TYPE_CHECKING:
    from engine.model.gpt import BraidGPTModel
    from engine.runtime.mcore import Groups


@torch.no_grad()
def load_model_weights(
    chunks: Sequence["BraidGPTModel"], model_dir: str | Path, spec: ModelSpec, groups: "Groups"
) -> None:
    """Fill every parameter of this rank's model chunks from a Hugging Face directory or a Megatron
    checkpoint, cast to the model's dtype.

    Raises ModelError or CheckpointError if a tensor is missing, surplus, mis-shaped or unreadable.
    """
    from engine.model.provider import named_weights

    model = open_model(model_dir)
    assert model.spec == spec, f"{model_dir} is not the model that the chunks were built for"
    parameters = list(named_weights(chunks, groups.layout, groups.pp_rank))
    parts = local_tensors(
        model.source,
        model.weights,
        (p.name for p in parameters),
        tp_rank=groups.tp_rank,
        tp_size=groups.layout.tp,
    )
    for weight, (name, part) in zip(parameters, parts, strict=True):
        assert part.shape == weight.parameter.shape, f"{name}: {part.shape} is not {weight.parameter.shape}"
        weight.parameter.copy_(part)


def local_tensors(
    source: Source, weights: Mapping[str, Weight], names: Iterable[str], *, tp_rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, this tensor-parallel rank's part) for each of `names`, one tensor in memory at a
    time.

    The part has the shape of the Megatron parameter, vocabulary padding included, and the stored dtype. With
    tied embeddings the last pipeline stage asks for `embedding.word_embeddings.weight`, of which its output
    layer is a copy.
    """
    for name in names:
        yield name, weights[name].to_megatron(source.read_slice, tp_rank, tp_size)


@torch.no_grad()
def load_adapter_weights(chunks: Sequence["BraidGPTModel"], adapter: PeftAdapter, groups: "Groups") -> None:
    """Fill every adapter parameter of this rank's chunks from a PEFT directory."""
    from engine.model.lora import named_adapters

    assert not adapter.lora.modules_to_save, "whole modules are not trained beside LoRA"
    for chunk, layers in zip(chunks, groups.layout.chunks_of(groups.pp_rank), strict=True):
        for target in named_adapters(chunk, layers):
            weight = adapter.weights[target.name]
            whole = target.partition is None  # more ranks than query groups: B is not cut
            part = weight.to_megatron(
                adapter.reader.read_slice, *((0, 1) if whole else (groups.tp_rank, groups.layout.tp))
            )
            assert part.shape == target.parameter.shape, f"{target.name}: {part.shape}"
            target.parameter.copy_(part)
