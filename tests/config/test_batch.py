"""Micro-batch x accumulation x data-parallel ranks == global batch."""

from typing import Any

import pytest

from engine.config.batch import BatchShape, resolve_batch_shape
from engine.config.options import BatchOptions
from engine.errors import ConfigError


def resolve(*, dp: int = 2, resumed: int | None = None, **options: Any) -> BatchShape:
    names = {
        "micro": "per_device_train_batch_size",
        "acc": "gradient_accumulation_steps",
        "wanted": "global_batch_size",
    }
    batch = BatchOptions(**{names.get(name, name): value for name, value in options.items()})
    return resolve_batch_shape(batch, data_parallel_size=dp, resumed_global_batch_size=resumed)


@pytest.mark.parametrize(
    ("options", "dp", "accumulation", "global_batch"),
    [
        ({}, 1, 1, 1),
        ({}, 4, 1, 4),
        ({"micro": 3}, 2, 1, 6),
        ({"micro": 3, "acc": 5}, 2, 5, 30),
        ({"micro": 2, "wanted": 16}, 2, 4, 16),
        ({"micro": 2, "wanted": 4}, 2, 1, 4),
        ({"micro": 2, "acc": 4, "wanted": 16}, 2, 4, 16),
    ],
)
def test_the_missing_one_is_derived(
    options: dict[str, int], dp: int, accumulation: int, global_batch: int
) -> None:
    shape = resolve(dp=dp, **options)
    assert (shape.accumulation, shape.global_batch_size) == (accumulation, global_batch)
    assert shape.micro_batch_size * shape.accumulation * dp == shape.global_batch_size


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"micro": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size must be at least 1, not -1"),
        ({"acc": 0}, "gradient_accumulation_steps must be at least 1, not 0"),
        ({"wanted": 0}, "global_batch_size 0 is not a multiple"),
        ({"wanted": -4}, "global_batch_size -4 is not a multiple"),
        ({"wanted": 5}, "global_batch_size 5 is not a multiple"),
        (
            {"micro": 4, "wanted": 4},
            "global_batch_size 4 is not a multiple of per_device_train_batch_size 4 x 2",
        ),
        ({"acc": 3, "wanted": 8}, "global_batch_size 8 contradicts 1 x 3 x 2 = 6 rows"),
    ],
)
def test_contradictions_name_the_numbers(options: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(**options)
    assert named in str(caught.value)


@pytest.mark.parametrize(("dp", "micro", "accumulation"), [(1, 1, 16), (2, 1, 8), (4, 2, 2), (16, 1, 1)])
def test_a_resumed_run_keeps_its_global_batch(dp: int, micro: int, accumulation: int) -> None:
    shape = resolve(dp=dp, micro=micro, resumed=16)
    assert (shape.accumulation, shape.global_batch_size) == (accumulation, 16)


def test_a_resumed_run_takes_its_accumulation_from_the_new_layout() -> None:
    assert resolve(dp=4, acc=8, resumed=16).accumulation == 4
    assert resolve(dp=4, acc=8, wanted=16, resumed=16).accumulation == 4


def test_a_resumed_run_cannot_change_its_global_batch() -> None:
    with pytest.raises(
        ConfigError, match="global_batch_size 32 differs from the resumed run's 16; leave it out"
    ):
        resolve(wanted=32, resumed=16)
    with pytest.raises(
        ConfigError, match="global_batch_size 16 is not a multiple of per_device_train_batch_size 3"
    ):
        resolve(dp=2, micro=3, resumed=16)
