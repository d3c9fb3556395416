"""`braid ... | head -1`: whatever command it is, it ends without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.pipe import CLOSED
from tests.launch.runs import ROOT, Place


def into_a_closed_pipe(*words: str, both: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a command whose stdout nobody reads, with `both` nor its stderr."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *words],
            cwd=ROOT,
            stdout=write,
            stderr=write if both else subprocess.PIPE,
            text=True,
            timeout=300,
        )
    finally:
        os.close(write)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "sft --help",
        "inspect MODEL",
        "inspect MODEL --json",
        "verify --model MODEL --checkpoint MODEL",
        "convert --to mcore --model MODEL --output_dir OUT --dry_run",
        "doctor",
    ],
)
def test_a_command_ends_without_a_word(place: Place, words: str) -> None:
    names = {"MODEL": str(place.model), "OUT": str(place.out)}
    assert into_a_closed_pipe(*(names.get(word, word) for word in words.split())) == (CLOSED, "")


def test_so_does_one_whose_errors_nobody_reads(place: Place) -> None:
    assert into_a_closed_pipe("inspect", str(place.root / "gone"), both=True)[0] == CLOSED


@pytest.mark.parametrize("ranks", [[], ["--nproc_per_node", "2", "--max_restarts", "1"]])
def test_so_does_training(place: Place, ranks: list[str], tmp_path: Path) -> None:
    words = ["--model", str(place.model), "--dataset", str(place.data), "--output_dir", str(place.out)]
    short = ["--max_steps", "1", "--device", "cpu", "--report_to", "none", "--global_batch_size", "2"]
    assert into_a_closed_pipe("sft", *words, *short, *ranks) == (CLOSED, "")


def test_another_pipe_that_breaks_is_a_failure() -> None:
    code = (
        "import os; from launch import cli\n"
        "def broken(words):\n"
        "    read, write = os.pipe(); os.close(read); os.write(write, b'x')\n"
        "cli._command = lambda name: broken\n"
        "cli.run()"
    )
    done = subprocess.run([sys.executable, "-c", code, "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("BrokenPipeError: [Errno 32] Broken pipe")
