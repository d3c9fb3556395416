"""Output directories appear whole or not at all, and an interrupted conversion goes on where it stopped."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import conversion
from converters.conversion import carry_out
from converters.convert import plan_to_hf, to_hf, to_mcore
from converters.mcore import layout
from converters.mcore.reader import McoreSource
from converters.stage import staged_directory
from converters.transfer import RECORDS_DIR, Crew, TransferOptions
from engine.errors import ModelError, OutputError
from engine.storage import files
from engine.storage.manifest import MANIFEST_FILE
from tests.launch.runs import everything_in

from .conftest import MakeModel
from .convert_worker import finished, stages

ROOT = Path(__file__).parents[2]
SIZE = 40_000
"""Bytes of a file: four or more for a tiny model."""
ALONE = Crew()


# The directory


def test_staged_directory(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "a" / "b", plan="p", crew=ALONE) as stage:
        assert stage.parent == tmp_path / "a"
        assert not (tmp_path / "a" / "b").exists()
        (stage / "x").write_text("1")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    (tmp_path / "empty").mkdir()
    with staged_directory(tmp_path / "empty", plan="p", crew=ALONE) as stage:
        (stage / "x").write_text("1")
    assert everything_in(tmp_path / "empty") == everything_in(tmp_path / "a" / "b") == {"x": b"1"}


def test_working_directory_is_filled_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with staged_directory(".", plan="p", crew=ALONE) as stage:
        (stage / "x").write_text("1")
        (stage / "inner").mkdir()
    assert sorted(os.listdir(".")) == ["inner", "x"]


def fail(target: Path, error: BaseException, *, plan: str = "p", crew: Crew = ALONE) -> None:
    with staged_directory(target, plan=plan, crew=crew) as stage:
        (stage / "x").write_text("1")
        raise error


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ModelError("bad"), ModelError),
        (RuntimeError("bad"), RuntimeError),
        (OSError(errno.EIO, "bad"), OutputError),
    ],
)
def test_an_error_removes_the_stage(tmp_path: Path, error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised, match="bad"):
        fail(tmp_path / "out", error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interruption_keeps_the_stage_for_the_same_plan(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path / "out", error)
    assert not (tmp_path / "out").exists()
    with staged_directory(tmp_path / "out", plan="p", crew=ALONE) as stage:
        assert (stage / "x").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_plan_clears_the_stage(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", KeyboardInterrupt(), plan="a")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "other", KeyboardInterrupt(), plan="a")
    before = stages(tmp_path / "out")
    with staged_directory(tmp_path / "out", plan="b", crew=ALONE) as stage:
        assert stages(tmp_path / "out") == [stage]
        assert [stage] != before
        assert not (stage / "x").exists()
    assert (stages(tmp_path / "other")[0] / "x").exists()  # of another output


def test_a_stage_that_somebody_is_writing_is_left_alone(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out", plan="a", crew=ALONE) as stage:
        # Locks belong to open files, so that this process can stand for two.
        with (
            pytest.raises(OutputError, match=r"out is being written by another process; wait .* or stop it"),
            staged_directory(tmp_path / "out", plan="a", crew=ALONE),
        ):
            pass
        with (
            pytest.raises(OutputError, match="is being written by another process"),
            staged_directory(tmp_path / "out", plan="a", crew=Crew(rank=0, size=2)),
        ):
            pass
        with pytest.raises(KeyboardInterrupt):
            fail(tmp_path / "out", KeyboardInterrupt(), plan="b")
        assert len(stages(tmp_path / "out")) == 2
        (stage / "mine").write_text("1")
    assert (tmp_path / "out" / "mine").exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with staged_directory(tmp_path / "out", plan="a", crew=ALONE) as stage:
        (stage / "x").write_text("1")
    assert (tmp_path / "out" / "x").exists()


def test_targets_that_are_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target, match in (("file", "is a file"), (".", "is not empty"), ("file/out", "cannot be written")):
        with (
            pytest.raises(OutputError, match=match),
            staged_directory(tmp_path / target, plan="p", crew=ALONE),
        ):
            pass
    assert everything_in(tmp_path) == {"file": b"x"}


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(OutputError, match=r"disk full while writing .*out; make room"):
            fail(tmp_path / "out", OSError(code, os.strerror(code)))
    assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="disk full"):
        files.check_free_space(tmp_path, 11)
    files.check_free_space(tmp_path, 10)


# Conversions that are stopped


def contents(directory: Path) -> dict[str, Any]:
    """Everything in it, but for when and by which command it was made."""
    found: dict[str, Any] = dict(everything_in(directory))
    found[MANIFEST_FILE] = json.loads(found[MANIFEST_FILE]) | {"created": "", "command": ""}
    return found


@contextmanager
def slowed_down(words: list[str], **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, once it has become slow; it is killed at the end."""
    command = [sys.executable, "-m", "tests.converters.convert_worker", json.dumps(settings), *words]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts in the background, this test maybe, with Ctrl-C switched off.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        printed = []
        while (line := process.stdout.readline()) and line != "slow\n":
            printed.append(line)
        assert line == "slow\n", (printed, process.communicate()[1])
        yield process
    finally:
        process.kill()
        process.communicate()


