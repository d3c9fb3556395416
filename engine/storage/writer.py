"""A process of its own that writes files while the program goes on.

The program copies its tensors into memory that both share, hands over which bytes make up which file, and is
free again. The writer needs nothing but Python's standard library: it starts in a moment, holds no lock of
the program, and hashes what it writes. It dies with the program.

    python -m engine.storage.writer MEMORY_FD    (jobs on standard input, answers on standard output)
"""

import base64
import ctypes
import hashlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import OutputError
from engine.storage.durable import is_full, write_all, write_whole
from engine.storage.manifest import FileEntry

_BLOCK = 4_000_000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes [start, stop) of the shared memory."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class StagedFile:
    """A file as a sequence of literal bytes and spans of the shared memory."""

    path: Path
    parts: tuple[bytes | Span, ...]


class BackgroundWriter:
    """The program's side. One job at a time."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("braid-checkpoint")
        self._memory: mmap.mmap | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._busy = False

    def memory(self, nbytes: int) -> mmap.mmap:
        """Shared memory of at least `nbytes`, to be filled before a job. It keeps its size between jobs, so
        that only the first has to wait for the kernel to hand out pages. Raises OutputError if there is not
        enough.
        """
        assert not self._busy, "the writer still reads the memory"
        nbytes = max(nbytes, 1)
        if self._memory is None or len(self._memory) < nbytes:
            try:
                os.ftruncate(self._fd, nbytes)
                self._memory = mmap.mmap(self._fd, nbytes)
            except (OSError, ValueError) as error:
                raise OutputError(
                    f"no memory to copy {nbytes / 1e9:.1f} GB of a checkpoint to ({error}); save less "
                    f"often or on more ranks"
                ) from error
        return self._memory

    def start(self, files: Sequence[StagedFile], *, record: Path | None = None) -> None:
        """Begin to write. When all is on the disk, `record` is written with sizes and hashes by file name, or
        with the error.
        """
        process = self._running()
        job = {
            "record": str(record) if record is not None else None,
            "files": [
                {"path": str(file.path), "parts": [_encoded(part) for part in file.parts]} for file in files
            ],
        }
        assert process.stdin is not None
        self._busy = True
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise self._died() from error

    def poll(self) -> bool:
        """Whether the writer is idle. Raises OutputError if it failed or died."""
        if self._busy:
            assert self._process is not None
            assert self._process.stdout is not None
            if select.select([self._process.stdout], [], [], 0)[0]:
                self.wait()
            elif self._process.poll() is not None:
                raise self._died()
        return not self._busy

    def wait(self) -> dict[str, FileEntry]:
        """Until the job is done: size and SHA-256 of its files by name. Raises OutputError if it failed."""
        if not self._busy:
            return {}
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        self._busy = False
        return read_answer(line)

    def close(self) -> None:
        """End the writer, whatever it is doing."""
        if self._process is not None:
            with suppress(OSError):
                self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()
            self._process = None
        self._busy = False
        if self._memory is not None:
            with suppress(BufferError):  # tensors may still look at it
                self._memory.close()
            self._memory = None
        with suppress(OSError):
            os.close(self._fd)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.storage.writer", str(self._fd), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self._fd],
                cwd=Path(__file__).parents[2],
                start_new_session=True,  # a signal to the program's group is the program's to answer
            )
        return self._process

    def _died(self) -> OutputError:
        assert self._process is not None
        code = self._process.wait()
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return OutputError(
            f"the process that writes checkpoints died ({reason}); the last one is not complete"
        )


def _encoded(part: bytes | Span) -> str | list[int]:
    return base64.b64encode(part).decode() if isinstance(part, bytes) else [part.start, part.stop]


def read_answer(line: bytes | str) -> dict[str, FileEntry]:
    """The content of a record. Raises OutputError for one of a failure."""
    value = json.loads(line)
    if "error" in value:
        raise OutputError(value["error"])
    return {name: FileEntry(**entry) for name, entry in value["files"].items()}


def main(fd: int, parent: int) -> None:
    """The writer's side."""
    with suppress(OSError, AttributeError):  # Linux; elsewhere the end of standard input has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(5)
    for line in sys.stdin.buffer:
        answer = _carry_out(json.loads(line), fd)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _carry_out(job: dict[str, Any], fd: int) -> bytes:
    record = Path(job["record"]) if job["record"] is not None else None
    try:
        size = os.fstat(fd).st_size
        # Not closed but let go: an error that passes here still holds views of it.
        memory = mmap.mmap(fd, size, access=mmap.ACCESS_READ) if size else memoryview(b"")
        files = {Path(file["path"]).name: _write(file, memory) for file in job["files"]}
        answer = json.dumps({"files": files}).encode()
        if record is not None:
            write_whole(record, answer)
        return answer
    except OSError as error:
        place = error.filename or Path(job["files"][0]["path"]).parent
        message = f"{place} cannot be written: {error.strerror}"
        if is_full(error):
            message = (
                f"disk full while writing {place}; make room or lower save_total_limit, then go on with "
                f"--resume_from_checkpoint auto"
            )
        answer = json.dumps({"error": message}).encode()
        if record is not None:
            with suppress(OSError):  # the program learns it from the answer all the same
                write_whole(record, answer)
        return answer


def _write(file: dict[str, Any], memory: mmap.mmap | memoryview) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    with open(file["path"], "wb", buffering=0) as out, ThreadPoolExecutor(1) as hasher:
        for part in file["parts"]:
            if isinstance(part, str):
                data = memoryview(base64.b64decode(part))
            else:
                data = memoryview(memory)[part[0] : part[1]]
            for start in range(0, len(data), _BLOCK):
                block = data[start : start + _BLOCK]
                hashed = hasher.submit(digest.update, block)
                write_all(out, block)
                hashed.result()
                size += len(block)
        os.fsync(out.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
