"""Experts in plain torch: what Megatron's specification without Transformer Engine lacks.

Shape suffixes: N tokens that came to this rank's experts, H hidden size, F width of an expert, K experts of
this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from engine.model.dispatch import AllGatherDispatcher, AllToAllDispatcher, OwnDispatcher
from engine.model.fused import weighted_swiglu
from engine.model.grouped import Shares, grouped_linear
from engine.model.layers import GatedMLP

_DISPATCHERS = {"alltoall": AllToAllDispatcher, "allgather": AllGatherDispatcher}


class MixtureOfExperts(MoELayer):
    """Megatron's layer with Braid's dispatchers: `dispatcher` is alltoall or allgather, and a rank that has
    all experts to itself needs neither.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *arguments: Any,
        dispatcher: str,
        pg_collection: Any = None,
        **more: Any,
    ) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, *arguments, pg_collection=groups, **more)
        alone = groups.tp_ep.size() == 1
        kind = OwnDispatcher if alone else _DISPATCHERS[dispatcher]
        self.token_dispatcher = kind(self.num_local_experts, config=config, pg_collection=groups)


class ExpertLayer(TransformerLayer):
    """Megatron's decoder layer, whose router learns which micro-batch it is called for."""

    def forward(self, *arguments: Any, **more: Any) -> Any:
        """As Megatron's; `packed_seq_params` are Braid's DocumentParams."""
        self.mlp.router.balance = more["packed_seq_params"].balance
        return super().forward(*arguments, **more)


class SharedExpert(SharedExpertMLP, GatedMLP):
    """The expert that every token goes to."""

    column_linear: type = ColumnParallelLinear
    row_linear: type = RowParallelLinear

    def __init__(
        self, config: TransformerConfig, gate: bool, pg_collection: Any = None, **unused: Any
    ) -> None:
        linears = MLPSubmodules(linear_fc1=self.column_linear, linear_fc2=self.row_linear)
        super().__init__(config=config, submodules=linears, gate=gate, pg_collection=pg_collection)


def mark_expert_weight(weight: torch.nn.Parameter, *, axis: int) -> None:
    """What Megatron asks a parameter: over which ranks its gradients are added up, and whether the norm of
    the gradients counts it on every rank. `axis` is the dimension that ranks share.
    """
    marks = {
        "allreduce": False,
        "tensor_model_parallel": True,
        "partition_dim": axis,
        "partition_stride": 1,
    }
    for name, value in marks.items():
        setattr(weight, name, value)


def is_expert_weight(weight: Tensor) -> bool:
    """Whether a parameter belongs to experts that tokens are routed to."""
    return not getattr(weight, "allreduce", True)


@dataclass(frozen=True, kw_only=True)
class ExpertMatrices:
    """One linear of each expert of this rank: `weight` [K, out, in], and with LoRA `up` [K, out, R] after
    `down` [K, R, in].
    """

    weight: Tensor
    down: Tensor | None = None
    up: Tensor | None = None

    def apply(self, tokens: Tensor, shares: Shares) -> Tensor:
        """[N, in], sorted by expert -> [N, out]."""
        out = grouped_linear(tokens, self.weight, shares)
        if self.down is None or self.up is None:
            return out
        return out + grouped_linear(grouped_linear(tokens, self.down, shares), self.up, shares)


class ExpertLinear(torch.nn.Module):
    """The weights of one linear of all experts of this rank, [K, out, in]."""

    def __init__(self, experts: int, out: int, into: int, *, axis: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(experts, out, into, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        mark_expert_weight(self.weight, axis=axis)

    def forward(self) -> ExpertMatrices:
        """A call, because Megatron gathers a module's updated weights when it is called."""
        return ExpertMatrices(weight=self.weight)


class GroupedExperts(MegatronModule):
    """The experts of this rank: silu(gate) * up, times the router's weight, and down."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, pg_collection: Any, **unused: Any
    ) -> None:
        super().__init__(config)
        self.num_local_experts, self.groups = num_local_experts, pg_collection
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        hidden = config.hidden_size
        self.linear_fc1 = ExpertLinear(num_local_experts, 2 * width, hidden, axis=1, config=config)
        self.linear_fc2 = ExpertLinear(num_local_experts, hidden, width, axis=2, config=config)

    @property
    def first_expert(self) -> int:
        """Index of this rank's first expert among all of the layer."""
        return int(self.groups.ep.rank()) * self.num_local_experts

    def forward(self, tokens_NH: Tensor, tokens_per_expert: Tensor, weights_N: Tensor) -> tuple[Tensor, None]:
        """Tokens in the order of their experts, int64 [K] of how many each has, and the router's weights ->
        [N, H].
        """
        shares = Shares(tokens_per_expert, tokens_NH.device)
        both = self.linear_fc1().apply(tokens_NH, shares)
        return self.linear_fc2().apply(weighted_swiglu(both, weights_N), shares), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's description, with the keys and shapes that Transformer Engine's grouped linears have."""
        return {
            f"{prefix}{name}.weight": self._describe(
                linear.weight, f"{prefix}experts.{name}.weight", sharded_offsets, gated=name == "linear_fc1"
            )
            for name, linear in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2))
        }

    def _describe(
        self, weight: Tensor, key: str, offsets: tuple[Any, ...], *, gated: bool
    ) -> ShardedTensorFactory:
        axis = len(offsets)
        experts = self.groups.ep.size() * self.num_local_experts
        rank, ranks = self.groups.expt_tp.rank(), self.groups.expt_tp.size()

        def build(key: str, data: Tensor, replica: Any, flattened: Any) -> list[ShardedTensor]:
            pieces = []
            for index, expert in enumerate(data.unbind()):
                place = (*offsets, (axis, self.first_expert + index, experts))
                cuts = [(expert, (axis + 2, rank, ranks))]
                if gated:
                    gate, up = expert.chunk(2)
                    cuts = [(gate, (axis + 1, rank, 2 * ranks)), (up, (axis + 1, ranks + rank, 2 * ranks))]
                pieces += [
                    ShardedTensor.from_rank_offsets(
                        key, part, *place, cut, replica_id=replica, prepend_axis_num=axis + 1
                    )
                    for part, cut in cuts
                ]
            return pieces

        def merge(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([part.flatten() for part in parts]).view(weight.shape)

        replica = (0, 0, self.groups.expt_dp.rank())
        return ShardedTensorFactory(key, weight, build, merge, replica)