def identities(directory: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    states = {name: (directory / name).stat() for name in names}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in states.items()}


@pytest.fixture
def checkpoint(models: MakeModel, tmp_path: Path) -> Path:
    to_mcore(models("qwen3"), tmp_path / "source")
    return tmp_path / "source"


def hf_words(checkpoint: Path, out: Path) -> list[str]:
    words = ["--checkpoint", str(checkpoint), "--output_dir", str(out), "--max_shard_size", str(SIZE)]
    return ["convert", "--to", "hf", *words, "--workers", "1"]


def test_killed_and_continued(checkpoint: Path, tmp_path: Path) -> None:
    """Files that were finished are kept as they are; the rest, one of them half written, is written anew. The
    same conversion is refused while the first still runs, and another target is not held up.
    """
    out = tmp_path / "out"
    to_hf(checkpoint, tmp_path / "expected", max_shard_size=SIZE)
    with slowed_down(hf_words(checkpoint, out), output=str(out), slow_after=2, pause=600) as process:
        with pytest.raises(OutputError, match="out is being written by another process"):
            to_hf(checkpoint, out, max_shard_size=SIZE)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    (stage,), done = stages(out), finished(out)
    assert len(done) == 2
    before = identities(stage, done)
    assert len(list(stage.iterdir())) > 3  # the two, the records, and what was half written

    to_hf(checkpoint, out, max_shard_size=SIZE)
    assert identities(out, done) == before
    assert contents(out) == contents(tmp_path / "expected")
    assert not stages(out)


