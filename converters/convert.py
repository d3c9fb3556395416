"""Hugging Face <-> Megatron `torch_dist` checkpoints, without a process group, a GPU or Megatron.

A round trip reproduces every tensor's name, shape, dtype and bytes, and the files too where they fit.
"""

import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch

from converters.companion_files import copy_companions
from converters.conversion import Conversion, ConvertReport, carry_out
from converters.hf.dequantise import open_dequantised
from converters.hf.layout import (
    DEFAULT_SHARD_SIZE,
    HfLayout,
    PlannedTensor,
    fits,
    kept_layout,
    plan_layout,
)
from converters.hf.reader import EMBEDDING, INDEX_FILE, LM_HEAD, HfReader, HfWeights, check_weights
from converters.mapping import Weight, hf_tensors, weight_map
from converters.mcore.companions import (
    COMPANIONS_DIR,
    SourceInfo,
    describe_source,
    read_source_info,
    torch_dtype,
    write_companions,
)
from converters.mcore.frame import write_frame
from converters.mcore.layout import plan_checkpoint
from converters.mcore.places import place_of, stacks_layers
from converters.mcore.reader import DistReader, checked_source
from converters.source import Source
from converters.transfer import OutputFile, TransferOptions, whole_tensor
from engine.errors import CheckpointError
from engine.model.spec import load_model_spec
from engine.storage.files import dtype_name, write_json


def to_mcore(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    dequantise: bool = False,
    options: TransferOptions | None = None,
) -> ConvertReport:
    """`plan_to_mcore`, carried out."""
    plan = plan_to_mcore(model_dir, dtype=dtype, dequantise=dequantise)
    return carry_out(plan, output_dir, options=options)


def plan_to_mcore(
    model_dir: str | Path, *, dtype: torch.dtype | None = None, dequantise: bool = False
) -> Conversion:
    """A Hugging Face directory as a Megatron checkpoint, loadable under every layout.

    Weights keep their dtype unless `dtype` is given; with `dequantise` those in fp8 become bf16, or `dtype`
    without being bf16 on the way. Raises ModelError for what is wrong with the source, which includes fp8
    weights without `dequantise` and a source without a quantization_config with it.
    """
    spec = load_model_spec(model_dir, fp8=dequantise)
    fp8_to = (dtype or torch.bfloat16) if dequantise else None
    source: HfWeights = HfReader(model_dir) if fp8_to is None else open_dequantised(model_dir, dtype=fp8_to)
    weights = weight_map(spec)
    check_weights(source, weights)
    stacked = stacks_layers(spec)
    dtypes = stored_dtypes(source, weights, dtype, stacked=stacked)
    plan = plan_checkpoint(weights, dtypes, stacked=stacked)
    info = describe_source(spec, source, keep_dtypes=dtype is None)

    def finish(stage: Path) -> None:
        write_companions(model_dir, stage, source=info, dequantised_to=fp8_to)
        write_frame(stage, plan.tensors, spec)

    return Conversion(kind="mcore", source=source, files=plan.files, tensors=len(weights), finish=finish)


def stored_dtypes(
    source: Source,
    weights: Mapping[str, Weight],
    dtype: torch.dtype | None = None,
    *,
    stacked: bool = True,
) -> dict[str, torch.dtype]:
    """dtype of each key of a checkpoint: the one asked for, or the narrowest that holds all of its source
    tensors exactly. `stacked` is whether layers are.
    """
    found: dict[str, list[torch.dtype]] = {}
    for weight in weights.values():
        dtypes = found.setdefault(place_of(weight.name, stacked=stacked).key, [])
        dtypes += [source.dtype(tensor.name) for tensor in weight.hf]
    return {key: dtype or reduce(torch.promote_types, dtypes) for key, dtypes in found.items()}


def to_hf(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    options: TransferOptions | None = None,
) -> ConvertReport:
    """`plan_to_hf`, carried out."""
    plan = plan_to_hf(checkpoint_dir, dtype=dtype, max_shard_size=max_shard_size)
    return carry_out(plan, output_dir, options=options)


def plan_to_hf(
    checkpoint_dir: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: int | None = None
) -> Conversion:
    """A Megatron checkpoint, converted or trained, as a Hugging Face directory.

    Weights keep the checkpoint's dtype unless `dtype` is given (a converted mixed-precision source gets its
    own back). `max_shard_size` is in bytes; without it the files are those of the source, if the checkpoint
    knows them and the dtypes are the same. Raises CheckpointError for what is wrong with the checkpoint.
    """
    reader, info = DistReader(checkpoint_dir), read_source_info(checkpoint_dir)
    companions = reader.directory / COMPANIONS_DIR
    weights = weight_map(load_model_spec(companions))
    source = checked_source(reader, weights)
    plan = _hf_tensors(source, weights, info, dtype)
    layout = hf_layout(kept_layout(reader.directory), plan, max_shard_size)

    def finish(stage: Path) -> None:
        copy_companions(companions, stage, error=CheckpointError)
        set_config_dtype(stage / "config.json", {tensor.dtype for tensor in plan.values()})

    # Only where the checkpoint has no LM head of its own, whatever braid.json says.
    copies = {LM_HEAD: EMBEDDING} if LM_HEAD in plan.keys() - hf_tensors(weights).keys() else {}
    files = output_files(layout, source, copies=copies)
    return Conversion(kind="hf", source=source, files=files, tensors=len(plan), finish=finish)


def _hf_tensors(
    source: Source, weights: Mapping[str, Weight], info: SourceInfo, dtype: torch.dtype | None
) -> dict[str, PlannedTensor]:
    """Every tensor to write by name, in the model's order."""
    original = info.hf_dtypes or {}
    plan: dict[str, PlannedTensor] = {}
    for name, tensor in hf_tensors(weights).items():
        kept = torch_dtype(original[name]) if name in original else source.dtype(name)
        plan[name] = PlannedTensor(name=name, dtype=dtype or kept, shape=tensor.shape)
    if info.lm_head_copy and LM_HEAD not in plan:
        embedding = plan[EMBEDDING]
        plan[LM_HEAD] = PlannedTensor(name=LM_HEAD, dtype=embedding.dtype, shape=embedding.shape)
    return plan


def hf_layout(
    kept: HfLayout | None, plan: Mapping[str, PlannedTensor], max_shard_size: int | None
) -> HfLayout:
    """The layout of the source's files, unless another size is asked for or other tensors are written."""
    if kept is not None and max_shard_size is None and fits(kept, plan):
        return kept
    size = DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size
    return plan_layout(list(plan.values()), max_shard_size=size)


def output_files(
    layout: HfLayout, source: Source, *, copies: Mapping[str, str] | None = None
) -> tuple[OutputFile, ...]:
    """The files of a layout, filled from a source. `copies` names tensors that are another one once more."""
    copies = copies or {}
    files = []
    for file in layout.files:
        tensors = (
            whole_tensor(source, copies.get(t.name, t.name), t.dtype, copy=t.name in copies)
            for t in file.tensors
        )
        files.append(OutputFile(name=file.name, parts=(file.header, *tensors)))
    if layout.index is not None:
        files.append(OutputFile(name=INDEX_FILE, parts=(layout.index,)))
    return tuple(files)


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
