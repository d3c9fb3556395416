"""Every row is in one pack, no pack is too full, and there are as few packs as best fit decreasing gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.packing import Packs, pack
from tests.data.tiny import chat_lengths


def best_fit_decreasing(costs: list[int], room: int) -> list[int]:
    """Places left in every pack, by looking through all of them for every row."""
    left: list[int] = []
    for cost in sorted(costs, reverse=True):
        fitting = [place for place in left if place >= cost]
        if fitting:
            left[left.index(min(fitting))] -= cost
        else:
            left.append(room - cost)
    return left


def rows_in(packs: Packs) -> list[list[int]]:
    return [packs[index].tolist() for index in range(len(packs))]


def test_by_hand() -> None:
    lengths = np.array([3, 7, 2, 10, 5, 3])
    packs = pack(lengths, 10)
    # 10 is full, 7 + 3 (the first 3) is full, 5 + 3 + 2 is full.
    assert rows_in(packs) == [[3], [0, 1], [2, 4, 5]]
    assert (packs.members.dtype, packs.offsets.dtype) == (np.int64, np.int64)
    assert packs.offsets.tolist() == [0, 1, 3, 6]
    assert packs.efficiency(lengths) == 1.0
    assert packs.work(lengths).tolist() == [100, 9 + 49, 4 + 25 + 9]
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            packs[outside]


@pytest.mark.parametrize("lengths", [[9], [7, 0], []])
def test_what_cannot_be_packed_is_a_bug(lengths: list[int]) -> None:
    with pytest.raises(AssertionError):
        pack(np.array(lengths, dtype=np.int64), 8)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_like_the_search_through_all_packs(costs: list[int]) -> None:
    lengths = np.array(costs, dtype=np.int64)
    packs = pack(lengths, 40)
    assert sorted(packs.members.tolist()) == list(range(len(costs)))
    assert all(rows == sorted(rows) for rows in rows_in(packs))
    left = [40 - sum(costs[row] for row in rows) for rows in rows_in(packs)]
    assert min(left) >= 0
    assert sorted(left) == sorted(best_fit_decreasing(costs, 40))
    assert rows_in(pack(lengths, 40)) == rows_in(packs)


def test_many_rows_of_chat_length() -> None:
    lengths = chat_lengths(50_000)
    packs = pack(lengths, 4096)
    assert np.array_equal(np.sort(packs.members), np.arange(50_000))
    assert packs.offsets[-1] == 50_000
    assert np.add.reduceat(lengths[packs.members], packs.offsets[:-1]).max() <= 4096
    assert packs.efficiency(lengths) >= 0.999
    assert packs.work(lengths).sum() == (lengths**2).sum()
