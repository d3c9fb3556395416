"""Starting the ranks of a run: which world this process belongs to, and torchrun's agent underneath.

Whichever rank fails, the user sees one message: the one of the first rank that failed.
"""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from engine.config.options import LaunchOptions
from engine.errors import ConfigError, UserError

# Environment variables that mean the same as the flags; flags win.
ENVIRONMENT: Mapping[str, str] = {
    name.upper(): name for name in ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
}
_STARTED = "BRAID_STARTED"
_ERROR_DIR = "BRAID_ERROR_DIR"


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run as this one sees them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    started: bool
    """False in the process that still has to start the ranks."""


def launch_environment() -> dict[str, str]:
    """Launch options that the environment sets. Under torchrun or Slurm these variables describe the worker
    instead.
    """
    if _worker_world() is not None:
        return {}
    return {option: os.environ[name] for name, option in ENVIRONMENT.items() if os.environ.get(name)}


def find_world(options: LaunchOptions) -> World:
    """This process's place, or the size of the world that has to be started. Raises ConfigError."""
    worker = _worker_world()
    if worker is not None:
        return worker
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
    return World(rank=0, size=local_size * nodes, local_rank=0, local_size=local_size, started=False)


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


def run_worker(world: World, work: Callable[[], None], place: Callable[[], str]) -> int:
    """Run a rank's work; a failure is reported once, by the launcher or by this rank. Returns the exit
    code.
    """
    try:
        work()
        return 0
    except UserError as error:
        _report(world, str(error), error.exit_code, place())
        return error.exit_code
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # torch's CheckpointException is no Exception
        _report(world, traceback.format_exc(), 1, place())
        return 1


def _report(world: World, message: str, code: int, place: str) -> None:
    where = f" (rank {world.rank}, {place})" if world.size > 1 and place else ""
    folder = os.environ.get(_ERROR_DIR)
    if folder:
        record = {"message": message, "code": code, "where": where, "time": time.time()}
        partial = Path(folder, f"{world.rank}.partial")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.rename(Path(folder, f"{world.rank}.json"))
    elif place or world.rank == 0:
        # Started by somebody else's torchrun: what goes wrong before the grid exists goes wrong on every rank
        # alike.
        print(_format(message, code, where), file=sys.stderr, flush=True)


def _format(message: str, code: int, where: str) -> str:
    return f"braid sft: error{where}: {message}" if code == 2 else f"braid sft: failed{where}:\n{message}"


def command_began() -> float:
    """time.monotonic() when the command began: a machine's processes share the clock, and the launcher hands
    on its time.
    """
    return float(os.environ.get(_STARTED) or time.monotonic())


def start_processes(options: LaunchOptions, world: World, argv: Sequence[str], *, began: float) -> int:
    """Start this node's ranks with torch's elastic agent and wait for them. Returns the exit code of the run;
    `began` is the time.monotonic() of the command's start.
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
            max_restarts=0,
            signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
            # Rank 0 speaks; what other ranks print is kept only as long as the run.
            logs_specs=DefaultLogsSpecs(
                log_dir=folder, redirects=dict.fromkeys(range(1, world.local_size), Std.ALL)
            ),
        )
        interrupted: list[int] = []
        others = {child.pid for child in psutil.Process().children(recursive=True)}
        try:
            with _interrupt_as_termination(interrupted):
                elastic_launch(config, sys.executable)("-m", "launch.cli", *argv)
            return 0
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return _first_error(Path(folder), failure.exitcode)
        except SignalException as error:
            # The agent has ended the ranks that it knew of; a signal amid their start leaves it without the
            # last.
            _end_processes(others)
            number = signal.SIGINT if interrupted else error.sigval
            print(f"braid sft: stopped by {number.name}", file=sys.stderr, flush=True)
            return 128 + int(number)


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
def _interrupt_as_termination(seen: list[int]) -> Iterator[None]:
    """Let Ctrl-C end the ranks by SIGTERM; `seen` receives the SIGINT.

    The agent would hand the SIGINT on, and a Python process can swallow its KeyboardInterrupt, or print where
    it struck.
    """

    def handler(number: int, frame: Any) -> None:
        seen.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for the processes that are started in the block."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _first_error(folder: Path, exit_code: int) -> int:
    """Print the message of the rank that failed first. A killed rank leaves none: say how it died."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    if not records:
        how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        print(f"braid sft: failed: a rank ended with {how} and left no message", file=sys.stderr, flush=True)
        return 1
    first = min(records, key=lambda record: record["time"])
    print(_format(first["message"], first["code"], first["where"]), file=sys.stderr, flush=True)
    return int(first["code"])
