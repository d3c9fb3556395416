"""PEFT LoRA adapters <-> adapters in Megatron's layout; one table, both directions from it.

An adapter's A of q, k, v, gate and up is the same on every tensor-parallel rank and B is cut by rows; of o
and down A is cut by columns and B is the same. Those of experts lie with the ranks that have the experts. In
a checkpoint every A and B is a tensor of its own, and so is every tensor of a module that is stored whole
(PEFT's modules_to_save), for which the engine has no place.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from converters.conversion import Conversion, ConvertReport, carry_out
from converters.convert import output_files, stored_dtypes
from converters.hf.layout import PlannedTensor, plan_layout
from converters.hf.reader import EMBEDDING, LM_HEAD, HfReader, check_weights
from converters.mapping import HfTensor, Innermost, Replicated, Sharded, Weight, hf_tensors, weight_map
from converters.mcore.companions import COMPANIONS_DIR, read_source_info, torch_dtype, write_companions
from converters.mcore.frame import write_frame
from converters.mcore.layout import plan_checkpoint
from converters.mcore.reader import DistReader, McoreSource, check_checkpoint
from converters.source import Source, row_blocks
from converters.transfer import TransferOptions
from engine.errors import CheckpointError, ConfigError, ModelError
from engine.model.lora_spec import (
    CHECKPOINT_PREFIX,
    CONFIG_FILE,
    LoraSpec,
    adapter_name,
    enclosing_modules,
    read_lora_config,
    saved_name,
)
from engine.model.projections import Projection
from engine.model.spec import ModelSpec, load_model_spec
from engine.storage.durable import fsync
from engine.storage.files import dtype_name, inside
from engine.storage.reader import check_files

ADAPTER_FILE = "adapter_model.safetensors"

_HF_PREFIX = "base_model.model."


def adapter_map(spec: ModelSpec, lora: LoraSpec) -> dict[str, Weight]:
    """Every A and B by its name in checkpoints, in the model's order, and then the tensors that are stored
    whole. Raises ConfigError for a name in modules_to_save that cannot be.
    """
    weights: dict[str, Weight] = {}
    targets = list(lora.targets(spec))
    modules = {place.module for place, _ in targets}
    for place, shape in targets:
        for weight in _of_experts(place, shape.rank, modules) if place.experts else _of(place, shape.rank):
            weights[weight.name] = weight
    for base_name, tensor in saved_tensors(spec, lora).items():
        name = saved_name(base_name)
        weights[name] = Replicated(name=name, hf=(tensor,))  # no rank asks for it, so none cuts it
    return weights


def _of(place: Projection, rank: int) -> Iterator[Weight]:
    """A [rank, in] and B [out, rank] of a module."""
    for kind, size, cut in (
        ("lora_A", (rank, place.in_features), place.row_parallel),
        ("lora_B", (place.out_features, rank), not place.row_parallel),
    ):
        name = adapter_name(place.layer, f"{place.linear}.{place.name}_{kind}")
        tensor = HfTensor(name=f"{_HF_PREFIX}{place.linear_module}.{kind}.weight", shape=size)
        axis = 1 if kind == "lora_A" else 0
        yield Sharded(name=name, hf=(tensor,), axis=axis) if cut else Replicated(name=name, hf=(tensor,))


def _of_experts(place: Projection, rank: int, modules: Collection[str]) -> Iterator[Weight]:
    """A [experts * rank, in] and B [out, rank * experts] of a parameter of experts, cut among the ranks that
    share them: PEFT stacks the experts of A, and has them innermost in B.

    Of two parameters of a module PEFT wraps the first, gate_up_proj, within the other.
    """
    assert place.experts is not None
    block, _, name = place.module.rpartition(".")
    inner = ".base_layer" if name == "gate_up_proj" and f"{block}.down_proj" in modules else ""
    prefix = adapter_name(place.layer, f"{place.linear}.{place.name}_")
    a = HfTensor(
        name=f"{_HF_PREFIX}{block}{inner}.lora_A.weight", shape=(place.experts * rank, place.in_features)
    )
    b = HfTensor(
        name=f"{_HF_PREFIX}{block}{inner}.lora_B.weight", shape=(place.out_features, rank * place.experts)
    )
    yield Sharded(name=f"{prefix}lora_A", hf=(a,), axis=0)
    yield Innermost(name=f"{prefix}lora_B", hf=(b,), count=place.experts)


def saved_tensors(spec: ModelSpec, lora: LoraSpec) -> dict[str, HfTensor]:
    """The adapter's tensors of modules that are stored whole, by the base's name for them.

    With tied embeddings, too, embedding and LM head are two modules and each may be there. Raises ConfigError
    for a name in modules_to_save that cannot be.
    """
    tensors = hf_tensors(weight_map(spec))
    tensors |= {LM_HEAD: HfTensor(name=LM_HEAD, shape=tensors[EMBEDDING].shape)}
    modules = dict.fromkeys(module for name in tensors for module in enclosing_modules(name))
    saved = set(lora.saved_modules(spec, modules))
    if experts := sorted(module for module in saved if ".mlp.experts" in module):
        raise ConfigError(f"modules_to_save: {experts[0]} is of experts, which cannot be stored whole here")
    return {
        name: HfTensor(name=f"{_HF_PREFIX}{name}", shape=tensor.shape)
        for name, tensor in tensors.items()
        if saved.intersection(enclosing_modules(name))
    }


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter directory whose tensors are exactly those that its configuration asks for."""

    directory: Path
    lora: LoraSpec
    weights: dict[str, Weight]
    reader: HfReader

    def config(self) -> bytes:
        """The configuration file as it is."""
        return inside(self.directory, CONFIG_FILE, error=ModelError).read_bytes()

    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all tensors exactly."""
        return reduce(torch.promote_types, (info.dtype for info in self.reader.tensors.values()))


def open_adapter(directory: str | Path, spec: ModelSpec) -> PeftAdapter:
    """Read configuration and headers of a PEFT directory. Raises ModelError for what is missing, surplus, of
    another shape than the base model asks for, or not supported.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ModelError(f"adapter directory {directory} does not exist; pass a directory that PEFT saved")
    lora = read_lora_config(path)
    try:
        lora.check(spec)
        weights = adapter_map(spec, lora)
    except ConfigError as error:
        raise ModelError(f"{path / CONFIG_FILE}: {error}") from None
    reader = HfReader(path, single_file=ADAPTER_FILE)
    check_weights(reader, weights, described_by=f"{CONFIG_FILE} and the base model")
    return PeftAdapter(directory=path, lora=lora, weights=weights, reader=reader)


