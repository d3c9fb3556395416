"""Rows that are read while training runs: nothing is held but a buffer, and a position says where to go on.

A stream is cut into buffers of a fixed number of rows. The rows of a buffer are tokenised, packed where
asked, and put into an order that the seed and the buffer's number decide; steps take the global batch from
them, one after another. So a position needs the row at which the current buffer began and how much of it is
taken, and a run that is resumed gets the same batches as one that was not interrupted, under any layout.
"""

import hashlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np

from engine.data.batches import collate, deal, order_by_work
from engine.data.loader import STEPS_AHEAD, StepBatch
from engine.data.packing import pack
from engine.data.sources import Reading, Row, dataset_files, stream_rows
from engine.data.store import StoreReport, TokenStore, TruncationStrategy, encode_rows
from engine.data.template import ChatTemplate, EncodedRow
from engine.errors import DataError


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where a stream stands between two steps."""

    epoch: int = 0
    """Passes over the data that are over."""

    row: int = 0
    """Rows of this pass before the current buffer."""

    buffer: int = 0
    """Number of the current buffer, over all passes."""

    taken: int = 0
    """Sequences (packs, or rows) of the current buffer that steps have taken."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """How a stream becomes steps; the counterpart of BatchPlan."""

    global_batch_size: int
    """Sequences of a step over all ranks."""

    data_parallel_size: int
    accumulation: int
    total_steps: int
    seed: int
    unit: str
    """What the sequences are called in messages: rows or packs."""

    @property
    def num_rows(self) -> int:
        """Not known of a stream."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What turns rows of text into sequences of tokens."""

    template: ChatTemplate
    system: str | None
    max_length: int
    truncation_strategy: TruncationStrategy
    capacity: int | None
    """Tokens of a pack; None leaves rows alone."""

    vocab_size: int
    """Ids from here on are refused."""


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    """What a step takes one of: the documents of a pack, or one row, and the position behind it."""

    documents: list[EncodedRow]
    work: int
    behind: StreamPosition


