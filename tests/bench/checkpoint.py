"""`make bench-checkpoint`: how long a save keeps the step waiting, in the background against at once, and how
long a restart takes to its first step.

A state of about 1 GB (weights, master weights and moments) in one process on the CPU. Bound: in the
background a tenth of the time at most.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOUND, SAVES = 0.1, 5
SHAPE = {
    "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 24_576,
}  # fmt: skip


def main() -> int:
    """Print both figures and the ratio; 1 if it is beyond the bound."""
    from tests.support.models import save_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model_dir = save_tiny_model("qwen3_head_dim", Path(folder) / "model", **SHAPE)
        figures = {}
        for mode in ("at once", "background"):
            out = Path(folder) / mode.replace(" ", "-")
            command = [sys.executable, "-m", "tests.bench.checkpoint", mode, str(model_dir), str(out)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures[mode] = json.loads(done.stdout.strip().splitlines()[-1])
    waits = {mode: statistics.median(figure["blocked_s"][1:]) for mode, figure in figures.items()}
    ratio = waits["background"] / waits["at once"]
    print(
        f"state of {figures['background']['gigabytes']:.2f} GB, medians of {SAVES - 1} saves after the first"
    )
    print(f"at once:    {waits['at once']:.3f} s (first {figures['at once']['blocked_s'][0]:.3f} s)")
    print(f"background: {waits['background']:.3f} s (first {figures['background']['blocked_s'][0]:.3f} s)")
    print(f"ratio {ratio:.3f}, bound {BOUND}")
    return 0 if ratio <= BOUND else 1


def _measure(mode: str, model_dir: str, out: Path) -> None:
    """A step, a save, and on; prints JSON."""
    import torch.distributed as dist

    from engine.config.options import OptimizerOptions, ParallelOptions
    from engine.data.batches import collate
    from engine.runtime.platform import open_platform
    from engine.training.checkpoint import CheckpointSaver, layout_degrees
    from engine.training.optimizer import set_learning_rate
    from engine.training.resume import TrainerState
    from engine.training.step import train_step
    from tests.support.training import open_run, random_rows

    open_platform(device="cpu", dtype="float32", transformer_impl="torch", local_rank=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    options = OptimizerOptions()
    spec, platform, groups, models, optimizer = open_run(0, 1, model_dir, ParallelOptions(), options)
    rows = random_rows(2, vocabulary=spec.vocab_size, longest=32, seed=0)
    background = mode == "background"
    saver = CheckpointSaver(out, groups, add_companions=lambda path: None, keep=1, background=background)
    blocked = []
    for step in range(1, SAVES + 1):
        set_learning_rate(optimizer, 1e-4, options.weight_decay)
        batches = [collate(rows, pad_id=0, pad_to_multiple_of=1)]
        train_step(models, optimizer, batches, groups, platform.device)
        state = TrainerState(
            step=step,
            total_steps=SAVES,
            global_batch_size=2,
            num_rows=2,
            data_fingerprint="",
            seed=1,
            tokens=0,
            layout=layout_degrees(models, groups),
        )
        saver.save(state, models, optimizer)
        blocked.append(saver.blocked_s)
        while background and not saver.idle():
            time.sleep(0.05)  # training goes on; the next save would otherwise wait for this one
    saver.wait()
    size = sum(path.stat().st_size for path in (out / f"checkpoint-{SAVES}").rglob("*") if path.is_file())
    print(json.dumps({"blocked_s": blocked, "gigabytes": size / 1e9}), flush=True)
    saver.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
