"""What rank 0 shows of a run: a progress bar on a terminal, plain lines anywhere else."""

import math
import sys
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column


class Display:
    """Shows steps and events on rank 0, nothing on other ranks.

    On a terminal a bar follows the run, and what others print appears above it.
    """

    def __init__(self, total_steps: int, done: int, *, enabled: bool, console: Console | None = None) -> None:
        self._enabled, self._total = enabled, total_steps
        console = console or Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if enabled and console.is_interactive:
            self._bar = Progress(
                # Narrow terminals cut the numbers behind, never the step.
                TextColumn("step", table_column=Column(no_wrap=True, min_width=4)),
                MofNCompleteColumn(
                    table_column=Column(no_wrap=True, min_width=2 * len(str(total_steps)) + 1)
                ),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done, numbers="")
            self._bar.start()

    def advance(self, step: int) -> None:
        """A step is done; call it for every step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        """The record of a logged step."""
        if self._bar is not None:
            self._bar.update(self._task, numbers="  ".join(_numbers(record)))
        elif self._enabled:
            width = len(str(self._total))
            print("  ".join([f"step {record['step']:>{width}}/{self._total}", *_numbers(record)]), flush=True)

    def line(self, text: str) -> None:
        """An event, as a line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


def _numbers(record: dict[str, Any]) -> list[str]:
    """The parts of a training record that people watch."""
    parts = [
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"grad norm {record['grad_norm']:.3f}" if record["grad_norm"] is not None else "grad norm -",
        f"{record['tokens_per_s']:,.0f} tok/s",
    ]
    if record["mfu"] is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record["eta_s"] is not None and math.isfinite(record["eta_s"]):
        parts.append(f"eta {timedelta(seconds=round(record['eta_s']))}")
    return parts
