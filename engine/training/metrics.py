"""What a run reports: one object a logged step in metrics.jsonl, and the same to the reporters."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from engine.runtime.platform import Platform
from engine.training.reporters import Reporter, open_reporters
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


def take_expert_load(models: Sequence[DistributedDataParallel]) -> dict[str, Any]:
    """Where the tokens of the steps since the last call went, all ranks together; nothing for a dense model.
    Call on every rank.

    `tokens_per_expert` adds up layers; `expert_load_max` is the largest share of a layer's tokens that an
    expert got, as a multiple of the even share, and `expert_load_min` the smallest.
    """
    chunks = [model.module for model in models]
    moe = chunks[0].spec.moe
    if moe is None:
        return {}
    load = torch.zeros(len(moe.layers), moe.num_experts + 1, device=torch.cuda.current_device())
    for chunk in chunks:
        for layer, router in chunk.routers():
            load[layer] = router.load
            router.load.zero_()
    dist.all_reduce(load)
    sparse = load[torch.tensor(moe.layers)]
    given, dropped = sparse[:, :-1], sparse[:, -1].sum()
    relative = given / given.mean(dim=1, keepdim=True).clamp_min(1e-9)
    return {
        "expert_load_max": round(float(relative.max()), 4),
        "expert_load_min": round(float(relative.min()), 4),
        "dropped_tokens": int(dropped),
        "tokens_per_expert": [int(count) for count in given.sum(dim=0)],
    }


class MetricsLog:
    """Writes metrics.jsonl and feeds the reporters on rank 0, and does nothing on the others."""

    def __init__(
        self,
        output_dir: Path,
        *,
        report_to: Sequence[str],
        options: Mapping[str, Any],
        resumed_step: int,
        enabled: bool,
    ) -> None:
        self._enabled = enabled
        self._reporters: list[Reporter] = []
        if not enabled:
            return
        path = output_dir / "metrics.jsonl"
        _forget_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._reporters = open_reporters(report_to, output_dir, options, resumed_step=resumed_step)

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`; its "step" counts from 1."""
        if not self._enabled:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        values: dict[str, float] = {}
        for name, value in record.items():
            # A list is a curve for each of its numbers: there is no other kind that every reporter has.
            several = {f"{name}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {}
            values |= several or {name: value}
        values = {n: v for n, v in values.items() if n != "step" and isinstance(v, int | float)}
        for reporter in self._reporters:
            reporter.log(record["step"], values)

    def close(self) -> None:
        """Flush and close the files."""
        if self._enabled:
            self._file.close()
        for reporter in self._reporters:
            reporter.close()


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
