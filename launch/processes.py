"""Starting the ranks of a run: which world this process belongs to, and torchrun's agent underneath.

Whichever rank fails, the user sees one message: the one of the first rank that failed.
"""

import functools
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from engine.config.options import LaunchOptions
from engine.errors import ConfigError, StoppedError, UserError
from launch.pipe import CLOSED, let_go, reader_has_gone

# Environment variables that mean the same as the flags; flags win.
ENVIRONMENT: Mapping[str, str] = {
    name.upper(): name for name in ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
}
_STARTED = "BRAID_STARTED"
_ERROR_DIR = "BRAID_ERROR_DIR"
MODELS = "BRAID_MODELS"
"""Directories of models by their id, which the launcher has looked up: a JSON object."""
_STOPPING = "stopping"
"""File in the folder of errors: the launcher was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run as this one sees them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    started: bool
    """False in the process that still has to start the ranks."""

    command: str = "sft"
    """The braid command that runs, for messages."""


def launch_environment() -> dict[str, str]:
    """Launch options that the environment sets. Under torchrun or Slurm these variables describe the worker
    instead.
    """
    if _worker_world() is not None:
        return {}
    return {option: os.environ[name] for name, option in ENVIRONMENT.items() if os.environ.get(name)}


def find_world(options: LaunchOptions, command: str = "sft") -> World:
    """This process's place, or the size of the world that has to be started. Raises ConfigError."""
    worker = _worker_world()
    if worker is not None:
        return replace(worker, command=command)
    local_size = 1 if options.nproc_per_node is None else options.nproc_per_node
    nodes = 1 if options.nnodes is None else options.nnodes
    for name, value in (("nproc_per_node", local_size), ("nnodes", nodes)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if nodes > 1:
        if options.node_rank is None or options.master_addr is None or options.master_port is None:
            raise ConfigError("NNODES > 1 needs NODE_RANK, MASTER_ADDR and MASTER_PORT on every node")
        if not 0 <= options.node_rank < nodes:
            raise ConfigError(f"node_rank must be in [0, {nodes}), not {options.node_rank}")
    return World(
        rank=0,
        size=local_size * nodes,
        local_rank=0,
        local_size=local_size,
        started=False,
        command=command,
    )


def _worker_world() -> World | None:
    """Set by torchrun (RANK, WORLD_SIZE), or by srun with several tasks (SLURM_PROCID, SLURM_NTASKS)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        size = int(env["WORLD_SIZE"])
        local_size = int(env.get("LOCAL_WORLD_SIZE", size))
        local_rank = int(env.get("LOCAL_RANK", env["RANK"]))
        return World(
            rank=int(env["RANK"]), size=size, local_rank=local_rank, local_size=local_size, started=True
        )
    if env.get("NPROC_PER_NODE") or env.get("NNODES"):
        return None  # srun started one launcher per node, which starts the ranks of its node
    tasks = int(env.get("SLURM_NTASKS", "1"))
    # An interactive allocation sets SLURM_NTASKS without being a step; srun's tasks have a step id that is a
    # number.
    if "SLURM_PROCID" in env and tasks > 1 and env.get("SLURM_STEP_ID", "").isdigit():
        return World(
            rank=int(env["SLURM_PROCID"]),
            size=tasks,
            local_rank=int(env.get("SLURM_LOCALID", "0")),
            local_size=int(
                env.get("SLURM_NTASKS_PER_NODE", "") or tasks // int(env.get("SLURM_NNODES", "1"))
            ),
            started=True,
        )
    return None


def open_world(world: World) -> None:
    """Set the variables that torch.distributed reads under Slurm, where torchrun does not. A single process
    needs none.
    """
    if not world.started:
        return
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(world.local_size))
    if world.size > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError("MASTER_ADDR is not set; under Slurm export the first node's name, and MASTER_PORT")


@functools.cache
def meeting_place(world: World) -> Any:
    """The store through which ranks find one another. A process of its own has nobody to meet, and needs
    neither an address nor a port.
    """
    import torch.distributed as dist

    if not world.started:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://"))
    # The agent's store outlives an attempt: what dead ranks left in it must not be found by new ones.
    return dist.PrefixStore(f"attempt-{restart_count()}", store)


def environment_of_one() -> dict[str, str]:
    """This process's environment for a command of its own: without what says that there are several
    processes, and which one this is.
    """
    of_ranks = ("RANK", "WORLD_SIZE", "SLURM_PROCID", *ENVIRONMENT)
    return {name: value for name, value in os.environ.items() if name not in of_ranks}


def restart_count() -> int:
    """How often the elastic agent, ours or somebody else's torchrun, has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def started_by_braid() -> bool:
    """Whether this is a rank that our own launcher has started, which says what ranks report to it."""
    return _ERROR_DIR in os.environ


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a rank to save and end.

    Our own launcher passes a request on as SIGUSR1; its agent ends ranks by SIGTERM when one of them has
    failed, and then there is nothing to wait for.
    """
    return (signal.SIGUSR1,) if started_by_braid() else (signal.SIGTERM, signal.SIGUSR1)


def run_worker(world: World, work: Callable[[], None], place: Callable[[], str]) -> int:
    """Run a rank's work; a failure is reported once, by the launcher or by this rank. Returns the exit
    code.
    """
    if (code := _after_restart(world)) is not None:
        return code
    try:
        work()
        return 0
    except StoppedError as error:
        _report(world, str(error), error.exit_code, "")
        # The launcher's agent takes any other code for a failure, and would start the ranks again.
        return 0 if started_by_braid() else error.exit_code
    except UserError as error:
        _report(world, str(error), error.exit_code, place())
        return error.exit_code
    except BaseException as error:  # torch's CheckpointException is no Exception
        if reader_has_gone(error):
            let_go()
            _report(world, "nobody reads what it prints", CLOSED, "")
            return CLOSED
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        _report(world, traceback.format_exc(), 1, place())
        return 1


def give_up(world: World, place: str, message: str) -> None:
    """End this process, whatever its other threads are doing."""
    _report(world, message, 1, place)
    os._exit(1)


def _after_restart(world: World) -> int | None:
    """In a rank that was started again: say why, once, or refuse where starting again cannot help."""
    folder, count = os.environ.get(_ERROR_DIR), restart_count()
    if folder is None or count == 0:
        return None
    if Path(folder, _STOPPING).exists():
        return 1
    first = _first_record(Path(folder), count - 1)
    if first is not None and first["code"] in (ConfigError.exit_code, CLOSED):
        _report(world, first["message"], first["code"], "")
        return int(first["code"])
    if world.rank == 0:
        reason = "a rank ended and left no message" if first is None else first["message"] + first["where"]
        print(f"braid {world.command}: restart {count} after: {reason}", file=sys.stderr, flush=True)
    return None


def _report(world: World, message: str, code: int, place: str) -> None:
    where = f" (rank {world.rank}, {place})" if world.size > 1 and place else ""
    folder = os.environ.get(_ERROR_DIR)
    if folder:
        record = {"message": message, "code": code, "where": where, "time": time.time()}
        partial = Path(folder, f"{world.rank}.partial")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.rename(Path(folder, f"{restart_count()}-{world.rank}.json"))
    elif code != CLOSED and (place or world.rank == 0):
        # Started by somebody else's torchrun: what goes wrong before the grid exists goes wrong on every rank
        # alike.
        print(_format(world.command, message, code, where), file=sys.stderr, flush=True)


def _format(command: str, message: str, code: int, where: str) -> str:
    if code == StoppedError.exit_code:
        return f"braid {command}: {message}"
    if code == ConfigError.exit_code:
        return f"braid {command}: error{where}: {message}"
    return f"braid {command}: failed{where}:{chr(10) if chr(10) in message else ' '}{message}"


def command_began() -> float:
    """time.monotonic() when the command began: a machine's processes share the clock, and the launcher hands
    on its time.
    """
    return float(os.environ.get(_STARTED) or time.monotonic())


def attempt_began() -> float:
    """The same of this attempt: a rank that was started again counts from its own start."""
    if restart_count() == 0:
        return command_began()
    return time.monotonic() - (time.time() - psutil.Process().create_time())


def start_processes(
    options: LaunchOptions,
    world: World,
    argv: Sequence[str],
    *,
    began: float,
    models: Mapping[str, str] | None = None,
) -> int:
    """Start this node's ranks with torch's elastic agent and wait for them. Returns the exit code of the run;
    `began` is the time.monotonic() of the command's start, `models` are directories by the names that
    `launch.models` is asked for.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # torch gives each of them a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with (
        tempfile.TemporaryDirectory(prefix="braid-") as folder,
        _environment(_ERROR_DIR, folder),
        _environment(_STARTED, repr(began)),
        _environment(MODELS, json.dumps(models or {})),
    ):
        nodes = options.nnodes or 1
        single = nodes == 1
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=world.local_size,
            run_id="braid" if not single else f"braid-{os.getpid()}",
            rdzv_backend="c10d" if single else "static",
            rdzv_endpoint="localhost:0" if single else f"{options.master_addr}:{options.master_port}",
            rdzv_configs={"rank": options.node_rank or 0, "timeout": 900},
            max_restarts=options.max_restarts,
            signals_to_handle="SIGHUP,SIGQUIT",
            # Rank 0 speaks; what other ranks print is kept only as long as the run.
            logs_specs=DefaultLogsSpecs(
                log_dir=folder, redirects=dict.fromkeys(range(1, world.local_size), Std.ALL)
            ),
        )
        others = {child.pid for child in psutil.Process().children(recursive=True)}
        with _passing_on(Path(folder), others) as received:
            try:
                elastic_launch(config, sys.executable)("-m", "launch.cli", *argv)
                return _stopped(world.command, Path(folder))
            except ChildFailedError as error:
                if received:  # before the ranks knew how to save
                    return _ended_by(world.command, received[0])
                rank, failure = error.get_first_failure()
                return _first_error(world.command, Path(folder), rank, failure.exitcode)
            except SignalException as error:
                # The agent has ended the ranks that it knew of; a signal amid their start leaves it without
                # the last.
                _end_processes(others)
                number = received[0] if received else signal.Signals(error.sigval)
                return _ended_by(world.command, number)


