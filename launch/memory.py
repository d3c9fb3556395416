"""The estimate of memory as a run is told it, and whether the cards of this machine have as much."""

import math
from collections.abc import Sequence

from engine.errors import ConfigError
from engine.model.memory import RankMemory, Workload, estimate
from launch.blueprint import Blueprint
from launch.gpu import Card, may_have_te, visible_card

GIB = 2**30
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "layer", "head")
_GATHERED = "  gathered: what ranks share and one has whole for a while, weights at work and new gradients"
# Assumed: CUDA's context and libraries, and what the allocator cannot use; and buffers of NCCL.
_ALLOWANCE_GIB, _NCCL_GIB = 2.0, 2.0


def workload(blueprint: Blueprint) -> Workload:
    """What of a run decides about its memory; rows are taken to be as long as they may be, and a device that
    is not named to be a GPU.
    """
    config, options = blueprint.config, blueprint.config.model
    multiple, fp8 = blueprint.micro_batch_multiple, options.fp8_recipe is not None
    return Workload(
        spec=blueprint.spec,
        layout=blueprint.layout,
        recompute=config.recompute,
        optimizer=config.optimizer,
        lora=blueprint.lora,
        dtype=options.torch_dtype or ("float32" if options.device == "cpu" else "bfloat16"),
        use_te=options.transformer_impl == "te" or fp8 or may_have_te(options, dry_run=False),
        fp8=fp8,
        tokens=blueprint.shape.micro_batch_size * math.ceil(config.data.max_length / multiple) * multiple,
        micro_batches=blueprint.shape.accumulation,
    )


def describe_memory(blueprint: Blueprint) -> str:
    """The table of all stages, what is not in it, and whether a card of this machine has room for it."""
    card = visible_card(blueprint.config.model)
    work = workload(blueprint)
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
        lines.append(f"  {_verdict(max(memory.total for memory in stages) / GIB, allowance, card)}")
    return "\n".join(lines)


def _row(memory: RankMemory, columns: Sequence[str]) -> str:
    parts = [memory.total if name == "sum" else getattr(memory, name) for name in columns]
    return "".join(f"{part / GIB:>13.1f}" for part in parts)


def _verdict(needed: float, allowance: float, card: Card) -> str:
    here = f"{card.name} here, {card.gib:.1f} GiB"
    if needed > card.gib:
        return f"{here}: does not fit, {needed - card.gib:.1f} GiB are missing"
    if needed + allowance > card.gib:
        return f"{here}: may not fit, only {card.gib - needed:.1f} GiB are left for what is not in the sum"
    return f"{here}: fits, {card.gib - needed - allowance:.1f} GiB are left"


def peak(blueprint: Blueprint) -> float:
    """Bytes of the rank that takes the most."""
    return max(memory.total for memory in estimate(workload(blueprint)))


def check_card(blueprint: Blueprint, card: Card | None) -> None:
    """Raise ConfigError where a card cannot even hold weights, gradients and optimizer."""
    if card is None:
        return
    needed = max(memory.lasting for memory in estimate(workload(blueprint))) / GIB
    if needed > card.gib:
        raise ConfigError(
            f"weights, gradients and optimizer take {needed:.0f} GiB of a rank, {card.name} has "
            f"{card.gib:.0f} GiB"
        )
