"""Output directories that appear whole or not at all, and that a second attempt can go on with.

The staging directory `.<name>.partial-<plan>` is a sibling of the target, so that the target appears in one
rename. It is named after the plan of the conversion: whoever carries out the same plan, after an interruption
or in another process of the same job, finds the same directory and the records of what is finished in it.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from converters.transfer import RECORDS_DIR, Crew, OutputFile, read_record
from engine.errors import OutputError
from engine.storage.durable import fsync, is_full
from engine.storage.files import shown

_LOCK_FILE = "lock"
_PLAN_DIGITS = 16
_POLL_SECONDS = 0.1
_BEGAN = psutil.Process().create_time()
_SLACK_SECONDS = 30.0
"""Between the starts of a job's processes, and between their clocks."""
_LAST_WORD_SECONDS = 2.0
"""In which a shared disk shows what a rank wrote last, and a launcher says better how it ended."""


class RankGoneError(OutputError):
    """A rank ended without a word. What is finished stays for the next attempt, as after an interruption."""


@contextmanager
def staged_directory(final: str | Path, *, plan: str, crew: Crew) -> Iterator[Path]:
    """A directory to write into. On rank 0 it becomes `final` when the block ends; the others only leave.

    If the block fails, it vanishes, on rank 0; if it is interrupted or killed, it stays for the next attempt
    at the same plan, and an attempt at another plan for the same target clears it away. Raises OutputError
    if `final` exists and is not an empty directory, if another process is writing it, or for what the
    operating system refuses: permissions, a full disk.
    """
    target = Path(final).resolve()
    with _output_errors(target):
        stage = stage_for(final, plan=plan)
        home, nested = stage.parent, stage.parent == target
        _make(stage)
        with _lock(stage, final, shared=crew.size > 1):
            if crew.rank == 0:
                _clear_others(home, target, stage)
            else:
                _note(stage, crew.rank).unlink(missing_ok=True)  # of an earlier start
            try:
                with _presence(stage, crew):
                    yield stage
                    if crew.rank:
                        _leave_note(stage, crew, error=None)
            except (KeyboardInterrupt, SystemExit, RankGoneError):
                raise
            except BaseException as error:
                _give_up(stage, crew, error)
                raise
            if crew.rank == 0:
                _publish(stage, target, nested=nested)


def stage_for(final: str | Path, *, plan: str) -> Path:
    """Where `final` would be staged. Raises OutputError if it exists and is not an empty directory."""
    target = Path(final).resolve()
    _check_free(target, final)
    # A mount point cannot be replaced; the working directory should not be pulled from under the user.
    nested = target.is_dir() and (os.path.ismount(target) or target == Path.cwd())
    home = target if nested else target.parent
    return home / f".{target.name}.partial-{plan[:_PLAN_DIGITS]}"


def _check_free(target: Path, final: str | Path) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{final} is a file; choose another output directory")
    if target.is_dir() and any(not _is_stage(child, target) for child in target.iterdir()):
        raise OutputError(f"{final} is not empty; choose a new output directory or remove it")


def _make(stage: Path) -> None:
    """The staging directory with its lock file, if it is not there; or nothing, if the disk is too full."""
    try:
        (stage / RECORDS_DIR).mkdir(parents=True, exist_ok=True)
        (stage / RECORDS_DIR / _LOCK_FILE).touch()
    except OSError:
        for directory in (stage / RECORDS_DIR, stage):
            with suppress(OSError):  # it is not empty, and then somebody else's
                directory.rmdir()
        raise


def _is_stage(path: Path, target: Path) -> bool:
    return path.name.startswith(f".{target.name}.partial-")