def _ended_by(command: str, number: signal.Signals) -> int:
    print(f"braid {command}: stopped by {number.name}", file=sys.stderr, flush=True)
    return 128 + int(number)


def _stopped(command: str, folder: Path) -> int:
    """The exit code of a run whose ranks all ended well: of one that was asked to stop, if it was."""
    record = _first_record(folder, None)
    if record is None or record["code"] != StoppedError.exit_code:
        return 0
    print(_format(command, record["message"], record["code"], ""), file=sys.stderr, flush=True)
    return int(record["code"])


def _end_processes(others: set[int]) -> None:
    """End the processes that this one has started, but for `others`."""
    started = [child for child in psutil.Process().children(recursive=True) if child.pid not in others]
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(started, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def _passing_on(folder: Path, others: set[int]) -> Iterator[list[signal.Signals]]:
    """Hand SIGTERM and SIGUSR1 on to the ranks as the request to save and end; yields what was received.

    SIGINT, or any second signal, ends them at once, by way of the agent's SIGHUP: it would hand a SIGINT on,
    and a Python process can swallow its KeyboardInterrupt, or print where it struck.
    """
    received: list[signal.Signals] = []

    def handler(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        (folder / _STOPPING).touch()
        if number == signal.SIGINT or len(received) > 1:
            os.kill(os.getpid(), signal.SIGHUP)
            return
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.pid not in others and "launch.cli" in child.cmdline():
                    child.send_signal(signal.SIGUSR1)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield received
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for the processes that are started in the block."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _first_error(command: str, folder: Path, rank: int, exit_code: int) -> int:
    """Print the message of the rank that failed first. A killed rank, which `rank` then is, leaves none: say
    how it died.
    """
    first = _first_record(folder, None)
    if first is None:
        how = f"exit code {exit_code}"
        if exit_code < 0:
            how = f"signal {-exit_code} ({signal.strsignal(-exit_code)})"
        message = f"braid {command}: failed: rank {rank} ended with {how} and left no message"
        print(message, file=sys.stderr, flush=True)
        return 1
    if first["code"] != CLOSED:
        line = _format(command, first["message"], first["code"], first["where"])
        print(line, file=sys.stderr, flush=True)
    return int(first["code"])


def _first_record(folder: Path, attempt: int | None) -> dict[str, Any] | None:
    """What the rank that failed first left, in an attempt or in the last that left anything."""
    attempts: dict[int, list[dict[str, Any]]] = {}
    for path in folder.glob("*-*.json"):
        number = int(path.name.partition("-")[0])
        attempts.setdefault(number, []).append(json.loads(path.read_text(encoding="utf-8")))
    records = attempts.get(max(attempts, default=0) if attempt is None else attempt, [])
    return min(records, key=lambda record: float(record["time"]), default=None)