@dataclass(kw_only=True)
class StreamLoader:
    """Serves a stream to data-parallel rank `dp_rank`; the counterpart of Loader."""

    datasets: Sequence[str]
    how: Reading = field(default_factory=Reading)
    encoding: Encoding
    plan: StreamPlan
    buffer_rows: int
    """Rows of a buffer, at least 1."""

    dp_rank: int
    pad_id: int
    pad_to_multiple_of: int
    pad_rows_to_multiple_of: int
    num_workers: int
    """0 assembles in the consumer; otherwise a thread assembles ahead."""

    report: StoreReport = field(default_factory=StoreReport.empty)
    """What became of the rows read so far, those assembled ahead among them."""

    @cached_property
    def fingerprint(self) -> str:
        """Of names and sizes of the files and of what is made of them, as a sha256 hex string: a stream is
        not read to be recognised.
        """
        digest = hashlib.sha256(f"stream {self.buffer_rows}\n".encode())
        encoding = self.encoding
        for value in (encoding.system, encoding.max_length, encoding.truncation_strategy, encoding.capacity):
            digest.update(f"{value!r}\n".encode())
        digest.update(repr(encoding.template.identity).encode())
        for name in self.datasets:
            digest.update(f"\n{name}".encode())
            for path in dataset_files(name):
                digest.update(f"\n{path.name} {path.stat().st_size}".encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for the start of a run."""
        return (
            f"streaming from {', '.join(self.datasets)} in buffers of {self.buffer_rows:,} rows; global "
            f"batch {self.plan.global_batch_size} {self.plan.unit}, {self.plan.total_steps} steps"
        )

    def steps(self, start_step: int = 0, position: dict[str, int] | None = None) -> Iterator[StepBatch]:
        """Steps from `start_step`, whose data begin at `position` (StepBatch.position of the step before), to
        the end of the plan.

        With workers a thread assembles ahead; closing the iterator ends it, and what goes wrong in it is
        raised here.
        """
        batches = self._assemble(start_step, StreamPosition(**(position or {})))
        if self.num_workers:
            batches = _ahead(batches)
        try:
            while True:
                began = time.monotonic()
                batch = next(batches, None)
                if batch is None:
                    return
                yield replace(batch, wait_s=time.monotonic() - began)
        finally:
            batches.close()  # type: ignore[attr-defined]

    def _assemble(self, start_step: int, position: StreamPosition) -> Iterator[StepBatch]:
        plan, waiting, sequences = self.plan, deque[_Sequence](), self._sequences(position)
        for step in range(start_step, plan.total_steps):
            while len(waiting) < plan.global_batch_size:
                waiting.append(next(sequences))
            taken = [waiting.popleft() for _ in range(plan.global_batch_size)]
            behind = taken[-1].behind
            packed = self.encoding.capacity is not None
            if packed:
                taken.sort(key=lambda sequence: sequence.work)
            hands = deal(len(taken), plan.data_parallel_size, plan.accumulation, evenly=packed)
            yield StepBatch(
                step=step,
                micro_batches=[
                    collate(
                        [document for card in cards for document in taken[card].documents],
                        pad_id=self.pad_id,
                        pad_to_multiple_of=self.pad_to_multiple_of,
                        pad_rows_to_multiple_of=self.pad_rows_to_multiple_of,
                    )
                    for cards in hands[self.dp_rank]
                ],
                position=asdict(behind),
            )

    def _sequences(self, position: StreamPosition) -> Iterator[_Sequence]:
        """Endless: pass after pass over the data."""
        at, kept = position, position != StreamPosition()
        while True:
            rows = itertools.islice(stream_rows(self.datasets, self.how), at.row, None)
            while batch := list(itertools.islice(rows, self.buffer_rows)):
                for sequence in self._buffer(batch, at):
                    kept = True
                    yield sequence
                at = replace(at, row=at.row + len(batch), buffer=at.buffer + 1, taken=0)
            if not kept:
                raise DataError(
                    f"no row of {', '.join(self.datasets)} is left: all are longer than max_length="
                    f"{self.encoding.max_length} or have no answer; raise max_length"
                )
            at = replace(at, epoch=at.epoch + 1, row=0)

    def _buffer(self, rows: Sequence[Row], at: StreamPosition) -> Iterator[_Sequence]:
        """The sequences of a buffer behind those that are taken, in the order in which steps take them."""
        encoding = self.encoding
        store, report = encode_rows(
            rows,
            encoding.template,
            system=encoding.system,
            max_length=encoding.max_length,
            truncation_strategy=encoding.truncation_strategy,
        )
        self.report = self.report.plus(report)
        if store is None:
            return
        store.check_vocabulary(encoding.vocab_size)
        groups, work = self._group(store)
        if encoding.capacity is not None:
            order = order_by_work(work, self.plan.global_batch_size, self.plan.seed, at.buffer)
        else:
            order = np.random.default_rng([self.plan.seed, at.buffer]).permutation(len(groups))
        for place, index in list(enumerate(order))[at.taken :]:
            yield _Sequence(
                documents=[store[int(row)] for row in groups[index]],
                work=int(work[index]),
                behind=replace(at, taken=place + 1),
            )

    def _group(self, store: TokenStore) -> tuple[list[np.ndarray], np.ndarray]:
        """Rows of the store that share a sequence, and the attention work of each sequence, int64."""
        lengths = store.lengths
        if self.encoding.capacity is None:
            return [np.array([row]) for row in range(len(lengths))], lengths**2
        packs = pack(lengths, self.encoding.capacity)
        return [packs[index] for index in range(len(packs))], packs.work(lengths)


def _ahead(batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """The same batches, assembled in a thread while the consumer works on earlier ones."""
    ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(STEPS_AHEAD)
    stopped = threading.Event()

    def put(item: StepBatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised in the consumer instead
            put(error)

    thread = threading.Thread(target=work, name="braid-stream", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
