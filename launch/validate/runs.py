"""Short training runs from a checkpoint under a layout, of which losses and gradient norms are kept."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config.options import MoeOptions, OptimizerOptions, ParallelOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.data.batches import MicroBatch, collate
from engine.data.template import EncodedRow
from engine.model.spec import ModelSpec, load_model_spec
from engine.runtime.mcore import Groups
from engine.runtime.platform import Platform, open_platform
from launch.processes import World
from launch.validate.tasks import Setup


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A rank ready to take steps."""

    spec: ModelSpec
    platform: Platform
    groups: Groups
    models: list[Any]
    optimizer: Any


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Of every step, before its update."""

    losses: list[float]
    grad_norms: list[float]


def platform_for(setup: Setup, world: World, dtype: str = "float32") -> Platform:
    """A rank's device. Transformer Engine's attention knows no fp32."""
    plain = dtype == "float32" or setup.on_cpu
    return open_platform(
        device=setup.device,
        dtype=dtype,
        transformer_impl="torch" if plain else setup.config.validate.transformer_impl,
        local_rank=world.local_rank,
    )


def open_run(
    platform: Platform,
    world_size: int,
    model_dir: str,
    parallel: ParallelOptions,
    optimizer: OptimizerOptions,
    recompute: RecomputeOptions | None = None,
    *,
    adapter: str | None = None,
    moe: MoeOptions | None = None,
) -> OpenRun:
    """Groups over the default group's ranks, and a checkpoint's weights in them. With `adapter`, a PEFT
    directory, that is what is trained.
    """
    from converters.adapter import open_adapter
    from converters.load import load_adapter_weights, load_model_weights
    from engine.model.provider import build_chunks
    from engine.runtime import mcore
    from engine.training.optimizer import build_optimizer, wrap_data_parallel

    spec = load_model_spec(model_dir)
    layout = ParallelLayout.resolve(parallel, num_layers=spec.num_layers, world_size=world_size)
    groups = mcore.initialize(layout, platform, seed=1)
    opened = open_adapter(adapter, spec) if adapter is not None else None
    lora = opened.lora if opened is not None else None
    chunks = build_chunks(spec, layout, platform, recompute or RecomputeOptions(), groups, lora, moe)
    load_model_weights(chunks, model_dir, spec, groups)
    if opened is not None:
        load_adapter_weights(chunks, opened, groups)
    models = wrap_data_parallel(chunks, optimizer, groups)
    built = build_optimizer(models, optimizer, groups, platform.dtype)
    return OpenRun(spec=spec, platform=platform, groups=groups, models=models, optimizer=built)


def train(
    run: OpenRun,
    options: OptimizerOptions,
    steps: Sequence[Sequence[MicroBatch]],
    learning_rates: Sequence[float],
) -> Curve:
    """Train on this rank's micro-batches of every step."""
    from engine.training.optimizer import set_learning_rate
    from engine.training.step import global_totals, train_step

    losses, norms, device = [], [], run.platform.device
    for batches, learning_rate in zip(steps, learning_rates, strict=True):
        set_learning_rate(run.optimizer, learning_rate, options.weight_decay)
        result = train_step(run.models, run.optimizer, batches, run.groups, device)
        done = (result.losses, result.micro_batches)
        losses.append(global_totals(*done, run.spec.train_flops_per_token, run.groups, device).loss)
        norms.append(result.grad_norm or 0.0)
    return Curve(losses=losses, grad_norms=norms)


def random_rows(count: int, *, vocabulary: int, longest: int, seed: int) -> list[EncodedRow]:
    """Rows of uneven length with two supervised stretches each, as a two-turn conversation has."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(generator.integers(longest // 3, longest + 1))
        supervised = np.zeros(length, dtype=bool)
        supervised[length // 4 : length // 2] = True
        supervised[3 * length // 4 : length - 1] = True
        ids = generator.integers(0, vocabulary, length).astype(np.int32)
        rows.append(EncodedRow(input_ids=ids, supervised=supervised))
    return rows


def successor_rows(steps: int, rows: int, *, tokens: int, symbols: int) -> list[list[EncodedRow]]:
    """Each symbol has two likely successors: there is something to learn in few steps."""
    random = np.random.default_rng(3)
    successors = random.integers(0, symbols, (symbols, 2))
    found = []
    for _ in range(steps):
        chosen = (random.random((rows, tokens)) < 0.3).astype(np.int64)
        ids = np.empty((rows, tokens), dtype=np.int32)
        ids[:, 0] = random.integers(symbols, size=rows)
        for place in range(1, tokens):
            ids[:, place] = successors[ids[:, place - 1], chosen[:, place]]
        found.append([EncodedRow(input_ids=row, supervised=np.arange(tokens) > 0) for row in ids])
    return found


def deal(rows: Sequence[EncodedRow], groups: Groups, size: int) -> list[MicroBatch]:
    """A data-parallel rank's micro-batches. Which rows share one does not depend on the layout: the
    load-balancing loss of experts does on that.
    """
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [collate_rows(batch, groups.layout) for batch in batches[groups.dp_rank :: groups.layout.dp]]


def collate_rows(rows: Sequence[EncodedRow], layout: ParallelLayout) -> MicroBatch:
    """A micro-batch that the layout can cut."""
    return collate(
        rows,
        pad_id=0,
        pad_to_multiple_of=layout.micro_batch_multiple,
        pad_rows_to_multiple_of=layout.document_multiple,
    )


def release(models: Sequence[Any]) -> None:
    """Break the cycles through autograd's hooks, which Python's collector cannot see: they would keep every
    model, and with it the threads of its gloo groups, alive in a process that goes on.
    """
    for model in models:
        if "rows" in vars(model):  # of Megatron-FSDP, which gathers ahead for a next step, and wraps twice
            model.stop_communication()
            vars(model.module).clear()
        vars(model).clear()


def release_all() -> None:
    """The same for all models of this process, whoever has made them."""
    gc.collect()
    for found in gc.get_objects():
        if type(found).__name__ in ("DistributedDataParallel", "Sharded"):
            release([found])
