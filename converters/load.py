"""Stored weights into the Megatron model of a running rank; only the bytes of its own part are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.adapter import PeftAdapter
from converters.model import open_model
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
    from engine.model.experts import is_expert_weight
    from engine.model.provider import named_weights

    model = open_model(model_dir)
    assert model.spec == spec, f"{model_dir} is not the model that the chunks were built for"
    parameters = list(named_weights(chunks, groups.layout, groups.pp_rank))
    for weight in parameters:
        # An expert's matrices are shared among ranks of their own.
        place = (groups.tp_rank, groups.layout.tp)
        if is_expert_weight(weight.parameter):
            place = (groups.etp_rank, groups.layout.etp)
        part, own = (
            model.weights[weight.name].to_megatron(model.source.read_slice, *place),
            weight.part(weight.parameter),
        )
        assert part.shape == own.shape, f"{weight.name}: {part.shape} is not {own.shape}"
        own.copy_(part)


@torch.no_grad()
def load_adapter_weights(chunks: Sequence["BraidGPTModel"], adapter: PeftAdapter, groups: "Groups") -> None:
    """Fill every adapter parameter of this rank's chunks from a PEFT directory."""
    from engine.model.lora import named_adapters

    assert not adapter.lora.modules_to_save, "whole modules are not trained beside LoRA"
    for chunk, layers in zip(chunks, groups.layout.chunks_of(groups.pp_rank), strict=True):
        for target in named_adapters(chunk, layers, groups):
            # A weight that ranks share may still be held whole: with more ranks than query groups.
            part = adapter.weights[target.name].to_megatron(
                adapter.reader.read_slice, target.rank, target.ranks
            )
            assert part.shape == target.parameter.shape, f"{target.name}: {part.shape}"
            target.parameter.copy_(part)
