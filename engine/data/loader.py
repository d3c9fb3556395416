"""The micro-batches of a rank, step by step, assembled ahead where threads are given."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from engine.data.batches import BatchPlan, MicroBatch, collate
from engine.data.store import TokenStore

# Steps assembled ahead: enough to hide the work, and host memory stays bounded.
_STEPS_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank computes in one step."""

    step: int
    """Number of the step, from 0."""

    micro_batches: list[MicroBatch]
    """`plan.accumulation` micro-batches; fillers stand where rows run out."""

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
    """The rows; as many as the plan counts."""

    plan: BatchPlan
    """Which of them every step takes."""

    dp_rank: int
    """Index of this rank among the data-parallel ones."""

    pad_id: int
    """Token id that fills padding."""

    pad_to_multiple_of: int
    """The length of every micro-batch is a multiple of this."""

    num_workers: int
    """Threads that assemble ahead; 0 assembles in the consumer."""

    def __post_init__(self) -> None:
        assert len(self.store) == self.plan.num_rows
        assert 0 <= self.dp_rank < self.plan.data_parallel_size
        assert self.pad_to_multiple_of >= 1
        assert self.num_workers >= 0

    def steps(self, start_step: int = 0) -> Iterator[StepBatch]:
        """Steps from `start_step` to the end of the plan, in order.

        With workers, two steps are assembled ahead; closing the iterator ends the threads, and what goes
        wrong in one is raised here.
        """
        numbers = range(start_step, self.plan.total_steps)
        if self.num_workers == 0:
            yield from map(self._assemble, numbers)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="braid-data")
        ahead: deque[Future[StepBatch]] = deque()
        try:
            for number in numbers:
                ahead.append(pool.submit(self._assemble, number))
                if len(ahead) > _STEPS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _assemble(self, step: int) -> StepBatch:
        micro_batches = [
            collate(
                [self.store[int(index)] for index in indices],
                pad_id=self.pad_id,
                pad_to_multiple_of=self.pad_to_multiple_of,
            )
            for indices in self.plan.micro_batches(step, self.dp_rank)
        ]
        return StepBatch(step=step, micro_batches=micro_batches)
