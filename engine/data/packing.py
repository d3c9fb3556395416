"""Rows share sequences: which of them go together so that little of every sequence stays empty."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Packs:
    """Rows dealt to sequences of at most `capacity` tokens. `packs[i]` are the rows of one, ascending."""

    members: np.ndarray
    """int64 [rows]; row numbers, one pack after another."""

    offsets: np.ndarray
    """int64 [packs + 1]; pack i is members[offsets[i] : offsets[i + 1]]."""

    capacity: int
    """Tokens of a full pack."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Rows of pack `index`, int64. IndexError: below 0 or beyond the last pack."""
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return self.members[self.offsets[index] : self.offsets[index + 1]]

    def efficiency(self, lengths: np.ndarray) -> float:
        """Share of the packs' capacity that real tokens fill; `lengths` are those of the rows, int64."""
        return float(lengths.sum()) / (len(self) * self.capacity)

    def work(self, lengths: np.ndarray) -> np.ndarray:
        """Attention work of every pack, int64 [packs]: the sum of its rows' squared lengths."""
        return np.add.reduceat(lengths[self.members] ** 2, self.offsets[:-1])


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Best fit decreasing: rows from long to short, each into the fullest pack that still has room for it.

    `lengths` are the tokens of every row, int64 [rows], each at least 1 and at most `capacity`. The same
    lengths give the same packs: a layout that pads rows pads those of a pack too, which then gets a little
    longer, and so all layouts train on the same packs.
    """
    assert lengths.dtype == np.int64
    assert lengths.ndim == 1
    assert len(lengths) > 0
    assert lengths.min() > 0
    assert lengths.max() <= capacity, "a row longer than a pack"

    longest_first = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[longest_first] = _best_fit(lengths[longest_first].tolist(), capacity)
    # The stable sort keeps the rows of a pack in their order.
    members = np.argsort(pack_of, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of))])
    return Packs(members=members, offsets=offsets, capacity=capacity)


def _best_fit(costs: list[int], room: int) -> list[int]:
    """The pack of each cost, taken in the order given; packs count from 0 in the order they are opened."""
    # with_left[n] are the open packs with n places left, and bit n of `lefts` says that there are any: the
    # smallest n that is large enough is one shift and one lowest bit away, however many packs are open.
    with_left: list[list[int]] = [[] for _ in range(room)]
    lefts, opened, chosen = 0, 0, []
    for cost in costs:
        fitting = lefts >> cost
        if fitting:
            left = cost + (fitting & -fitting).bit_length() - 1
            packs = with_left[left]
            target = packs.pop()
            if not packs:
                lefts ^= 1 << left
            left -= cost
        else:
            target, left = opened, room - cost
            opened += 1
        chosen.append(target)
        if left:
            if not with_left[left]:
                lefts |= 1 << left
            with_left[left].append(target)
    return chosen
