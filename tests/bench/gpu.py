"""`make bench-gpu`: Braid on one GPU beside its peers, as one table.

Every case runs in a process of its own, one after another, and leaves a bench.json in a folder of
`--output_dir`; the table is written anew after each (gpu.json, gpu.md). With `--resume` cases that have left
their results are not run again, so that a machine may go away in the middle. Nothing is judged here: what a
figure is to be read against is printed beside it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.bench.output import write_json
from launch.bench.sweep import end_process, ending_on_sigterm, failure_reason
from launch.processes import environment_of_one
from tests.bench.gpu_cases import ROWS_MULTIPLE, Case, Settings, all_cases, chosen
from tests.bench.gpu_table import FAILURE, RESULT, outcome, read_row, read_rows, table, write

PEER_SHAPES = {"1.5b": "qwen2.5-1.5b", "3b": "qwen2.5-3b", "7b": "qwen2.5-7b"}


def main(argv: Sequence[str]) -> int:
    """0 if at least one case has numbers, 1 if none has, 2 for what is wrong before the first."""
    parser = _parser()
    options = parser.parse_args(argv)
    settings = Settings(steps=options.steps, global_batch_size=options.global_batch_size)
    cases = all_cases()
    try:
        _check(settings)
        asked = chosen(
            cases, _names(options.cases), [PEER_SHAPES[name] for name in _names(options.peer_shapes)]
        )
    except KeyError as error:
        parser.error(f"peer_shapes are {', '.join(PEER_SHAPES)}, not {error}")
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(case.shown_command(settings, Path("DIR") / case.name) for case in asked))
        return 0
    if not _has_cuda():
        print("make bench-gpu: torch sees no CUDA device; nothing was run", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="braid-bench-gpu-") as folder:
        root = Path(options.output_dir or folder)
        refusal = refuse(root, settings, resume=options.resume)
        if refusal is not None:
            print(f"make bench-gpu: {refusal}", file=sys.stderr)
            return 2
        with ending_on_sigterm():
            return run(cases, asked, settings, root, timeout=options.case_timeout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__.splitlines()[0])
    add, default = parser.add_argument, Settings()
    add("--cases", default="", help="names or patterns, separated by commas, such as qwen2.5-7b-*,*-liger")
    add("--peer_shapes", default="1.5b", help="shapes of the peers: 1.5b, 3b, 7b, separated by commas")
    add("--output_dir", help="where results are kept; default: the table is only printed")
    add("--resume", action="store_true", help="keep the results that are in output_dir already")
    add("--steps", type=int, default=default.steps, help="measured steps")
    add("--global_batch_size", type=int, default=default.global_batch_size, help="rows of a step")
    add("--case_timeout", type=float, default=1800.0, help="seconds after which a case is ended")
    add("--list", action="store_true", help="print the commands of the cases, and stop")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(settings: Settings) -> None:
    if settings.steps < 1:
        raise ValueError(f"steps must be at least 1, not {settings.steps}")
    if settings.global_batch_size < 1 or settings.global_batch_size % ROWS_MULTIPLE:
        raise ValueError(
            f"global_batch_size must be a multiple of {ROWS_MULTIPLE}, not {settings.global_batch_size}"
        )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def refuse(root: Path, settings: Settings, *, resume: bool) -> str | None:
    """Why results cannot be kept in `root`, in one line; None where they can."""
    if root.exists() and not root.is_dir():
        return f"output_dir {root} is a file; choose a directory"
    if not root.is_dir() or not any(root.iterdir()):
        return None
    if not resume:
        return f"output_dir {root} is in use; pass --resume to go on there, or choose another"
    if not (root / "gpu.json").is_file():
        return f"output_dir {root} is in use, and has no gpu.json to go on from; choose another"
    before = json.loads((root / "gpu.json").read_text(encoding="utf-8"))["settings"]
    if before != asdict(settings):
        words = " ".join(f"--{name} {value}" for name, value in before.items())
        return f"output_dir {root} has results with {words}; pass the same, or choose another"
    return None


def run(
    cases: Sequence[Case], asked: Sequence[Case], settings: Settings, root: Path, *, timeout: float
) -> int:
    """Run what was asked for and has no results yet, and write the table after each case."""
    root.mkdir(parents=True, exist_ok=True)
    write(read_rows(cases, asked, settings, root), settings, root)
    for number, case in enumerate(asked, start=1):
        directory, began = root / case.name, time.monotonic()
        how = ""
        if (directory / RESULT).is_file():
            how = " (from before)"
        elif case.missing() is None:
            run_case(case, settings, directory, timeout)
            how = f" ({time.monotonic() - began:.0f} s)"
        row = read_row(case, settings, root)
        print(f"[{number}/{len(asked)}] {case.name}: {outcome(row)}{how}", flush=True)
        write(read_rows(cases, asked, settings, root), settings, root)
    rows = read_rows(cases, asked, settings, root)
    table(rows).show()
    print(f"wrote gpu.json and gpu.md to {root}")
    return 0 if any(row.record for row in rows) else 1


def run_case(case: Case, settings: Settings, directory: Path, timeout: float) -> None:
    """Run a case; its directory then has bench.json, or failure.json, and what was printed."""
    shutil.rmtree(directory, ignore_errors=True)  # of a case that was cut off, or failed
    process = subprocess.Popen(
        case.command(settings, directory),
        env=environment_of_one(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, complaint = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_process(process)
        _leave(directory, FAILURE, {"reason": f"no result after {timeout:g} s"})
        return
    except BaseException:
        end_process(process)
        raise
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "printed.txt").write_text(f"{printed}\n{complaint}", encoding="utf-8")
    record = peer_record(printed) if case.peer else None
    if record is not None:
        _leave(directory, RESULT, record)
    if not (directory / RESULT).is_file():
        reason = failure_reason(complaint, process.returncode)
        reason = reason.removeprefix("error: ").removeprefix("failed: ")
        _leave(directory, FAILURE, {"reason": reason, "code": process.returncode})


def peer_record(printed: str) -> dict[str, Any] | None:
    """The line of JSON that a peer prints last; libraries may have printed before it."""
    for line in reversed(printed.splitlines()):
        if line.startswith('{"kind": "peer"'):
            record: dict[str, Any] = json.loads(line)
            return record
    return None


def _leave(directory: Path, name: str, record: dict[str, Any]) -> None:
    write_json(directory / name, record)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
