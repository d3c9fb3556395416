"""The micro-batches of a rank, step by step, assembled ahead where threads are given."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from engine.data.batches import BatchPlan, MicroBatch, collate
from engine.data.packing import Packs
from engine.data.store import TokenStore

# Steps assembled ahead: enough to hide the work, and host memory stays bounded.
STEPS_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank computes in one step."""

    step: int
    """Number of the step, from 0."""

    micro_batches: list[MicroBatch]
    """`plan.accumulation` micro-batches; fillers stand where rows run out."""

    wait_s: float = 0.0
    """Seconds the consumer waited for this step, or took to assemble it where there are no workers."""

    position: dict[str, int] | None = None
    """Of a stream, where it stands behind this step."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank's rows, without padding."""
        return sum(batch.num_tokens for batch in self.micro_batches)

    @property
    def num_supervised(self) -> int:
        """Targets of this rank's rows."""
        return sum(batch.num_supervised for batch in self.micro_batches)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Serves the rows of `store` as `plan` says to data-parallel rank `dp_rank`.

    Its position is the step number and nothing else: a resumed run asks for `steps(step)` and gets the same
    batches.
    """

    store: TokenStore
    """The rows."""

    plan: BatchPlan
    """Which of them every step takes; with `packs`, which of those."""

    dp_rank: int
    """Index of this rank among the data-parallel ones."""

    pad_id: int
    """Token id that fills padding."""

    pad_to_multiple_of: int
    """The length of every micro-batch is a multiple of this."""

    num_workers: int
    """Threads that assemble ahead; 0 assembles in the consumer."""

    packs: Packs | None = None
    """Rows that share a sequence; None takes them one by one."""

    pad_rows_to_multiple_of: int = 1
    """The length of every row is padded to a multiple of this; see `collate`."""

    def __post_init__(self) -> None:
        assert self.plan.num_rows == len(self.store if self.packs is None else self.packs)
        assert self.packs is None or len(self.packs.members) == len(self.store)
        assert 0 <= self.dp_rank < self.plan.data_parallel_size
        assert self.pad_to_multiple_of >= 1
        assert self.num_workers >= 0

    @cached_property
    def fingerprint(self) -> str:
        """What the plan's rows are made of, as a sha256 hex string: the same rows packed are other rows."""
        if self.packs is None:
            return self.store.fingerprint
        digest = hashlib.sha256(f"packing {self.store.fingerprint} {self.packs.capacity}\n".encode())
        digest.update(self.packs.offsets.tobytes())
        digest.update(self.packs.members.tobytes())
        return digest.hexdigest()

    def steps(self, start_step: int = 0, position: dict[str, int] | None = None) -> Iterator[StepBatch]:
        """Steps from `start_step` to the end of the plan, in order. Only a stream needs `position`.

        With workers, two steps are assembled ahead; closing the iterator ends the threads, and what goes
        wrong in one is raised here.
        """
        numbers = range(start_step, self.plan.total_steps)
        if self.num_workers == 0:
            for number in numbers:
                yield _timed(partial(self._assemble, number))
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="braid-data")
        ahead: deque[Future[StepBatch]] = deque()
        try:
            for number in numbers:
                ahead.append(pool.submit(self._assemble, number))
                if len(ahead) > STEPS_AHEAD:
                    yield _timed(ahead.popleft().result)
            while ahead:
                yield _timed(ahead.popleft().result)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _assemble(self, step: int) -> StepBatch:
        micro_batches = [
            collate(
                [self.store[int(row)] for row in self._rows_of(indices)],
                pad_id=self.pad_id,
                pad_to_multiple_of=self.pad_to_multiple_of,
                pad_rows_to_multiple_of=self.pad_rows_to_multiple_of,
            )
            for indices in self.plan.micro_batches(step, self.dp_rank)
        ]
        return StepBatch(step=step, micro_batches=micro_batches)

    def _rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Rows of the store that the plan's `indices` stand for, int64."""
        if self.packs is None or not len(indices):
            return indices
        return np.concatenate([self.packs[int(index)] for index in indices])


def _timed(get: Callable[[], StepBatch]) -> StepBatch:
    began = time.monotonic()
    batch = get()
    return replace(batch, wait_s=time.monotonic() - began)
