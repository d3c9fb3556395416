"""`make bench`: a Braid training step against the same step written with transformers and torch, one process,
CPU.

Each side lives in a process of its own, with the same threads, rows, weights and AdamW. The sides take their
steps in turn, so that a busy machine slows both alike, and the medians are compared. Bound: a Braid step
takes at most 1.25 times as long.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

BOUND = 1.25
WARMUP, STEPS = 3, 25
ROWS, LENGTH, MICRO_BATCH = 16, 128, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of one length, or of uneven length (which transformers has to pad)."""

    name: str
    uneven: bool


CASES = (Case(name="even rows", uneven=False), Case(name="uneven rows", uneven=True))
SHAPE = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096,
}  # fmt: skip


def main() -> int:
    """Print a table; 1 if a case is beyond the bound."""
    from rich.console import Console
    from rich.table import Table

    from tests.support.models import save_tiny_model

    table = Table(
        title=f"One training step, fp32, CPU, {os.cpu_count()} threads: {ROWS} rows of up to {LENGTH} tokens"
    )
    for column in ("rows", "transformers + torch, ms", "Braid, ms", "ratio"):
        table.add_column(column)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        model_dir = save_tiny_model("qwen3_head_dim", Path(folder) / "model", **SHAPE)
        for case in CASES:
            reference, braid = (1e3 * statistics.median(times) for times in _alternate(case, model_dir))
            worst = max(worst, braid / reference)
            table.add_row(case.name, f"{reference:.1f}", f"{braid:.1f}", f"{braid / reference:.2f}")
    Console().print(table)
    print(f"worst ratio {worst:.2f}, bound {BOUND}")
    return 0 if worst <= BOUND else 1


def _alternate(case: Case, model_dir: Path) -> tuple[list[float], list[float]]:
    """Seconds of each step of the reference and of Braid, taken in turn."""
    sides = [_start(side, case, model_dir) for side in ("reference", "braid")]
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(WARMUP + STEPS):
        for side, seconds in zip(sides, times, strict=True):
            assert side.stdin is not None
            assert side.stdout is not None
            side.stdin.write("step\n")
            side.stdin.flush()
            answer = side.stdout.readline()
            if not answer:
                raise RuntimeError("a side of the benchmark ended; run it alone to see why")
            if step >= WARMUP:
                seconds.append(float(answer))
    for side in sides:
        side.communicate()
    return times


def _start(side: str, case: Case, model_dir: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.step", side, json.dumps(asdict(case))]
    return subprocess.Popen(
        [*command, str(model_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _time_steps(step: Callable[[], object]) -> None:
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        print(time.perf_counter() - started, flush=True)


def _rows(case: Case) -> list:
    import numpy as np

    from engine.data.template import EncodedRow
    from tests.support.training import random_rows

    if case.uneven:
        return random_rows(ROWS, vocabulary=SHAPE["vocab_size"], longest=LENGTH, seed=0)
    generator = np.random.default_rng(0)
    supervised = np.arange(LENGTH) >= LENGTH // 2
    return [
        EncodedRow(
            input_ids=generator.integers(0, SHAPE["vocab_size"], LENGTH).astype(np.int32),
            supervised=supervised,
        )
        for _ in range(ROWS)
    ]


def _braid(case: Case, model_dir: str) -> None:
    import torch.distributed as dist

    from engine.config.options import OptimizerOptions, ParallelOptions
    from engine.data.batches import collate
    from engine.runtime.platform import open_platform
    from engine.training.optimizer import set_learning_rate
    from engine.training.step import global_totals, train_step
    from tests.support.training import open_run

    open_platform(device="cpu", dtype="float32", transformer_impl="torch", local_rank=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    options = OptimizerOptions()
    spec, platform, groups, models, optimizer = open_run(0, 1, model_dir, ParallelOptions(), options)
    rows = _rows(case)
    parts = [rows[i : i + MICRO_BATCH] for i in range(0, ROWS, MICRO_BATCH)]

    def step() -> None:
        batches = [collate(part, pad_id=0, pad_to_multiple_of=1) for part in parts]
        set_learning_rate(optimizer, 1e-4, options.weight_decay)
        result = train_step(models, optimizer, batches, groups, platform.device)
        global_totals(result.losses, batches, spec.train_flops_per_token, groups, platform.device)

    _time_steps(step)


def _reference(case: Case, model_dir: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    rows = _rows(case)
    parts = [rows[i : i + MICRO_BATCH] for i in range(0, ROWS, MICRO_BATCH)]

    def pad(part: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        longest = max(len(row.input_ids) for row in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        labels = torch.full((len(part), longest), -100)
        mask = torch.zeros(len(part), longest, dtype=torch.long)
        for i, row in enumerate(part):
            n = len(row.input_ids)
            ids[i, :n] = torch.from_numpy(row.input_ids)
            mask[i, :n] = 1
            labels[i, :n] = torch.where(torch.from_numpy(row.supervised), ids[i, :n], -100)
        return ids, labels, mask

    def step() -> None:
        supervised = sum(int(row.supervised[1:].sum()) for row in rows)
        optimizer.zero_grad()
        for part in parts:
            ids, labels, mask = pad(part)
            # Without padding no mask is passed, which lets SDPA take its fast causal path.
            logits = model(ids, attention_mask=mask if case.uneven else None).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / supervised).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    _time_steps(step)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    {"braid": _braid, "reference": _reference}[sys.argv[1]](Case(**json.loads(sys.argv[2])), sys.argv[3])
