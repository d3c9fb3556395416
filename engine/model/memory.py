"""What the memory of a rank goes to at the peak of a step, counted from sizes. Pure Python: no torch, no GPU.

Counted is what torch allocates: weights, gradients and optimizer, what a forward pass keeps for the backward
pass, and what the layer or the head at work has beside that. `engine.model.activations` counts one decoder
layer. Sizes are those of GPU kernels; plain torch on a CPU keeps more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.options import OptimizerOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.config.recompute import granularity_of
from engine.model.activations import LayerActivations, Numbers
from engine.model.lora_spec import LoraSpec
from engine.model.projections import projections
from engine.model.spec import ModelSpec

LOGITS_BLOCK = 2**31
"""Bytes of logits that the head makes at once on a GPU, about. Every block adds to the whole fp32 gradient of
the head's weight, so they are few.
"""

# Elements that Megatron-FSDP may have under way: weights gathered ahead, gradients that are being reduced,
# and what it reduces at once where units are not decoder layers.
_GATHERED_AHEAD, _REDUCED_BEHIND, _BUCKET = 5e8, 1e9, 4e7

_MOMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What of a run decides about its memory."""

    spec: ModelSpec
    layout: ParallelLayout
    recompute: RecomputeOptions
    optimizer: OptimizerOptions
    lora: LoraSpec | None
    """The adapter that is trained; None in full training."""
    dtype: str
    """Arithmetic of the run: bfloat16, float16 or float32."""
    use_te: bool
    fp8: bool
    """Linears of decoder layers in fp8."""
    tokens: int
    """Of a micro-batch, over all ranks that share it, padding included. All are taken to be supervised."""
    micro_batches: int
    """Of a step, for one data-parallel rank."""

    @property
    def numbers(self) -> Numbers:
        """How large numbers are."""
        return Numbers(size=4 if self.dtype == "float32" else 2, fp8=self.fp8)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank. The ranks of a pipeline stage have the same, but for padding of the vocabulary."""

    weights: float
    """In the run's dtype, adapters in fp32, and with fp8 two further copies of the linears. Its own rows
    where ranks share them.
    """
    gradients: float
    """Megatron's fp32 buffers, of what is trained; its own rows, where ranks share them."""
    optimizer: float
    """This rank's part of master weights and moments."""
    activations: float
    """Kept for the backward passes of all micro-batches in flight."""
    layer: float
    """What a layer's backward pass has beside what was kept."""
    head: float
    """The same of the LM head and the loss; 0 on all stages but the last."""
    gathered: float = 0.0
    """What data-parallel ranks share, and a rank has whole for a while: weights of layers at work and of what
    is no layer, and gradients that are not reduced yet.
    """
    unshared: float = 0.0
    """The weights at the start, all of them on every rank, that ranks then share."""

    @property
    def lasting(self) -> float:
        """What is there between steps too."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """At the peak: the head is done when the last layer's backward pass begins."""
        at_work = self.activations + max(self.layer, self.head) + self.gathered
        return self.lasting + max(at_work, self.unshared)


def estimate(work: Workload) -> list[RankMemory]:
    """The memory of a rank of each pipeline stage, in order."""
    return [_stage(work, pp_rank) for pp_rank in range(work.layout.pp)]


def _stage(work: Workload, pp_rank: int) -> RankMemory:
    chunks = work.layout.chunks_of(pp_rank)
    held, last = _held(work, pp_rank, chunks), pp_rank == work.layout.pp - 1
    layers = {layer: activations_of(work, layer) for chunk in chunks for layer in chunk}
    kept = [
        _kept_by_chunk(work, [layers[layer] for layer in chunk], last=last and chunk is chunks[-1])
        for chunk in chunks
    ]
    return RankMemory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=most_in_flight(kept, work.layout, pp_rank, work.micro_batches),
        layer=max(_at_work(work, chunk, layers) for chunk in chunks),
        head=_head(work) if last else 0.0,
        gathered=held.gathered,
        unshared=held.unshared,
    )


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Elements of a rank by how they are shared."""

    dense: float
    """The same on all data- and context-parallel ranks."""
    experts: float
    """The same on all ranks with the same experts."""

    @classmethod
    def sum(cls, parts: Sequence["Parameters"]) -> "Parameters":
        return cls(dense=sum(part.dense for part in parts), experts=sum(part.experts for part in parts))

    @property
    def total(self) -> float:
        return self.dense + self.experts

    def share(self, layout: ParallelLayout) -> float:
        """A rank's part, where ranks with the same ones divide them."""
        expert_ranks = layout.world_size // (layout.pp * layout.ep * layout.etp)
        return self.dense / (layout.dp * layout.cp) + self.experts / expert_ranks


