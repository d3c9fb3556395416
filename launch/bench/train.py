"""`braid bench train`: steps of training on random weights and rows, timed."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from engine.config.bench import TrainBenchConfig
from engine.config.parse import flatten
from engine.data.loader import StepBatch
from engine.errors import TrainingError
from engine.runtime.platform import Platform, open_platform_of
from launch.batching import describe, training_loader
from launch.bench.breakdown import Breakdown, measure_breakdown
from launch.bench.data import random_store
from launch.bench.paper import BREAKDOWN_STEPS, check_outputs, draw_bench, total_steps
from launch.bench.ranks import Environment, opened_groups
from launch.bench.report import TrainReport, write_oom, write_train
from launch.blueprint import Blueprint
from launch.processes import World, open_world

if TYPE_CHECKING:
    from engine.runtime.mcore import Groups


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step; all but `seconds` and `batch` are the same on every rank."""

    seconds: float
    """From asking for the micro-batches to the sum of losses over all ranks."""

    tokens: int
    supervised: int
    flops: float
    loss: float
    batch: StepBatch


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A rank ready to take steps."""

    blueprint: Blueprint
    platform: Platform
    groups: "Groups"
    models: Sequence[Any]
    optimizer: Any
    batches: Iterator[StepBatch]
    flops_per_token: Callable[[int], float]

    def step(self) -> Step:
        """One step as the training loop takes it; call on every rank."""
        from engine.training.optimizer import set_learning_rate
        from engine.training.step import global_totals, train_step

        options, device = self.blueprint.config.optimizer, self.platform.device
        torch.cuda.synchronize()
        began = time.perf_counter()
        batch = next(self.batches)
        set_learning_rate(self.optimizer, options.learning_rate or 0.0, options.weight_decay)
        result = train_step(self.models, self.optimizer, batch.micro_batches, self.groups, device)
        totals = global_totals(result.losses, result.micro_batches, self.flops_per_token, self.groups, device)
        torch.cuda.synchronize()
        return Step(
            seconds=time.perf_counter() - began,
            tokens=totals.tokens,
            supervised=totals.supervised,
            flops=totals.flops,
            loss=totals.loss,
            batch=batch,
        )


class Phase:
    """What a rank is doing, for the message of one that runs out of memory."""

    def __init__(self) -> None:
        self.name = "starting"


def run(config: TrainBenchConfig, world: World, place: list[str]) -> None:
    """One rank's whole benchmark; rank 0 prints and writes the results. Raises UserError."""
    blueprint = draw_bench(config, world)
    open_world(world)
    bench = config.bench
    if world.rank == 0:
        check_outputs(bench.output_dir, bench.trace)
    platform = open_platform_of(config.model, world.local_rank)
    opened = opened_groups(
        blueprint.layout, platform, world, place, seed=bench.seed, deterministic=bench.deterministic
    )
    with opened as groups:
        report = benchmark(blueprint, config, platform, groups)
        if world.rank == 0:
            write_train(report, bench.output_dir)


def benchmark(
    blueprint: Blueprint, config: TrainBenchConfig, platform: Platform, groups: "Groups"
) -> TrainReport:
    """The measurement on open groups; call on every rank. Raises TrainingError where memory is not enough."""
    phase = Phase()
    with _memory_named(phase, config, blueprint, platform):
        return measure(build(blueprint, config, platform, groups, phase), config, phase)


def build(
    blueprint: Blueprint, config: TrainBenchConfig, platform: Platform, groups: "Groups", phase: Phase
) -> Runner:
    """Model, optimizer and rows, put together as a run of training has them."""
    from engine.data.prepare import PreparedData
    from engine.model.lora import initialize_adapters
    from engine.model.provider import build_chunks
    from engine.training.optimizer import build_optimizer, wrap_data_parallel
    from launch.bench.weights import initialize_weights

    run, spec, layout, lora = blueprint.config, blueprint.spec, blueprint.layout, blueprint.lora
    sequences = total_steps(config) * blueprint.shape.global_batch_size
    store = random_store(config.bench, sequences=sequences, vocab_size=spec.vocab_size)
    loader = training_loader(blueprint, PreparedData(train=store, evaluation=None), dp_rank=groups.dp_rank)
    if groups.rank == 0:
        print(f"{blueprint.summary()}\n{describe(loader)}", flush=True)
    phase.name = "while the model was built"
    chunks = build_chunks(spec, layout, platform, run.recompute, groups, lora, run.moe)
    initialize_weights(chunks, layout, groups, seed=run.run.seed)
    if lora is not None:
        initialize_adapters(chunks, seed=run.run.seed, groups=groups)
    phase.name = "while the optimizer was built"
    models = wrap_data_parallel(chunks, run.optimizer, groups)
    adapters = None if lora is None else lora.num_parameters(spec, active=True)
    return Runner(
        blueprint=blueprint,
        platform=platform,
        groups=groups,
        models=models,
        optimizer=build_optimizer(models, run.optimizer, groups, platform.dtype),
        batches=loader.steps(),
        flops_per_token=partial(spec.train_flops_per_token, adapter_parameters=adapters),
    )


