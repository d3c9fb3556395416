"""One fault: a run is hurt, started again, and must end as if nothing had happened."""

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.storage.manifest import check_manifest, hash_file, read_manifest
from engine.training.resume import list_checkpoints
from tests.faults.injuries import Fault
from tests.faults.runs import BALLAST, STEPS, Settings, run

_RESUMED = re.compile(r"resuming from \S*checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a finished run leaves, as far as two runs must agree: bitwise, times left out."""

    export: dict[str, str]
    """SHA-256 of the exported weights by file."""
    state: dict[str, str]
    """SHA-256 of the last checkpoint's shards: weights, optimizer, random generators."""
    losses: list[tuple[int, float, float]]
    """(step, loss, gradient norm) of every logged step."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial went."""

    fault: str
    seed: int
    hit: bool
    """False where the run was over before the fault came."""
    problems: list[str]
    resumed_from: int
    linger_s: float
    seconds: float


def trace(output_dir: Path) -> Trace:
    """Of a run that has ended well."""
    weights = sorted((output_dir / "hf").glob("*.safetensors"))
    last = read_manifest(output_dir / f"checkpoint-{STEPS}")
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return Trace(
        export={path.name: hash_file(path).sha256 for path in weights},
        state={name: entry.sha256 for name, entry in last.files.items() if name.endswith(".distcp")},
        losses=[(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r],
    )


def attempt(name: str, fault: Fault, settings: Settings, wanted: Trace, place: Path, seed: int) -> Outcome:
    """Run, hurt, damage, run again, compare. `place` is emptied before."""
    dice, out = random.Random(seed), place / "out"
    for leftover in place.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    logs = place.with_name(f"{place.name}-logs")
    first = run(settings, out, logs / "first", fault.injure, dice)
    (place / BALLAST).unlink(missing_ok=True)
    hit = any(first.codes) or fault.damage is not None
    problems = []
    if hit and fault.codes is not None and not set(first.codes) <= {0, *fault.codes}:
        problems.append(f"exit codes {first.codes}")
    if hit and first.linger_s > 30:
        problems.append(f"the other ranks lived on for {first.linger_s:.0f} s")
    there = list_checkpoints(out)
    if fault.damage is not None and there:
        fault.damage(there[-1], dice)
    expected = _newest_whole(out)
    second = run(settings, out, logs / "second", None, dice)
    resumed = max(map(int, _RESUMED.findall(second.printed)), default=0)
    if any(second.codes):
        last = (logs / "second" / "0.out").read_text().strip().splitlines()[-1:]
        problems.append(f"the second run ended with {second.codes}: {last}")
    else:
        problems += _compare(wanted, trace(out))
        if left := [path.name for path in out.glob(".checkpoint-*")]:
            problems.append(f"left behind: {left}")
    if resumed != expected and not (expected == STEPS and not any(second.codes)):
        problems.append(f"resumed from {resumed}, newest whole checkpoint {expected}")
    return Outcome(
        fault=name,
        seed=seed,
        hit=hit,
        problems=problems,
        resumed_from=resumed,
        linger_s=first.linger_s,
        seconds=first.seconds + second.seconds,
    )


def _newest_whole(output_dir: Path) -> int:
    """Step of the newest checkpoint of which every byte is right; 0 if there is none."""
    for path in reversed(list_checkpoints(output_dir)):
        if not check_manifest(path, read_manifest(path)):
            return int(path.name.removeprefix("checkpoint-"))
    return 0


def _compare(wanted: Trace, found: Trace) -> list[str]:
    pairs: list[tuple[str, Any, Any]] = [
        ("exported weights", wanted.export, found.export),
        ("last checkpoint", wanted.state, found.state),
        ("losses", wanted.losses, found.losses),
    ]
    return [f"{what} differ" for what, a, b in pairs if a != b]