def layer_parameters(spec: ModelSpec, layout: ParallelLayout, layer: int) -> tuple[Parameters, float]:
    """This rank's part of a decoder layer, and how many of the dense ones are in the linears that fp8
    changes.
    """
    hidden, moe, width = spec.hidden_size, spec.moe, spec.ffn_hidden_size
    heads = spec.head_dim * (spec.num_attention_heads + 2 * spec.num_query_groups)
    linears = hidden * (heads + spec.head_dim * spec.num_attention_heads)
    whole, experts = 2 * hidden + (2 * spec.head_dim if spec.qk_norm else 0), 0.0
    if moe is not None and spec.has_experts(layer):
        width = moe.shared_ffn_hidden_size or 0
        whole += hidden * moe.num_experts + (hidden if width else 0)
        experts = 3 * hidden * moe.ffn_hidden_size * moe.num_experts / (layout.ep * layout.etp)
    linears += 3 * hidden * width
    cut = linears + (heads if spec.qkv_bias else 0)
    return Parameters(dense=whole + cut / layout.tp, experts=experts), linears / layout.tp


def adapter_parameters(lora: LoraSpec, spec: ModelSpec, layout: ParallelLayout, layer: int) -> Parameters:
    """This rank's part of the adapters of a layer."""
    dense = experts = 0.0
    for place in projections(spec, layer):
        if (shape := lora.at(place)) is None:
            continue
        if place.experts is not None:
            experts += place.num_parameters(shape.rank) / layout.ep
            continue
        cut, whole = place.out_features, place.in_features
        if place.row_parallel:
            cut, whole = whole, cut
        # With more ranks than groups B of queries, keys and values is whole on every rank.
        crowded = place.linear.endswith("linear_qkv") and spec.num_query_groups % layout.tp
        dense += shape.rank * (whole + cut / (1 if crowded else layout.tp))
    return Parameters(dense=dense, experts=experts)


@dataclass(frozen=True, kw_only=True)
class _Held:
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    unshared: float


def _held(work: Workload, pp_rank: int, chunks: Sequence[range]) -> _Held:
    """What is there between steps."""
    spec, layout, options, size = work.spec, work.layout, work.optimizer, work.numbers.size
    of_layers = [layer_parameters(spec, layout, layer) for chunk in chunks for layer in chunk]
    layers = [part for part, _ in of_layers]
    ends = Parameters(dense=_ends(spec, layout, pp_rank), experts=0.0)
    model = trained = Parameters.sum([ends, *layers])
    sharded = options.fully_sharded and layout.dp * layout.cp > 1
    divided = sharded and options.data_parallel_sharding_strategy == "optim_grads_params"
    weights = size * (model.share(layout) if divided else model.total)
    if work.fp8:
        weights += 2 * sum(linears for _, linears in of_layers)
    if work.lora is not None:
        trained = Parameters.sum(
            [adapter_parameters(work.lora, spec, layout, layer) for chunk in chunks for layer in chunk]
        )
        weights += 4 * (trained.share(layout) if divided else trained.total)
    # Adapters are fp32, as are the weights of a run in fp32: neither has a second, master copy, but under
    # Megatron-FSDP.
    master = 4 if sharded or (size < 4 and work.lora is None) else 0
    moments = _MOMENT_BYTES[options.exp_avg_dtype] + _MOMENT_BYTES[options.exp_avg_sq_dtype]
    here = 1 - options.optimizer_offload_fraction if options.optimizer_cpu_offload else 1.0
    states = trained.share(layout) if options.use_distributed_optimizer else trained.total
    return _Held(
        weights=weights,
        gradients=4 * (trained.share(layout) if sharded else trained.total),
        optimizer=here * (master + moments) * states,
        gathered=_gathered(work, [part.total for part in layers], ends.total) if sharded else 0.0,
        unshared=size * model.total if divided else 0.0,
    )


def _gathered(work: Workload, layers: Sequence[float], ends: float) -> float:
    """What Megatron-FSDP has whole at the peak, where layers and ends have so many elements. Adapters are
    small beside that.
    """
    weights, unit = 0.0, _BUCKET
    if work.optimizer.data_parallel_sharding_strategy == "optim_grads_params":
        unit = max(layers)
        weights = work.numbers.size * (min(sum(layers), _GATHERED_AHEAD + unit) + ends)
    gradients = 0.0 if work.lora is not None else min(sum(layers) + ends, _REDUCED_BEHIND + unit)
    return weights + 4 * gradients


def _ends(spec: ModelSpec, layout: ParallelLayout, pp_rank: int) -> float:
    """Elements of embedding, LM head and last norm; the last stage has a copy of tied embeddings."""
    first, last = pp_rank == 0, pp_rank == layout.pp - 1
    matrices = int(first) + int(last and not (first and spec.tied_embeddings))
    return matrices * _vocabulary(spec, layout) * spec.hidden_size + (spec.hidden_size if last else 0)


