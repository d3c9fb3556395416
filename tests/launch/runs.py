"""Running the command as a user does, and looking at what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
_LAUNCH_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NPROC_PER_NODE", "NNODES", "NODE_RANK",
    "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "BRAID_ERROR_DIR",
    "BRAID_STARTED", "BRAID_MODELS",
)  # fmt: skip
_MARK = "BRAID_TEST_RUN"

QUESTIONS = (
    ("What is the capital of France?", "Paris."),
    ("How many legs has a spider?", "Eight."),
    ("Which planet is the largest?", "Jupiter is the largest planet."),
    ("水的化学式是什么？", "H2O。"),
    ("Name a prime number.", "Seven."),
    ("What freezes at zero degrees?", "Water does."),
    ("Who wrote Faust?", "Goethe."),
    ("What is two plus two?", "Four."),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str
    left_running: tuple[int, ...]
    """Ids of processes that the command started and that outlived it."""


def braid(*words: str, cache: Path, stop_by: signal.Signals | None = None, **environment: str) -> Run:
    """`python -m launch.cli WORDS` in a process of its own; `stop_by` is sent once two ranks run."""
    mark = uuid.uuid4().hex
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
    env |= {"BRAID_CACHE": str(cache), _MARK: mark, **environment}
    command = [sys.executable, "-m", "launch.cli", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while stop_by is not None and process.poll() is None:
        if len(list(_marked_processes(mark))) >= 3:
            process.send_signal(stop_by)
            break
        time.sleep(0.1)
    stdout, stderr = process.communicate(timeout=300)
    return Run(
        code=process.returncode, stdout=stdout, stderr=stderr, left_running=tuple(_marked_processes(mark))
    )


def _marked_processes(mark: str) -> Iterable[int]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                yield process.pid
        except psutil.Error:  # ended meanwhile, or a zombie, or somebody else's
            continue


def forget_launch_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the surrounding machine says about processes and nodes must not reach a command run in this
    process.
    """
    for name in _LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def have_cards(monkeypatch: pytest.MonkeyPatch, root: Path, *lines: str, code: int = 0) -> None:
    """Let the driver's tool answer with `lines`."""
    folder = root / "bin"
    folder.mkdir()
    tool = folder / "nvidia-smi"
    answer = "\n".join(lines)
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def question_rows(count: int = len(QUESTIONS)) -> list[dict[str, Any]]:
    """Rows of the messages format."""
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in QUESTIONS[:count]
    ]


def everything_in(directory: Path) -> dict[str, bytes | None]:
    """Content of every file and directory (None) below `directory`, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True, kw_only=True)
class Place:
    """The test's directory; what a command may read and must leave as it is."""

    root: Path
    model: Path
    data: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def out(self) -> Path:
        return self.root / "out"

    def sft(self, *words: str) -> list[str]:
        """A run at TP2: the checks happen in this process, before two ranks would start."""
        given = [
            "sft",
            "--model",
            str(self.model),
            "--dataset",
            str(self.data),
            "--output_dir",
            str(self.out),
        ]
        return [
            *given,
            "--device",
            "cpu",
            "--nproc_per_node",
            "2",
            "--tensor_model_parallel_size",
            "2",
            *words,
        ]

    def refused(self, words: list[str], *named: str) -> str:
        """Run a command; it must end with exit code 2, one line that holds all of `named`, and nothing
        changed.
        """
        before = everything_in(self.root)
        code = main(words)
        printed = self.capsys.readouterr().err
        assert code == 2, printed
        assert_one_line(printed, words[0], *named)
        assert everything_in(self.root) == before
        return printed


def assert_one_line(printed: str, command: str, *named: str) -> None:
    assert printed.count("\n") == 1, printed
    assert printed.startswith(f"braid {command}: error"), printed
    assert "Traceback" not in printed
    for part in named:
        assert part in printed
