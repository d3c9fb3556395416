"""Gradients of experts' weights in Triton, added to Megatron's float32 buffer by the kernel that makes them;
import only where kernels can be compiled.

A program makes a tile [out, in] of one expert. Two fit on a multiprocessor of an H100: while one waits for
the buffer's memory the other multiplies. Each element is added to once: results do not depend on timing.

Shape suffixes: N rows that came to this rank's experts, K experts, O outputs and I inputs of a linear.
"""

import triton
import triton.language as tl
from torch import Tensor

# Of a tile, both ways, and rows that a product takes at once.
_BLOCK, _STEP = 128, 64
# Tiles of this many block rows follow each other through the columns, for the L2 cache.
_GROUP = 8


@triton.jit
def _tokens(source, first, end, columns, width, STEP: tl.constexpr):
    """[STEP, columns] from row `first` on, with zeros from row `end` on."""
    token = tl.arange(0, STEP)
    begin = tl.full((), 0, tl.int64) + first  # the interpreter counts in Python's integers
    at = source + begin * width + (token[:, None] * width + columns[None])
    return tl.load(at, mask=(first + token < end)[:, None] & (columns < width)[None], other=0.0)


@triton.jit
def _add(total, product, expert, out, into, OUT, IN, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    line, column = out + tl.arange(0, BLOCK_OUT), into + tl.arange(0, BLOCK_IN)
    at = total + expert.to(tl.int64) * OUT * IN + (line[:, None] * IN + column[None])
    here = (line < OUT)[:, None] & (column < IN)[None]
    tl.store(at, tl.load(at, mask=here) + product, mask=here)


@triton.jit
def _add_products(
    total, grads, inputs, ends, OUT, IN, BLOCK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    down, across = tl.cdiv(OUT, BLOCK), tl.cdiv(IN, BLOCK)
    expert, number = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    above = number // (GROUP * across) * GROUP
    height = tl.minimum(down - above, GROUP)
    number %= GROUP * across
    out, into = (above + number % height) * BLOCK, number // height * BLOCK
    start, end = tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)
    if start < end:
        lines, columns = out + tl.arange(0, BLOCK), into + tl.arange(0, BLOCK)
        product = tl.zeros((BLOCK, BLOCK), tl.float32)
        for first in range(start, end, STEP):
            a = _tokens(grads, first, end, lines, OUT, STEP)
            b = _tokens(inputs, first, end, columns, IN, STEP)
            product = tl.dot(a.T, b, product)
        # Half a tile of the buffer at a time: all of it would not fit beside the product.
        HALF: tl.constexpr = BLOCK // 2
        left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK, 2, HALF)), (0, 2, 1)))
        _add(total, left, expert, out, into, OUT, IN, BLOCK, HALF)
        _add(total, right, expert, out, into + HALF, OUT, IN, BLOCK, HALF)


def add_grouped_products(total_KOI: Tensor, grads_NO: Tensor, inputs_NI: Tensor, ends_K: Tensor) -> None:
    """total[e] += grads[rows of e].T @ inputs[rows of e], contiguous; `total` float32. Rows are sorted by
    expert, and int32 `ends` has how many those up to each expert have. Experts without rows stay as they are.
    """
    experts, out, into = total_KOI.shape
    tiles = experts * triton.cdiv(out, _BLOCK) * triton.cdiv(into, _BLOCK)
    if tiles and len(grads_NO):
        _add_products[(tiles,)](
            total_KOI, grads_NO, inputs_NI, ends_K, out, into, BLOCK=_BLOCK, STEP=_STEP, GROUP=_GROUP,
            num_warps=8, num_stages=3,
        )  # fmt: skip
