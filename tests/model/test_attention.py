"""Attention over packed documents, and over chunks of a context-parallel rank, against a dense softmax."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.model import attention
from engine.model.attention import Segments, attend
from engine.model.context_parallel import shard_positions

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
