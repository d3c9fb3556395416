"""A base and a LoRA adapter -> one Hugging Face checkpoint. Both are read, neither is touched."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters.adapter import PeftAdapter, open_adapter
from converters.convert import ConvertReport, set_config_dtype
from converters.files import check_free_space, copy_companions, staged_directory
from converters.hf_files import HfReader, check_weights, model_tensors
from converters.hf_writer import DEFAULT_SHARD_SIZE, HfWriter, PlannedTensor
from converters.mapping import weight_map
from engine.errors import ConfigError, ModelError
from engine.model.lora_spec import adapter_name, hf_module
from engine.model.spec import ModelSpec, load_model_spec


@dataclass(frozen=True, kw_only=True)
class _Delta:
    """scaling * B A, of the base's tensor `W`."""

    a: str
    b: str
    scaling: float

    def added_to(self, weight: Tensor, reader: HfReader) -> Tensor:
        """W + scaling * B A in fp32 or wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        product = reader.read(self.b).to(wide) @ reader.read(self.a).to(wide)
        return weight.to(wide) + product * self.scaling


def merge(
    model_dir: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
) -> ConvertReport:
    """Write the base with the adapter added to its weights, tensor by tensor.

    Weights keep the base's dtype unless `dtype` is given; `max_shard_size` is in bytes. Raises ModelError for
    what is wrong with base or adapter, OutputError for the target; a failure leaves nothing behind.
    """
    started = time.monotonic()
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size must be a positive number of bytes, not {max_shard_size}")
    spec, reader = load_model_spec(model_dir), HfReader(model_dir)
    check_weights(reader, weight_map(spec))
    adapter = open_adapter(adapter_dir, spec)
    deltas = _deltas(spec, adapter)
    plan = {
        name: PlannedTensor(
            name=name, dtype=dtype or reader.tensors[name].dtype, shape=reader.tensors[name].shape
        )
        for name in model_tensors(reader)
    }
    total = sum(tensor.nbytes for tensor in plan.values())
    with staged_directory(output_dir) as stage:
        check_free_space(stage.parent, total)
        copy_companions(model_dir, stage, error=ModelError)
        set_config_dtype(stage / "config.json", {tensor.dtype for tensor in plan.values()})
        with HfWriter(stage, list(plan.values()), max_shard_size=max_shard_size) as writer:
            for name, planned in plan.items():
                weight = reader.read(name)
                if name in deltas:
                    weight = deltas[name].added_to(weight, adapter.reader)
                writer.add(name, weight.to(planned.dtype))
    return ConvertReport(
        output_dir=Path(output_dir), tensors=len(plan), bytes=total, seconds=time.monotonic() - started
    )


def _deltas(spec: ModelSpec, adapter: PeftAdapter) -> Mapping[str, _Delta]:
    """What is added to which tensor of the base."""
    deltas = {}
    for layer, linear, projection, shape in adapter.lora.targets(spec.num_layers):
        names = (adapter_name(layer, f"{linear}.{projection}_{kind}") for kind in ("lora_A", "lora_B"))
        a, b = (adapter.weights[name].hf[0].name for name in names)
        deltas[f"{hf_module(layer, projection)}.weight"] = _Delta(a=a, b=b, scaling=shape.scaling)
    return deltas
