"""`make faults`: hundreds of faults, each followed by a restart that must end bitwise as the unhurt run.

python -m tests.faults [--count 200] [--seed 0] [--report FILE.json] [--only WORDS]
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.injuries import FAULTS
from tests.faults.runs import Settings, run, warm_up
from tests.faults.trial import Outcome, attempt, trace

_DISK = "64m"
_INSIDE = "BRAID_FAULTS_INSIDE"


def main() -> int:
    """Print a table; 1 if any trial went wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    faults = {name: fault for name, fault in FAULTS.items() if arguments.only in name}
    warm_up()
    outcomes: list[Outcome] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="braid-faults-") as folder, _small_disk(Path(folder)) as place:
        root = Path(folder)
        settings = _prepare(root)
        calm = run(settings, place / "out", root / "calm-logs", None, random.Random(0))
        assert not any(calm.codes), (calm.codes, calm.printed)
        wanted, seed = trace(place / "out"), arguments.seed
        while sum(outcome.hit for outcome in outcomes) < arguments.count:
            name = list(faults)[seed % len(faults)]
            outcomes.append(attempt(name, faults[name], settings, wanted, place, seed))
            if outcomes[-1].problems:
                print(f"{name}, seed {seed}: {'; '.join(outcomes[-1].problems)}", flush=True)
            seed += 1
    print(table(outcomes))
    bad = sum(bool(outcome.problems) for outcome in outcomes)
    hits = sum(outcome.hit for outcome in outcomes)
    print(f"{hits} faults, {bad} with a problem, {(time.monotonic() - began) / 60:.1f} minutes")
    if arguments.report is not None:
        arguments.report.write_text(
            json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1)
        )
    return 1 if bad else 0


@contextlib.contextmanager
def _small_disk(root: Path) -> Iterator[Path]:
    """A place for runs: a disk of its own that can be filled, where one can be made."""
    place = root / "disk"
    place.mkdir()
    mounted = _INSIDE in os.environ
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def _prepare(root: Path) -> Settings:
    """A tiny model with tokenizer, and eight rows."""
    from launch.tiny import build_tiny_qwen3
    from tests.launch.runs import question_rows, write_rows

    os.environ["BRAID_CACHE"] = str(root / "cache")
    # Threads of the tokenizer do not survive a fork: the ranks would wait for them for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    model = build_tiny_qwen3(root / "model", **sizes)
    data = write_rows(root / "data.jsonl", question_rows())
    return Settings(model=model, data=data, cache=root / "cache")


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row a kind of fault."""
    groups = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome.fault].append(outcome)
    lines = [
        "| fault | injected | too late | bitwise equal afterwards | longest until all ranks had ended |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, group in groups.items():
        hit = [outcome for outcome in group if outcome.hit]
        equal = sum(not outcome.problems for outcome in hit)
        linger = max((outcome.linger_s for outcome in hit), default=0.0)
        lines.append(f"| {name} | {len(hit)} | {len(group) - len(hit)} | {equal} | {linger:.1f} s |")
    return "\n".join(lines)


def _take_own_mounts() -> None:
    """Start again with mounts of our own, where this machine lets a process have them."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return
    os.environ[_INSIDE] = "1"
    os.execvp(inside[0], [*inside, sys.executable, "-m", "tests.faults", *sys.argv[1:]])


if __name__ == "__main__":
    if _INSIDE not in os.environ:
        _take_own_mounts()
    sys.exit(main())
