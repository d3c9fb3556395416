"""The process that writes files beside the program: what it writes, how it fails, and its death."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.errors import OutputError
from engine.storage.writer import BackgroundWriter, Span, StagedFile, read_answer


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    made = BackgroundWriter()
    yield made
    made.close()


def fill(writer: BackgroundWriter, content: bytes) -> None:
    writer.memory(len(content))[: len(content)] = content


def test_files_hold_spans_and_literals_in_order(writer: BackgroundWriter, tmp_path: Path) -> None:
    content = os.urandom(9_000_000)
    fill(writer, content)
    first = StagedFile(path=tmp_path / "a", parts=(b"head", Span(start=5, stop=8_500_000), b"", b"tail"))
    second = StagedFile(path=tmp_path / "b", parts=(Span(start=0, stop=5),))
    writer.start([first, second], record=tmp_path / "record")
    entries = writer.wait()
    wanted = {"a": b"head" + content[5:8_500_000] + b"tail", "b": content[:5]}
    for name, data in wanted.items():
        assert (tmp_path / name).read_bytes() == data
        assert (entries[name].bytes, entries[name].sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert read_answer((tmp_path / "record").read_bytes()) == entries


def test_memory_grows_and_is_used_again(writer: BackgroundWriter, tmp_path: Path) -> None:
    for size in (10, 5_000_000, 100):
        content = os.urandom(size)
        fill(writer, content)
        writer.start([StagedFile(path=tmp_path / "a", parts=(Span(start=0, stop=size),))])
        assert writer.wait()["a"].bytes == size
        assert (tmp_path / "a").read_bytes() == content
    assert len(writer.memory(1)) == 5_000_000


def test_poll_tells_when_it_is_done(writer: BackgroundWriter, tmp_path: Path) -> None:
    assert writer.poll()
    fill(writer, b"x")
    writer.start([StagedFile(path=tmp_path / "a", parts=(Span(start=0, stop=1),))])
    end = time.monotonic() + 60
    while not writer.poll():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_failure_is_one_line_and_in_the_record(writer: BackgroundWriter, tmp_path: Path) -> None:
    fill(writer, b"x")
    missing = StagedFile(path=tmp_path / "no" / "a", parts=(Span(start=0, stop=1),))
    writer.start([missing], record=tmp_path / "record")
    with pytest.raises(OutputError, match="cannot be written") as caught:
        writer.wait()
    assert str(tmp_path / "no" / "a") in str(caught.value)
    with pytest.raises(OutputError, match="cannot be written"):
        read_answer((tmp_path / "record").read_bytes())
    writer.start([StagedFile(path=tmp_path / "a", parts=(b"y",))])  # and it goes on
    assert writer.wait()["a"].bytes == 1


def test_a_full_disk_is_named(writer: BackgroundWriter) -> None:
    fill(writer, b"x")
    writer.start([StagedFile(path=Path("/dev/full"), parts=(Span(start=0, stop=1),))])
    with pytest.raises(OutputError, match="disk full"):
        writer.wait()


@pytest.mark.parametrize("way", ["poll", "wait"])
def test_a_killed_writer_is_an_error(writer: BackgroundWriter, tmp_path: Path, way: str) -> None:
    fill(writer, b"x")
    writer.start([StagedFile(path=tmp_path / "a", parts=(Span(start=0, stop=1),))])
    writer.wait()
    (process,) = (c for c in psutil.Process().children() if "engine.storage.writer" in c.cmdline())
    process.suspend()
    writer.start([StagedFile(path=tmp_path / "b", parts=(Span(start=0, stop=1),))])
    process.kill()
    end = time.monotonic() + 60
    while (
        process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end
    ):  # not waited for, which reaps it
        time.sleep(0.01)
    with pytest.raises(OutputError, match=r"died \(SIGKILL\)"):
        getattr(writer, way)()


def test_it_dies_with_the_program(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys, psutil
from pathlib import Path
from engine.storage.writer import BackgroundWriter, StagedFile
writer = BackgroundWriter()
writer.start([StagedFile(path=Path({str(tmp_path / "a")!r}), parts=(b"x",))])
writer.wait()
(child,) = psutil.Process().children()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, end = int(done.stdout), time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)
