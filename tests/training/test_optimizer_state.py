"""A flat range of a parameter as boxes: they are what the range is, and few."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.training.optimizer_state import _boxes


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_boxes_are_the_range(rows: int, columns: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, rows * columns))
    last = data.draw(st.integers(first, rows * columns))
    flat = torch.arange(rows * columns)
    found, seen = list(_boxes(first, last, (rows, columns))), []
    assert len(found) <= 3
    for start, stop, offsets, sizes in found:
        box = flat.view(rows, columns)[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        assert tuple(box.shape) == sizes
        assert torch.equal(box.flatten(), flat[start:stop])
        seen += range(start, stop)
    assert seen == list(range(first, last))


def test_boxes_of_a_vector() -> None:
    assert list(_boxes(2, 5, (9,))) == [(2, 5, (2,), (3,))]
    assert list(_boxes(4, 4, (9,))) == []