def measure(runner: Runner, config: TrainBenchConfig, phase: Phase) -> TrainReport:
    """Warm up, time the steps, and take the further ones that were asked for; call on every rank."""
    bench, platform = config.bench, runner.platform
    for number in range(bench.warmup_steps):
        phase.name = f"in step {number + 1} of the warm-up"
        runner.step()
    if not platform.is_cpu:
        torch.cuda.reset_peak_memory_stats()
    steps = []
    for number in range(bench.steps):
        phase.name = f"in measured step {number + 1}"
        steps.append(runner.step())
    memory = _largest(platform.memory_gib())
    breakdown = None
    if bench.breakdown:
        phase.name = "in a step under timers"
        breakdown = measure_breakdown(
            lambda: runner.step().batch.wait_s, runner.models, runner.optimizer, steps=BREAKDOWN_STEPS
        )
    if bench.trace is not None:
        phase.name = "in the traced step"
        _trace(runner, Path(bench.trace))
    return _report(runner, config, steps, memory, breakdown)


def _report(
    runner: Runner,
    config: TrainBenchConfig,
    steps: Sequence[Step],
    memory_gib: float | None,
    breakdown: Breakdown | None,
) -> TrainReport:
    from engine.model.provider import attention_name

    blueprint, platform, layout = runner.blueprint, runner.platform, runner.blueprint.layout
    rows, places = _rows_and_places(steps, runner.groups)
    seconds = statistics.median(step.seconds for step in steps)
    tokens = statistics.mean(step.tokens for step in steps)
    tflops = statistics.mean(step.flops for step in steps) / seconds / layout.world_size / 1e12
    peak, loss, spec, lora = platform.peak_flops(), steps[-1].loss, blueprint.spec, blueprint.lora
    return TrainReport(
        model=str(blueprint.model_dir),
        architecture=spec.architecture,
        parameters=spec.num_parameters(),
        trained_parameters=spec.num_parameters() if lora is None else lora.num_parameters(spec),
        dtype=str(platform.dtype).removeprefix("torch."),
        transformer_impl="te" if platform.use_te else "torch",
        attention=attention_name(platform, layout, spec.head_dim),
        layout=layout,
        options=flatten(config),
        global_batch_size=blueprint.shape.global_batch_size,
        micro_batch_size=blueprint.shape.micro_batch_size,
        accumulation=blueprint.shape.accumulation,
        step_seconds=[step.seconds for step in steps],
        median_step_s=seconds,
        tokens_per_step=tokens,
        supervised_tokens_per_step=statistics.mean(step.supervised for step in steps),
        rows_per_step=rows / len(steps),
        padding_share=1.0 - sum(step.tokens for step in steps) / places,
        tokens_per_s=tokens / seconds,
        tokens_per_s_per_device=tokens / seconds / layout.world_size,
        tflops_per_device=tflops,
        mfu=tflops * 1e12 / peak if peak else None,
        peak_memory_gib=memory_gib,
        loss=loss if math.isfinite(loss) else None,
        breakdown=breakdown,
        environment=Environment.here(platform),
    )


def _rows_and_places(steps: Sequence[Step], groups: "Groups") -> tuple[int, int]:
    """Rows, and tokens with padding, of all steps and data-parallel ranks. Call on every rank."""
    sums = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    if groups.reports_loss and groups.cp_rank == 0:
        batches = [batch for step in steps for batch in step.batch.micro_batches]
        sums[0] = sum(len(batch.lengths) for batch in batches)
        sums[1] = sum(batch.tokens.numel() for batch in batches)
    dist.all_reduce(sums)
    return int(sums[0]), int(sums[1])


def _largest(value: float | None) -> float | None:
    """The largest value of all ranks. Call on every rank."""
    if value is None:
        return None
    largest = torch.tensor(value, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _trace(runner: Runner, path: Path) -> None:
    """Take one step, under the profiler on rank 0."""
    if runner.groups.rank != 0:
        runner.step()
        return
    from torch.profiler import ProfilerActivity, profile

    device = [] if runner.platform.is_cpu else [ProfilerActivity.CUDA]
    with profile(activities=[ProfilerActivity.CPU, *device]) as profiler:
        runner.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    print(f"wrote {path}", flush=True)


@contextlib.contextmanager
def _memory_named(
    phase: Phase, config: TrainBenchConfig, blueprint: Blueprint, platform: Platform
) -> Iterator[None]:
    """Turn what a device without memory raises into one line, and leave it in bench.json."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        message = f"out of memory on the device {phase.name}; {_remedy(blueprint)}"
        if config.bench.output_dir is not None:
            write_oom(Path(config.bench.output_dir), message, flatten(config), Environment.here(platform))
        raise TrainingError(message) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of torch's allocator, or of a library that allocates for itself."""
    texts = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _remedy(blueprint: Blueprint) -> str:
    config, ways = blueprint.config, []
    if config.batch.per_device_train_batch_size > 1:
        ways.append("lower per_device_train_batch_size")
    ways.append("lower max_length")
    if not config.recompute.gradient_checkpointing and config.recompute.recompute_granularity != "full":
        ways.append("pass --gradient_checkpointing")
    ways.append("raise tensor_model_parallel_size or pipeline_model_parallel_size")
    return ", ".join(ways[:-1]) + ", or " + ways[-1]
