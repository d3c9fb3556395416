"""LoRA inside Megatron's fused, sharded linears: separate A and B for every projection, as PEFT has them.

Shape suffixes: T tokens of a micro-batch (1 / tp of them under sequence parallelism where noted), H hidden
size, R rank of an adapter. A is [R, in], B is [out, R]; both are fp32 whatever the model's dtype is, and take
part in its arithmetic by a cast.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from engine.model.experts import ExpertLinear, ExpertMatrices, is_expert_weight, mark_expert_weight
from engine.model.gpt import BraidGPTModel
from engine.model.lora_spec import LoraSpec, LowRank, adapter_name
from engine.model.projections import Projection, projections
from engine.runtime import mcore
from engine.runtime.kernels import product

A, B = "_lora_A", "_lora_B"


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """This rank's place among the ranks that share a linear."""

    rank: int
    size: int
    group: Any
    sequence_parallel: bool


class LoraLinear(torch.nn.Module):
    """A frozen Megatron linear, `base_layer`, and the adapters of the projections in it.

    The parameters `<projection>_lora_A` and `<projection>_lora_B` are this module's own, not a submodule's:
    Megatron waits for a gathered parameter when the module that holds it is called.
    """

    def __init__(
        self, base_layer: torch.nn.Module, adapters: Mapping[str, LowRank], tp: TensorParallel, dropout: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = dict(adapters)
        self.tp = tp
        self.dropout = dropout

    def forward(self, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """[T, 1, in] -> what the base layer returns: (output, bias or None), the output with the adapters'
        part.
        """
        x, low = self.down(x)
        out, bias = self.base_layer(x, *arguments)
        return self.add_to(out, low), bias

    def add_to(self, out: Tensor, low: Tensor) -> Tensor:
        """The base layer's output, which is overwritten, with the adapters' part; `low` is from `down`."""
        raise NotImplementedError

    def add_weight(self, name: str, shape: tuple[int, int], partition: int | None) -> None:
        """A parameter; `partition` is the dimension that tensor parallelism cuts, None if all ranks hold it
        whole.
        """
        if partition is not None:
            shape = tuple(n // self.tp.size if i == partition else n for i, n in enumerate(shape))  # type: ignore[assignment]
        weight = torch.nn.Parameter(
            torch.zeros(shape, dtype=torch.float32, device=torch.cuda.current_device())
        )
        tensor_parallel.set_tensor_model_parallel_attributes(
            weight,
            is_parallel=partition is not None,
            dim=partition if partition is not None else -1,
            stride=1,
        )
        # Of a weight that all ranks hold, each rank sees the gradient of its tokens or rows only: marked like
        # this, Megatron adds them up.
        weight.sequence_parallel = partition is None and self.tp.size > 1  # type: ignore[attr-defined]
        self.register_parameter(name, weight)

    def down(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., in] -> x for the base layer, and scaling * A x of all adapters in order, beside one another,
        [..., sum of R].
        """
        weights = [getattr(self, name + A) * shape.scaling for name, shape in self.adapters.items()]
        if self.dropout and self.training:
            # Each adapter drops inputs of its own, as in PEFT.
            parts = [_Multiply.apply(F.dropout(x, self.dropout), weight)[1] for weight in weights]
            return x, torch.cat(parts, dim=-1)
        kept, low = _Multiply.apply(x, torch.cat(weights))
        return kept, low


class _Multiply(torch.autograd.Function):
    """x as it is, and x @ weight.T in the dtype of x, for a float32 weight whose gradient is never rounded to
    that dtype. The product's part of the gradient of x is added to the other part in the product itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        return x, F.linear(x, cast)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, cast = ctx.saved_tensors
        grad_x, grad = grad_outputs
        if grad is None:
            return grad_x, None
        low = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            if grad_x is None:
                grad_x = (low @ cast).view(x.shape)
            else:  # what the base layer's backward pass has just made, and nobody else has
                grad_x = grad_x.contiguous()
                grad_x.view(-1, x.shape[-1]).addmm_(low, cast)
        return grad_x, product(low.T, x.flatten(0, -2))


class _AddMultiply(torch.autograd.Function):
    """out += low @ weight.T in one product, for a float32 weight whose gradient is never rounded to the dtype
    of `out`.

    `out` is a linear's output, which no backward pass reads. It is overwritten behind autograd's back:
    Transformer Engine returns views, of which autograd allows no change.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, low: Tensor, weight: Tensor) -> Tensor:
        cast = weight.to(low.dtype)
        ctx.save_for_backward(low, cast)
        result = out.detach()
        result.view(-1, out.shape[-1]).addmm_(low.flatten(0, -2), cast.T)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, cast = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad, grad @ cast, product(grad.flatten(0, -2).T, low.flatten(0, -2))


class LoraColumnLinear(LoraLinear):
    """Around a column-parallel linear: inputs are whole rows, outputs are this rank's features.

    Under sequence parallelism A is applied to the rank's own tokens, and only the R numbers a token are
    gathered.
    """

    def __init__(
        self,
        base_layer: torch.nn.Module,
        adapters: Mapping[str, LowRank],
        tp: TensorParallel,
        dropout: float,
        sizes: Mapping[str, tuple[int, int]],
        groups: int | None,
    ) -> None:
        """`sizes` has (out, in) of every projection of the fused linear in order, adapted or not; `groups` is
        the number of query groups by which q, k and v interleave, None for gate and up.
        """
        super().__init__(base_layer, adapters, tp, dropout)
        self.sizes, self.groups = dict(sizes), groups or 1
        # With more ranks than groups Megatron cuts a group's q, k and v anywhere: B is then held whole.
        self.whole_groups = groups is None or groups % tp.size == 0
        self.local_groups = 1 if groups is None else max(1, groups // tp.size)
        self.ranks_per_group = 1 if self.whole_groups else tp.size // self.groups
        for name, shape in adapters.items():
            out_features, in_features = sizes[name]
            self.add_weight(name + A, (shape.rank, in_features), None)
            self.add_weight(name + B, (out_features, shape.rank), 0 if self.whole_groups else None)

    def add_to(self, out: Tensor, low: Tensor) -> Tensor:
        if self.tp.sequence_parallel:
            low = tensor_parallel.gather_from_sequence_parallel_region(
                low, tensor_parallel_output_grad=True, group=self.tp.group
            )
        result: Tensor = _AddMultiply.apply(out, low, self._up())
        return result

    def _up(self) -> Tensor:
        """B of all adapters as one matrix [features of this rank, sum of R]: a row has the numbers of its own
        projection, and zeros for the others.
        """
        total, start, parts = sum(shape.rank for shape in self.adapters.values()), 0, []
        for name, (out_features, _) in self.sizes.items():
            if name in self.adapters:
                own = self._rows(name)
                block = F.pad(own, (start, total - start - own.shape[1]))
                start += own.shape[1]
            else:
                features = out_features * self.ranks_per_group // self.tp.size
                block = torch.zeros(features, total, device=torch.cuda.current_device())
            parts.append(block.unflatten(0, (self.local_groups, -1)))
        up = torch.cat(parts, dim=1).flatten(0, 1)
        if self.whole_groups:
            return up
        share = up.shape[0] // self.ranks_per_group
        return up.narrow(0, self.tp.rank % self.ranks_per_group * share, share)

    def _rows(self, name: str) -> Tensor:
        """B of the rank's query groups, or of its part of gate or up."""
        weight: Tensor = getattr(self, name + B)
        return (
            weight if self.whole_groups else weight.chunk(self.groups)[self.tp.rank // self.ranks_per_group]
        )


class LoraRowLinear(LoraLinear):
    """Around a row-parallel linear: inputs are this rank's features, outputs are sums over the ranks.

    The sum over ranks is taken over the R numbers a token; under sequence parallelism each rank then keeps
    its tokens, and B is applied to those.
    """

    def __init__(
        self,
        base_layer: torch.nn.Module,
        adapters: Mapping[str, LowRank],
        tp: TensorParallel,
        dropout: float,
        sizes: Mapping[str, tuple[int, int]],
    ) -> None:
        super().__init__(base_layer, adapters, tp, dropout)
        for name, shape in adapters.items():
            out_features, in_features = sizes[name]
            self.add_weight(name + A, (shape.rank, in_features), 1)
            self.add_weight(name + B, (out_features, shape.rank), None)

    def add_to(self, out: Tensor, low: Tensor) -> Tensor:
        (name,) = self.adapters
        if self.tp.sequence_parallel:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=self.tp.group)
        result: Tensor = _AddMultiply.apply(out, low, getattr(self, name + B))
        return result


class LoraExpertLinear(torch.nn.Module):
    """The frozen weights of one linear of all experts of this rank, `base_layer`, and an adapter for each.

    `<projection>_lora_A` is [K * R, in] for K experts of this rank and `<projection>_lora_B` [out, R, K], as
    PEFT has those of all experts. Each expert lies on one rank: expert tensor parallelism is refused.
    """

    def __init__(
        self, base_layer: ExpertLinear, place: Projection, shape: LowRank, config: TransformerConfig
    ) -> None:
        super().__init__()
        assert config.expert_tensor_parallel_size == 1
        self.base_layer, self.name, self.shape = base_layer, place.name, shape
        self.experts = len(base_layer.weight)
        sizes = {
            A: (self.experts * shape.rank, place.in_features),
            B: (place.out_features, shape.rank, self.experts),
        }
        for kind, size in sizes.items():
            weight = torch.nn.Parameter(
                torch.zeros(size, dtype=torch.float32, device=torch.cuda.current_device())
            )
            mark_expert_weight(weight, axis=0 if kind == A else 2)
            self.register_parameter(place.name + kind, weight)

    def forward(self) -> ExpertMatrices:
        """Those of the base layer, with the adapters: [K, R, in] and [K, out, R], the scale in the first."""
        a, b = getattr(self, self.name + A), getattr(self, self.name + B)
        matrices: ExpertMatrices = self.base_layer()
        dtype = matrices.weight.dtype
        return replace(
            matrices,
            down=(a.unflatten(0, (self.experts, -1)) * self.shape.scaling).to(dtype),
            up=b.permute(2, 0, 1).contiguous().to(dtype),
        )


def attach_lora(chunk: BraidGPTModel, lora: LoraSpec, layers: range) -> None:
    """Freeze the chunk and put adapters around its linears; `layers` are the global indices of its layers.

    A starts random and B at zero, as in PEFT (Hu et al., 2021); see `initialize_adapters`.
    """
    chunk.requires_grad_(False)
    chunk.lora = lora
    group = chunk.pg_collection.tp
    tp = TensorParallel(
        rank=group.rank(), size=group.size(), group=group, sequence_parallel=chunk.config.sequence_parallel
    )
    assert tp.sequence_parallel or tp.size == 1, "the layout has sequence parallelism wherever it has TP"
    for local, layer in enumerate(layers):
        by_linear: dict[str, list[Projection]] = {}
        for place in projections(chunk.spec, layer):
            by_linear.setdefault(place.linear, []).append(place)
        for linear, places in by_linear.items():
            adapters = {place.name: shape for place in places if (shape := lora.at(place)) is not None}
            if adapters:
                block_name, _, linear_name = linear.rpartition(".")
                block = chunk.decoder.layers[local].get_submodule(block_name)
                base = getattr(block, linear_name)
                setattr(block, linear_name, _wrap(base, places, adapters, tp, lora.lora_dropout, chunk))
    if chunk.pre_process:
        chunk.embedding.register_forward_hook(_require_grad)


def _wrap(
    base: torch.nn.Module,
    places: Sequence[Projection],
    adapters: Mapping[str, LowRank],
    tp: TensorParallel,
    dropout: float,
    chunk: BraidGPTModel,
) -> torch.nn.Module:
    if isinstance(base, ExpertLinear):
        return LoraExpertLinear(base, places[0], adapters[places[0].name], chunk.config)
    sizes = {place.name: (place.out_features, place.in_features) for place in places}
    if places[0].row_parallel:
        return LoraRowLinear(base, adapters, tp, dropout, sizes)
    groups = chunk.spec.num_query_groups if "q_proj" in sizes else None
    return LoraColumnLinear(base, adapters, tp, dropout, sizes, groups)


def _require_grad(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """With frozen embeddings nothing before the first adapter asks for a gradient; recomputation and the
    first pipeline stage's backward pass need something that does.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output


@dataclass(frozen=True, kw_only=True)
class NamedAdapter:
    """An adapter parameter of this rank under its name in checkpoints (see converters.adapter)."""

    name: str
    parameter: torch.nn.Parameter
    partition: int | None
    """Dimension that is cut among `ranks`, of which this is number `rank`."""
    rank: int = 0
    ranks: int = 1
    replica: tuple[int, int, int] = (0, 0, 0)
    """Which copy of the part this is, in Megatron's terms."""


def named_adapters(chunk: BraidGPTModel, layers: range, groups: mcore.Groups) -> Iterator[NamedAdapter]:
    """Every adapter parameter of a chunk whose layers have the global indices `layers`."""
    layout = groups.layout
    for own_name, parameter in chunk.named_parameters():
        if not own_name.endswith((A, B)):
            continue
        local, _, rest = own_name.removeprefix("decoder.layers.").partition(".")
        cut: bool = parameter.tensor_model_parallel
        rank, ranks, replica = groups.tp_rank, layout.tp, (0, 0 if cut else groups.tp_rank, groups.dp_cp_rank)
        if is_expert_weight(parameter):
            rank, ranks, replica = groups.ep_rank, layout.ep, (0, 0, groups.expert_dp.rank())
        yield NamedAdapter(
            name=adapter_name(layers[int(local)], rest),
            parameter=parameter,
            partition=parameter.partition_dim if cut else None,
            rank=rank if cut else 0,
            ranks=ranks if cut else 1,
            replica=replica,
        )


@torch.no_grad()
def initialize_adapters(chunks: Sequence[BraidGPTModel], *, seed: int, groups: mcore.Groups) -> None:
    """A uniform in +-1 / sqrt(in), B zero: PEFT's start. The numbers depend on the seed and the name only, so
    that every layout starts from the same adapter.
    """
    for chunk, layers in zip(chunks, groups.layout.chunks_of(groups.pp_rank), strict=True):
        for adapter in named_adapters(chunk, layers, groups):
            if adapter.name.endswith(B):
                adapter.parameter.zero_()
                continue
            size = list(adapter.parameter.shape)
            if adapter.partition is not None:
                size[adapter.partition] *= adapter.ranks
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {adapter.name}".encode()))
            bound = size[1] ** -0.5
            full = torch.empty(size, device="cpu").uniform_(-bound, bound, generator=generator)
            part = full.chunk(adapter.ranks, dim=adapter.partition or 0)[adapter.rank]
            adapter.parameter.copy_(part)


def adapter_state(chunk: BraidGPTModel, layers: range, groups: mcore.Groups) -> dict[str, ShardedTensor]:
    """The chunk's adapters for Megatron's distributed checkpoint, by the chunk's own parameter names."""
    names = {id(parameter): name for name, parameter in chunk.named_parameters()}
    state = {}
    for adapter in named_adapters(chunk, layers, groups):
        cut = (adapter.partition, adapter.rank, adapter.ranks)
        state[names[id(adapter.parameter)]] = ShardedTensor.from_rank_offsets(
            adapter.name,
            adapter.parameter,
            *([] if adapter.partition is None else [cut]),
            replica_id=adapter.replica,
        )
    return state
