"""What a run reports: one object a logged step in metrics.jsonl, one line on the terminal, TensorBoard."""

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from engine.runtime.platform import Platform
from engine.training.step import StepTotals


@dataclass
class Throughput:
    """Time and work since the last logged step."""

    platform: Platform
    world_size: int
    start: float
    """time.monotonic() when the run began."""

    since: float = 0.0
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0

    def __post_init__(self) -> None:
        self.since = time.monotonic()

    def add(self, totals: StepTotals) -> None:
        """Count one step."""
        self.steps += 1
        self.tokens += totals.tokens
        self.flops += totals.flops

    def pause(self, seconds: float) -> None:
        """Leave out time that evaluation or saving took."""
        self.since += seconds

    def take(self, *, steps_left: int) -> dict[str, Any]:
        """Rates since the last call, then start over. Unknown values are None."""
        now = time.monotonic()
        seconds = max(now - self.since, 1e-9)
        per_device = self.flops / seconds / self.world_size
        peak = self.platform.peak_flops()
        memory = self.platform.memory_gib()
        rates = {
            "tokens_per_s": round(self.tokens / seconds, 1),
            "tflops_per_gpu": round(per_device / 1e12, 4),
            "mfu": round(per_device / peak, 4) if peak else None,
            "mem_gib": round(memory, 3) if memory is not None else None,
            "elapsed_s": round(now - self.start, 3),
            "eta_s": round(seconds / self.steps * steps_left, 1) if self.steps else None,
        }
        self.since, self.steps, self.tokens, self.flops = now, 0, 0, 0.0
        return rates


class MetricsLog:
    """Writes to `output_dir` on rank 0, and nothing on the others."""

    def __init__(self, output_dir: Path, *, report_to: list[str], resumed_step: int, enabled: bool) -> None:
        self._enabled = enabled
        self._tensorboard: Any = None
        if not enabled:
            return
        path = output_dir / "metrics.jsonl"
        _forget_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(output_dir / "runs"), purge_step=resumed_step + 1)

    def write(self, record: dict[str, Any], line: str) -> None:
        """Append `record` (its "step" counts from 1) and print `line`."""
        if not self._enabled:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(name, value, record["step"])
        print(line, flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self._enabled:
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop what a crashed run logged after the checkpoint it resumes from: those steps are taken again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the torn last line of a killed run
        if record.get("step", 0) <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def step_line(record: dict[str, Any], total_steps: int) -> str:
    """The terminal line of a training record."""
    width = len(str(total_steps))
    parts = [
        f"step {record['step']:>{width}}/{total_steps}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"grad norm {record['grad_norm']:.3f}" if record["grad_norm"] is not None else "grad norm -",
        f"{record['tokens_per_s']:,.0f} tok/s",
    ]
    if record["mfu"] is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record["eta_s"] is not None:
        parts.append(f"eta {timedelta(seconds=round(record['eta_s']))}")
    return "  ".join(parts)
