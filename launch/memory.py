"""The estimate of memory as a run is told it, and whether the cards of this machine have as much."""

import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from engine.config.options import ModelOptions
from engine.errors import ConfigError
from engine.model.memory import RankMemory, Workload, estimate
from launch.blueprint import Blueprint

_GIB = 2**30
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "layer", "head")
_GATHERED = "  gathered: what ranks share and one has whole for a while, weights at work and new gradients"
# Assumed: CUDA's context and libraries, and what the allocator cannot use; and buffers of NCCL.
_ALLOWANCE_GIB, _NCCL_GIB = 2.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU of this machine."""

    name: str
    gib: float


def visible_card(options: ModelOptions) -> Card | None:
    """The smallest card that the run would see here, as the driver's own tool says it: asking CUDA would open
    the card. None without one, and for runs on the CPU.
    """
    if options.device == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    cards = [line.split(", ", 1) for line in done.stdout.splitlines() if line[:1].isdigit()]
    if not cards:
        return None
    mib, name = min(cards, key=lambda card: float(card[0]))
    return Card(name=name, gib=float(mib) / 1024)


def workload(blueprint: Blueprint, card: Card | None) -> Workload:
    """What of a run decides about its memory; rows are taken to be as long as they may be."""
    config, options = blueprint.config, blueprint.config.model
    on_gpu = options.device == "cuda" or (options.device == "auto" and card is not None)
    may_have_te = options.device != "cpu" and find_spec("transformer_engine") is not None
    multiple = blueprint.micro_batch_multiple
    return Workload(
        spec=blueprint.spec,
        layout=blueprint.layout,
        recompute=config.recompute,
        optimizer=config.optimizer,
        lora=blueprint.lora,
        dtype=options.torch_dtype or ("bfloat16" if on_gpu else "float32"),
        use_te=options.transformer_impl == "te" or (options.transformer_impl == "auto" and may_have_te),
        fp8=options.fp8_recipe is not None,
        tokens=blueprint.shape.micro_batch_size * math.ceil(config.data.max_length / multiple) * multiple,
        micro_batches=blueprint.shape.accumulation,
    )


def describe_memory(blueprint: Blueprint) -> str:
    """The table of all stages, what is not in it, and whether a card of this machine has room for it."""
    card = visible_card(blueprint.config.model)
    work = workload(blueprint, card)
    stages = estimate(work)
    columns = (*_COLUMNS, *(("gathered",) if any(memory.gathered for memory in stages) else ()), "sum")
    allowance = _ALLOWANCE_GIB + (_NCCL_GIB if blueprint.layout.world_size > 1 else 0.0)
    lines = [
        f"memory of a rank on a GPU, an estimate in GiB: {work.dtype}, {work.tokens:,} tokens a micro-batch",
        "  stage" + "".join(f"{name:>13}" for name in columns),
        *(f"  {f'pp{rank}':<5}" + _row(memory, columns) for rank, memory in enumerate(stages)),
        "  layer and head: what one of them has while it is at work, of which the larger counts",
        *([_GATHERED] if "gathered" in columns else []),
        f"  not in the sum, assumed: {allowance:.0f} GiB for the CUDA context and libraries, memory in pieces"
        + (", NCCL" if blueprint.layout.world_size > 1 else ""),
    ]
    if card is not None:
        lines.append(f"  {_verdict(max(memory.total for memory in stages) / _GIB, allowance, card)}")
    return "\n".join(lines)


def _row(memory: RankMemory, columns: Sequence[str]) -> str:
    parts = [memory.total if name == "sum" else getattr(memory, name) for name in columns]
    return "".join(f"{part / _GIB:>13.1f}" for part in parts)


def _verdict(needed: float, allowance: float, card: Card) -> str:
    here = f"{card.name} here, {card.gib:.1f} GiB"
    if needed > card.gib:
        return f"{here}: does not fit, {needed - card.gib:.1f} GiB are missing"
    if needed + allowance > card.gib:
        return f"{here}: may not fit, only {card.gib - needed:.1f} GiB are left for what is not in the sum"
    return f"{here}: fits, {card.gib - needed - allowance:.1f} GiB are left"


def check_card(blueprint: Blueprint, card: Card | None) -> None:
    """Raise ConfigError where a card cannot even hold weights, gradients and optimizer."""
    if card is None:
        return
    needed = max(memory.lasting for memory in estimate(workload(blueprint, card))) / _GIB
    if needed > card.gib:
        raise ConfigError(
            f"weights, gradients and optimizer take {needed:.0f} GiB of a rank, {card.name} has "
            f"{card.gib:.0f} GiB"
        )
