"""`make bench-convert`: converting a checkpoint of Qwen2.5-1.5B's shape against copying it.

Copy and both conversions take turns on one disk with a warm page cache, each in a process of its own; the
medians are compared. Bounds: at least 0.7 of the copy's speed, counted from opening the source to the last
fsync; at most 1.0 GB of memory above an interpreter with torch; at most 12 s from the command to its end.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from converters.convert import output_files
from converters.hf.layout import PlannedTensor, plan_layout
from converters.mapping import hf_tensors, weight_map
from converters.source import Source, new_or_given
from converters.transfer import TransferOptions, write_files
from engine.model.spec import model_spec_from_config

ROUNDS = 3
RATIO, MEMORY, COMMAND = 0.7, 1.0e9, 12.0
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16",
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
}  # fmt: skip


class RandomSource(Source):
    """Normal random weights in bfloat16."""

    directory = Path()

    def __init__(self) -> None:
        spec = model_spec_from_config(CONFIG)
        self._shapes = {name: tensor.shape for name, tensor in hf_tensors(weight_map(spec)).items()}
        self.plan = [PlannedTensor(name=n, dtype=torch.bfloat16, shape=s) for n, s in self._shapes.items()]

    def files(self) -> list[Path]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return new_or_given((stop - start, *self._shapes[name][1:]), torch.bfloat16, out).normal_(std=0.02)


@dataclass(kw_only=True)
class Figures:
    """What the rounds of one side measured."""

    seconds: list[float] = field(default_factory=list)
    """Of the work itself."""
    command: list[float] = field(default_factory=list)
    """From the start of the process to its end."""
    memory: list[int] = field(default_factory=list)
    """Peak resident set in bytes."""


def main() -> int:
    """Print a table; 1 if a figure is beyond its bound."""
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory(prefix="bench-convert-") as folder:
        root = Path(folder)
        size = _make_source(root / "hf")
        _warm(root / "hf")
        figures = {side: Figures() for side in ("copy", "to mcore", "to hf")}
        for _ in range(ROUNDS):
            _measure(figures["copy"], _copy_command(root), root / "copy")
            _measure(figures["to mcore"], _braid("--to", "mcore", "--model", root / "hf"), root / "mcore")
            shutil.rmtree(root / "copy")
            _measure(figures["to hf"], _braid("--to", "hf", "--checkpoint", root / "mcore"), root / "back")
            _compare(root / "hf", root / "back")
            for name in ("mcore", "back"):
                shutil.rmtree(root / name)
        _, _, interpreter = _run([sys.executable, "-c", "import torch"])
    table = Table(
        title=f"{size / 1e9:.2f} GB of bf16 in several shards, {os.cpu_count()} CPUs, medians of {ROUNDS}"
    )
    for column in ("", "s", "GB/s", "of the copy", "command, s", "peak memory above torch, GB"):
        table.add_column(column, justify="left" if not column else "right")
    copied, good = statistics.median(figures["copy"].seconds), True
    for side, found in figures.items():
        seconds, command = statistics.median(found.seconds), statistics.median(found.command)
        above = max(found.memory) - interpreter
        numbers = [
            f"{seconds:.2f}",
            f"{size / 1e9 / seconds:.2f}",
            f"{copied / seconds:.2f}",
            f"{command:.1f}",
        ]
        table.add_row(side, *numbers, "" if side == "copy" else f"{above / 1e9:.2f}")
        if side != "copy":
            good &= copied / seconds >= RATIO and command <= COMMAND and above <= MEMORY
    Console(width=100).print(table)
    print(
        f"bounds: {RATIO} of the copy, {COMMAND:.0f} s, {MEMORY / 1e9:.1f} GB: {'held' if good else 'BROKEN'}"
    )
    return 0 if good else 1


def _make_source(directory: Path) -> int:
    """Returns the bytes of the files."""
    directory.mkdir()
    source = RandomSource()
    files = output_files(plan_layout(source.plan, max_shard_size=1_000_000_000), source)
    write_files(files, directory, source, TransferOptions(workers=os.cpu_count() or 1))
    shutil.rmtree(directory / ".records")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return sum(file.nbytes for file in files)


def _warm(directory: Path) -> None:
    for path in directory.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.read(16_000_000):
                pass


def _copy_command(root: Path) -> list[str]:
    script = 'cp -r "$0" "$1" && sync "$1"/*'
    return ["sh", "-c", script, str(root / "hf")]


def _braid(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "convert", *map(str, words), "--output_dir"]


def _measure(figures: Figures, command: list[str], target: Path) -> None:
    os.sync()  # what others have written should not be paid for here
    seconds, output, memory = _run([*command, str(target)])
    own = re.search(r"GB in ([\d.]+) s", output)
    figures.seconds.append(float(own[1]) if own else seconds)
    figures.command.append(seconds)
    figures.memory.append(memory)


def _run(command: list[str]) -> tuple[float, str, int]:
    """Seconds, standard output, and peak memory in bytes as `/usr/bin/time -v` counts it."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return time.perf_counter() - started, output, usage.ru_maxrss * 1024


def _compare(before: Path, after: Path) -> None:
    for path in before.iterdir():
        subprocess.run(["cmp", str(path), str(after / path.name)], check=True)


if __name__ == "__main__":
    sys.exit(main())
