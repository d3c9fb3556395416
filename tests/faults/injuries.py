"""The faults: what happens to a run, or to what a run has left, before it is started again."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.storage.manifest import MANIFEST_FILE
from tests.faults.runs import BALLAST, RANKS, STEPS, Injury, LiveRun, checkpoints

Damage = Callable[[Path, random.Random], None]
"""Does something to the directory of the newest checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A kind of fault."""

    injure: Injury
    damage: Damage | None = None
    codes: tuple[int, ...] | None = None
    """Exit codes that every rank may end with; None: anything but success on all of them."""


def _pause_until_training(live: LiveRun) -> None:
    live.wait_until(lambda: bool(checkpoints(live.output_dir)))


def _saving(live: LiveRun, dice: random.Random) -> None:
    """Until some save after the first checkpoint is under way."""
    _pause_until_training(live)
    live.wait_until(lambda: any(live.output_dir.glob(".checkpoint-*.partial/.records")))
    time.sleep(dice.uniform(0, 0.08))


def kill_anywhere(live: LiveRun, dice: random.Random) -> None:
    """SIGKILL of a random rank at a random moment, before the first step too."""
    time.sleep(dice.uniform(0, 4.0))
    live.send(dice.randrange(RANKS), signal.SIGKILL)


def kill_between_steps(live: LiveRun, dice: random.Random) -> None:
    """SIGKILL of a random rank after a random number of checkpoints."""
    step = dice.randrange(1, STEPS)
    live.wait_until(lambda: max(checkpoints(live.output_dir), default=0) >= step)
    time.sleep(dice.uniform(0, 0.2))
    live.send(dice.randrange(RANKS), signal.SIGKILL)


def kill_late(live: LiveRun, dice: random.Random) -> None:
    """SIGKILL of a random rank when there are several checkpoints."""
    step = dice.randrange(2, STEPS)
    live.wait_until(lambda: max(checkpoints(live.output_dir), default=0) >= step)
    live.send(dice.randrange(RANKS), signal.SIGKILL)


def kill_while_saving(live: LiveRun, dice: random.Random) -> None:
    """SIGKILL of a random rank in the middle of a save."""
    _saving(live, dice)
    live.send(dice.randrange(RANKS), signal.SIGKILL)


def kill_all_while_saving(live: LiveRun, dice: random.Random) -> None:
    """SIGKILL of all ranks in the middle of a save, as when the node goes down."""
    _saving(live, dice)
    for rank in range(RANKS):
        live.send(rank, signal.SIGKILL)


def kill_writer(live: LiveRun, dice: random.Random) -> None:
    """SIGKILL of a process that writes a checkpoint, in the middle of a save."""
    _saving(live, dice)
    _kill_some_writer(live, dice)


def _kill_some_writer(live: LiveRun, dice: random.Random) -> None:
    writers = live.writers()
    if writers:
        try:
            dice.choice(writers).kill()
        except psutil.NoSuchProcess:
            return


def terminate(live: LiveRun, dice: random.Random) -> None:
    """SIGTERM to all ranks, as a scheduler does."""
    _pause_until_training(live)
    time.sleep(dice.uniform(0, 1.0))
    for rank in range(RANKS):
        live.send(rank, signal.SIGTERM)


def warn(live: LiveRun, dice: random.Random) -> None:
    """SIGUSR1 to one rank, as Slurm warns before the time limit."""
    _pause_until_training(live)
    time.sleep(dice.uniform(0, 1.0))
    live.send(dice.randrange(RANKS), signal.SIGUSR1)


def freeze(live: LiveRun, dice: random.Random) -> None:
    """A rank that hangs: SIGSTOP."""
    _pause_until_training(live)
    time.sleep(dice.uniform(0, 0.5))
    live.send(dice.randrange(RANKS), signal.SIGSTOP)


def fill_disk(live: LiveRun, dice: random.Random) -> None:
    """The disk fills up while the run goes on. Where none could be made that is small, files must not grow
    any more: the kernel then refuses the same writes, with another number.
    """
    _pause_until_training(live)
    time.sleep(dice.uniform(0, 0.3))
    disk = live.output_dir.parent
    if os.path.ismount(disk):
        with open(disk / BALLAST, "ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        return
    for process in [*live.alive_processes(), *live.writers()]:
        with suppress(OSError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))


def _shard(checkpoint: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(path for path in checkpoint.glob("*.distcp") if path.stat().st_size))


def truncate(checkpoint: Path, dice: random.Random) -> None:
    """A shard that ends early."""
    path = _shard(checkpoint, dice)
    os.truncate(path, dice.randrange(1, path.stat().st_size))


def empty(checkpoint: Path, dice: random.Random) -> None:
    """A shard of no bytes."""
    os.truncate(_shard(checkpoint, dice), 0)


def flip(checkpoint: Path, dice: random.Random) -> None:
    """One bit of any file is another."""
    path = dice.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size))
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def lose(checkpoint: Path, dice: random.Random) -> None:
    """A file of the checkpoint is gone."""
    dice.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file())).unlink()


def exchange(checkpoint: Path, dice: random.Random) -> None:
    """A shard comes from another step."""
    others = [path for path in checkpoint.parent.glob("checkpoint-*") if path != checkpoint]
    path = _shard(checkpoint, dice)
    if others:
        shutil.copyfile(dice.choice(sorted(others)) / path.name, path)
    else:
        path.write_bytes(path.read_bytes()[::-1])


def tear_manifest(checkpoint: Path, dice: random.Random) -> None:
    """The manifest ends early."""
    path = checkpoint / MANIFEST_FILE
    os.truncate(path, dice.randrange(path.stat().st_size))


def leave_junk(checkpoint: Path, dice: random.Random) -> None:
    """Beside the checkpoints lies a newer directory with nothing whole in it."""
    fake = checkpoint.with_name(f"checkpoint-{STEPS + 1}")
    fake.mkdir()
    shutil.copyfile(checkpoint / "trainer_state.json", fake / "trainer_state.json")


_STOPPED = (75,)
FAULTS: Mapping[str, Fault] = {
    "a rank killed at any moment": Fault(injure=kill_anywhere),
    "a rank killed between saves": Fault(injure=kill_between_steps),
    "a rank killed in the middle of a save": Fault(injure=kill_while_saving),
    "all ranks killed in the middle of a save": Fault(injure=kill_all_while_saving),
    "a writer killed in the middle of a save": Fault(injure=kill_writer),
    "disk full": Fault(injure=fill_disk),
    "SIGTERM to all ranks": Fault(injure=terminate, codes=_STOPPED),
    "SIGUSR1 to one rank": Fault(injure=warn, codes=_STOPPED),
    "a rank that hangs": Fault(injure=freeze),
    "newest checkpoint: truncated shard": Fault(injure=kill_late, damage=truncate),
    "newest checkpoint: empty shard": Fault(injure=kill_late, damage=empty),
    "newest checkpoint: flipped bit": Fault(injure=kill_late, damage=flip),
    "newest checkpoint: missing file": Fault(injure=kill_late, damage=lose),
    "newest checkpoint: foreign shard": Fault(injure=kill_late, damage=exchange),
    "newest checkpoint: torn manifest": Fault(injure=kill_late, damage=tear_manifest),
    "a newer directory that is no checkpoint": Fault(injure=kill_late, damage=leave_junk),
}
