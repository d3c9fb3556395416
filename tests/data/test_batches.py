"""The layout of a micro-batch, token by token, and the promises of a plan."""

import numpy as np
import pytest
import torch

from engine.data.batches import BatchPlan, collate, evaluation_plan
from engine.data.template import EncodedRow
from engine.errors import ConfigError


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
    )


LAYOUTS = [(1, 1), (1, 2), (2, 3), (3, 4), (1, 12), (6, 2), (12, 1)]


@pytest.mark.parametrize(("micro", "dp"), LAYOUTS)
@pytest.mark.parametrize("num_rows", [1, 5, 12, 50])
def test_union_over_ranks_is_the_step(micro: int, dp: int, num_rows: int) -> None:
    plan = make_plan(num_rows=num_rows, micro=micro, dp=dp)
    reference = make_plan(num_rows=num_rows)
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
