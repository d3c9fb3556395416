"""What there is to do, piece by piece, and what became of each: every result is a file of its own, so that a
call that is cut off loses one piece at most. Pure Python.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.bench.output import write_json
from launch.validate.layouts import Layout, layouts_of
from launch.validate.options import ValidateConfig


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece; a part has names for its own variants."""

    part: str
    name: str
    layout: Layout
    model: str = ""
    variant: str = ""

    @property
    def id(self) -> str:
        """The directory of its files, relative to that of all results."""
        return f"{self.part}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no result."""

    message: str
    oom: bool = False


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A call: its options, and the machine as it was found."""

    config: ValidateConfig
    ranks: int
    on_cpu: bool

    @property
    def root(self) -> Path:
        """Directory of the report and all results."""
        return Path(str(self.config.validate.output_dir))

    @property
    def device(self) -> str:
        return "cpu" if self.on_cpu else "cuda"

    @cached_property
    def layouts(self) -> list[Layout]:
        """What is validated. Raises ConfigError."""
        return layouts_of(self.ranks, self.config.validate.layouts)

    @property
    def micro_batches(self) -> int:
        """Of a step, over all data-parallel ranks: enough for every schedule and every rank."""
        return max(4, self.ranks)

    @property
    def layers(self) -> int:
        """Decoder layers that every schedule of these ranks can deal out."""
        return max(4, *(layout.pp * layout.vpp for layout in layouts_of(self.ranks)))

    def model_dir(self, name: str) -> Path:
        """Where a small model lies."""
        return self.root / "models" / name

    def folder(self, task: Task) -> Path:
        """Where the files of a task lie."""
        return self.root / task.id

    def begin(self, task: Task) -> None:
        """Note that a task is under way."""
        self.folder(task).mkdir(parents=True, exist_ok=True)
        (self.folder(task) / "started").touch()

    def finish(self, task: Task, result: dict[str, Any]) -> None:
        """Keep a result."""
        write_json(self.folder(task) / "result.json", result)

    def fail(self, task: Task, failure: Failure) -> None:
        """Keep the reason, unless another rank was first."""
        path = self.folder(task) / "error.json"
        if not path.exists():
            write_json(path, asdict(failure))

    def started(self, task: Task) -> bool:
        return (self.folder(task) / "started").exists()

    def forget(self, task: Task) -> None:
        """What a task left that was cut off before it had a result."""
        shutil.rmtree(self.folder(task), ignore_errors=True)

    def result(self, task: Task) -> dict[str, Any] | None:
        """None where there is none."""
        return _read(self.folder(task) / "result.json")

    def failure(self, task: Task) -> Failure | None:
        """None where it did not fail, as far as it got."""
        found = _read(self.folder(task) / "error.json")
        return None if found is None else Failure(**found)

    def is_done(self, task: Task) -> bool:
        return any((self.folder(task) / f"{kind}.json").exists() for kind in ("result", "error"))


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
