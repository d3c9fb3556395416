"""What a converter reads: the tensors of a model under their Hugging Face names, a few rows at a time.

Whatever the format on disk, converters see it through `Source`; so each of them works from every format, in
memory that does not grow with the model.
"""

import math
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 16_000_000
"""Bytes of a tensor that are looked at at once."""


class Source(ABC):
    """Tensors by Hugging Face name. Subclasses raise the UserError of their format where a file fails."""

    directory: Path

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that hold the tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read_rows` gives."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, [stop - start, ...], contiguous; into `out` where it is given."""

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) along `axis`, contiguous. Rows that are not asked for are not read."""
        shape = self.shape(name)
        assert 0 <= start <= stop <= shape[axis], f"[{start}, {stop}) of axis {axis} of {name} {shape}"
        if axis == 0:
            return self.read_rows(name, start, stop)
        result = torch.empty((*shape[:axis], stop - start, *shape[axis + 1 :]), dtype=self.dtype(name))
        for first, last in row_blocks(self, name):
            result[first:last] = self.read_rows(name, first, last).narrow(axis, start, stop - start)
        return result

    def row_bytes(self, name: str) -> int:
        """Bytes of one row."""
        return math.prod(self.shape(name)[1:]) * self.dtype(name).itemsize

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return self.shape(name)[0] * self.row_bytes(name)


def row_blocks(source: Source, name: str, block: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """The rows of a tensor as ranges of at most `block` bytes, one row at least."""
    rows = source.shape(name)[0]
    step = max(1, block // max(1, source.row_bytes(name)))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def new_or_given(shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`out`, which has to fit, or a new tensor."""
    if out is None:
        return torch.empty(shape, dtype=dtype)
    assert (tuple(out.shape), out.dtype) == (shape, dtype), f"{out.shape} {out.dtype} for {shape} {dtype}"
    assert out.is_contiguous()
    return out