def new_adapter_config(lora: LoraSpec, base_model: str, spec: ModelSpec) -> bytes:
    """An `adapter_config.json` for an adapter that starts here."""
    return (json.dumps(lora.to_config(base_model, spec), indent=2, ensure_ascii=False) + "\n").encode()


def write_adapter_companions(
    model_dir: str | Path, checkpoint_dir: str | Path, *, config: bytes, dtype: torch.dtype
) -> None:
    """What a checkpoint of adapters carries beside them: the base's companions, and the adapter's
    configuration and dtype.
    """
    write_companions(model_dir, checkpoint_dir, adapter_dtype=dtype_name(dtype))
    path = Path(checkpoint_dir) / COMPANIONS_DIR / CONFIG_FILE
    path.write_bytes(config)
    fsync(path)


def holds_adapter(checkpoint_dir: str | Path) -> bool:
    """Whether a checkpoint is one of adapters, of a run or converted."""
    return (Path(checkpoint_dir) / COMPANIONS_DIR / CONFIG_FILE).is_file()


def check_adapter_checkpoint(
    reader: DistReader, spec: ModelSpec, lora: LoraSpec | None = None
) -> dict[str, Weight]:
    """The map of a checkpoint of adapters. Raises CheckpointError unless it holds exactly those of its own
    configuration, and is of the adapter `lora` where one is given.
    """
    if not holds_adapter(reader.directory):
        raise CheckpointError(
            f"{reader.directory} holds no LoRA adapter; it is a checkpoint of a whole model"
        )
    try:
        stored = read_lora_config(reader.directory / COMPANIONS_DIR)
        stored.check(spec)
        weights = adapter_map(spec, stored)
    except (ConfigError, ModelError) as error:
        raise CheckpointError(str(error)) from None
    # As configurations, in which `all-linear` and the names that it stands for are the same.
    before, now = stored.to_config("", spec), (lora or stored).to_config("", spec)
    if lora is not None and before != now:
        names = [name for name in before | now if now.get(name) != before.get(name)]
        raise CheckpointError(
            f"{reader.directory} belongs to a LoRA run with another {names[0]} ({getattr(stored, names[0])}, "
            f"now {getattr(lora, names[0])}); resume with that run's settings"
        )
    check_checkpoint(reader, weights, prefixes=(CHECKPOINT_PREFIX,))
    return weights