@contextmanager
def _lock(stage: Path, final: str | Path, *, shared: bool) -> Iterator[None]:
    """Held while a process writes into the stage. A file system without locks goes without."""
    with open(stage / RECORDS_DIR / _LOCK_FILE, "ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{final} is being written by another process; wait for it or stop it"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
                raise
        yield


def _clear_others(home: Path, target: Path, stage: Path) -> None:
    """Remove what attempts at other plans left, unless somebody is still at it."""
    for other in home.iterdir():
        if other == stage or not _is_stage(other, target):
            continue
        with suppress(OSError, OutputError), _lock(other, target, shared=False):
            shutil.rmtree(other, ignore_errors=True)


def _give_up(stage: Path, crew: Crew, error: BaseException) -> None:
    if crew.rank == 0:
        shutil.rmtree(stage, ignore_errors=True)
        return
    with suppress(OSError):  # the disk may be full, or rank 0 may have given up first
        _leave_note(stage, crew, error=str(error))


def _note(stage: Path, rank: int) -> Path:
    """What a rank leaves for rank 0 when it has done its part or failed."""
    return stage / RECORDS_DIR / f"rank-{rank}"


def _leave_note(stage: Path, crew: Crew, *, error: str | None) -> None:
    note = {"run": crew.run, "time": time.time(), "error": error}
    _note(stage, crew.rank).write_text(json.dumps(note), encoding="utf-8")


def _presence_file(stage: Path, rank: int) -> Path:
    """Locked by a rank as long as it is at work."""
    return stage / RECORDS_DIR / f"rank-{rank}.lock"


@contextmanager
def _presence(stage: Path, crew: Crew) -> Iterator[None]:
    """By the lock rank 0 knows whether this rank lives. A file system without locks does without."""
    if crew.rank == 0:
        yield
        return
    with open(_presence_file(stage, crew.rank), "ab") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(json.dumps({"run": crew.run, "time": time.time()}).encode())
            file.flush()
        yield


def _is_gone(stage: Path, rank: int, crew: Crew) -> bool:
    """Whether a rank has been at work in this start of the job, and is there no longer."""
    try:
        with open(_presence_file(stage, rank), "rb") as file:
            came = json.loads(file.read())
            if came["run"] != crew.run or came["time"] < _BEGAN - _SLACK_SECONDS:
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, ValueError):  # it has not come, is at work, or there are no locks
        return False
    return True


def wait_for(files: Sequence[OutputFile], stage: Path, crew: Crew) -> None:
    """On rank 0, until the others have left and their files are there. Raises OutputError when one of them
    failed, and RankGoneError when one of them ended without a word.

    A rank without files is waited for as well: it may not have come yet, and the directory is about to go.
    """
    missing, others = list(files), list(range(1, crew.size))
    gone: dict[int, float] = {}
    while True:
        others = [rank for rank in others if not _has_left(stage, rank, crew)]
        gone = {r: gone.get(r, time.monotonic()) for r in others if _is_gone(stage, r, crew)}
        for rank, since in gone.items():
            if time.monotonic() - since > _LAST_WORD_SECONDS:
                raise RankGoneError(
                    f"rank {rank} ended without a word; see what ended it, and run the command again: it "
                    f"goes on with what is finished"
                )
        missing = [file for file in missing if read_record(stage, file) is None]
        if not others and not missing:
            return
        time.sleep(_POLL_SECONDS)


def _has_left(stage: Path, rank: int, crew: Crew) -> bool:
    """Whether a rank has done its part. Raises OutputError if it failed."""
    try:
        note = json.loads(_note(stage, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not yet whole
        return False
    if note["run"] != crew.run:
        return False
    if note["error"] is None:
        return True
    if note["time"] < _BEGAN - _SLACK_SECONDS:  # a job that is started again can have the name of before
        return False
    raise OutputError(f"rank {rank} failed: {note['error']}")


def clear_leftovers(stage: Path, files: Sequence[OutputFile]) -> None:
    """Remove everything but `files` and the records: what an attempt that was killed left half written does
    not belong into the output.
    """
    kept = {RECORDS_DIR, *(file.name for file in files)}
    for path in stage.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _publish(stage: Path, target: Path, *, nested: bool) -> None:
    shutil.rmtree(stage / RECORDS_DIR)
    fsync(stage)
    if nested:
        for child in stage.iterdir():
            child.rename(target / child.name)
        stage.rmdir()
    else:
        stage.rename(target)
    fsync(target.parent)


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    """Turns what the operating system refuses while writing into an OutputError."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise OutputError(
                f"disk full while writing {target}; make room or choose another directory"
            ) from error
        place = f" ({shown(error.filename)})" if error.filename else ""
        raise OutputError(f"{target} cannot be written: {error.strerror or error}{place}") from error
