"""The same steps with and without threads, from the start and from the middle."""

import gc
import threading
import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.data.batches import BatchPlan, collate
from engine.data.loader import Loader, StepBatch
from engine.data.packing import Packs, pack
from engine.data.store import TokenStore, build_store
from engine.data.template import ChatTemplate, EncodedRow
from tests.data.tiny import PAD, row

NUM_ROWS = 23


@pytest.fixture(scope="module")
def store(chatml: ChatTemplate) -> TokenStore:
    rows = [row({"query": "q" * (i % 5), "response": f"answer {i}"}) for i in range(NUM_ROWS)]
    return build_store(
        rows, chatml, system=None, max_length=100, truncation_strategy="delete", cache_dir=None
    )


def make_loader(
    store: TokenStore, *, num_workers: int, dp_rank: int = 0, max_steps: int | None = None
) -> Loader:
    plan = BatchPlan(
        num_rows=len(store), global_batch_size=8, micro_batch_size=2, data_parallel_size=2, accumulation=2,
        num_train_epochs=2.5, max_steps=max_steps, seed=1,
    )  # fmt: skip
    return Loader(
        store=store, plan=plan, dp_rank=dp_rank, pad_id=PAD, pad_to_multiple_of=16, num_workers=num_workers
    )


def comparable(steps: Iterable[StepBatch]) -> list[object]:
    return [
        (
            each.step,
            [
                {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in vars(batch).items()}
                for batch in each.micro_batches
            ],
        )
        for each in steps
    ]


@pytest.fixture(scope="module")
def packs(store: TokenStore) -> Packs:
    return pack(store.lengths, 100)


def make_packed_loader(store: TokenStore, packs: Packs, *, num_workers: int, dp_rank: int = 0) -> Loader:
    plan = BatchPlan(
        num_rows=len(packs), global_batch_size=4, micro_batch_size=1, data_parallel_size=2, accumulation=2,
        num_train_epochs=2.0, max_steps=None, seed=1, work=packs.work(store.lengths), unit="packs",
    )  # fmt: skip
    return Loader(
        store=store, plan=plan, dp_rank=dp_rank, pad_id=PAD, pad_to_multiple_of=16, num_workers=num_workers,
        packs=packs, pad_rows_to_multiple_of=4,
    )  # fmt: skip


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("braid-data")]


@pytest.mark.parametrize("dp_rank", [0, 1])
def test_workers_change_nothing(store: TokenStore, dp_rank: int) -> None:
    inline = comparable(make_loader(store, num_workers=0, dp_rank=dp_rank).steps())
    assert len(inline) == 8
    assert inline == comparable(make_loader(store, num_workers=2, dp_rank=dp_rank).steps())
    assert not data_threads()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_from_the_middle(store: TokenStore, num_workers: int) -> None:
    loader = make_loader(store, num_workers=num_workers)
    assert comparable(loader.steps(5)) == comparable(loader.steps(0))[5:]
    assert list(loader.steps(8)) == []


def test_every_token_of_an_epoch_is_served_once(store: TokenStore) -> None:
    ranks = [list(make_loader(store, num_workers=0, dp_rank=rank).steps())[:3] for rank in (0, 1)]
    assert all(len(step.micro_batches) == 2 for steps in ranks for step in steps)
    assert all(len(b.tokens) % 16 == 0 for steps in ranks for step in steps for b in step.micro_batches)
    assert sum(step.num_tokens for steps in ranks for step in steps) == store.report.tokens
    assert sum(step.num_supervised for steps in ranks for step in steps) == store.report.supervised_tokens


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_micro_batch_holds_the_rows_of_its_packs(store: TokenStore, packs: Packs, num_workers: int) -> None:
    assert 2 < len(packs) < NUM_ROWS
    for dp_rank in (0, 1):
        loader = make_packed_loader(store, packs, num_workers=num_workers, dp_rank=dp_rank)
        steps = list(loader.steps())
        assert len(steps) == loader.plan.total_steps == 2 * loader.plan.steps_per_epoch
        for step in steps:
            wanted = [
                collate(
                    [store[row] for index in indices for row in packs[index].tolist()],
                    pad_id=PAD,
                    pad_to_multiple_of=16,
                    pad_rows_to_multiple_of=4,
                )
                for indices in loader.plan.micro_batches(step.step, dp_rank)
            ]
            wanted_step = StepBatch(step=step.step, micro_batches=wanted)
            assert comparable([step]) == comparable([wanted_step])
        assert comparable(loader.steps(2)) == comparable(steps[2:])


