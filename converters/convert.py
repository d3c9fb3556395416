"""Hugging Face <-> Megatron `torch_dist` checkpoints, tensor by tensor, without a process group.

A round trip reproduces every tensor's name, shape, dtype and bytes. Peak memory is that of the largest tensor
and its copy, whatever the size of the model.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from converters.companions import (
    COMPANIONS_DIR,
    SourceInfo,
    describe_source,
    read_source_info,
    torch_dtype,
    write_companions,
)
from converters.dist_ckpt import DistReader, DistWriter, check_checkpoint, stacked_key
from converters.files import check_free_space, copy_companions, dtype_name, staged_directory, write_json
from converters.hf_files import EMBEDDING, LM_HEAD, HfReader, check_weights
from converters.hf_writer import DEFAULT_SHARD_SIZE, HfWriter, PlannedTensor
from converters.mapping import Weight, weight_map
from engine.errors import CheckpointError, ConfigError
from engine.model.spec import load_model_spec


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What a conversion wrote."""

    output_dir: Path
    tensors: int
    bytes: int
    """Bytes of tensor data."""
    seconds: float

    def line(self) -> str:
        """For the terminal."""
        rate = self.bytes / 1e9 / max(self.seconds, 1e-9)
        return (
            f"{self.output_dir}: {self.tensors} tensors, {self.bytes / 1e9:.3f} GB in {self.seconds:.2f} s "
            f"({rate:.2f} GB/s)"
        )


def to_mcore(
    model_dir: str | Path, output_dir: str | Path, *, dtype: torch.dtype | None = None
) -> ConvertReport:
    """Convert a Hugging Face directory into a Megatron checkpoint, loadable under every layout.

    Weights keep their dtype unless `dtype` is given. Raises ModelError for what is wrong with the source,
    OutputError for the target; a failure leaves nothing behind.
    """
    started = time.monotonic()
    spec = load_model_spec(model_dir)
    weights = weight_map(spec)
    reader = HfReader(model_dir)
    check_weights(reader, weights)
    dtypes = _mcore_dtypes(reader, weights, dtype)
    source = describe_source(model_dir, keep_dtypes=dtype is None)
    total = 0
    with staged_directory(output_dir) as stage:
        check_free_space(
            stage.parent,
            sum(_elements(w) * dtypes[stacked_key(w.name).key].itemsize for w in weights.values()),
        )
        write_companions(model_dir, stage, source=source)
        with DistWriter(stage, num_layers=spec.num_layers) as writer:
            for weight in weights.values():
                tensor = weight.to_megatron(reader.read_slice).to(dtypes[stacked_key(weight.name).key])
                writer.add(weight.name, tensor)
                total += tensor.nbytes
    return ConvertReport(
        output_dir=Path(output_dir), tensors=len(weights), bytes=total, seconds=time.monotonic() - started
    )


def _elements(weight: Weight) -> int:
    return int(torch.Size(weight.shape).numel())


def _mcore_dtypes(
    reader: HfReader, weights: Mapping[str, Weight], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """dtype of each stacked key: the one asked for, or the narrowest that holds all of its source tensors
    exactly.
    """
    sources: dict[str, list[torch.dtype]] = {}
    for weight in weights.values():
        found = sources.setdefault(stacked_key(weight.name).key, [])
        found += [reader.tensors[tensor.name].dtype for tensor in weight.hf]
    return {key: dtype or reduce(torch.promote_types, found) for key, found in sources.items()}


def to_hf(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
) -> ConvertReport:
    """Convert a Megatron checkpoint, converted or trained, into a Hugging Face directory.

    Weights keep the checkpoint's dtype unless `dtype` is given (a converted mixed-precision source gets its
    own back); `max_shard_size` is in bytes. Raises CheckpointError for what is wrong with the checkpoint,
    OutputError for the target; a failure leaves nothing behind.
    """
    started = time.monotonic()
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size must be a positive number of bytes, not {max_shard_size}")
    reader = DistReader(checkpoint_dir)
    source = read_source_info(checkpoint_dir)
    companions = Path(checkpoint_dir) / COMPANIONS_DIR
    weights = weight_map(load_model_spec(companions))
    check_checkpoint(reader, weights)
    plan = _hf_plan(reader, weights, source, dtype)
    total = sum(tensor.nbytes for tensor in plan.values())
    with staged_directory(output_dir) as stage:
        check_free_space(stage.parent, total)
        copy_companions(companions, stage, error=CheckpointError)
        set_config_dtype(stage / "config.json", {tensor.dtype for tensor in plan.values()})
        with HfWriter(stage, list(plan.values()), max_shard_size=max_shard_size) as writer:
            for weight in weights.values():
                for name, tensor in weight.to_hf(reader.read(weight.name, weight)).items():
                    writer.add(name, tensor.to(plan[name].dtype))
                    if name == EMBEDDING and source.lm_head_copy:
                        writer.add(LM_HEAD, tensor.to(plan[LM_HEAD].dtype))
    return ConvertReport(
        output_dir=Path(output_dir), tensors=len(plan), bytes=total, seconds=time.monotonic() - started
    )


def _hf_plan(
    reader: DistReader, weights: Mapping[str, Weight], source: SourceInfo, dtype: torch.dtype | None
) -> dict[str, PlannedTensor]:
    """Every tensor to write by name, in the model's order."""
    original = source.hf_dtypes or {}
    plan: dict[str, PlannedTensor] = {}
    for weight in weights.values():
        stored = reader.dtype(weight.name)
        for tensor in weight.hf:
            kept = torch_dtype(original[tensor.name]) if tensor.name in original else stored
            plan[tensor.name] = PlannedTensor(name=tensor.name, dtype=dtype or kept, shape=tensor.shape)
    if source.lm_head_copy and LM_HEAD not in plan:
        embedding = plan[EMBEDDING]
        plan[LM_HEAD] = PlannedTensor(name=LM_HEAD, dtype=embedding.dtype, shape=embedding.shape)
    return plan


def set_config_dtype(path: Path, dtypes: set[torch.dtype]) -> None:
    """Let config.json name the dtype that was written, for transformers loads a model in it.

    The file stays as it is, byte by byte, if it agrees or if the weights are of several dtypes.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if len(dtypes) != 1 or not keys:
        return
    name = dtype_name(next(iter(dtypes)))
    if any(config[key] != name for key in keys):
        write_json(path, config | dict.fromkeys(keys, name))
