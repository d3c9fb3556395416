"""What is concluded from results: one check a layout and quantity, and what a part says of itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.bench.output import Table
from launch.validate.tasks import Setup, Task


@dataclass(frozen=True, kw_only=True)
class Check:
    """One quantity of one layout."""

    part: str
    layout: str
    name: str
    state: Literal["passed", "failed", "not run", "does not apply"]
    value: float | None = None
    bound: float | None = None
    note: str = ""
    """Why it failed or was not run, where it is not the value."""


@dataclass(kw_only=True)
class PartReport:
    """What a part found."""

    part: str
    title: str
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences on what was done and where bounds come from."""
    record: dict[str, Any] = field(default_factory=dict)
    """What a program may want to read."""

    @property
    def state(self) -> str:
        """The worst of its checks; a part of which nothing was run is `not run`."""
        states = {check.state for check in self.checks}
        if "failed" in states:
            return "failed"
        if "not run" in states:
            return "incomplete" if "passed" in states else "not run"
        return "passed" if self.checks else "not run"


def bounded(task: Task, name: str, value: float, bound: float, note: str = "") -> Check:
    """Passed where the value is within the bound; what is not a number is within none."""
    state: Literal["passed", "failed"] = "passed" if value <= bound else "failed"
    return Check(
        part=task.part, layout=task.layout.name, name=name, state=state, value=value, bound=bound, note=note
    )


def outcome(task: Task, name: str, *, passed: bool, note: str = "") -> Check:
    """Of something that has no number."""
    state: Literal["passed", "failed"] = "passed" if passed else "failed"
    return Check(part=task.part, layout=task.layout.name, name=name, state=state, note=note)


def missing(setup: Setup, task: Task, name: str, layout: str | None = None) -> Check:
    """Of a task without a result: it failed, or its turn did not come."""
    failure = setup.failure(task)
    return Check(
        part=task.part,
        layout=layout or task.layout.name,
        name=name,
        state="not run" if failure is None else "failed",
        note="no result yet" if failure is None else failure.message,
    )


def distance(found: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Relative, element by element."""
    return [abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True)]


def largest(values: Sequence[float]) -> float:
    """The largest; not a number where one of them is none, which max() would hide."""
    return max(values, key=lambda value: float("inf") if value != value else value)
