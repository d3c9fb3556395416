"""Worker processes that are spawned once and reused for every layout.

Importing torch and Megatron takes seconds; a test that paid for it in four processes each would make the
suite slow. Each job opens a gloo group over the first `world_size` workers and closes it again.
"""

import gc
import importlib
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any


class WorkerError(AssertionError):
    """A job failed on a rank; the message holds that rank's traceback."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """`module:function` called on every rank as function(rank, world_size, **arguments); results must
    pickle.
    """

    target: str
    world_size: int
    store: str
    device: str
    arguments: dict[str, Any]


class WorkerPool:
    """`size` ranks at most, started when a job needs them. A failed or hung job ends the workers; the next
    job starts fresh ones.
    """

    def __init__(self, size: int, device: str = "cpu") -> None:
        self.size, self.device = size, device
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(
        self, function: Callable[..., Any], world_size: int, *, timeout: float = 240.0, **arguments: Any
    ) -> list[Any]:
        """Results by rank. Raises WorkerError with the traceback of the first rank that failed."""
        assert world_size <= self.size
        self._start(world_size)
        with tempfile.TemporaryDirectory() as folder:
            target = f"{function.__module__}:{function.__qualname__}"
            job = Job(
                target=target,
                world_size=world_size,
                store=os.path.join(folder, "store"),
                device=self.device,
                arguments=arguments,
            )
            for pipe in self._pipes[:world_size]:
                pipe.send(job)
            return self._collect(world_size, timeout)

    def close(self) -> None:
        """End the worker processes of this pool."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self, world_size: int) -> None:
        """Start the ranks that are still missing; most jobs need few."""
        context = mp.get_context("spawn")
        for rank in range(len(self._processes), world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes[:world_size])}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                ranks = sorted(waiting.values())
                self.close()
                raise WorkerError(f"ranks {ranks} gave no answer within {timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "the process ended"
                if not good:
                    self.close()
                    raise WorkerError(f"rank {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]


def _serve(rank: int, pipe: Connection) -> None:
    os.environ.setdefault("LOCAL_WORLD_SIZE", "4")
    import torch.distributed as dist

    from engine.runtime.platform import open_platform

    first = True
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        try:
            os.environ["BRAID_TEST_DEVICE"] = job.device
            platform = open_platform(
                device=job.device, dtype="float32", transformer_impl="torch", local_rank=rank
            )
            dist.init_process_group(
                platform.backend,
                store=dist.FileStore(job.store, job.world_size),
                rank=rank,
                world_size=job.world_size,
            )
            module, _, name = job.target.partition(":")
            answer = getattr(importlib.import_module(module), name)(rank, job.world_size, **job.arguments)
            # A rank that left early would break the connections that the others still open.
            dist.barrier()
            pipe.send((True, answer))
            del answer
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                from engine.runtime import mcore

                dist.destroy_process_group()
                mcore.destroy()
            if first:
                # What is imported stays; leaving it out makes every later collection ten times faster.
                gc.freeze()
                first = False
