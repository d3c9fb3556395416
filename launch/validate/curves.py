"""Part curves: a training run in bf16 under every layout, against one GPU's in bf16 and in fp32."""

from dataclasses import asdict
from itertools import pairwise
from math import sqrt
from statistics import fmean
from typing import Any

from launch.bench.output import Table
from launch.processes import World
from launch.validate.layouts import ONE
from launch.validate.models import EXPERTS
from launch.validate.parity import ADAM_EPSILON
from launch.validate.tasks import Setup, Task
from launch.validate.verdict import PartReport, bounded, distance, largest, missing

_DENSE = "qwen2.5"
_ROWS = 2
_SIZES = {False: (256, 256), True: (32, 64)}
"""Tokens of a row and symbols of the language that is learnt, by whether the device is a CPU."""
_LEARNING_RATE, _WARMUP = 1e-3, 10
_PARTS = 10
"""Of a curve; those of its second half are compared by their means. One alone would be a matter of luck: two
bf16 runs of a mixture of experts cross each other all the time.
"""


def tasks(setup: Setup) -> list[Task]:
    """One GPU's curves in both dtypes for each kind of model, and one for every layout."""
    kinds = sorted({layout.experts for layout in setup.layouts})
    references = [
        Task(part="curves", name=f"one-{model}-{dtype}", layout=ONE, model=model, variant=dtype)
        for model in map(_model, kinds)
        for dtype in ("float32", "bfloat16")
    ]
    return references + [
        Task(part="curves", name=layout.name, layout=layout, model=_model(layout.experts), variant="bfloat16")
        for layout in setup.layouts
    ]


def _model(experts: bool) -> str:
    return EXPERTS if experts else _DENSE


def perform(task: Task, setup: Setup, world: World) -> dict[str, Any]:
    """Train on every rank of an open default group."""
    from launch.validate import runs

    platform = runs.platform_for(setup, world, task.variant)
    options, count = task.layout.optimizer(adam_epsilon=ADAM_EPSILON), setup.config.validate.steps
    model_dir = str(setup.model_dir(task.model))
    run = runs.open_run(platform, world.size, model_dir, task.layout.parallel(), options)
    tokens, symbols = _SIZES[setup.on_cpu]
    steps = runs.successor_rows(count, _ROWS * setup.micro_batches, tokens=tokens, symbols=symbols)
    rates = [_LEARNING_RATE * min(1.0, (step + 1) / _WARMUP) for step in range(count)]
    curve = runs.train(run, options, [runs.deal(rows, run.groups, _ROWS) for rows in steps], rates)
    runs.release(run.models)
    return asdict(curve)


def judge(setup: Setup) -> PartReport:
    """Distance from one GPU's curve, where that is known, beside what bf16 does to one GPU's curve."""
    report = PartReport(part="curves", title="Loss curves")
    all_tasks = tasks(setup)
    one: dict[tuple[str, str], list[float]] = {}
    for task in all_tasks:
        result = setup.result(task)
        if result is None:
            name = task.name if task.layout is ONE else None
            report.checks.append(missing(setup, task, "curve", layout=name))
            continue
        report.record[task.name] = result["losses"]
        if task.layout is ONE:
            one[task.model, task.variant] = result["losses"]
    rows = [
        _noise(model, one) for model in {task.model: None for task in all_tasks} if len(_of(model, one)) == 2
    ]
    for task in (task for task in all_tasks if task.layout is not ONE):
        references = _of(task.model, one)
        if task.name in report.record and len(references) == 2:
            exact, wanted = references
            rows.append(_compare(setup, task, report.record[task.name], wanted, exact, report))
    columns = ("layout", "first, last loss", "any step", "bound", "second half", "bound", "")
    report.tables.append(Table(title="relative distance from one GPU's curve", columns=columns, rows=rows))
    bounds = setup.config.bounds
    report.notes.append(
        f"{setup.config.validate.steps} steps in bf16. The noise of bf16 is measured: it is the distance "
        f"between one GPU's curves in bf16 and in fp32. Another layout rounds other partial sums, and may be "
        f"{bounds.noise_factor:g} times as far from one GPU's curve; by the means of the last five "
        f"tenths of the steps (root mean square) at least {bounds.curve_floor:g}, at any step at least "
        f"{2 * bounds.curve_floor:g}."
    )
    return report


def _of(model: str, one: dict[tuple[str, str], list[float]]) -> list[list[float]]:
    """One GPU's curves in fp32 and in bf16, as far as they are there."""
    return [one[model, dtype] for dtype in ("float32", "bfloat16") if (model, dtype) in one]


def _noise(model: str, one: dict[tuple[str, str], list[float]]) -> list[str]:
    exact, wanted = _of(model, one)
    any_step, half = (f"{value:.1e}" for value in _distances(wanted, exact))
    return [f"one GPU in fp32, {model}", f"{exact[0]:.3f}, {exact[-1]:.3f}", any_step, "", half, "", "noise"]


def noise_bounds(setup: Setup, wanted: list[float], exact: list[float]) -> tuple[float, float]:
    """How far a curve may be from one GPU's `wanted` at any step, and in its second half."""
    bounds = setup.config.bounds
    any_step, half = _distances(wanted, exact)
    return bounds.in_bf16(2 * bounds.curve_floor, any_step), bounds.in_bf16(bounds.curve_floor, half)


def _distances(found: list[float], wanted: list[float]) -> tuple[float, float]:
    """The largest of any step, and of the means of tenths of the second half the root mean square."""
    of_parts = distance(_means(found), _means(wanted))
    return largest(distance(found, wanted)), sqrt(fmean(value**2 for value in of_parts))


def _means(losses: list[float]) -> list[float]:
    borders = [len(losses) * part // _PARTS for part in range(_PARTS // 2, _PARTS + 1)]
    return [fmean(losses[start:end]) for start, end in pairwise(borders)]


def _compare(
    setup: Setup, task: Task, found: list[float], wanted: list[float], exact: list[float], report: PartReport
) -> list[str]:
    any_step, half = _distances(found, wanted)
    any_bound, half_bound = noise_bounds(setup, wanted, exact)
    checks = [
        bounded(task, "curve, any step", any_step, any_bound),
        bounded(task, "curve, second half", half, half_bound),
    ]
    report.checks += checks
    state = "passed" if all(check.state == "passed" for check in checks) else "FAILED"
    numbers = (any_step, any_bound, half, half_bound)
    ends = f"{found[0]:.3f}, {found[-1]:.3f}"
    return [task.layout.name, ends, *(f"{number:.1e}" for number in numbers), state]
