"""The operations that `braid bench comm` times, and what their bandwidth means.

Bandwidths are those of nccl-tests (its doc/PERFORMANCE.md): the algorithm bandwidth is bytes / seconds, the
bus bandwidth that times a factor, so that operations and numbers of ranks can be compared with the speed of
the links. The bytes of a message are those of the whole buffer on one rank: the result of an all_gather, the
input of a reduce_scatter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Bus bandwidth / algorithm bandwidth, to be taken times (ranks - 1) / ranks; None: 1, between two ranks.
FACTORS: Mapping[str, float | None] = {
    "all_reduce": 2.0,
    "all_gather": 1.0,
    "reduce_scatter": 1.0,
    "all_to_all": 1.0,
    "send_recv": None,
}
_ELEMENT_BYTES = 4


def bus_factor(operation: str, ranks: int) -> float:
    """Bus bandwidth / algorithm bandwidth of an operation over `ranks` ranks."""
    factor = FACTORS[operation]
    return 1.0 if factor is None else factor * (ranks - 1) / ranks


@dataclass(frozen=True, kw_only=True)
class Message:
    """Buffers of one size for a group; float32 [elements], a multiple of the number of ranks."""

    whole: torch.Tensor
    other: torch.Tensor
    """Of the same size, for operations that do not work in place."""

    part: torch.Tensor
    """One rank's share of a buffer, [elements / ranks]."""

    @classmethod
    def of(cls, size: int, ranks: int, device: torch.device) -> "Message":
        """Buffers of `size` bytes, rounded up so that every rank has the same share."""
        share = -(-size // (_ELEMENT_BYTES * ranks))
        whole = torch.ones(share * ranks, dtype=torch.float32, device=device)
        return cls(whole=whole, other=torch.empty_like(whole), part=whole[:share].clone())

    @property
    def bytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.whole.numel() * _ELEMENT_BYTES


def call_of(operation: str, message: Message, group: Any, *, ring: bool) -> Callable[[], None]:
    """A function that runs the operation once, on every rank of the group.

    send_recv passes the buffer on to the next rank of the group: in a `ring`, or from the first to the last,
    as pipeline stages do.
    """
    if operation == "send_recv":
        return _send_recv(message, group, ring=ring)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(message.whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(message.whole, message.part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(message.part, message.whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(message.other, message.whole, group=group),
    }
    call = calls[operation]

    def run() -> None:
        call()

    return run


def _send_recv(message: Message, group: Any, *, ring: bool) -> Callable[[], None]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    following, previous = (
        dist.get_global_rank(group, (rank + step) % ranks) if group is not None else (rank + step) % ranks
        for step in (1, -1)
    )

    def run() -> None:
        operations = []
        if ring or rank < ranks - 1:
            operations.append(dist.P2POp(dist.isend, message.whole, following, group))
        if ring or rank > 0:
            operations.append(dist.P2POp(dist.irecv, message.other, previous, group))
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return run