def test_packed_rows_are_served_once_an_epoch(store: TokenStore, packs: Packs) -> None:
    served: list[int] = []
    for dp_rank in (0, 1):
        loader = make_packed_loader(store, packs, num_workers=0, dp_rank=dp_rank)
        for step in list(loader.steps())[: loader.plan.steps_per_epoch]:
            assert step.num_tokens == sum(sum(batch.lengths) for batch in step.micro_batches)
            served += [length for batch in step.micro_batches for length in batch.lengths]
    assert sorted(served) == sorted(store.lengths.tolist())


def test_the_plan_counts_rows_or_packs(store: TokenStore, packs: Packs) -> None:
    with pytest.raises(AssertionError):
        replace(make_packed_loader(store, packs, num_workers=0), packs=None)
    with pytest.raises(AssertionError):
        replace(make_loader(store, num_workers=0), packs=packs)


def test_fingerprint_tells_packed_rows_from_others(store: TokenStore, packs: Packs) -> None:
    plain = make_loader(store, num_workers=0)
    assert plain.fingerprint == store.fingerprint
    packed = make_packed_loader(store, packs, num_workers=0)
    fingerprints = {plain.fingerprint, packed.fingerprint}
    assert packed.fingerprint == make_packed_loader(store, packs, num_workers=1, dp_rank=1).fingerprint
    # One pack for each row has the rows of no packs, and is still another run.
    alone = Packs(members=np.arange(NUM_ROWS), offsets=np.arange(NUM_ROWS + 1), capacity=100)
    for other in (pack(store.lengths, 101), alone):
        fingerprints.add(make_packed_loader(store, other, num_workers=0).fingerprint)
    assert len(fingerprints) == 4
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


class CountingStore(TokenStore):
    """Counts the rows read, and fails where told."""

    def __init__(self, store: TokenStore, fails_after: int | None = None) -> None:
        vars(self).update(vars(store))
        self.reads = 0
        self.fails_after = fails_after

    def __getitem__(self, index: int) -> EncodedRow:
        self.reads += 1
        if self.fails_after is not None and self.reads > self.fails_after:
            raise RuntimeError("disk on fire")
        return super().__getitem__(index)


def test_two_steps_ahead_and_no_further(store: TokenStore) -> None:
    counting = CountingStore(store)
    steps = make_loader(counting, num_workers=1).steps()
    next(steps)
    deadline = time.monotonic() + 5
    while counting.reads < 11 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    # Four rows a step on this rank; the third step ends the epoch of 23 rows.
    assert counting.reads == 4 + 4 + 4
    steps.close()  # type: ignore[attr-defined]
    assert not data_threads()


def test_dropped_iterator_ends_its_threads(store: TokenStore) -> None:
    steps = make_loader(store, num_workers=2).steps()
    next(steps)
    assert data_threads()
    del steps
    gc.collect()
    assert not data_threads()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failure_reaches_the_consumer(store: TokenStore, num_workers: int) -> None:
    steps = make_loader(CountingStore(store, fails_after=14), num_workers=num_workers).steps()
    with pytest.raises(RuntimeError, match="disk on fire"):
        list(steps)
    assert not data_threads()


class SlowStore(TokenStore):
    """Reads a row once `may_read` allows it."""

    def __init__(self, store: TokenStore) -> None:
        vars(self).update(vars(store))
        self.may_read = threading.Event()

    def __getitem__(self, index: int) -> EncodedRow:
        assert self.may_read.wait(timeout=30)
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_waiting_is_counted(store: TokenStore, num_workers: int) -> None:
    slow = SlowStore(store)
    steps = make_loader(slow, num_workers=num_workers).steps()
    # The wait ends no sooner than reading is allowed.
    threading.Timer(0.2, slow.may_read.set).start()
    began = time.monotonic()
    first = next(steps)
    assert 0 < first.wait_s <= time.monotonic() - began
    assert first.wait_s > 0.1
    assert all(each.wait_s >= 0 for each in steps)
