"""Which rows make a step, and what a micro-batch of them looks like."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np
import torch

from engine.data.template import EncodedRow
from engine.errors import ConfigError

# Rows of like work are looked for within at most this many global batches: more would hardly make batches
# more even, and leave less to chance which rows meet.
_WINDOW_BATCHES = 64
# Steps looked at to say how even the work is: beyond them the mean hardly moves.
_STEPS_MEASURED = 200


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """D documents of T tokens in all, one after another without padding between them (batch dimension 1)."""

    tokens: torch.Tensor
    """int64 [T]."""

    labels: torch.Tensor
    """int64 [T]; labels[t] is the token behind token t in its document, 0 behind the last one."""

    loss_mask: torch.Tensor
    """bool [T]; True where labels[t] is a target."""

    position_ids: torch.Tensor
    """int64 [T]; counts from 0 in every document."""

    cu_seqlens: torch.Tensor
    """int32 [D + 1]; document d is tokens[cu_seqlens[d] : cu_seqlens[d + 1]]."""

    max_seqlen: int
    """Tokens of the longest document, padding included."""

    lengths: tuple[int, ...]
    """Tokens of each row, without padding; empty in a filler."""

    num_tokens: int
    """Sum of `lengths`."""

    num_supervised: int
    """Number of True in loss_mask."""

    def real_tokens(self) -> torch.Tensor:
        """bool [T]: tokens that are no padding."""
        real = torch.zeros(self.tokens.numel(), dtype=torch.bool)
        for start, length in zip(self.cu_seqlens.tolist(), self.lengths, strict=False):
            real[start : start + length] = True
        return real


def collate(
    rows: Sequence[EncodedRow], *, pad_id: int, pad_to_multiple_of: int, pad_rows_to_multiple_of: int = 1
) -> MicroBatch:
    """Lay `rows` out as one micro-batch, T a multiple of `pad_to_multiple_of`.

    Every row is padded at its own end to a multiple of `pad_rows_to_multiple_of`, which must divide
    `pad_to_multiple_of`; this padding belongs to its document. What T then lacks stands at the end as a
    document of its own. Padding has the token `pad_id` and no targets. No rows give a filler: a document of
    `pad_to_multiple_of` tokens of padding, which keeps ranks in step.
    """
    assert pad_rows_to_multiple_of >= 1
    assert pad_to_multiple_of >= 1
    assert pad_to_multiple_of % pad_rows_to_multiple_of == 0
    lengths = [len(row) for row in rows]
    assert all(lengths), "a row without tokens"
    gaps = [-length % pad_rows_to_multiple_of for length in lengths]
    documents = [length + gap for length, gap in zip(lengths, gaps, strict=True)]
    tail = -sum(documents) % pad_to_multiple_of if rows else pad_to_multiple_of
    documents += [tail] if tail else []
    cu_seqlens = np.cumsum([0, *documents], dtype=np.int32)
    starts, lasts, total = cu_seqlens[:-1], cu_seqlens[1:] - 1, int(cu_seqlens[-1])

    tokens = np.empty(total, dtype=np.int64)
    targets = np.empty(total, dtype=bool)
    padding = np.full(max([tail, *gaps]), pad_id, dtype=np.int32)
    no_targets = np.zeros(len(padding), dtype=bool)
    ids, supervised = [], []
    for row, gap in zip(rows, gaps, strict=True):
        ids.append(row.input_ids)
        supervised.append(row.supervised)
        if gap:
            ids.append(padding[:gap])
            supervised.append(no_targets[:gap])
    np.concatenate([*ids, padding[:tail]], out=tokens)
    np.concatenate([*supervised, no_targets[:tail]], out=targets)

    labels = np.roll(tokens, -1)
    labels[lasts] = 0
    loss_mask = np.roll(targets, -1)
    loss_mask[lasts] = False
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(np.arange(total, dtype=np.int64) - np.repeat(starts, documents)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(documents),
        lengths=tuple(lengths),
        num_tokens=sum(lengths),
        num_supervised=int(loss_mask.sum()),
    )


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which rows every step takes, on which rank and in which micro-batch. A row may be a pack of rows.

    The rows of a step depend on (seed, step, num_rows, global_batch_size, work) only: a run goes on unchanged
    under another data-parallel size or micro-batch size. Given `work`, rows of like work share a step, and it
    is dealt evenly to ranks and micro-batches. ConfigError: a field is out of range, or the sizes do not
    multiply up.
    """

    num_rows: int
    """Rows of the data set, at least 1."""

    global_batch_size: int
    """Rows of a step over all ranks = micro_batch_size x accumulation x data_parallel_size."""

    micro_batch_size: int
    """Rows of a full micro-batch."""

    data_parallel_size: int
    """Ranks that share the rows of a step."""

    accumulation: int
    """Micro-batches of a step on every rank."""

    num_train_epochs: float
    """Passes over the rows; ignored where max_steps is given."""

    max_steps: int | None
    """Steps of the run, or None."""

    seed: int
    """Seed of the row order, at least 0."""

    shuffle: bool = True
    """Take the rows in a new order every epoch, or always in theirs."""

    work: np.ndarray | None = field(default=None, compare=False, repr=False)
    """int64 [num_rows]; attention work of every row. None leaves work out of account; needs `shuffle`."""

    unit: str = "rows"
    """What the rows are called in messages."""

    def __post_init__(self) -> None:
        sizes = ("num_rows", "global_batch_size", "micro_batch_size", "data_parallel_size", "accumulation")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        product = self.micro_batch_size * self.accumulation * self.data_parallel_size
        if self.global_batch_size != product:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not micro-batch {self.micro_batch_size} x "
                f"accumulation {self.accumulation} x data-parallel size {self.data_parallel_size} = {product}"
            )
        if self.max_steps is not None and self.max_steps < 0:
            raise ConfigError(f"max_steps is {self.max_steps}; it must be at least 0")
        if not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        if self.work is not None:
            assert self.shuffle
            assert self.work.dtype == np.int64
            assert self.work.shape == (self.num_rows,)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the rows; the last may be smaller."""
        return -(-self.num_rows // self.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        if self.max_steps is not None:
            return self.max_steps
        # In decimal, as the user wrote it: 0.1 * 30 in floating point is above 3 and would become 4 steps.
        return math.ceil(Fraction(repr(float(self.num_train_epochs))) * self.steps_per_epoch)

    @cached_property
    def _work_bytes(self) -> bytes:
        # The order is cached under all that it depends on, so the work has to be hashable.
        assert self.work is not None
        return self.work.tobytes()

    def row_indices(self, step: int) -> np.ndarray:
        """Rows of a step (from 0) over all ranks, int64 [<= global_batch_size]; never across an epoch.

        With `work`, from little to much of it.
        """
        assert step >= 0
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        end = min(start + self.global_batch_size, self.num_rows)
        if not self.shuffle:
            return np.arange(start, end, dtype=np.int64)
        if self.work is None:
            return _permutation(self.num_rows, self.seed, epoch)[start:end]
        return _permutation_by_work(self._work_bytes, self.global_batch_size, self.seed, epoch)[start:end]

    def micro_batches(self, step: int, dp_rank: int) -> list[np.ndarray]:
        """Rows of `dp_rank` in a step, by micro-batch: `accumulation` arrays, int64 [<= micro_batch_size].

        Ranks get equally many rows, give or take one, and so do the micro-batches of a rank. Where a step has
        fewer rows than global_batch_size, some arrays are shorter or empty.
        """
        assert 0 <= dp_rank < self.data_parallel_size
        rows = self.row_indices(step)
        return [rows[cards] for cards in self._dealt(len(rows))[dp_rank]]

    def _dealt(self, count: int) -> list[list[np.ndarray]]:
        """Which of the `count` rows of a step go into each micro-batch of each rank."""
        return deal(count, self.data_parallel_size, self.accumulation, evenly=self.work is not None)

    def describe(self) -> str:
        """One line that says how rows become steps."""
        last = self.num_rows - (self.steps_per_epoch - 1) * self.global_batch_size
        epochs = f"{self.total_steps / self.steps_per_epoch:.4g}"
        return (
            f"{self.num_rows} {self.unit}, global batch {self.global_batch_size} = "
            f"{self.micro_batch_size} (micro-batch) x {self.accumulation} (accumulation) x "
            f"{self.data_parallel_size} (data parallel), "
            f"{self.steps_per_epoch} steps per epoch, {epochs} epochs, {self.total_steps} steps, "
            f"the last step of an epoch has {last} {self.unit}"
        )


def evaluation_plan(
    num_rows: int,
    *,
    micro_batch_size: int,
    data_parallel_size: int,
    max_micro_batches: int = 8,
    micro_batches_multiple_of: int = 1,
) -> BatchPlan:
    """A plan that takes every row once, in order, at most `max_micro_batches` micro-batches a step per rank.

    `micro_batches_multiple_of` rounds their number up, for pipeline schedules that need it. ConfigError: see
    BatchPlan.
    """
    assert max_micro_batches >= 1
    assert micro_batches_multiple_of >= 1
    needed = max(1, -(-num_rows // max(1, micro_batch_size * data_parallel_size)))
    # As even as possible over the steps, so that the last one is not mostly fillers.
    steps = -(-needed // max_micro_batches)
    accumulation = -(-needed // steps)
    accumulation += -accumulation % micro_batches_multiple_of
    return BatchPlan(
        num_rows=num_rows,
        global_batch_size=micro_batch_size * accumulation * data_parallel_size,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
        accumulation=accumulation,
        num_train_epochs=1.0,
        max_steps=None,
        seed=0,
        shuffle=False,
    )


def imbalance(plan: BatchPlan, work: np.ndarray) -> float:
    """How uneven `plan` deals `work`, int64 [num_rows], which need not be its own: 1.0 is even.

    The work of the heaviest micro-batch of any rank over the mean one, averaged over the first full steps of
    the first epoch; of the only step where it is a short one. Fillers do not count.
    """
    steps = min(max(plan.num_rows // plan.global_batch_size, 1), _STEPS_MEASURED)
    steps_of_rows = np.stack([plan.row_indices(step) for step in range(steps)])
    dealt = plan._dealt(steps_of_rows.shape[1])
    parts = [cards for micro_batches in dealt for cards in micro_batches if len(cards)]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    loads = np.add.reduceat(work[steps_of_rows[:, np.concatenate(parts)]], starts, axis=1)
    return float((loads.max(axis=1) / loads.mean(axis=1)).mean())


def deal(count: int, ranks: int, parts: int, *, evenly: bool) -> list[list[np.ndarray]]:
    """Which of `count` rows each rank takes in each of its `parts` micro-batches; `evenly` where they are
    sorted by work.
    """
    return _deal_evenly(count, ranks, parts) if evenly else _deal(count, ranks, parts)


def order_by_work(work: np.ndarray, global_batch_size: int, seed: int, part: int) -> np.ndarray:
    """The order of BatchPlan with `work`, int64 [rows], for the rows of one part of a stream."""
    return _permutation_by_work(work.tobytes(), global_batch_size, seed, part)


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.flags.writeable = False  # shared by every caller through the cache
    return order


@lru_cache(maxsize=2)
def _permutation_by_work(work_bytes: bytes, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation in which each global batch has rows of like work, from little to much, and a short last
    batch has rows of any work.
    """
    work = np.frombuffer(work_bytes, dtype=np.int64)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(work))
    num_full = len(work) // global_batch_size
    # Rows of a short last batch are left to chance: cut off after sorting, they would be the heaviest ones.
    full, rest = np.split(order, [num_full * global_batch_size])
    # At least two windows, or every epoch would have the same batches.
    num_windows = max(2, -(-num_full // _WINDOW_BATCHES))
    windows = np.array_split(full.reshape(num_full, global_batch_size), num_windows)
    batches = np.concatenate([_by_work(window, work) for window in windows])
    order = np.concatenate([batches[random.permutation(num_full)].ravel(), _by_work(rest, work)])
    order.flags.writeable = False  # shared by every caller through the cache
    return order


def _by_work(rows: np.ndarray, work: np.ndarray) -> np.ndarray:
    """The same rows from little to much work, in the same shape."""
    flat = rows.ravel()
    return flat[np.argsort(work[flat], kind="stable")].reshape(rows.shape)


@lru_cache(maxsize=4)
def _deal(count: int, ranks: int, parts: int) -> list[list[np.ndarray]]:
    """Deal cards 0 .. count - 1 to `ranks` one at a time, so that a short step leaves no rank without rows
    while another has two more than it, and cut each hand into `parts`.
    """
    return [np.array_split(np.arange(rank, count, ranks), parts) for rank in range(ranks)]


@lru_cache(maxsize=4)
def _deal_evenly(count: int, ranks: int, parts: int) -> list[list[np.ndarray]]:
    """Deal cards 0 .. count - 1 to `ranks` back and forth, and each hand to its `parts` in the same way.

    Where cards are sorted, neighbours land in parts of the same index, and sums over hands are close.
    """
    hands = _back_and_forth(np.arange(count), ranks)
    return [_back_and_forth(hand, parts) for hand in hands]


def _back_and_forth(cards: np.ndarray, hands: int) -> list[np.ndarray]:
    rounds, place = np.divmod(np.arange(len(cards)), hands)
    owner = np.where(rounds % 2, hands - 1 - place, place)
    return [cards[owner == hand] for hand in range(hands)]
