"""What a Hugging Face Qwen `config.json` says about the model: pure data, no torch, no Megatron.

`ModelSpec` is the one description that the Megatron model, the weight mapping and the planner read.
"""

import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import ConfigError, MalformedConfigError, ModelError

# Megatron pads the vocabulary to a multiple of this (times TP); Qwen's published vocabularies divide by it
# already, so that a stored checkpoint has the same shapes under every tensor-parallel degree that divides it.
VOCAB_MULTIPLE = 128

Family = Literal["qwen2", "qwen3"]
ARCHITECTURES: Mapping[str, Family] = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "yarn")

_MAX_LAYERS, _MAX_EXPERTS, _MAX_WIDTH = 10_000, 200_000, 2**40
"""Beyond these, experts of all layers together, sizes are no model's. A configuration may claim any number,
and the table of weights is as long as the model has layers, and experts in them.
"""

FP8_REFUSAL = (
    "quantised (fp8) source; pass --dequantise to convert it to bf16, or convert from the bf16 checkpoint"
)
"""What is said of fp8 weights wherever they are met and `braid convert` was not told to dequantise them."""


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: base period `theta` and, where `rope_type` is not "default", the scaling's
    parameters.
    """

    theta: float
    rope_type: str
    parameters: Mapping[str, Any]
    """The scaling entries as transformers reads them (`factor`, `original_max_position_embeddings`, ...)."""


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """The mixture of experts that some or all layers have in place of an MLP."""

    num_experts: int
    top_k: int
    """Experts that a token goes to."""
    ffn_hidden_size: int
    """Width of an expert."""
    shared_ffn_hidden_size: int | None
    """Width of the expert that every token goes to, weighted by a gate of its own; None: there is none."""
    normalize_top_k: bool
    """Whether the weights of a token's experts are made to add up to 1."""
    aux_loss_coef: float
    """Weight of the load-balancing loss, `router_aux_loss_coef`."""
    layers: tuple[bool, ...]
    """Which decoder layers have experts."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A Qwen decoder. Sizes are counts of elements; names follow Megatron's TransformerConfig."""

    architecture: str
    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    initializer_range: float
    rope: RopeSpec
    moe: MoeSpec | None = None

    def summary(self) -> str:
        """What it is, in a few words."""
        return (
            f"{self.architecture}, {self.num_parameters() / 1e6:,.1f} M parameters, {self.num_layers} layers"
        )

    def has_experts(self, layer: int) -> bool:
        """Whether a decoder layer is a mixture of experts."""
        return self.moe is not None and self.moe.layers[layer]

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the embedding as Megatron stores it, padded so that `tp_size` ranks hold equal parts."""
        multiple = math.lcm(VOCAB_MULTIPLE, tp_size)
        return -(-self.vocab_size // multiple) * multiple

    def num_parameters(self) -> int:
        """Trainable weights, tied embeddings counted once, vocabulary padding left out."""
        other = 2 * self.hidden_size
        if self.qkv_bias:
            other += self.head_dim * (self.num_attention_heads + 2 * self.num_query_groups)
        if self.qk_norm:
            other += 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        layers = self._matmul_weights(active=False) + self.num_layers * other
        return layers + embeddings + self.hidden_size

    def _matmul_weights(self, *, active: bool) -> int:
        """Weights of the linears of all layers; with `active` those that work on one token."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_query_groups)
        dense, moe = 3 * self.hidden_size * self.ffn_hidden_size, self.moe
        if moe is None:
            return self.num_layers * (attention + dense)
        experts = 3 * self.hidden_size * moe.ffn_hidden_size * (moe.top_k if active else moe.num_experts)
        experts += self.hidden_size * moe.num_experts  # the router
        if moe.shared_ffn_hidden_size is not None:
            experts += self.hidden_size * (3 * moe.shared_ffn_hidden_size + 1)
        sparse = sum(moe.layers)
        return self.num_layers * attention + sparse * experts + (self.num_layers - sparse) * dense

    def train_flops_per_token(self, sequence_length: float, adapter_parameters: int | None = None) -> float:
        """Model FLOPs of forward and backward for one token of a causal document of `sequence_length` tokens.

        6 x matmul weights that work on the token (LM head included, embedding look-up not) + 6 x layers x
        heads*head_dim x sequence (the causal half); recomputation earns no credit. For Qwen2 heads*head_dim
        is the hidden size. With LoRA of `adapter_parameters` elements, frozen weights count 4 x (they get no
        gradient) and adapters 6 x.
        """
        width = self.num_attention_heads * self.head_dim
        matmul = self._matmul_weights(active=True) + self.vocab_size * self.hidden_size
        attention = 6.0 * self.num_layers * width * sequence_length
        if adapter_parameters is not None:
            return 4.0 * matmul + 6.0 * adapter_parameters + attention
        return 6.0 * matmul + attention

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise ConfigError unless `tp_size` ranks can share heads and the MLP evenly, and hold whole
        key/value heads or share each among the same number of ranks.
        """
        sizes = [("num_attention_heads", self.num_attention_heads)]
        if self.moe is None or not all(self.moe.layers):
            sizes.append(("intermediate_size", self.ffn_hidden_size))
        if self.moe is not None and self.moe.shared_ffn_hidden_size is not None:
            sizes.append(("shared_expert_intermediate_size", self.moe.shared_ffn_hidden_size))
        for what, count in sizes:
            if count % tp_size:
                raise ConfigError(
                    f"tensor_model_parallel_size {tp_size} does not divide the model's {what} {count}; "
                    f"choose a divisor of {count}"
                )
        if self.num_query_groups % tp_size and tp_size % self.num_query_groups:
            raise ConfigError(
                f"tensor_model_parallel_size {tp_size} neither divides the model's num_key_value_heads "
                f"{self.num_query_groups} nor is a multiple of it; choose another degree"
            )

    def check_expert_parallel(self, ep_size: int, etp_size: int) -> None:
        """Raise ConfigError unless `ep_size` ranks can share the experts evenly, and `etp_size` ranks each
        expert.
        """
        if self.moe is None:
            if ep_size > 1 or etp_size > 1:
                raise ConfigError(
                    f"{self.architecture} has no experts; leave expert_model_parallel_size and "
                    f"expert_tensor_parallel_size at 1"
                )
            return
        for flag, degree, what, count in (
            ("expert_model_parallel_size", ep_size, "num_experts", self.moe.num_experts),
            ("expert_tensor_parallel_size", etp_size, "moe_intermediate_size", self.moe.ffn_hidden_size),
        ):
            if count % degree:
                raise ConfigError(
                    f"{flag} {degree} does not divide the model's {what} {count}; choose a divisor of {count}"
                )

    def check_context_parallel(self, tp_size: int, cp_size: int, comm_type: str | None) -> None:
        """Raise ConfigError unless the heads of a tensor-parallel rank can be dealt to its context-parallel
        ranks, where they exchange tokens for heads.
        """
        if cp_size == 1 or comm_type != "a2a":
            return
        heads, groups = self.num_attention_heads // tp_size, max(1, self.num_query_groups // tp_size)
        if heads % cp_size or (groups % cp_size and cp_size % groups):
            raise ConfigError(
                f"cp_comm_type a2a deals {heads} heads and {groups} key/value heads of a tensor-parallel "
                f"rank to context_parallel_size {cp_size} ranks, which does not come out even; use all_gather"
            )


def read_hf_config(model_dir: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a model directory. Raises ModelError if it is missing or not a JSON
    object.
    """
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise ModelError(
            f"model directory {model_dir} does not exist; pass a directory with a Hugging Face checkpoint"
        )
    if not path.is_file():
        raise ModelError(f"{model_dir} has no config.json; pass a directory with a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return config


def load_model_spec(model_dir: str | Path, *, fp8: bool = False) -> ModelSpec:
    """Read and check `config.json` of `model_dir`. Raises ModelError for what Braid cannot train.

    `fp8` lets an fp8 checkpoint pass, for whoever dequantises its weights.
    """
    config, where = read_hf_config(model_dir), str(Path(model_dir) / "config.json")
    return model_spec_from_config(config, where=where, fp8=fp8)


def model_spec_from_config(
    config: Mapping[str, Any], *, where: str = "config.json", fp8: bool = False
) -> ModelSpec:
    """The spec of a parsed Hugging Face configuration, which may hold anything; `where` names it in errors
    (ModelError), `fp8` is as for `load_model_spec`.
    """
    names = config.get("architectures") or []
    architecture = names[0] if isinstance(names, list) and names else None
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        named = _shown(architecture).strip("'\"")
        raise ModelError(
            f"{where}: architecture {named} is not supported; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    refuse_quantised(config, where, fp8=fp8)
    _refuse_unsupported(config, where)
    family = ARCHITECTURES[architecture]
    hidden, heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
    groups = _size(config, "num_key_value_heads", where, default=heads)
    # transformers' Qwen3Config falls back to 128 whatever the hidden size is; the others to hidden / heads.
    usual = 128 if architecture == "Qwen3ForCausalLM" else None
    if usual is None and config.get("head_dim") is None:
        if hidden % heads:
            raise ModelError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )
        usual = hidden // heads
    if heads % groups:
        raise ModelError(f"{where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    moe = _moe(config, family, where) if "Moe" in architecture else None
    return ModelSpec(
        architecture=architecture,
        family=family,
        num_layers=_num_layers(config, where),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_size(config, "head_dim", where, default=usual),
        vocab_size=_size(config, "vocab_size", where),
        max_position_embeddings=_size(config, "max_position_embeddings", where, default=32768),
        norm_epsilon=_number(config, "rms_norm_eps", where, default=1e-6),
        tied_embeddings=_flag(config, "tie_word_embeddings", where),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        initializer_range=_number(config, "initializer_range", where, default=0.02),
        rope=_rope(config, where),
        moe=moe if moe is not None and any(moe.layers) else None,
    )


def _moe(config: Mapping[str, Any], family: Family, where: str) -> MoeSpec:
    """The mixture of experts, with transformers' defaults for what the configuration leaves out."""
    # Transformers calls the experts of some families local; both names are read.
    name = "num_local_experts" if "num_local_experts" in config else "num_experts"
    shared, num_layers = family == "qwen2", _num_layers(config, where)
    num_experts = _size(config, name, where, default=60 if shared else 128)
    top_k = _size(config, "num_experts_per_tok", where, default=4 if shared else 8)
    if num_experts * num_layers > _MAX_EXPERTS:
        raise MalformedConfigError(
            f"{where}: {name} {num_experts} in each of num_hidden_layers {num_layers} are more than the "
            f"{_MAX_EXPERTS} that are read"
        )
    if top_k > num_experts:
        raise ModelError(f"{where}: num_experts_per_tok {top_k} is more than {name} {num_experts}")
    every = _size(config, "decoder_sparse_step", where, default=1)
    dense = _dense_layers(config, num_layers, where)
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        ffn_hidden_size=_size(config, "moe_intermediate_size", where, default=1408 if shared else 768),
        shared_ffn_hidden_size=_size(config, "shared_expert_intermediate_size", where, default=5632)
        if shared
        else None,
        normalize_top_k=_flag(config, "norm_topk_prob", where),
        aux_loss_coef=_number(config, "router_aux_loss_coef", where, default=0.001),
        layers=tuple(layer not in dense and (layer + 1) % every == 0 for layer in range(num_layers)),
    )


def _dense_layers(config: Mapping[str, Any], num_layers: int, where: str) -> frozenset[int]:
    """The layers that have no experts although it would be their turn."""
    layers = config.get("mlp_only_layers")
    layers = [] if layers is None else layers
    if not isinstance(layers, list):
        raise MalformedConfigError(
            f"{where}: mlp_only_layers must be a list of layer numbers, not {_shown(layers)}"
        )
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise MalformedConfigError(
                f"{where}: mlp_only_layers must be numbers of layers, 0 to {num_layers - 1}, not "
                f"{_shown(layer)}"
            )
    return frozenset(layers)


def _num_layers(config: Mapping[str, Any], where: str) -> int:
    return _size(config, "num_hidden_layers", where, most=_MAX_LAYERS)


def _size(
    config: Mapping[str, Any], key: str, where: str, *, default: int | None = None, most: int = _MAX_WIDTH
) -> int:
    """A count, or the default where there is none or null."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise MalformedConfigError(f"{where}: {key} must be a positive integer, not {_shown(value)}")
    if value > most:
        raise MalformedConfigError(f"{where}: {key} must be at most {most}, not {_shown(value)}")
    return value


def _number(
    config: Mapping[str, Any], key: str, where: str, *, default: float | None = None, positive: bool = False
) -> float:
    """A finite number that is not negative, with `positive` not zero either; null is none."""
    value = config.get(key, default)
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        kind = "a positive number" if positive else "a number that is not negative"
        raise MalformedConfigError(f"{where}: {key} must be {kind}, not {_shown(value)}")
    return number


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    """A truth value; false where there is none or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise MalformedConfigError(f"{where}: {key} must be true or false, not {_shown(value)}")
    return bool(value)


def _object(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A copy of a JSON object; an empty one where there is none or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise MalformedConfigError(f"{where}: {key} must be a JSON object, not {_shown(value)}")
    return dict(value or {})


def _shown(value: object) -> str:
    """A value from a file as one short line."""
    short = reprlib.Repr()
    short.maxstring = 80
    return short.repr(value)


def refuse_quantised(config: Mapping[str, Any], where: str, *, fp8: bool = False) -> None:
    """Raise ModelError, by the name of the method, for a configuration of quantised weights; with `fp8` for
    any method but that.
    """
    settings = _object(config, "quantization_config", where)
    if not settings:
        return
    method = settings.get("quant_method")
    if method == "fp8":
        if not fp8:
            raise ModelError(f"{where}: {FP8_REFUSAL}")
        return
    known = isinstance(method, str) and re.fullmatch(r"[\w.-]{1,40}", method)
    raise ModelError(
        f"{where}: quantised ({method if known else 'unknown method'}) source; "
        f"convert from the unquantised checkpoint"
    )


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{where}: hidden_act {_shown(config['hidden_act'])} is not supported, only silu")
    if _flag(config, "use_sliding_window", where):
        raise ModelError(f"{where}: use_sliding_window is true; sliding-window attention is not supported")
    if config.get("qkv_bias") is not None and not _flag(config, "qkv_bias", where):
        raise ModelError(f"{where}: qkv_bias is false; Qwen2's q, k and v have biases here")
    if _flag(config, "attention_bias", where):
        raise ModelError(f"{where}: attention_bias is true; only Qwen2's built-in q/k/v biases are supported")


def _rope(config: Mapping[str, Any], where: str) -> RopeSpec:
    """Read both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (hub
    files).
    """
    parameters = _object(config, "rope_scaling", where) | _object(config, "rope_parameters", where)
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    theta = _number(parameters, "rope_theta", where, positive=True)
    del parameters["rope_theta"]
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if rope_type not in ROPE_TYPES:
        raise ModelError(
            f"{where}: rope type {_shown(rope_type)} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    for name, value in parameters.items():
        if isinstance(value, dict):
            raise ModelError(f"{where}: rope parameters of their own for {_shown(name)} are not supported")
    if rope_type != "default":
        _check_scaling(parameters, where)
    return RopeSpec(theta=theta, rope_type=rope_type, parameters=parameters)


def _check_scaling(parameters: Mapping[str, Any], where: str) -> None:
    """Raise MalformedConfigError for what transformers could not compute with."""
    _number(parameters, "factor", where, positive=True)
    for name in (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ):
        if parameters.get(name) is not None:
            _number(parameters, name, where, positive=not name.startswith("mscale"))
    _flag(parameters, "truncate", where)
