"""Part parity: losses and gradient norms of a few steps under every layout, against one GPU's."""

from dataclasses import asdict
from typing import Any

from launch.bench.output import Table
from launch.processes import World
from launch.validate.layouts import ONE
from launch.validate.models import models_of
from launch.validate.tasks import Setup, Task
from launch.validate.verdict import PartReport, bounded, distance, largest, missing

DTYPES = ("float32", "bfloat16")
_STEPS = 3
_ROWS = 2
"""Of a micro-batch: documents of their own in one sequence."""
_TOKENS = {False: 256, True: 24}
"""Of the longest row, by whether the device is a CPU."""
_LEARNING_RATE = 1e-3
# AdamW divides a gradient by its own magnitude: with 1e-8 an element that is nothing but rounding noise moves
# by a full learning rate in a random direction, and a comparison would test the noise.
ADAM_EPSILON = 1e-5


def tasks(setup: Setup) -> list[Task]:
    """One GPU's runs, and one for every layout; a task has a model's, or a layout's, in both dtypes."""
    kinds = sorted({layout.experts for layout in setup.layouts})
    references = [
        Task(part="parity", name=f"one-{model}", layout=ONE, model=model)
        for experts in kinds
        for model in models_of(experts)
    ]
    return references + [Task(part="parity", name=layout.name, layout=layout) for layout in setup.layouts]


def perform(task: Task, setup: Setup, world: World) -> dict[str, Any]:
    """Train on every rank of an open default group; curves by model and dtype."""
    models = [task.model] if task.model else models_of(task.layout.experts)
    return {
        f"{model} {dtype}": asdict(_train(task, setup, world, model, dtype))
        for model in models
        for dtype in DTYPES
    }


def _train(task: Task, setup: Setup, world: World, model: str, dtype: str) -> Any:
    from engine.runtime import mcore
    from launch.validate import runs

    platform = runs.platform_for(setup, world, dtype)
    options = task.layout.optimizer(adam_epsilon=ADAM_EPSILON)
    run = runs.open_run(platform, world.size, str(setup.model_dir(model)), task.layout.parallel(), options)
    steps = [
        runs.random_rows(
            _ROWS * setup.micro_batches,
            vocabulary=run.spec.vocab_size,
            longest=_TOKENS[setup.on_cpu],
            seed=seed,
        )
        for seed in range(_STEPS)
    ]
    batches = [runs.deal(rows, run.groups, _ROWS) for rows in steps]
    curve = runs.train(run, options, batches, [_LEARNING_RATE] * _STEPS)
    runs.release(run.models)
    mcore.destroy()  # the next run of this task opens groups of its own
    return curve


def judge(setup: Setup) -> PartReport:
    """Largest relative distance of a step from one GPU's, in the same dtype."""
    report = PartReport(part="parity", title="Parity with one GPU")
    all_tasks = tasks(setup)
    wanted: dict[str, Any] = {}
    for task in (task for task in all_tasks if task.model):
        result = setup.result(task)
        if result is None:
            report.checks.append(missing(setup, task, "one GPU", layout=task.name))
        wanted |= result or {}
    rows: list[list[str]] = []
    for task in (task for task in all_tasks if not task.model):
        result = setup.result(task)
        if result is None:
            report.checks.append(missing(setup, task, "parity"))
            continue
        report.record[task.name] = result
        for run, found in result.items():
            if run in wanted:
                rows.append(_compare(setup, task, run, found, wanted, report))
    bounds = setup.config.bounds
    report.record["one"] = wanted
    columns = ("layout", "model, dtype", "loss", "bound", "gradient norm", "bound", "")
    report.tables.append(Table(title="largest relative distance of a step", columns=columns, rows=rows))
    report.notes.append(
        f"{_STEPS} steps of {setup.micro_batches} micro-batches from the same random weights with the same "
        f"rows; AdamW at {_LEARNING_RATE:g}, epsilon {ADAM_EPSILON:g}. Bounds in fp32: loss "
        f"{bounds.fp32_loss_bound:g}, gradient norm {bounds.fp32_norm_bound:g}; layouts only add up in "
        f"another order. In bf16, which keeps 8 bits of a number, layouts round other partial sums: loss "
        f"{bounds.bf16_loss_bound:g}, gradient norm {bounds.bf16_norm_bound:g}, or {bounds.noise_factor:g} "
        f"times the noise of bf16, the distance between one GPU's runs in bf16 and in fp32."
    )
    return report


def noise_bounds(setup: Setup, rounded: dict[str, Any], exact: dict[str, Any]) -> tuple[float, float]:
    """How far losses and gradient norms of a layout may be from one GPU's in bf16, `rounded`, of which
    `exact` are those in fp32.
    """
    bounds = setup.config.bounds
    losses, norms = _distances(rounded, exact)
    return bounds.in_bf16(bounds.bf16_loss_bound, losses), bounds.in_bf16(bounds.bf16_norm_bound, norms)


def _distances(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, float]:
    """The largest of any step, of losses and of gradient norms."""
    losses, norms = (largest(distance(found[name], wanted[name])) for name in ("losses", "grad_norms"))
    return losses, norms


def _compare(
    setup: Setup, task: Task, run: str, found: dict[str, Any], wanted: dict[str, Any], report: PartReport
) -> list[str]:
    bounds, (model, dtype) = setup.config.bounds, run.split()
    loss_bound, norm_bound = (
        (bounds.fp32_loss_bound, bounds.fp32_norm_bound)
        if dtype == "float32"
        else noise_bounds(setup, wanted[run], wanted[f"{model} float32"])
    )
    losses, norms = _distances(found, wanted[run])
    loss = bounded(task, f"loss, {run}", losses, loss_bound)
    norm = bounded(task, f"gradient norm, {run}", norms, norm_bound)
    report.checks += [loss, norm]
    state = "passed" if loss.state == norm.state == "passed" else "FAILED"
    values = (f"{loss.value:.1e}", f"{loss_bound:.1e}", f"{norm.value:.1e}", f"{norm_bound:.1e}")
    return [task.layout.name, run, *values, state]
