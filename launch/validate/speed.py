"""Part speed: what `braid bench train` measures under every layout, and what that says about scaling."""

import copy
from functools import cache
from typing import Any

from engine.config.bench import TrainBenchConfig
from engine.config.options import ModelOptions
from engine.config.parse import parse
from engine.errors import ConfigError
from launch.bench.output import Table
from launch.bench.paper import draw_bench
from launch.bench.shapes import spec_of_shape
from launch.gpu import Card, visible_card
from launch.memory import check_card
from launch.processes import World
from launch.validate.efficiency import ideal_bubble, measured_bubble, ratio
from launch.validate.layouts import ONE, Layout, data_parallel
from launch.validate.tasks import Failure, Setup, Task
from launch.validate.verdict import Check, PartReport, missing, outcome

_FALLBACK = "qwen2.5-1.5b"
_LONG = 4
"""Times as many micro-batches, for the bubble."""


def tasks(setup: Setup) -> list[Task]:
    """One GPU and every layout that is for models of this kind; DP 1, DP N and TP 2 of the model for scaling;
    pipelines with more micro-batches too.
    """
    shape, small = setup.config.speed.shape, scaling_shape(setup)
    experts = spec_of_shape(shape).moe is not None
    layouts = [ONE, *(layout for layout in setup.layouts if layout.experts == experts)]
    found = [_task(shape, layout) for layout in layouts]
    found += [_task(small, layout) for layout in _scaling(setup)]
    found += [_task(shape, layout, long=True) for layout in layouts if layout.pp > 1]
    return list({task.name: task for task in found}.values())


def _task(shape: str, layout: Layout, *, long: bool = False) -> Task:
    name = f"{shape}-{layout.name}{'-long' if long else ''}"
    return Task(part="speed", name=name, layout=layout, model=shape, variant="long" if long else "")


def _scaling(setup: Setup) -> list[Layout]:
    return [ONE, data_parallel(setup.ranks), Layout(name="TP2", ranks=2, tp=2)]


def scaling_shape(setup: Setup) -> str:
    """The model whose DP 1 is compared with."""
    options = setup.config.speed
    if options.scaling_shape is not None:
        return options.scaling_shape
    fits = refusal(_task(options.shape, ONE), setup) is None
    return options.shape if fits and spec_of_shape(options.shape).moe is None else _FALLBACK


def configure(task: Task, setup: Setup) -> TrainBenchConfig:
    """The options of a measurement, full rows so that all steps are the same work."""
    options = setup.config.speed
    accumulation = options.accumulation * (_LONG if task.variant == "long" else 1)
    words = [
        *("--shape", task.model, "--device", setup.device, "--lengths", "even"),
        *("--transformer_impl", "torch" if setup.on_cpu else setup.config.validate.transformer_impl),
        *("--max_length", str(options.max_length), "--gradient_accumulation_steps", str(accumulation)),
        *("--steps", str(options.bench_steps), "--warmup_steps", "1"),
        # The time of the update, which a pipeline's bubble does not count.
        *("--breakdown", str(task.layout.pp > 1).lower(), *task.layout.words()),
        *(word for option in options.bench_options for word in _words(option)),
    ]
    return copy.deepcopy(_read(tuple(words)))


@cache
def _read(words: tuple[str, ...]) -> TrainBenchConfig:
    return parse(TrainBenchConfig, words)[0]


def _words(option: str) -> tuple[str, str]:
    name, _, value = option.partition("=")
    return f"--{name}", value


def refusal(task: Task, setup: Setup) -> Failure | None:
    """Why a layout cannot be for this model, or on these cards, as paper says."""
    config, ranks = configure(task, setup), task.layout.ranks
    world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, started=False)
    try:
        blueprint = draw_bench(config, world)
    except ConfigError as error:
        return Failure(message=str(error))
    try:
        check_card(blueprint, _card(setup.on_cpu))
    except ConfigError as error:
        return Failure(message=str(error), oom=True)
    return None


@cache
def _card(on_cpu: bool) -> Card | None:
    return None if on_cpu else visible_card(ModelOptions(device="cuda"))


