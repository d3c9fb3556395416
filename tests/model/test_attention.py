"""Attention over packed documents, and over chunks of a context-parallel rank, against a dense softmax."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.model import attention
from engine.model.attention import TILE, Segments, attend, list_tiles
from engine.model.context_parallel import shard_positions
from engine.model.packed_attention import attend_packed

HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.3
CPU = torch.device("cpu")


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax over all pairs, with what lies in another document or in the future masked."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(document))
    seen = (document[:, None] == document[None]) & (position[:, None] >= position[None])
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) * SCALE
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, v)


def tensors(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, HEADS, DIM), (tokens, GROUPS, DIM), (tokens, GROUPS, DIM), (tokens, HEADS, DIM))
    q, k, v, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), weight


@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (1, 12, 3)])
def test_documents(lengths: tuple[int, ...]) -> None:
    q, k, v, weight = tensors(sum(lengths))
    wanted = dense(q, k, v, lengths)
    found = attend(q, k, v, Segments.documents(lengths, CPU), SCALE)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("rows", [1024, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_context_parallelism_together(size: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' queries against all keys give every row once; `rows` masks a chunk whole or in blocks."""
    monkeypatch.setattr(attention, "_MASK_ROWS", rows)
    lengths = (2 * size, 10 * size, 4 * size)
    q, k, v, weight = tensors(sum(lengths))
    wanted = dense(q, k, v, lengths)
    found = torch.zeros_like(wanted)
    for rank in range(size):
        own = shard_positions(lengths, rank, size)
        found = found.index_copy(
            0, own, attend(q[own], k, v, Segments.chunks(lengths, rank, size, CPU), SCALE)
        )
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_has_one_rank_and_every_rank_the_same_work(size: int) -> None:
    lengths = (2 * size, 6 * size, 2 * size)
    shares = [shard_positions(lengths, rank, size) for rank in range(size)]
    assert torch.cat(shares).sort().values.tolist() == list(range(sum(lengths)))
    keys_seen = [
        sum(
            k - q + 1 + i
            for q, k in zip(segments.q_lengths, segments.k_lengths, strict=True)
            for i in range(q)
        )
        for segments in (Segments.chunks(lengths, rank, size, CPU) for rank in range(size))
    ]
    assert len(set(keys_seen)) == 1


def test_keys_of_the_segments_for_packed_kernels() -> None:
    """The packed form says the same as starts and lengths."""
    segments = Segments.chunks((8, 4), 1, 2, CPU)
    assert segments.cu_q.tolist() == [0, 2, 4, 5, 6]
    assert segments.cu_k.tolist() == [0, 4, 10, 12, 15]
    assert segments.key_index is not None
    assert segments.key_index.tolist() == [*range(4), *range(6), 8, 9, 8, 9, 10]


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"), [((1,), (1,)), ((200, 3, 64), (200, 3, 64)), ((64, 100), (130, 400))]
)
def test_tiles_cover_every_pair_once(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...]) -> None:
    """By queries and by keys: each query and key has one tile, and what a tile is said to see is right."""
    of_queries, of_keys = list_tiles(q_lengths, k_lengths)
    wanted = set()
    q_start = k_start = 0
    for queries, keys in zip(q_lengths, k_lengths, strict=True):
        seen = [(i, j) for i in range(queries) for j in range(keys) if j <= i + keys - queries]
        wanted |= {(q_start + i, k_start + j) for i, j in seen}
        q_start, k_start = q_start + queries, k_start + keys
    by_queries = [
        (row + i, first + j)
        for row, rows, first, position, bound in of_queries.tolist()
        for i in range(rows)
        for j in range(min(bound, position + i + 1))
    ]
    by_keys = [
        (first + i, row + j)
        for row, rows, first, count, offset in of_keys.tolist()
        for i in range(count)
        for j in range(rows)
        if j <= offset + i
    ]
    assert set(by_queries) == set(by_keys) == wanted
    assert len(by_queries) == len(by_keys) == len(wanted)
    assert max(of_queries[:, 1].max(), of_keys[:, 1].max()) <= TILE


@pytest.mark.parametrize("column", [4, 3])
def test_heaviest_tiles_come_first(column: int) -> None:
    tiles = list_tiles((70, 500, 3), (70, 500, 3))[0 if column == 4 else 1]
    assert (np.diff(tiles[:, column]) <= 0).all()


PACKED = {
    "documents": ((1, 700, 63, 64, 65, 129), None),
    "chunks of a context-parallel rank": ((64, 200), (300, 712)),
    "one long document": ((3000,), None),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize(("heads", "groups"), [(28, 4), (5, 5)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["FlashAttention 4", "Triton", "FlashAttention 2"])
def test_packed_kernels(
    kernel: str, case: str, heads: int, groups: int, dim: int, dtype: torch.dtype
) -> None:
    """Against the same numbers in fp64."""
    if kernel == "FlashAttention 4":
        pytest.importorskip("flash_attn.cute", reason="the package flash-attn-4 is optional")
    q_lengths, k_lengths = PACKED[case]
    device, scale = torch.device("cuda"), dim**-0.5
    k_lengths = k_lengths or q_lengths
    starts = tuple(sum(k_lengths[:i]) for i in range(len(k_lengths)))
    segments = Segments._make(q_lengths, starts, k_lengths, device, plain=k_lengths == q_lengths)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(tokens: int, count: int) -> Tensor:
        # A view, as projections fused in one matrix give it.
        whole = torch.randn(tokens, 2 * count, dim, generator=generator, device=device, dtype=dtype)
        return whole[:, count:].requires_grad_()

    q, k, v = random(sum(q_lengths), heads), random(sum(k_lengths), groups), random(sum(k_lengths), groups)
    weight = torch.randn_like(q)
    found = attend_packed(kernel, q, k, v, segments, scale)
    gradients = torch.autograd.grad(found, (q, k, v), weight)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = []
    for query, start, count in zip(wide[0].split(q_lengths), starts, k_lengths, strict=True):
        key, value = (x[start : start + count].repeat_interleave(heads // groups, 1) for x in wide[1:])
        seen = torch.ones(len(query), count, dtype=torch.bool, device=device).tril(count - len(query))
        scores = torch.einsum("qnd,knd->nqk", query, key) * scale
        parts.append(
            torch.einsum("nqk,knd->qnd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)
        )
    wanted = torch.cat(parts)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    exact = torch.autograd.grad(wanted, wide, weight.double())
    for result, truth in zip((found, *gradients), (wanted, *exact), strict=True):
        assert result.dtype == dtype
        assert (result.double() - truth).norm() <= bound * truth.norm()
    again = attend_packed(kernel, q, k, v, segments, scale)
    assert torch.equal(again, found)
    if kernel == "Triton":  # nothing is added up by atomics
        for first, second in zip(gradients, torch.autograd.grad(again, (q, k, v), weight), strict=True):
            assert torch.equal(first, second)
