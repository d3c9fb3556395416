"""Hugging Face names and layouts <-> Megatron names and layouts, one table per model, both directions from
it.

Megatron names are those of Megatron-Core's Transformer Engine specification, which Megatron-LM stores; they
are called canonical here. A tensor of a decoder layer is named with its index
(`decoder.layers.3.mlp.linear_fc1.weight`).

Shapes: `V` vocabulary, `H` hidden, `F` MLP width, `G` key/value heads (query groups), `R` query heads per
group, `D` head dimension. "Full" means not sharded by tensor parallelism; the vocabulary padding is not part
of it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.spec import VOCAB_MULTIPLE, ModelSpec

ReadSlice = Callable[[str, int, int, int], Tensor]
"""`read(hf_name, axis, start, stop)`: elements [start, stop) along `axis` of a Hugging Face tensor."""


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """A tensor of a Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows of a Megatron tensor, which are rows [start, stop) of a Hugging Face tensor."""

    hf: HfTensor | None
    """None: padding, rows of zeros."""
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Weight(ABC):
    """One Megatron parameter and the Hugging Face tensors that it holds."""

    name: str
    """Canonical Megatron name."""

    hf: tuple[HfTensor, ...]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the full Megatron tensor."""

    @abstractmethod
    def to_megatron(self, read: ReadSlice, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        """The part of tensor-parallel rank `tp_rank`; reads only what that part needs. Defaults give the full
        tensor.
        """

    def rows(self) -> Iterator[Rows]:
        """What the full Megatron tensor is made of, from its first row to its last, padding included."""
        for tensor in self.hf:
            yield Rows(hf=tensor, start=0, stop=tensor.shape[0])

    def places(self) -> dict[str, list[tuple[int, Rows]]]:
        """The inverse of `rows`: by Hugging Face name its rows in order, each with the row of the full
        Megatron tensor at which they begin.
        """
        found: dict[str, list[tuple[int, Rows]]] = {tensor.name: [] for tensor in self.hf}
        begin = 0
        for rows in self.rows():
            if rows.hf is not None:
                found[rows.hf.name].append((begin, rows))
            begin += rows.count
        return found

    def to_hf(self, full: Tensor) -> dict[str, Tensor]:
        """The Hugging Face tensors inside the full Megatron tensor, contiguous."""
        return {
            name: torch.cat([full[begin : begin + rows.count] for begin, rows in places])
            for name, places in self.places().items()
        }

    @abstractmethod
    def merge(self, shards: list[Tensor]) -> Tensor:
        """The full tensor from the parts of all tensor-parallel ranks, in rank order."""


def _part(size: int, rank: int, ranks: int) -> tuple[int, int]:
    assert size % ranks == 0, f"{size} is not a multiple of {ranks}"
    return rank * size // ranks, (rank + 1) * size // ranks


@dataclass(frozen=True, kw_only=True)
class Replicated(Weight):
    """The same tensor on every tensor-parallel rank (norms)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.hf[0].shape

    def to_megatron(self, read: ReadSlice, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        return read(self.hf[0].name, 0, 0, self.hf[0].shape[0])

    def merge(self, shards: list[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True, kw_only=True)
class Sharded(Weight):
    """One tensor cut into equal parts along `axis` (0: column-parallel, 1: row-parallel linear)."""

    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.hf[0].shape

    def to_megatron(self, read: ReadSlice, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        start, stop = _part(self.shape[self.axis], tp_rank, tp_size)
        return read(self.hf[0].name, self.axis, start, stop)

    def merge(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, dim=self.axis)


@dataclass(frozen=True, kw_only=True)
class Innermost(Weight):
    """A Hugging Face matrix [out, n * count], whose columns are [n, count] to Megatron, [out, n, count]; cut
    along the last.
    """

    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.hf[0].shape
        return rows, columns // self.count, self.count

    def to_megatron(self, read: ReadSlice, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        start, stop = _part(self.count, tp_rank, tp_size)
        return read(self.hf[0].name, 0, 0, self.shape[0]).view(self.shape)[..., start:stop]

    def to_hf(self, full: Tensor) -> dict[str, Tensor]:
        return super().to_hf(full.flatten(1))

    def merge(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Weight):
    """Embedding or LM head [V, H], cut along V after padding; a shard's rows beyond V are zero."""

    multiple: int
    """V is padded to a multiple of lcm(multiple, tp_size)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.hf[0].shape

    def padded_rows(self, tp_size: int = 1) -> int:
        """Rows of the padded tensor under `tp_size` ranks."""
        multiple = math.lcm(self.multiple, tp_size)
        return -(-self.shape[0] // multiple) * multiple

    def rows(self) -> Iterator[Rows]:
        yield from super().rows()
        if padding := self.padded_rows() - self.shape[0]:
            yield Rows(hf=None, start=0, stop=padding)

    def to_megatron(self, read: ReadSlice, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        rows = self.shape[0]
        start, stop = _part(self.padded_rows(tp_size), tp_rank, tp_size)
        known = read(self.hf[0].name, 0, min(start, rows), min(stop, rows))
        if known.shape[0] == stop - start:
            return known
        return torch.cat([known, known.new_zeros(stop - start - known.shape[0], self.shape[1])])

    def merge(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards)[: self.shape[0]]


@dataclass(frozen=True, kw_only=True)
class FusedQKV(Weight):
    """q, k and v (weights [*, H] or biases [*]) interleaved per query group: [G, (R + 2) * D, ...] flattened
    to rows.

    A tensor-parallel rank holds whole groups or, where there are more ranks than groups, equal cuts of a
    group's rows.
    """

    groups: int
    heads_per_group: int
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups * (self.heads_per_group + 2) * self.head_dim, *self.hf[0].shape[1:])

    def _group_rows(self) -> tuple[int, int, int]:
        """Rows of a group's q, k and v."""
        return self.heads_per_group * self.head_dim, self.head_dim, self.head_dim

    def rows(self) -> Iterator[Rows]:
        for group in range(self.groups):
            for tensor, count in zip(self.hf, self._group_rows(), strict=True):
                yield Rows(hf=tensor, start=group * count, stop=(group + 1) * count)

    def to_megatron(self, read: ReadSlice, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        if tp_size > self.groups:
            ranks_per_group = tp_size // self.groups
            group = self.to_megatron(read, tp_rank // ranks_per_group, self.groups)
            start, stop = _part(group.shape[0], tp_rank % ranks_per_group, ranks_per_group)
            return group[start:stop].contiguous()
        first, last = _part(self.groups, tp_rank, tp_size)
        parts = []
        for tensor, rows in zip(self.hf, self._group_rows(), strict=True):
            part = read(tensor.name, 0, first * rows, last * rows)
            parts.append(part.reshape(last - first, rows, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def merge(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Weight):
    """gate and up [F, H] one above the other, [2F, H]; rank i of a tensor-parallel group holds [gate_i;
    up_i].
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return (2 * self.hf[0].shape[0], *self.hf[0].shape[1:])

    def to_megatron(self, read: ReadSlice, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        start, stop = _part(self.hf[0].shape[0], tp_rank, tp_size)
        return torch.cat([read(tensor.name, 0, start, stop) for tensor in self.hf])

    def merge(self, shards: list[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


def weight_map(spec: ModelSpec) -> dict[str, Weight]:
    """Every Megatron parameter of the model by canonical name, in pipeline order.

    With tied embeddings `output_layer.weight` is absent: the last pipeline stage holds a copy of the
    embedding, and neither checkpoint format stores it.
    """
    embedding = HfTensor(name="model.embed_tokens.weight", shape=(spec.vocab_size, spec.hidden_size))
    weights: list[Weight] = [_vocabulary("embedding.word_embeddings.weight", embedding)]
    for layer in range(spec.num_layers):
        weights += _layer(spec, layer)
    final_norm = HfTensor(name="model.norm.weight", shape=(spec.hidden_size,))
    weights.append(Replicated(name="decoder.final_layernorm.weight", hf=(final_norm,)))
    if not spec.tied_embeddings:
        head = HfTensor(name="lm_head.weight", shape=(spec.vocab_size, spec.hidden_size))
        weights.append(_vocabulary("output_layer.weight", head))
    return {weight.name: weight for weight in weights}


def hf_tensors(weights: Mapping[str, Weight]) -> dict[str, HfTensor]:
    """Every Hugging Face tensor that the map covers, by name."""
    return {tensor.name: tensor for weight in weights.values() for tensor in weight.hf}


def _vocabulary(name: str, tensor: HfTensor) -> Vocabulary:
    return Vocabulary(name=name, hf=(tensor,), multiple=VOCAB_MULTIPLE)


def _layer(spec: ModelSpec, layer: int) -> list[Weight]:
    megatron, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden = spec.hidden_size
    q_rows, kv_rows = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim

    def tensor(name: str, *shape: int) -> HfTensor:
        return HfTensor(name=hf + name, shape=shape)

    def qkv(name: str, kind: str, *columns: int) -> FusedQKV:
        rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        return FusedQKV(
            name=megatron + name,
            hf=tuple(tensor(f"self_attn.{part}.{kind}", count, *columns) for part, count in rows.items()),
            groups=spec.num_query_groups,
            heads_per_group=spec.heads_per_group,
            head_dim=spec.head_dim,
        )

    def norm(name: str, source: str, size: int) -> Replicated:
        return Replicated(name=megatron + name, hf=(tensor(source, size),))

    weights: list[Weight] = [
        norm("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", hidden),
        qkv("self_attention.linear_qkv.weight", "weight", hidden),
    ]
    if spec.qkv_bias:
        weights.append(qkv("self_attention.linear_qkv.bias", "bias"))
    if spec.qk_norm:
        weights.append(norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", spec.head_dim))
        weights.append(norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", spec.head_dim))
    proj = tensor("self_attn.o_proj.weight", hidden, q_rows)
    weights.append(Sharded(name=megatron + "self_attention.linear_proj.weight", hf=(proj,), axis=1))
    after_attention = "post_attention_layernorm.weight"
    if not spec.has_experts(layer):
        return [
            *weights,
            norm("mlp.linear_fc1.layer_norm_weight", after_attention, hidden),
            *_mlp(megatron + "mlp.", hf + "mlp.", hidden, spec.ffn_hidden_size),
        ]
    # The router reads the normed tokens too, so Transformer Engine has this norm as a module of its own.
    return [*weights, norm("pre_mlp_layernorm.weight", after_attention, hidden), *_experts(spec, layer)]


def _mlp(megatron: str, hf: str, hidden: int, width: int, suffix: str = "") -> list[Weight]:
    """Gate and up, and down, of an MLP whose names begin with `megatron` and `hf`."""
    gate, up = (HfTensor(name=f"{hf}{name}_proj.weight", shape=(width, hidden)) for name in ("gate", "up"))
    down = HfTensor(name=f"{hf}down_proj.weight", shape=(hidden, width))
    return [
        GatedMLP(name=f"{megatron}linear_fc1.weight{suffix}", hf=(gate, up)),
        Sharded(name=f"{megatron}linear_fc2.weight{suffix}", hf=(down,), axis=1),
    ]


def _experts(spec: ModelSpec, layer: int) -> list[Weight]:
    """The MLP of a layer with experts, each expert by its index, as Transformer Engine's grouped linears name
    them.
    """
    moe, hidden = spec.moe, spec.hidden_size
    assert moe is not None
    megatron, hf = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
    router = HfTensor(name=f"{hf}gate.weight", shape=(moe.num_experts, hidden))
    weights: list[Weight] = [Replicated(name=f"{megatron}router.weight", hf=(router,))]
    for expert in range(moe.num_experts):
        weights += _mlp(
            f"{megatron}experts.", f"{hf}experts.{expert}.", hidden, moe.ffn_hidden_size, suffix=str(expert)
        )
    if moe.shared_ffn_hidden_size is not None:
        gate = HfTensor(name=f"{hf}shared_expert_gate.weight", shape=(1, hidden))
        weights += _mlp(
            f"{megatron}shared_experts.", f"{hf}shared_expert.", hidden, moe.shared_ffn_hidden_size
        )
        weights.append(Replicated(name=f"{megatron}shared_experts.gate_weight", hf=(gate,)))
    return weights
