"""Part resume: a run of `braid sft` is killed, and goes on from its checkpoint under every layout."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch.bench.output import Table
from launch.bench.sweep import end_process, failure_reason
from launch.processes import World, environment_of_one, give_up
from launch.tiny import DATA_DIR
from launch.validate.layouts import Layout, layouts_of
from launch.validate.models import EXPERTS
from launch.validate.parity import ADAM_EPSILON
from launch.validate.tasks import Failure, Setup, Task
from launch.validate.verdict import PartReport, bounded, distance, largest, missing

_DENSE = "qwen3"
STEPS, _EVERY = 16, 4
"""Steps of a run, and between its checkpoints."""
_LEARNING_RATE = 3e-4
_POLL_SECONDS = 0.05


def tasks(setup: Setup) -> list[Task]:
    """The uninterrupted run of each kind of model, and what goes on from the killed one in every layout."""
    found = []
    for killed in kills(setup):
        mine = [layout for layout in setup.layouts if layout.experts == killed.layout.experts]
        model = killed.model
        found.append(
            Task(
                part="resume", name=f"straight-{model}", layout=killed.layout, model=model, variant="straight"
            )
        )
        found += [Task(part="resume", name=layout.name, layout=layout, model=model) for layout in mine]
    return found


def kills(setup: Setup) -> list[Task]:
    """Runs that are killed, each in the machine's first layout for its kind of model."""
    first: dict[bool, Layout] = {}
    for layout in layouts_of(setup.ranks):
        first.setdefault(layout.experts, layout)
    kinds = {layout.experts for layout in setup.layouts}
    models = {EXPERTS if kind else _DENSE: layout for kind, layout in first.items() if kind in kinds}
    return [
        Task(part="resume", name=f"killed-{model}", layout=layout, model=model, variant="killed")
        for model, layout in models.items()
    ]


def _stop(task: Task, setup: Setup) -> tuple[Task, dict[str, Any] | None]:
    """The killed run of a task's model, and what became of it."""
    (killed,) = (one for one in kills(setup) if one.model == task.model)
    return killed, setup.result(killed)


def ready(task: Task, setup: Setup) -> bool:
    """Whether there is something to go on from, where a task has to."""
    return task.variant == "straight" or _stop(task, setup)[1] is not None


def kill(task: Task, setup: Setup, timeout: float) -> None:
    """Start the run in processes of its own, and end all of them by SIGKILL, as when a machine goes down,
    when a checkpoint is complete and training has gone on from there.
    """
    from engine.training.resume import list_checkpoints

    setup.forget(task)
    output = setup.folder(task) / "run"
    environment = environment_of_one() | {"NPROC_PER_NODE": str(task.layout.ranks)}
    log = setup.folder(task) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "launch.cli", "sft", *_words(task, setup)]
    ends = time.monotonic() + timeout
    with log.open("w") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=printed)
        try:
            while process.poll() is None and time.monotonic() < ends:
                saved = list_checkpoints(output)
                if saved and _last_step(output) > _step(saved[-1]):
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            running = process.poll() is None
            end_process(process)
    saved, last = list_checkpoints(output), _last_step(output)
    if running and saved and last < STEPS:
        setup.finish(task, {"checkpoint": saved[-1].name, "saved_step": _step(saved[-1]), "last_step": last})
        return
    reason = failure_reason(log.read_text(encoding="utf-8"), process.returncode)
    why = f"no checkpoint after {timeout:g} s" if running else f"the run ended before it was killed: {reason}"
    setup.fail(task, Failure(message=why))


def perform(task: Task, setup: Setup, world: World) -> dict[str, Any]:
    """Train on every rank of an open default group; losses by step."""
    import torch.distributed as dist

    words = _words(task, setup)
    if task.variant != "straight":
        killed, result = _stop(task, setup)
        assert result is not None
        checkpoint = setup.folder(killed) / "run" / result["checkpoint"]
        words += ["--resume_from_checkpoint", str(checkpoint)]
    run_sft(world, words)
    dist.barrier()
    output = setup.folder(task) / "run"
    losses = _losses(output) if world.rank == 0 else {}
    if world.rank == 0:
        shutil.rmtree(output)
    return {"losses": losses}


