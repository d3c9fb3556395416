"""Disks that really fill up: one line that says so, and nothing is left that looks like an output."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from launch.cli import main
from tests.launch.runs import ROOT, everything_in, forget_launch_variables

from .adapters import Bases

PAGE = 4096
WEIGHTS = 155
"""Pages that the weights take."""
# Attempts at a command, each under a limit of its own, in one process for the sake of the imports. What would
# notice the limit beforehand is switched off, so that it is met while writing.
CHILD = """
import contextlib, io, json, os, resource, shutil, subprocess, sys
from converters import conversion
from engine.storage.manifest import check_manifest, read_manifest
from launch.cli import main
from pathlib import Path

conversion.check_free_space = lambda *_, **__: None
limit, where, out, sizes, words = json.loads(sys.argv[1])
for size in sizes:
    if limit == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    else:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{limit}={size}", "tmpfs", where], check=True)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    left = sorted(os.listdir(where))
    problems = [str(p) for p in check_manifest(Path(out), read_manifest(Path(out)))] if code == 0 else []
    print(json.dumps([code, printed.getvalue(), left, problems]), flush=True)
    if limit == "file size":
        shutil.rmtree(out, ignore_errors=True)
    else:
        subprocess.run(["umount", where], check=True)
"""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A command under a limit that has ended."""

    code: int
    stderr: str
    left: list[str]
    """In the directory that the limit is of."""
    problems: list[str]
    """Of a finished output with its manifest."""


@cache
def may_mount() -> bool:
    """Whether this user may have a disk of their own, in a name space of its own."""
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def skip_without_disks() -> None:
    """Where nothing can be mounted, limits of the size of files have to do, in the tests below."""
    if not may_mount():
        pytest.skip("no leave to mount a disk of a known size")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_launch_variables(monkeypatch)


@pytest.fixture
def commands(bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Mapping[str, list[str]]:
    """One of each kind of conversion, without its output directory."""
    model, adapter = str(bases.model("qwen2_tied")), str(bases.adapter("qwen2_tied", "subset"))
    to_mcore = ["convert", "--to", "mcore", "--model", model]
    assert main([*to_mcore, "--output_dir", str(tmp_path / "checkpoint")]) == 0
    capsys.readouterr()
    return {
        "to mcore": to_mcore,
        "to hf": ["convert", "--to", "hf", "--checkpoint", str(tmp_path / "checkpoint")],
        "merge": ["merge", "--model", model, "--adapter", adapter],
    }


def attempts(limit: str, sizes: Sequence[int], words: Sequence[str], where: Path, out: Path) -> list[Attempt]:
    """A command, writing `out` in `where`, under a limit of every one of the sizes."""
    content = json.dumps([limit, str(where), str(out), list(sizes), [*words, "--output_dir", str(out)]])
    alone = [] if limit == "file size" else ["unshare", "-rm"]
    command = [*alone, sys.executable, "-c", CHILD, content]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(sizes)
    return [Attempt(code=c, stderr=e, left=left, problems=p) for c, e, left, p in found]


def check(found: Sequence[Attempt], named: str, where: Path, out: Path) -> None:
    """Up to a size all fail, in one line and without a trace; from there on all succeed."""
    codes = [attempt.code for attempt in found]
    assert sorted(codes, reverse=True) == codes
    assert {codes[0], codes[-1]} == {2, 0}
    for attempt in found:
        if attempt.code == 0:
            assert (attempt.stderr, attempt.problems) == ("", [])
            assert attempt.left == [out.name] or where == out
        else:
            assert attempt.stderr.startswith("braid ")
            assert attempt.stderr.count("\n") == 1
            assert named in attempt.stderr
            assert str(out) in attempt.stderr
            assert attempt.left == []


@pytest.mark.parametrize(
    ("kind", "in_place"),
    [("to mcore", False), ("to hf", False), ("merge", False), ("to hf", True)],
    ids=["to mcore", "to hf", "merge", "to hf, the disk itself"],
)
def test_disk_that_fills_up(
    commands: Mapping[str, list[str]], tmp_path: Path, kind: str, in_place: bool
) -> None:
    """With room for so many pages: for less than the weights, for them but not for all that lies beside them,
    for everything.
    """
    skip_without_disks()
    where = tmp_path / "disk"
    where.mkdir()
    out = where if in_place else where / "out"
    few, enough, plenty = [1, 2, 3, *range(4, WEIGHTS, 30)], range(WEIGHTS, WEIGHTS + 40, 3), [1000]
    found = attempts("size", [PAGE * n for n in (*few, *enough, *plenty)], commands[kind], where, out)
    check(found, "disk full while writing", where, out)
    assert [attempt.code for attempt in found].count(2) > len(few), "also where the weights fit"


@pytest.mark.parametrize("kind", ["to mcore", "to hf", "merge"])
def test_disk_that_has_no_place_for_another_file(
    commands: Mapping[str, list[str]], tmp_path: Path, kind: str
) -> None:
    """There is room for data, but not for names."""
    skip_without_disks()
    where = tmp_path / "disk"
    where.mkdir()
    found = attempts("nr_inodes", range(1, 34), commands[kind], where, where / "out")
    check(found, "disk full while writing", where, where / "out")


@pytest.mark.parametrize("kind", ["to mcore", "to hf", "merge"])
def test_files_that_may_not_grow(commands: Mapping[str, list[str]], tmp_path: Path, kind: str) -> None:
    """Under `ulimit -f`, as batch systems set it."""
    where = tmp_path / "disk"
    where.mkdir()
    sizes = [0, 1, 30, 500, 1000, 3000, 10_000, 100_000, 500_000, 2_000_000]
    found = attempts("file size", sizes, commands[kind], where, where / "out")
    check(found, "cannot be written: File too large", where, where / "out")


@pytest.mark.parametrize("kind", ["to mcore", "to hf", "merge"])
def test_too_little_room_is_seen_before_anything_is_written(
    commands: Mapping[str, list[str]], tmp_path: Path, kind: str
) -> None:
    """The command itself, on a disk of one megabyte."""
    skip_without_disks()
    printed = shell(
        "mount -t tmpfs -o size=1m tmpfs disk", commands[kind], tmp_path, alone=["unshare", "-rm"]
    )
    assert "disk full: " in printed
    assert "GB free, the output needs 0.03" in printed


@pytest.mark.parametrize("kind", ["to mcore", "to hf", "merge"])
def test_the_command_where_files_may_not_grow(
    commands: Mapping[str, list[str]], tmp_path: Path, kind: str
) -> None:
    """Beyond four kilobytes, which the interpreter itself needs."""
    assert "cannot be written: File too large" in shell("ulimit -f 8", commands[kind], tmp_path)


def shell(before: str, words: Sequence[str], directory: Path, *, alone: Sequence[str] = ()) -> str:
    """What the command, after another in the same shell, prints on stderr: one line, for it is refused. It
    writes `disk/out` and leaves `disk` empty.
    """
    (directory / "disk").mkdir()
    there = everything_in(directory)
    # What is left is added to what the command prints, for nobody sees it outside of the shell.
    script = before + ' && "$@"; code=$?; ls -A disk >&2; exit $code'
    command = [*alone, "sh", "-c", script, "sh", sys.executable, "-B", "-m", "launch.cli", *words]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output_dir", "disk/out"],
        cwd=directory, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("braid "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert everything_in(directory) == there
    return done.stderr
