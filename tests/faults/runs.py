"""Small runs at TP2 x PP2 that can be hurt: four ranks forked from a process that has imported everything.

The parent of the ranks does what torchrun's agent does: when one of them fails, it ends the others. Starting
the real launcher would take ten seconds a run, nearly all of it imports.
"""

import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from engine.storage.manifest import MANIFEST_FILE

RANKS = 4
STEPS = 6
TIMEOUT = 120.0
BALLAST = "ballast"
"""File beside the output directory that fills a small disk."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a series have in common."""

    model: Path
    data: Path
    cache: Path

    def words(self, output_dir: Path) -> list[str]:
        """The command line, without its first word."""
        return [
            "--model", str(self.model), "--dataset", str(self.data), "--output_dir", str(output_dir),
            "--device", "cpu", "--max_length", "64", "--global_batch_size", "4", "--max_steps", str(STEPS),
            "--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2",
            "--learning_rate", "1e-2", "--save_steps", "1", "--save_total_limit", "3",
            "--report_to", "none", "--resume_from_checkpoint", "auto", "--hang_timeout", "6",
        ]  # fmt: skip


@dataclass(kw_only=True)
class LiveRun:
    """A run under way."""

    output_dir: Path
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)
    """Exit code by rank, negative for a signal, of those that have ended."""

    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def send(self, rank: int, number: signal.Signals) -> None:
        """A signal to a rank, if it still runs."""
        if rank in self.alive():
            os.kill(self.pids[rank], number)

    def alive_processes(self) -> list[psutil.Process]:
        """The ranks that have not ended."""
        found = []
        for rank in self.alive():
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(self.pids[rank]))
        return found

    def writers(self) -> list[psutil.Process]:
        """The processes that write checkpoints for the ranks."""
        found = []
        for rank in self.alive():
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(self.pids[rank]).children()
                found += [child for child in children if "engine.storage.writer" in child.cmdline()]
        return found

    def wait_until(self, happened: Callable[[], bool], timeout: float = TIMEOUT) -> bool:
        """Whether it happened before the run or the time ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if happened():
                return True
            if len(self.alive()) < len(self.pids):
                return False
            time.sleep(0.002)
        return False


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that is over."""

    codes: tuple[int, ...]
    """Exit code by rank."""
    printed: str
    """What rank 0 printed."""
    seconds: float
    linger_s: float
    """From the first rank's death to the last one's."""


Injury = Callable[[LiveRun, random.Random], None]


def warm_up() -> None:
    """Import what ranks need, once, before they are forked."""
    import engine.training.loop
    import engine.training.optimizer
    import launch.sft
    from engine.data import prepare, stream
    from engine.model import provider

    assert all((engine.training.loop, launch.sft, prepare, stream, provider))


def run(
    settings: Settings, output_dir: Path, log_dir: Path, injure: Injury | None, dice: random.Random
) -> Ended:
    """Start a run, hurt it if `injure` is given, and wait for its end."""
    port, started = _free_port(), time.monotonic()
    log_dir.mkdir(parents=True, exist_ok=True)
    pids = [_fork(rank, port, settings, output_dir, log_dir) for rank in range(RANKS)]
    live = LiveRun(output_dir=output_dir, pids=pids)
    with _never_left_behind(pids):
        if injure is not None:
            injure(live, dice)
        linger = _supervise(live)
    return Ended(
        codes=tuple(live.codes[rank] for rank in range(RANKS)),
        printed=(log_dir / "0.out").read_text(encoding="utf-8"),
        seconds=time.monotonic() - started,
        linger_s=linger,
    )


def _supervise(live: LiveRun) -> float:
    """Wait for all ranks. When one has failed the others are ended: politely, and after a while by force."""
    first: float | None = None
    end = time.monotonic() + TIMEOUT
    while live.alive():
        failed = any(code not in (0, 75) for code in live.codes.values())
        now = time.monotonic()
        if failed and first is None:
            first = now
            for rank in live.alive():
                live.send(rank, signal.SIGTERM)
        if (first is not None and now > first + 10) or now > end:
            for rank in live.alive():
                live.send(rank, signal.SIGKILL)
        time.sleep(0.005)
    return 0.0 if first is None else time.monotonic() - first


def _fork(rank: int, port: int, settings: Settings, output_dir: Path, log_dir: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log_dir / f"{rank}.out", "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "BRAID_CACHE": str(settings.cache),
        }
        from launch.cli import main

        code = main(["sft", *settings.words(output_dir)])
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _never_left_behind(pids: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """Directories of checkpoints that carry a manifest, by step."""
    found = output_dir.glob(f"checkpoint-*/{MANIFEST_FILE}")
    return {int(path.parent.name.removeprefix("checkpoint-")): path.parent for path in found}