def test_killed_and_continued_towards_megatron(
    models: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = models("qwen2"), tmp_path / "out"
    words = ["convert", "--to", "mcore", "--model", str(source), "--output_dir", str(out), "--workers", "1"]
    with slowed_down(words, output=str(out), slow_after=1, pause=600, file_size=SIZE) as process:
        process.send_signal(signal.SIGKILL)
    (stage,), done = stages(out), finished(out)
    before = identities(stage, done)
    monkeypatch.setitem(layout.plan_checkpoint.__kwdefaults__, "file_size", SIZE)
    to_mcore(source, out)
    to_mcore(source, tmp_path / "expected")
    assert before
    assert identities(out, done) == before
    assert contents(out) == contents(tmp_path / "expected")


def test_interrupted_and_continued(checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the command with code 130, between two blocks, and keeps what is finished."""
    out = tmp_path / "out"
    with slowed_down(hf_words(checkpoint, out), output=str(out), slow_after=1, pause=3.0) as process:
        process.send_signal(signal.SIGINT)
        stderr = process.communicate()[1]
        assert (process.returncode, stderr) == (130, "braid convert: interrupted\n")
    assert not out.exists()
    (stage,), done = stages(out), finished(out)
    before = identities(stage, done)
    assert {path.name for path in stage.iterdir()} == {RECORDS_DIR, *done}  # nothing half written
    assert done
    to_hf(checkpoint, out, max_shard_size=SIZE)
    assert identities(out, done) == before


@pytest.fixture
def interrupted(checkpoint: Path, tmp_path: Path) -> Path:
    """An output directory of whose files two are finished."""
    interrupt(checkpoint, tmp_path / "out")
    assert len(finished(tmp_path / "out")) == 2
    return tmp_path / "out"


def interrupt(checkpoint: Path, out: Path) -> None:
    plan = plan_to_hf(checkpoint, max_shard_size=SIZE)
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, out, options=TransferOptions(progress=Interrupt(out)))


class Interrupt:
    """A progress that is interrupted once two files are finished."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __call__(self, count: int) -> None:
        if len(finished(self._out)) == 2:
            raise KeyboardInterrupt


def test_another_dtype_starts_over(checkpoint: Path, interrupted: Path, tmp_path: Path) -> None:
    (before,) = stages(interrupted)
    to_hf(checkpoint, tmp_path / "expected", max_shard_size=SIZE, dtype=torch.float16)
    to_hf(checkpoint, interrupted, max_shard_size=SIZE, dtype=torch.float16)
    assert contents(interrupted) == contents(tmp_path / "expected")
    assert not before.exists()
    assert not stages(interrupted)


def test_a_source_that_was_touched_starts_over(checkpoint: Path, interrupted: Path) -> None:
    (before,), done = stages(interrupted), finished(interrupted)
    kept = identities(before, done)
    data = checkpoint / "__0_0.distcp"
    os.utime(data, ns=(data.stat().st_atime_ns, data.stat().st_mtime_ns + 1))
    to_hf(checkpoint, interrupted, max_shard_size=SIZE)
    again = identities(interrupted, done)
    assert all(again[name][1] != kept[name][1] for name in done)
    assert not before.exists()


@pytest.mark.parametrize("damage", ["file", "size", "record"])
def test_only_files_that_are_whole_are_kept(
    checkpoint: Path, interrupted: Path, tmp_path: Path, damage: str
) -> None:
    (stage,), (first, second) = stages(interrupted), finished(interrupted)
    kept = identities(stage, [first, second])
    if damage == "file":
        (stage / first).unlink()
    elif damage == "size":
        os.truncate(stage / first, 100)
    else:
        (stage / RECORDS_DIR / f"{first}.json").write_text('{"nbytes": 3')
    to_hf(checkpoint, interrupted, max_shard_size=SIZE)
    to_hf(checkpoint, tmp_path / "expected", max_shard_size=SIZE)
    assert contents(interrupted) == contents(tmp_path / "expected")
    again = identities(interrupted, [first, second])
    assert again[second] == kept[second]
    assert again[first] != kept[first]


def test_what_an_attempt_left_behind_does_not_get_into_the_output(
    checkpoint: Path, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file, half a manifest, a companion that the source no longer has; nor does it take room."""
    (stage,) = stages(interrupted)
    for name in ("model-00003-of-00009.safetensors.host-7", f".{MANIFEST_FILE}.7", "vocab.json"):
        (stage / name).write_text("{")
    (stage / "hf_layout").mkdir()
    (stage / "hf_layout" / "x.header").write_text("{")
    done = finished(interrupted)
    looked = []

    def check_free_space(directory: Path, needed: int) -> None:
        looked.append({path.name for path in stage.iterdir()} == {RECORDS_DIR, *done})

    to_hf(checkpoint, tmp_path / "expected", max_shard_size=SIZE)
    monkeypatch.setattr(conversion, "check_free_space", check_free_space)
    to_hf(checkpoint, interrupted, max_shard_size=SIZE)
    assert looked == [True]
    assert contents(interrupted) == contents(tmp_path / "expected")


def test_an_error_of_the_source_removes_what_was_finished(
    checkpoint: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_rows(*args: Any) -> None:
        raise ModelError("shard is gone")

    monkeypatch.setattr(McoreSource, "read_rows", read_rows)
    with pytest.raises(ModelError, match="shard is gone"):
        to_hf(checkpoint, interrupted, max_shard_size=SIZE)
    assert not stages(interrupted)
    assert not interrupted.exists()


def test_room_is_asked_for_what_is_not_finished(
    checkpoint: Path, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, done = plan_to_hf(checkpoint, max_shard_size=SIZE), finished(interrupted)
    needed = sum(file.nbytes for file in plan.files if file.name not in done) + conversion._SMALL_FILES
    usage = shutil.disk_usage(interrupted.parent)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    with pytest.raises(OutputError, match=r"disk full: .* GB free, the output needs .*; make room"):
        carry_out(plan, tmp_path / "anew")
    carry_out(plan, interrupted)
    assert interrupted.is_dir()