def perform(task: Task, setup: Setup, world: World) -> dict[str, Any]:
    """Measure on every rank of an open default group."""
    from engine.runtime import mcore
    from engine.runtime.platform import open_platform_of
    from launch.bench.train import benchmark

    config = configure(task, setup)
    blueprint, platform = draw_bench(config, world), open_platform_of(config.model, world.local_rank)
    groups = mcore.initialize(blueprint.layout, platform, seed=config.bench.seed)
    return benchmark(blueprint, config, platform, groups).record()


def judge(setup: Setup) -> PartReport:
    """Tables of speed and of efficiency. There is no bound: a layout passes where it could be measured."""
    report = PartReport(part="speed", title="Speed")
    rows: list[list[str]] = []
    for task in tasks(setup):
        result = setup.result(task)
        check = _check(setup, task, measured=result is not None)
        if task.layout is not ONE or task.model == scaling_shape(setup) or check.state == "passed":
            report.checks.append(check)
        if result is not None:
            report.record[task.name] = result
        rows.append(_row(task, result, check.note))
    columns = ("model, layout", "tokens/s per GPU", "MFU", "s a step", "GiB", "why not")
    options = setup.config.speed
    title = f"rows of {options.max_length:,} tokens, {options.accumulation} micro-batches of one row"
    report.tables += [Table(title=title, columns=columns, rows=rows), _efficiency(setup, report.record)]
    report.notes.append(
        "Efficiencies compare tokens/s per GPU. A pipeline's ideal bubble is (p - 1) / (v m + p - 1), with p "
        "stages of v chunks and m micro-batches; the measured one comes from a step with m and one with "
        f"{_LONG} m micro-batches, the update left out: what further micro-batches cost is what m of them "
        "would cost without a bubble. It counts everything that a longer step does not pay again."
    )
    return report


def _check(setup: Setup, task: Task, *, measured: bool) -> Check:
    if measured:
        return outcome(task, f"speed, {task.name}", passed=True)
    why = refusal(task, setup)
    if why is None:
        return missing(setup, task, f"speed, {task.name}")
    return Check(
        part=task.part,
        layout=task.layout.name,
        name=f"speed, {task.name}",
        state="failed" if why.oom else "does not apply",
        note=why.message,
    )


def _row(task: Task, result: dict[str, Any] | None, why: str) -> list[str]:
    if result is None:
        return [task.name, "", "", "", "", why]
    mfu = "" if result["mfu"] is None else f"{100 * result['mfu']:.1f} %"
    memory = "" if result["peak_memory_gib"] is None else f"{result['peak_memory_gib']:.1f}"
    speed = f"{result['tokens_per_s_per_device']:,.0f}"
    return [task.name, speed, mfu, f"{result['median_step_s']:.3f}", memory, ""]


def _efficiency(setup: Setup, results: dict[str, Any]) -> Table:
    """And put the numbers into `results`."""
    small, shape = scaling_shape(setup), setup.config.speed.shape

    def speed(layout: Layout) -> float | None:
        found = results.get(_task(small, layout).name)
        return None if found is None else float(found["tokens_per_s_per_device"])

    one, many, tp2 = (speed(layout) for layout in _scaling(setup))
    found: dict[str, tuple[float | None, str]] = {
        f"weak scaling, {small}, DP 1 -> DP {setup.ranks}": (ratio(many, one), ""),
        f"TP 2 per GPU, {small}, against TP 1": (ratio(tp2, one), ""),
    }
    for layout in (layout for layout in setup.layouts if layout.pp > 1):
        ideal = ideal_bubble(layout.pp, setup.config.speed.accumulation, layout.vpp)
        found[f"bubble, {shape}, {layout.name}"] = (
            _bubble(shape, layout, results),
            f"ideal {100 * ideal:.1f} %",
        )
    results["efficiency"] = {name: value for name, (value, _) in found.items()}
    rows = [
        [name, "not measured" if value is None else f"{100 * value:.1f} %", note]
        for name, (value, note) in found.items()
    ]
    return Table(title="efficiency", columns=("", "measured", ""), rows=rows)


def _bubble(shape: str, layout: Layout, results: dict[str, Any]) -> float | None:
    short, long = (results.get(_task(shape, layout, long=long).name) for long in (False, True))
    if short is None or long is None or short["breakdown"] is None:
        return None
    return measured_bubble(
        seconds=short["median_step_s"],
        micro_batches=short["accumulation"],
        long_seconds=long["median_step_s"],
        long_micro_batches=long["accumulation"],
        update_seconds=short["breakdown"]["optimizer_s"],
    )
