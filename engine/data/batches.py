"""Which rows make a step, and what a micro-batch of them looks like."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from engine.data.template import EncodedRow
from engine.errors import ConfigError


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

    num_tokens: int
    """Tokens of the rows, without padding."""

    num_supervised: int
    """Number of True in loss_mask."""


def collate(rows: Sequence[EncodedRow], *, pad_id: int, pad_to_multiple_of: int) -> MicroBatch:
    """Lay `rows` out as one micro-batch, T a multiple of `pad_to_multiple_of`.

    Padding stands at the end as a document of its own, of `pad_id` tokens and without targets. No rows give a
    filler: such a document of `pad_to_multiple_of` tokens, which keeps ranks in step.
    """
    assert pad_to_multiple_of >= 1
    num_tokens = sum(map(len, rows))
    padding = -num_tokens % pad_to_multiple_of if rows else pad_to_multiple_of
    lengths = [len(row) for row in rows] + ([padding] if padding else [])
    assert min(lengths) > 0, "a row without tokens"
    total = num_tokens + padding

    tokens = np.full(total, pad_id, dtype=np.int64)
    targets = np.zeros(total, dtype=bool)
    if rows:
        np.concatenate([row.input_ids for row in rows], out=tokens[:num_tokens])
        np.concatenate([row.supervised for row in rows], out=targets[:num_tokens])
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    starts, lasts = cu_seqlens[:-1], cu_seqlens[1:] - 1

    labels = np.roll(tokens, -1)
    labels[lasts] = 0
    loss_mask = np.roll(targets, -1)
    loss_mask[lasts] = False
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(np.arange(total, dtype=np.int64) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(lengths),
        num_tokens=num_tokens,
        num_supervised=int(loss_mask.sum()),
    )


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which rows every step takes, on which rank and in which micro-batch.

    The rows of a step depend on (seed, step, num_rows, global_batch_size) only: a run goes on unchanged under
    another data-parallel size or micro-batch size. ConfigError: a field is out of range, or the sizes do not
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

    def row_indices(self, step: int) -> np.ndarray:
        """Rows of a step (from 0) over all ranks, int64 [<= global_batch_size]; never across an epoch."""
        assert step >= 0
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        end = min(start + self.global_batch_size, self.num_rows)
        if not self.shuffle:
            return np.arange(start, end, dtype=np.int64)
        return _permutation(self.num_rows, self.seed, epoch)[start:end]

    def micro_batches(self, step: int, dp_rank: int) -> list[np.ndarray]:
        """Rows of `dp_rank` in a step, by micro-batch: `accumulation` arrays, int64 [<= micro_batch_size].

        Ranks get equally many rows, give or take one, and so do the micro-batches of a rank. Where a step has
        fewer rows than global_batch_size, some arrays are shorter or empty.
        """
        assert 0 <= dp_rank < self.data_parallel_size
        # Dealt like cards: a short step leaves no rank without rows while another has two more than it.
        own = self.row_indices(step)[dp_rank :: self.data_parallel_size]
        return np.array_split(own, self.accumulation)

    def describe(self) -> str:
        """One line that says how rows become steps."""
        last = self.num_rows - (self.steps_per_epoch - 1) * self.global_batch_size
        epochs = f"{self.total_steps / self.steps_per_epoch:.4g}"
        return (
            f"{self.num_rows} rows, global batch {self.global_batch_size} = "
            f"{self.micro_batch_size} (micro-batch) x {self.accumulation} (accumulation) x "
            f"{self.data_parallel_size} (data parallel), "
            f"{self.steps_per_epoch} steps per epoch, {epochs} epochs, {self.total_steps} steps, "
            f"the last step of an epoch has {last} rows"
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


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.flags.writeable = False  # shared by every caller through the cache
    return order
