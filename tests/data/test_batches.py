"""The layout of a micro-batch, token by token, and the promises of a plan."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batches import BatchPlan, collate, evaluation_plan, imbalance
from engine.data.packing import pack
from engine.data.template import EncodedRow
from engine.errors import ConfigError
from tests.data.tiny import chat_lengths


def encoded(ids: list[int], supervised: list[int]) -> EncodedRow:
    return EncodedRow(input_ids=np.array(ids, dtype=np.int32), supervised=np.array(supervised, dtype=bool))


ROWS = [encoded([11, 12, 13], [1, 0, 1]), encoded([21, 22], [0, 1])]


def test_layout_with_padding() -> None:
    batch = collate(ROWS, pad_id=9, pad_to_multiple_of=8)
    assert batch.tokens.tolist() == [11, 12, 13, 21, 22, 9, 9, 9]
    assert batch.labels.tolist() == [12, 13, 0, 22, 0, 9, 9, 0]
    # The target at position 0 of the first row has nothing that predicts it.
    assert batch.loss_mask.tolist() == [False, True, False, True, False, False, False, False]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_supervised) == (3, 5, 2)
    assert batch.lengths == (3, 2)
    dtypes = [batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens, batch.loss_mask]
    assert [each.dtype for each in dtypes] == [*[torch.int64] * 3, torch.int32, torch.bool]


def test_layout_without_padding() -> None:
    batch = collate(ROWS, pad_id=9, pad_to_multiple_of=5)
    assert batch.tokens.tolist() == [11, 12, 13, 21, 22]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_supervised) == (3, 5, 2)


@pytest.mark.parametrize("multiple", [1, 4])
def test_filler(multiple: int) -> None:
    batch = collate([], pad_id=9, pad_to_multiple_of=multiple)
    assert batch.tokens.tolist() == [9] * multiple
    assert batch.position_ids.tolist() == list(range(multiple))
    assert not batch.loss_mask.any()
    assert batch.cu_seqlens.tolist() == [0, multiple]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_supervised) == (multiple, 0, 0)
    assert batch.lengths == ()


def test_layout_with_padded_rows() -> None:
    batch = collate(ROWS, pad_id=9, pad_to_multiple_of=12, pad_rows_to_multiple_of=4)
    assert batch.tokens.tolist() == [11, 12, 13, 9, 21, 22, 9, 9, 9, 9, 9, 9]
    assert batch.labels.tolist() == [12, 13, 9, 0, 22, 9, 9, 0, 9, 9, 9, 0]
    assert batch.loss_mask.nonzero().flatten().tolist() == [1, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3] * 3
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_supervised) == (4, 5, 2)
    assert batch.lengths == (3, 2)
    whole = collate(ROWS, pad_id=9, pad_to_multiple_of=4, pad_rows_to_multiple_of=4)
    assert whole.cu_seqlens.tolist() == [0, 4, 8]
    filler = collate([], pad_id=9, pad_to_multiple_of=8, pad_rows_to_multiple_of=4)
    assert (filler.cu_seqlens.tolist(), filler.lengths) == ([0, 8], ())
    with pytest.raises(AssertionError):
        collate(ROWS, pad_id=9, pad_to_multiple_of=6, pad_rows_to_multiple_of=4)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=6), rows_to=st.integers(1, 5), factor=st.integers(1, 3))
def test_padded_rows_hold_what_bare_rows_hold(lengths: list[int], rows_to: int, factor: int) -> None:
    random = np.random.default_rng(lengths)
    rows = [
        EncodedRow(
            input_ids=random.integers(10, 99, length).astype(np.int32), supervised=random.random(length) < 0.5
        )
        for length in lengths
    ]
    multiple = factor * rows_to
    batch = collate(rows, pad_id=9, pad_to_multiple_of=multiple, pad_rows_to_multiple_of=rows_to)
    bounds = batch.cu_seqlens.tolist()
    assert len(batch.tokens) == bounds[-1] > 0
    assert len(batch.tokens) % multiple == 0
    assert all(bound % rows_to == 0 for bound in bounds)
    assert batch.max_seqlen == np.diff(bounds).max()
    assert batch.lengths == tuple(lengths)
    assert batch.num_tokens == sum(lengths)
    assert batch.num_supervised == batch.loss_mask.sum()
    for row, start in zip(rows, bounds, strict=False):
        alone = collate([row], pad_id=9, pad_to_multiple_of=1)
        here = slice(start, start + len(row))
        assert torch.equal(batch.tokens[here], alone.tokens)
        assert torch.equal(batch.loss_mask[here], alone.loss_mask)
        assert torch.equal(batch.position_ids[here], alone.position_ids)
        masked = batch.loss_mask[here]
        assert torch.equal(batch.labels[here][masked], alone.labels[masked])
    assert batch.num_supervised == sum(int(row.supervised[1:].sum()) for row in rows)


def make_plan(
    *,
    num_rows: int = 50,
    global_batch_size: int = 12,
    micro: int = 1,
    dp: int = 1,
    epochs: float = 3.0,
    max_steps: int | None = None,
    seed: int = 5,
    shuffle: bool = True,
    work: np.ndarray | None = None,
) -> BatchPlan:
    return BatchPlan(
        num_rows=num_rows,
        global_batch_size=global_batch_size,
        micro_batch_size=micro,
        data_parallel_size=dp,
        accumulation=global_batch_size // (micro * dp),
        num_train_epochs=epochs,
        max_steps=max_steps,
        seed=seed,
        shuffle=shuffle,
        work=work,
    )


LAYOUTS = [(1, 1), (1, 2), (2, 3), (3, 4), (1, 12), (6, 2), (12, 1)]


def some_work(num_rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, num_rows)


@pytest.mark.parametrize("with_work", [False, True])
@pytest.mark.parametrize(("micro", "dp"), LAYOUTS)
@pytest.mark.parametrize("num_rows", [1, 5, 12, 50])
def test_union_over_ranks_is_the_step(micro: int, dp: int, num_rows: int, with_work: bool) -> None:
    work = some_work(num_rows) if with_work else None
    plan = make_plan(num_rows=num_rows, micro=micro, dp=dp, work=work)
    reference = make_plan(num_rows=num_rows, work=work)
    for step in range(plan.total_steps):
        ranks = [plan.micro_batches(step, rank) for rank in range(dp)]
        for micro_batches in ranks:
            assert len(micro_batches) == plan.accumulation
            assert all(len(rows) <= micro for rows in micro_batches)
        dealt = [row for micro_batches in ranks for rows in micro_batches for row in rows.tolist()]
        assert sorted(dealt) == sorted(plan.row_indices(step).tolist())
        assert plan.row_indices(step).tolist() == reference.row_indices(step).tolist()
        counts = [sum(map(len, micro_batches)) for micro_batches in ranks]
        assert max(counts) - min(counts) <= 1
        for micro_batches in ranks:
            sizes = list(map(len, micro_batches))
            assert max(sizes) - min(sizes) <= 1


def test_without_work_rows_are_dealt_like_cards() -> None:
    plan = make_plan(micro=2, dp=3)
    for step in (0, 4):
        for rank in range(3):
            dealt = np.array_split(plan.row_indices(step)[rank::3], 2)
            assert [rows.tolist() for rows in plan.micro_batches(step, rank)] == [
                rows.tolist() for rows in dealt
            ]


def test_epochs_are_fresh_permutations_and_never_mix() -> None:
    plan = make_plan()
    assert plan.steps_per_epoch == 5
    sizes = [len(plan.row_indices(step)) for step in range(5)]
    assert sizes == [12, 12, 12, 12, 2]
    epochs = [np.concatenate([plan.row_indices(e * 5 + s) for s in range(5)]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert make_plan().row_indices(7).tolist() == plan.row_indices(7).tolist()
    assert make_plan(seed=6).row_indices(7).tolist() != plan.row_indices(7).tolist()
    in_order = make_plan(shuffle=False)
    assert in_order.row_indices(4).tolist() == in_order.row_indices(9).tolist() == [48, 49]


@pytest.mark.parametrize("num_rows", [1, 12, 50, 2000])
def test_with_work_every_row_is_used_once_an_epoch(num_rows: int) -> None:
    work = some_work(num_rows)
    plan = make_plan(num_rows=num_rows, work=work)
    steps = plan.steps_per_epoch
    sizes = [len(plan.row_indices(step)) for step in range(steps)]
    assert sizes == [len(make_plan(num_rows=num_rows).row_indices(step)) for step in range(steps)]
    epochs = [np.concatenate([plan.row_indices(e * steps + s) for s in range(steps)]) for e in range(3)]
    assert all(np.sort(epoch).tolist() == list(range(num_rows)) for epoch in epochs)
    if num_rows > 12:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[1], epochs[2])
        # Batches are of even work each, but come neither from light to heavy nor the other way round.
        means = [work[plan.row_indices(step)].mean() for step in range(num_rows // 12)]
        assert len(means) < 4 or means not in (sorted(means), sorted(means, reverse=True))
    # Nothing but seed, epoch, number of rows, global batch and work takes part.
    again = make_plan(num_rows=num_rows, work=work.copy(), epochs=1.0, micro=3, dp=4)
    assert np.array_equal(again.row_indices(steps), plan.row_indices(steps))
    if num_rows > 12:
        for other in ({"seed": 6}, {"work": work[::-1].copy()}):
            changed = make_plan(**{"num_rows": num_rows, "work": work, **other})  # type: ignore[arg-type]
            found = np.concatenate([changed.row_indices(step) for step in range(steps)])
            assert not np.array_equal(found, epochs[0])


def test_a_short_last_batch_has_rows_of_any_work() -> None:
    num_rows = 64 * 12 + 11
    work = np.arange(num_rows)
    plan = make_plan(num_rows=num_rows, work=work)
    for epoch in range(3):
        last = work[plan.row_indices((epoch + 1) * plan.steps_per_epoch - 1)]
        assert len(last) == 11
        assert last.min() < num_rows / 2 < last.max()


def test_with_work_no_two_epochs_have_the_same_batches() -> None:
    plan = make_plan(num_rows=120, work=some_work(120))
    epochs = [{frozenset(plan.row_indices(10 * e + s).tolist()) for s in range(10)} for e in range(3)]
    assert not epochs[0] & epochs[1]
    assert not epochs[1] & epochs[2]


@pytest.mark.parametrize(("micro", "dp"), LAYOUTS)
def test_neighbours_in_work_share_a_place_on_different_ranks(micro: int, dp: int) -> None:
    plan = make_plan(micro=micro, dp=dp, work=np.arange(50))
    rows = plan.row_indices(0)
    assert np.all(np.diff(rows) > 0), "the work of a row is its number here"
    place = {row: index for index, row in enumerate(rows.tolist())}
    ranks = [plan.micro_batches(0, rank) for rank in range(dp)]
    for parts in zip(*ranks, strict=True):
        for neighbours in zip(*(np.sort(part).tolist() for part in parts), strict=True):
            places = sorted(place[row] for row in neighbours)
            assert places == list(range(places[0], places[0] + dp))


def test_back_and_forth_evens_ranks_and_micro_batches_out() -> None:
    plan = make_plan(num_rows=16, global_batch_size=16, micro=2, dp=4, work=np.arange(16))
    loads = np.array([[rows.sum() for rows in plan.micro_batches(0, rank)] for rank in range(4)])
    assert (loads == 15).all(), "0 + 15, 1 + 14 and so on"
    assert imbalance(plan, np.arange(16)) == 1.0


def test_packs_of_chat_length_are_balanced() -> None:
    """Data-parallel 8 x accumulation 4, one pack a micro-batch, as a node of eight GPUs trains."""
    lengths = chat_lengths(50_000)
    packs = pack(lengths, 4096)
    work = packs.work(lengths)
    balanced = make_plan(num_rows=len(packs), global_batch_size=32, dp=8, work=work)
    plain = replace(balanced, work=None)
    assert imbalance(balanced, work) <= 1.05
    assert imbalance(plain, work) > 2
    assert plain == make_plan(num_rows=len(packs), global_batch_size=32, dp=8)
    steps = [[plain.micro_batches(step, rank) for rank in range(8)] for step in range(plain.num_rows // 32)]
    loads = np.array([[[work[rows].sum() for rows in rank] for rank in step] for step in steps])
    expected = (loads.max(axis=(1, 2)) / loads.mean(axis=(1, 2))).mean()
    assert imbalance(plain, work) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_rows", "epochs", "max_steps", "total"),
    [
        (50, 1.0, None, 5),
        (50, 0.5, None, 3),
        (50, 2.2, None, 11),
        (50, 0.001, None, 1),
        (50, 3, None, 15),
        (360, 0.1, None, 3),
        (50, 1.0, 7, 7),
        (50, 1.0, 2, 2),
        (50, 1.0, 0, 0),
    ],
)
def test_total_steps(num_rows: int, epochs: float, max_steps: int | None, total: int) -> None:
    assert make_plan(num_rows=num_rows, epochs=epochs, max_steps=max_steps).total_steps == total


def test_sizes_must_multiply_up() -> None:
    with pytest.raises(ConfigError, match="global_batch_size 12 is not micro-batch 5 x"):
        make_plan(micro=5)
    for wrong in (
        {"num_rows": 0},
        {"max_steps": -1},
        {"epochs": 0.0},
        {"epochs": float("nan")},
        {"seed": -1},
    ):
        with pytest.raises(ConfigError):
            make_plan(**wrong)


def test_description() -> None:
    assert make_plan(micro=2, dp=3).describe() == (
        "50 rows, global batch 12 = 2 (micro-batch) x 2 (accumulation) x 3 (data parallel), "
        "5 steps per epoch, 3 epochs, 15 steps, the last step of an epoch has 2 rows"
    )
    assert replace(make_plan(), unit="packs").describe().endswith("the last step of an epoch has 2 packs")


def test_imbalance_of_a_single_short_step_leaves_fillers_out() -> None:
    plan = make_plan(num_rows=3, dp=4, work=np.array([1, 2, 3]))
    assert imbalance(plan, np.array([1, 2, 3])) == 1.5


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 100])
@pytest.mark.parametrize(("micro", "dp", "multiple"), [(1, 1, 1), (1, 4, 1), (3, 2, 2)])
def test_evaluation_takes_every_row_once(num_rows: int, micro: int, dp: int, multiple: int) -> None:
    plan = evaluation_plan(
        num_rows, micro_batch_size=micro, data_parallel_size=dp, max_micro_batches=8,
        micro_batches_multiple_of=multiple,
    )  # fmt: skip
    assert plan.accumulation <= 8
    assert plan.accumulation % multiple == 0
    seen: list[int] = []
    for step in range(plan.total_steps):
        for rank in range(dp):
            micro_batches = plan.micro_batches(step, rank)
            assert len(micro_batches) == plan.accumulation
            seen.extend(np.concatenate(micro_batches).tolist())
    assert sorted(seen) == list(range(num_rows))
