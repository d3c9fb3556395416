"""One rank of the crew: processes that are started once and go through many layouts.

A process start takes 20 s on a GPU machine, so groups are closed and opened between layouts instead. A task
of several ranks that fails on one of them ends the crew, since the others may wait for it in a collective;
whoever started the crew starts another for what is left. So does a process that cannot give its memory
back.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import first_line
from launch.processes import World, meeting_place, open_world
from launch.validate import comm, curves, parity, resume, speed
from launch.validate.tasks import Failure, Setup, Task

if TYPE_CHECKING:
    from torch.distributed import Store

AGAIN = "again"
"""File in the directory of results: the crew ended through no fault of a task."""

_WORK = {
    "comm": comm.perform,
    "parity": parity.perform,
    "curves": curves.perform,
    "resume": resume.perform,
    "speed": speed.perform,
}
# Ranks that have no part in a task wait for the next one this long.
_PATIENCE = timedelta(minutes=60)
_MAY_STAY = 2**30
"""Bytes on a device that a task may leave behind."""


class _NotGivenBack(Exception):
    """Memory is still taken by a task that has ended."""


def serve(world: World, setup: Setup, tasks: Sequence[Task]) -> None:
    """Go through the tasks, the same list on every rank; tasks of one rank are dealt out."""
    open_world(world)
    store, alone = meeting_place(world), 0
    for number, task in enumerate(tasks):
        if task.layout.ranks == 1:
            owner, alone = alone % world.size, alone + 1
            if owner == world.rank:
                _take_alone(task, setup, world)
        elif world.rank < task.layout.ranks:
            _take(task, setup, replace(world, size=task.layout.ranks), store, str(number))
        if number == 0:
            # What is imported stays; leaving it out makes every later collection much faster.
            gc.freeze()


def _take_alone(task: Task, setup: Setup, world: World) -> None:
    """Nobody waits for this rank: after a failure it goes on."""
    import torch.distributed as dist

    with contextlib.suppress(Exception):  # which is in the results
        _take(task, setup, replace(world, rank=0, size=1), dist.HashStore(), task.id)
    _clear(setup)


def _take(task: Task, setup: Setup, world: World, store: "Store", key: str) -> None:
    import torch.distributed as dist

    setup.begin(task)
    try:
        with _open_group(world, setup, store, key):
            result = _WORK[task.part](task, setup, world)
            # A rank that left early would break the connections that the others still open.
            dist.barrier()
            if world.rank == 0:
                setup.finish(task, result)
                print(f"{task.id}: done", flush=True)
            del result
            _clear(setup)
    except _NotGivenBack:
        raise
    except Exception as error:
        setup.fail(task, _failure(error))
        print(f"{task.id}: {type(error).__name__}: {error}", flush=True)
        raise


def _failure(error: Exception) -> Failure:
    import torch

    text = f"{type(error).__name__}: {first_line(error)}"
    oom = isinstance(error, torch.OutOfMemoryError) or "out of memory" in text
    return Failure(message=text, oom=oom)


@contextlib.contextmanager
def _open_group(world: World, setup: Setup, store: Any, key: str) -> Iterator[None]:
    """torch's default group over the ranks of a task, and Megatron's forgotten behind it."""
    import torch.distributed as dist

    from engine.runtime import mcore
    from launch.validate.runs import platform_for

    platform = platform_for(setup, world)
    mcore.adapt_megatron(platform)
    dist.init_process_group(
        platform.backend,
        store=dist.PrefixStore(key, store),
        rank=world.rank,
        world_size=world.size,
        timeout=_PATIENCE,
    )
    try:
        yield
    except BaseException:
        if world.size == 1:  # the others of a larger group may be stuck, and closing it would wait for them
            _close_group()
        raise
    _close_group()


def _close_group() -> None:
    import torch.distributed as dist

    from engine.runtime import mcore

    mcore.destroy()
    dist.destroy_process_group()


def _clear(setup: Setup) -> None:
    """Take the models of a task apart, and end this process where their memory does not come back."""
    import torch

    from launch.validate.runs import release_all

    release_all()
    gc.collect()
    if setup.on_cpu:
        return
    torch.cuda.empty_cache()
    if torch.cuda.memory_allocated() > _MAY_STAY:
        Path(setup.root, AGAIN).touch()
        raise _NotGivenBack(f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB")
    torch.cuda.reset_peak_memory_stats()