def _vocabulary(spec: ModelSpec, layout: ParallelLayout) -> int:
    """Rows of a rank's part of embedding or LM head."""
    return spec.padded_vocab_size(layout.tp) // layout.tp


def activations_of(work: Workload, layer: int) -> LayerActivations:
    """Of one micro-batch in a decoder layer of this rank."""
    adapters: dict[str, tuple[int, ...]] = {}
    for place in projections(work.spec, layer) if work.lora is not None else ():
        if work.lora is not None and (shape := work.lora.at(place)) is not None:
            adapters[place.linear] = (*adapters.get(place.linear, ()), shape.rank)
    return LayerActivations(
        spec=work.spec,
        layout=work.layout,
        recompute=work.recompute,
        adapters=adapters,
        frozen=work.lora is not None,
        dropout=work.lora is not None and work.lora.lora_dropout > 0,
        numbers=work.numbers,
        use_te=work.use_te,
        layer=layer,
    )


def _own_tokens(work: Workload) -> float:
    """Tokens of a micro-batch that a rank has between linears."""
    return work.tokens / (work.layout.cp * work.layout.tp)


def _kept_by_chunk(work: Workload, layers: Sequence[LayerActivations], *, last: bool) -> float:
    """Bytes that the forward pass of one micro-batch leaves behind."""
    spec, size, options = work.spec, work.numbers.size, work.recompute
    tables = 2 * spec.head_dim * size * work.layout.tp  # cosine and sine, of all heads alike
    # The last stage has the last norm's input and output; the others what they have sent.
    ends = 2 * spec.hidden_size * size + 4 if last else spec.hidden_size * size
    kept, starts = sum(layer.kept() for layer in layers), 0
    if granularity_of(options) == "full":
        count = options.recompute_num_layers or 1
        if options.recompute_method == "block":
            kept, starts = sum(layer.kept() for layer in layers[count:]), min(count, len(layers))
        else:
            kept, starts = 0.0, -(-len(layers) // count)
    # A recomputed group of layers keeps what came in.
    kept += starts * spec.hidden_size * size
    return _own_tokens(work) * (kept + tables + ends)


def _at_work(work: Workload, chunk: range, layers: dict[int, LayerActivations]) -> float:
    """The most that the backward pass of a layer of a chunk has beside what was kept: what it computes again,
    and gradients of activations or the weight's, of which there is an empty one where it is added to the
    buffer.
    """
    options, again = work.recompute, [layers[layer].again() for layer in chunk]
    if granularity_of(options) == "full":
        group = 1 if options.recompute_method == "block" else options.recompute_num_layers or 1
        again = [
            sum(layers[layer].kept() for layer in chunk[start : start + group])
            for start in range(0, len(chunk), group)
        ]
    gradients = max(layers[layer].gradients() for layer in chunk)
    weight = max(_largest_weight(work, layer) for layer in chunk) if work.lora is None else 0.0
    own = _own_tokens(work)
    return own * max(again) + max(own * gradients, weight)


def _largest_weight(work: Workload, layer: int) -> float:
    """Bytes of the first linear of an MLP, or of those of this rank's experts together."""
    spec, layout = work.spec, work.layout
    width = spec.ffn_hidden_size / layout.tp
    if spec.moe is not None and spec.has_experts(layer):
        width = spec.moe.ffn_hidden_size * spec.moe.num_experts / (layout.ep * layout.etp)
    return 2 * width * spec.hidden_size * work.numbers.size


def _head(work: Workload) -> float:
    """Hidden states of supervised tokens, their gradient, and logits; then the weight's empty gradient."""
    spec, size = work.spec, work.numbers.size
    rows, columns = work.tokens / work.layout.cp, _vocabulary(spec, work.layout)
    states = rows * spec.hidden_size * size * (3 if work.layout.tp > 1 else 2)
    blocks = max(1, -(-rows * columns * size // LOGITS_BLOCK))
    logits = rows / blocks * columns * size
    weight = columns * spec.hidden_size * size if work.lora is None else 0
    return states + max(logits, weight)


def most_in_flight(kept: Sequence[float], layout: ParallelLayout, pp_rank: int, micro_batches: int) -> float:
    """The most that is kept at once on a pipeline rank, whose chunks keep `kept` bytes of a micro-batch each:
    under 1F1B, or Megatron's interleaved schedule of several chunks.
    """
    pp, chunks = layout.pp, len(kept)
    total, ahead = micro_batches * chunks, pp - pp_rank - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * pp
    alive = most = 0.0
    for number in range(total):
        alive += kept[number % (pp * chunks) // pp]
        most = max(most, alive)
        if number >= ahead:
            alive -= kept[chunks - 1 - (number - ahead) % (pp * chunks) // pp]
    return most