def run_sft(world: World, argv: Sequence[str]) -> None:
    """`braid sft` on an open default group: what a worker does between opening and closing its processes,
    without the export.
    """
    from engine.config.adopt import adopt
    from engine.config.options import SftConfig
    from engine.config.parse import parse
    from engine.runtime import mcore
    from engine.runtime.platform import open_platform_of
    from engine.training.watch import StopRequest
    from launch.blueprint import draw
    from launch.sft import prepare_here, settle_resume, share_data, train

    config, given = parse(SftConfig, argv)
    blueprint = draw(config, world, adopted=adopt(config, given))
    platform = open_platform_of(config.model, world.local_rank)
    data = prepare_here(blueprint, world)
    groups = mcore.initialize(blueprint.layout, platform, seed=config.run.seed)
    blueprint = settle_resume(blueprint, world)
    hung = partial(give_up, world, str(blueprint.layout.place(world.rank)))
    train(blueprint, platform, groups, share_data(data, blueprint), hung, StopRequest())


def tidy(setup: Setup) -> None:
    """Remove the checkpoints of killed runs from which nothing is left to go on."""
    if all(setup.is_done(task) for task in tasks(setup)):
        for task in kills(setup):
            shutil.rmtree(setup.folder(task) / "run", ignore_errors=True)


def _words(task: Task, setup: Setup) -> list[str]:
    """In fp32, of torch's layers: what goes on differs by rounding only."""
    return [
        *("--model", str(setup.model_dir(task.model)), "--dataset", f"{DATA_DIR / 'qa.jsonl'}#64"),
        *("--output_dir", str(setup.folder(task) / "run"), "--device", setup.device),
        *("--torch_dtype", "float32", "--transformer_impl", "torch", "--max_length", "256"),
        *("--max_steps", str(STEPS), "--save_steps", str(_EVERY), "--report_to", "none"),
        *("--global_batch_size", str(setup.micro_batches), "--learning_rate", str(_LEARNING_RATE)),
        *("--adam_epsilon", str(ADAM_EPSILON), *task.layout.words()),
    ]


def _losses(output: Path) -> dict[int, float]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _last_step(output: Path) -> int:
    return max(_losses(output), default=0) if (output / "metrics.jsonl").is_file() else 0


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def judge(setup: Setup) -> PartReport:
    """Losses after the checkpoint, against those of the uninterrupted run."""
    report = PartReport(part="resume", title="Killed, and resumed in another layout")
    rows: list[list[str]] = []
    for killed in kills(setup):
        stop = setup.result(killed)
        if stop is None:
            report.checks.append(missing(setup, killed, "killed run", layout=killed.name))
        for task in (task for task in tasks(setup) if task.model == killed.model):
            result = setup.result(task)
            if result is None:
                name = task.name if task.variant else None
                report.checks.append(missing(setup, task, "resumed run", layout=name))
            elif task.variant == "straight":
                straight = result["losses"]
                report.record[task.name] = straight
            elif stop is not None and f"straight-{task.model}" in report.record:
                report.record[task.name] = result["losses"]
                rows.append(_compare(setup, task, killed, stop, straight, report))
    columns = ("layout", "saved in", "killed behind step", "went on from", "loss", "")
    report.tables.append(
        Table(title="relative distance from the uninterrupted run", columns=columns, rows=rows)
    )
    report.notes.append(
        f"A run of {STEPS} steps in fp32 is saved every {_EVERY} steps, and all its processes are killed "
        f"(SIGKILL) behind a checkpoint. Every layout goes on from it to the end. Bound: each loss within "
        f"{setup.config.bounds.resume_bound:g} of that of a run that nobody killed: sums are added up in "
        f"another order, and what that changes grows over the steps."
    )
    return report


def _compare(
    setup: Setup,
    task: Task,
    killed: Task,
    stop: dict[str, Any],
    straight: dict[str, float],
    report: PartReport,
) -> list[str]:
    found = report.record[task.name]
    steps = [str(step) for step in range(stop["saved_step"] + 1, STEPS + 1)]
    if sorted(found, key=int) != steps:
        value, note = float("nan"), f"steps {', '.join(found)} are not those behind the checkpoint"
    else:
        value = largest(distance([found[step] for step in steps], [straight[step] for step in steps]))
        note = ""
    check = bounded(task, "losses after resuming", value, setup.config.bounds.resume_bound, note)
    report.checks.append(check)
    state = "passed" if check.state == "passed" else "FAILED"
    where = (killed.layout.name, str(stop["last_step"]), str(stop["saved_step"]))
    return [task.layout.name, *where, f"{value:.1e}", state]
