"""Gets tasks done by crews: starts one, watches it, and starts another when it was ended before the last."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.parse import build, flatten
from launch.bench.output import write_json
from launch.bench.sweep import end_process, failure_reason
from launch.processes import environment_of_one
from launch.validate import comm, curves, parity, resume, speed
from launch.validate.crew import AGAIN
from launch.validate.models import build_models
from launch.validate.options import ValidateConfig
from launch.validate.tasks import Failure, Setup, Task

CREW = "crew.json"
ON_SMALL_MODELS = ("parity", "curves", "resume")
_POLL_SECONDS = 0.2
PLANS = {
    "comm": comm.tasks,
    "parity": parity.tasks,
    "curves": curves.tasks,
    "resume": resume.tasks,
    "speed": speed.tasks,
}


@dataclass(kw_only=True)
class Clock:
    """How much of the time of each part is left."""

    seconds: float
    """That every part has."""

    spent: dict[str, float]

    def left(self, part: str) -> float:
        return self.seconds - self.spent.get(part, 0.0)

    def spend(self, part: str, seconds: float) -> None:
        self.spent[part] = self.spent.get(part, 0.0) + seconds


def conduct(setup: Setup) -> None:
    """Get done what was asked for; returns when each task has a result or an error, or no time is left."""
    options = setup.config.validate
    clock = Clock(seconds=options.part_timeout, spent={})
    plan = [task for part, tasks in PLANS.items() if part in options.parts for task in tasks(setup)]
    left = [task for task in plan if not setup.is_done(task) and _fits(task, setup)]
    build_models(setup, [task.layout.experts for task in left if task.part in ON_SMALL_MODELS])
    for killed in resume.kills(setup) if any(task.part == "resume" for task in left) else ():
        if not setup.is_done(killed):
            print(f"{killed.id}: {killed.layout.ranks} processes that will be killed", flush=True)
            began = time.monotonic()
            resume.kill(killed, setup, clock.left("resume"))
            clock.spend("resume", time.monotonic() - began)
    crews = 0
    while tasks := [task for task in left if not setup.is_done(task) and _can_start(task, setup, clock)]:
        crews += 1
        print(f"{len(tasks)} tasks for {setup.ranks} processes", flush=True)
        _run_crew(setup, tasks, clock, setup.root / f"crew-{int(time.time())}-{crews}.log")
    resume.tidy(setup)


def _fits(task: Task, setup: Setup) -> bool:
    return task.part != "speed" or speed.refusal(task, setup) is None


def _can_start(task: Task, setup: Setup, clock: Clock) -> bool:
    ready = task.part != "resume" or resume.ready(task, setup)
    return ready and clock.left(task.part) > 0


def _run_crew(setup: Setup, tasks: Sequence[Task], clock: Clock, log: Path) -> None:
    """One crew, until it ends or has to be ended."""
    for task in tasks:
        setup.forget(task)
    (setup.root / AGAIN).unlink(missing_ok=True)
    orders = {
        "options": flatten(setup.config),
        "ranks": setup.ranks,
        "on_cpu": setup.on_cpu,
        "tasks": [task.id for task in tasks],
    }
    write_json(setup.root / CREW, orders)
    environment = environment_of_one() | {"NPROC_PER_NODE": str(setup.ranks)}
    command = [sys.executable, "-m", "launch.cli", "validate", "crew", str(setup.root / CREW)]
    with log.open("w") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=printed)
        try:
            hung = _watch(setup, tasks, clock, process)
        finally:
            end_process(process)
    _blame(setup, tasks, hung=hung, code=process.returncode, printed=log.read_text(errors="replace"))


def _watch(
    setup: Setup, tasks: Sequence[Task], clock: Clock, process: "subprocess.Popen[bytes]"
) -> str | None:
    """Wait for the crew. Returns why it is to be ended: "hung", or "late" for a part that has no time left;
    None where it ended by itself.
    """
    done = sum(setup.is_done(task) for task in tasks)
    moved = before = time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        now, finished = time.monotonic(), sum(setup.is_done(task) for task in tasks)
        if finished > done:
            done, moved = finished, now
            print(f"[{finished}/{len(tasks)}]", flush=True)
        part = next((task.part for task in tasks if not setup.is_done(task)), None)
        if part is None:
            continue
        clock.spend(part, now - before)
        before = now
        if clock.left(part) <= 0:
            return "late"
        if now - moved > setup.config.validate.task_timeout:
            return "hung"
    return None


def _blame(setup: Setup, tasks: Sequence[Task], *, hung: str | None, code: int, printed: str) -> None:
    """Find out which task ended a crew that did not end well, and say so in its results; without one that can
    be blamed the first that is left is, or crews would be started for ever.
    """
    left = [task for task in tasks if not setup.is_done(task)]
    failed = any(setup.failure(task) is not None for task in tasks)
    again = (setup.root / AGAIN).exists() and len(left) < len(tasks)
    if not left or hung == "late" or again or (failed and hung is None):
        return
    seconds = setup.config.validate.task_timeout
    reason = (
        f"no result within {seconds:g} s" if hung else f"the processes ended: {failure_reason(printed, code)}"
    )
    for task in [task for task in left if setup.started(task)] or left[:1]:
        setup.fail(task, Failure(message=reason))


def read_orders(path: Path) -> tuple[Setup, list[Task]]:
    """What a rank of a crew is told."""
    orders = json.loads(path.read_text(encoding="utf-8"))
    config = build(ValidateConfig, orders["options"])
    setup = Setup(config=config, ranks=orders["ranks"], on_cpu=orders["on_cpu"])
    known = {task.id: task for part in config.validate.parts if part in PLANS for task in PLANS[part](setup)}
    return setup, [known[name] for name in orders["tasks"]]
