"""What a decoder layer keeps for its backward pass, in bytes for each token. Pure Python: no torch.

Tokens are those that a rank has between linears: tensor parallelism with sequence parallelism and context
parallelism both divide them. Inside a linear's reach a tensor-parallel rank has tp times as many tokens and
1 / tp of the width, which comes to the same. A tensor that two operations keep counts once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.options import RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.config.recompute import MLP_ACTIVATION, granularity_of
from engine.model.spec import ModelSpec

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Bytes of a number."""

    size: int
    """In the run's dtype."""
    fp8: bool
    """Linears keep their inputs in a byte."""


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """One decoder layer. Methods return bytes for each token of the rank."""

    spec: ModelSpec
    layout: ParallelLayout
    recompute: RecomputeOptions
    adapters: Mapping[str, tuple[int, ...]]
    """LoRA: ranks of the adapters in each of Megatron's linears."""
    frozen: bool
    """LoRA: weights take no gradient, so that linears need not keep what comes in."""
    dropout: bool
    """Adapters drop inputs."""
    numbers: Numbers
    use_te: bool
    layer: int

    def kept(self) -> float:
        """Kept until the backward pass."""
        return sum(self._parts().values()) - self.again()

    def again(self) -> float:
        """Computed again in the backward pass by selective recomputation, and not kept."""
        parts, modules = self._parts(), self._modules()
        dropped: set[str] = set()
        if "core_attn" in modules:
            dropped.add("core")
        if MLP_ACTIVATION in modules:
            dropped.add("active")
        if "shared_experts" in modules:
            dropped.add("shared expert")
        block = "moe" if self._sparse else "mlp"
        if block in modules:
            dropped |= {"mlp input", "mlp", "active", "shared expert"}
        found = sum(parts.get(name, 0.0) for name in dropped)
        output = self.spec.hidden_size * self.numbers.size
        if block in modules and not self._norm_in_linear:
            found -= output  # what the block starts from: the norm is not in it
        elif "layernorm" in modules:
            found += self._norm_outputs() * output
        return found

    def gradients(self) -> float:
        """Gradients of activations that are there at once in the MLP: of gate and up, of silu(gate) * up,
        which takes the place of that unless it was computed again, of the residual, and what is gathered for
        a linear.
        """
        width, moe = self.spec.ffn_hidden_size, self.spec.moe
        if moe is not None and self._sparse:
            width = max(moe.top_k * moe.ffn_hidden_size, moe.shared_ffn_hidden_size or 0)
        gathered = self.layout.tp if self.layout.tp > 1 else 0
        again = 1 if MLP_ACTIVATION in self._modules() else 0
        return self.numbers.size * ((2 + again) * width + (1 + gathered) * self.spec.hidden_size)

    @property
    def _sparse(self) -> bool:
        return self.spec.has_experts(self.layer)

    @property
    def _norm_in_linear(self) -> bool:
        """Whether Transformer Engine has the norm before a dense MLP in the linear."""
        return self.use_te and not self.frozen and not self._sparse

    def _modules(self) -> set[str]:
        if granularity_of(self.recompute) != "selective":
            return set()
        return set(self.recompute.recompute_modules) or {"core_attn"}

    def _norm_outputs(self) -> int:
        """How many outputs of norms that are modules of their own something keeps as they are."""
        if not self.frozen:
            return int(self._sparse and self._shared_width > 0)
        if self.dropout:
            return 0
        return sum(name in self.adapters for name in ("self_attention.linear_qkv", "mlp.linear_fc1"))

    @property
    def _shared_width(self) -> int:
        return 0 if self.spec.moe is None else self.spec.moe.shared_ffn_hidden_size or 0

    def _parts(self) -> dict[str, float]:
        """Everything, by what recomputation can leave out."""
        hidden, size = self.spec.hidden_size, self.numbers.size
        return {
            # Inputs of both norms, and their scales.
            "residuals": 2 * (hidden * size + _FP32),
            "qkv input": self._input("self_attention.linear_qkv", hidden),
            **self._attention(),
            **(self._experts() if self._sparse else self._mlp()),
        }

    def _attention(self) -> dict[str, float]:
        spec, layout, size = self.spec, self.layout, self.numbers.size
        cp, exchange = layout.cp, layout.cp_comm_type or ("p2p" if self.use_te else "all_gather")
        by_heads = cp > 1 and exchange == "a2a"
        # Ranks that outnumber the groups hold copies of keys and values.
        groups = max(spec.num_query_groups, layout.tp * (cp if by_heads else 1))
        queries, keys = spec.num_attention_heads * spec.head_dim, groups * spec.head_dim
        kept = queries + 2 * keys + queries  # rotated queries and keys, values, and what attention returns
        if spec.qk_norm:
            kept += queries + 2 * keys  # what comes out of the linear
        core: float = _FP32 * spec.num_attention_heads  # logarithms of the sums of exponentials
        if by_heads:
            core += queries * size  # the result by heads, beside that by tokens
        elif cp > 1 and exchange == "all_gather":
            # Keys and values that any query of this rank sees, in place of the rank's own: two of the 2 * cp
            # chunks see (2 * cp + 1) / (2 * cp) sequences together.
            core += (cp + 0.5 - 1) * 2 * keys * size
        projection = self._input("self_attention.linear_proj", queries, is_kept=True)
        return {"attention": kept * size + projection, "core": core}

    def _mlp(self) -> dict[str, float]:
        spec, width = self.spec, self.spec.ffn_hidden_size
        low, active = self._low("mlp.linear_fc2"), self._input("mlp.linear_fc2", width)
        # An adapter's own copy is not computed again, nor is the fp8 one of a linear that is trained.
        again = not (self.dropout if self.frozen else self.numbers.fp8)
        return {
            "mlp input": self._input("mlp.linear_fc1", spec.hidden_size),
            "mlp": 2 * width * self.numbers.size + (low if again else active),
            "active": active - low if again else 0,
        }

    def _experts(self) -> dict[str, float]:
        """Approximate: as if every expert got its even share of the tokens, and none were dropped."""
        moe, size, hidden = self.spec.moe, self.numbers.size, self.spec.hidden_size
        assert moe is not None
        # The router's input, and logits, scores and weights.
        router = (0 if self.frozen else hidden * size) + 3 * _FP32 * moe.num_experts
        routed = 2 * moe.ffn_hidden_size  # gate and up
        for linear, width in (("linear_fc1", hidden * self.layout.etp), ("linear_fc2", moe.ffn_hidden_size)):
            ranks = self.adapters.get(f"mlp.experts.{linear}", ())
            routed += (width if ranks or not self.frozen else 0) + sum(ranks)
        parts: dict[str, float] = {"mlp": router + moe.top_k * routed * size}
        if width := self._shared_width:
            shared = "mlp.shared_experts.linear_"
            adapted = self.adapters.get(f"{shared}fc1") and not self.dropout
            parts["mlp input"] = hidden * size if adapted or not self.frozen else 0
            parts["shared expert"] = (
                self._input(f"{shared}fc1", hidden, is_kept=True)
                + 2 * width * size
                + self._input(f"{shared}fc2", width)
                + hidden * size  # its result, for the gradient of its gate
            )
        return parts

    def _input(self, linear: str, width: int, *, is_kept: bool = False) -> float:
        """What a linear keeps of its input, which something else keeps too where `is_kept`."""
        size, ranks = self.numbers.size, self.adapters.get(linear, ())
        if not self.frozen:
            if self.numbers.fp8:
                return width
            return 0 if is_kept else width * size
        low = self._low(linear)
        if self.dropout:  # every adapter has an input of its own, and a mask
            return len(ranks) * width * (size + 1) + low
        return (width * size if ranks and not is_kept else 0) + low

    def _low(self, linear: str) -> float:
        """What comes out of A, which every tensor-parallel rank has whole."""
        return self.numbers.size * sum(self.adapters.get(linear, ())) * self.layout.tp