def to_peft(
    checkpoint_dir: str | Path, output_dir: str | Path, *, options: TransferOptions | None = None
) -> ConvertReport:
    """`plan_to_peft`, carried out."""
    return carry_out(plan_to_peft(checkpoint_dir), output_dir, options=options)


def plan_to_peft(checkpoint_dir: str | Path) -> Conversion:
    """A checkpoint of adapters as a PEFT directory.

    Tensors of a run, which are fp32, are written in the dtype of the adapter that it started from if they all
    fit into it exactly, as they do after zero steps; others in the checkpoint's. Raises CheckpointError for
    what is wrong with the checkpoint.
    """
    reader = DistReader(checkpoint_dir)
    companions = reader.directory / COMPANIONS_DIR
    weights = check_adapter_checkpoint(reader, load_model_spec(companions))
    check_files(reader)
    source, wanted = McoreSource(reader, weights), read_source_info(checkpoint_dir).adapter_dtype
    narrow = torch_dtype(wanted) if wanted is not None else None
    if narrow is not None and not all(_all_fit(source, name, narrow) for name in hf_tensors(weights)):
        narrow = None
    tensors = [
        PlannedTensor(name=name, dtype=_narrower(source.dtype(name), narrow), shape=tensor.shape)
        for name, tensor in hf_tensors(weights).items()
    ]
    size = sum(tensor.nbytes for tensor in tensors)
    layout = plan_layout(tensors, max_shard_size=size + 1, single_file=ADAPTER_FILE)

    def finish(stage: Path) -> None:
        (stage / CONFIG_FILE).write_bytes(inside(companions, CONFIG_FILE, error=CheckpointError).read_bytes())
        fsync(stage / CONFIG_FILE)

    files = output_files(layout, source)
    return Conversion(kind="peft", source=source, files=files, tensors=len(tensors), finish=finish)


def _narrower(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """`wanted` where it is a part of `stored`: what was narrow in an adapter of several dtypes stays so."""
    return wanted if wanted is not None and torch.promote_types(stored, wanted) == stored else stored


def _all_fit(source: Source, name: str, dtype: torch.dtype) -> bool:
    """Whether every element of a tensor is the same in `dtype`."""
    blocks = (source.read_rows(name, first, last) for first, last in row_blocks(source, name))
    return all(torch.equal(block.to(dtype).to(block.dtype), block) for block in blocks)


def adapter_to_mcore(
    model_dir: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    options: TransferOptions | None = None,
) -> ConvertReport:
    """`plan_adapter_to_mcore`, carried out."""
    return carry_out(plan_adapter_to_mcore(model_dir, adapter_dir), output_dir, options=options)


def plan_adapter_to_mcore(model_dir: str | Path, adapter_dir: str | Path) -> Conversion:
    """A PEFT directory as a checkpoint of adapters for the base `model_dir`, in its own dtype. Raises
    ModelError for what is wrong with either.
    """
    spec = load_model_spec(model_dir)
    adapter = open_adapter(adapter_dir, spec)
    plan = plan_checkpoint(adapter.weights, stored_dtypes(adapter.reader, adapter.weights))

    def finish(stage: Path) -> None:
        write_adapter_companions(model_dir, stage, config=adapter.config(), dtype=adapter.dtype())
        write_frame(stage, plan.tensors)

    return Conversion(
        kind="mcore-adapter",
        source=adapter.reader,
        files=plan.files,
        tensors=len(adapter.weights),
        finish=finish,
    )
