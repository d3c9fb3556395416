"""What a config.json says of a model: transformers' defaults, counts and FLOPs, and anything that is no
configuration refused in one line.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen3MoeConfig

from engine.errors import ConfigError, MalformedConfigError, ModelError
from engine.model.spec import ModelSpec, load_model_spec, model_spec_from_config
from tests.support.models import MODELS, MOE_MODELS

QWEN2 = {
    "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, "vocab_size": 512,
}  # fmt: skip
QWEN3 = {**QWEN2, "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16}
DENSE = {**QWEN2, "architectures": ["Qwen3ForCausalLM"]}
YARN = {"rope_type": "yarn", "factor": 4.0}


def tiny(name: str, **changes: Any) -> ModelSpec:
    """The spec of a model of MODELS or MOE_MODELS."""
    config = {**MODELS, **MOE_MODELS}[name](**changes)
    values = json.loads(config.to_json_string(use_diff=False))
    architecture = type(config).__name__.replace("Config", "ForCausalLM")
    return model_spec_from_config(values | {"architectures": [architecture]})


# What it says


@pytest.mark.parametrize(
    ("config", "defaults"), [(QWEN2, Qwen2MoeConfig()), (QWEN3, Qwen3MoeConfig())], ids=["qwen2", "qwen3"]
)
def test_what_is_left_out_is_as_in_transformers(config: Mapping[str, Any], defaults: Any) -> None:
    spec = model_spec_from_config(config)
    moe = spec.moe
    assert moe is not None
    assert moe.num_experts == defaults.num_experts
    assert moe.top_k == defaults.num_experts_per_tok
    assert moe.ffn_hidden_size == defaults.moe_intermediate_size
    assert moe.shared_ffn_hidden_size == getattr(defaults, "shared_expert_intermediate_size", None)
    assert moe.normalize_top_k is defaults.norm_topk_prob
    assert moe.aux_loss_coef == defaults.router_aux_loss_coef
    assert (defaults.decoder_sparse_step, defaults.mlp_only_layers) == (1, [])
    assert moe.layers == (True,) * 4
    assert spec.norm_epsilon == defaults.rms_norm_eps
    assert spec.initializer_range == defaults.initializer_range
    assert spec.tied_embeddings is defaults.tie_word_embeddings
    assert spec.rope.theta == defaults.rope_parameters["rope_theta"]


def test_what_is_said_is_read() -> None:
    said = {
        "num_experts": 12, "num_experts_per_tok": 5, "moe_intermediate_size": 24, "norm_topk_prob": True,
        "shared_expert_intermediate_size": 40, "router_aux_loss_coef": 0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "rope_theta": 1000000, "rope_scaling": {**YARN, "beta_fast": None},
    }  # fmt: skip
    spec = model_spec_from_config({**QWEN2, **said})
    moe = spec.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.ffn_hidden_size, moe.shared_ffn_hidden_size) == (12, 5, 24, 40)
    assert (moe.normalize_top_k, moe.aux_loss_coef, spec.norm_epsilon) == (True, 0.0, 1e-5)
    assert spec.tied_embeddings
    assert (spec.rope.theta, spec.rope.rope_type) == (1e6, "yarn")
    assert spec.rope.parameters == {"factor": 4.0, "beta_fast": None}
    # Qwen3 has no shared expert, whatever its configuration says.
    third = model_spec_from_config({**QWEN3, **said}).moe
    assert third is not None
    assert third.shared_ffn_hidden_size is None
    local = model_spec_from_config({**QWEN3, "num_local_experts": 9}).moe
    assert local is not None
    assert local.num_experts == 9


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"decoder_sparse_step": 2}, {1, 3, 5}),
        ({"decoder_sparse_step": 4}, {3}),
        ({"decoder_sparse_step": 7}, set()),
        ({"mlp_only_layers": [0, 4, 4]}, {1, 2, 3, 5}),
        ({"mlp_only_layers": None}, {0, 1, 2, 3, 4, 5}),
        ({"mlp_only_layers": [1, 2], "decoder_sparse_step": 2}, {3, 5}),
    ],
)
@pytest.mark.parametrize("name", MOE_MODELS)
def test_which_layers_have_experts(name: str, changes: dict[str, Any], sparse: set[int]) -> None:
    """As transformers builds them."""
    asked = {"num_hidden_layers": 6, "mlp_only_layers": [], **changes}
    spec = tiny(name, **asked)
    assert {layer for layer in range(6) if spec.has_experts(layer)} == sparse
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MOE_MODELS[name](**asked))
    built = {i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}
    assert built == sparse


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in [*MODELS, *MOE_MODELS]]
    + [(name, {"decoder_sparse_step": 2, "tie_word_embeddings": True}) for name in MOE_MODELS],
)
def test_parameters_are_those_of_transformers(name: str, changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config({**MODELS, **MOE_MODELS}[name](**changes))
    # Tied weights are one parameter.
    assert tiny(name, **changes).num_parameters() == sum(weight.numel() for weight in model.parameters())


def test_flops_are_of_the_experts_that_a_token_meets() -> None:
    """Both models by hand: 64 wide, four layers, 512 tokens in the vocabulary."""
    # Queries, keys, values and output; heads of 8 and of 16.
    second_attention, third_attention = 64 * 8 * (8 + 4 + 4 + 8), 64 * 16 * (8 + 4 + 4 + 8)
    dense, expert, router, shared, gate = 3 * 64 * 96, 3 * 64 * 32, 64 * 8, 3 * 64 * 48, 64
    second = 4 * second_attention + dense + 3 * (2 * expert + router + shared + gate) + 64 * 512
    third = 4 * third_attention + 4 * (3 * expert + router) + 64 * 512
    assert tiny("qwen2_moe").train_flops_per_token(100) == 6 * second + 6 * 4 * (8 * 8) * 100
    assert tiny("qwen3_moe").train_flops_per_token(100) == 6 * third + 6 * 4 * (8 * 16) * 100
    with_adapter = tiny("qwen3_moe").train_flops_per_token(100, 1000)
    assert with_adapter == 4 * third + 6 * 1000 + 6 * 4 * (8 * 16) * 100


# Which layouts it takes


@pytest.mark.parametrize(
    ("ep", "etp", "message"),
    [
        (
            3,
            1,
            "expert_model_parallel_size 3 does not divide the model's num_experts 8; choose a divisor of 8",
        ),
        (16, 1, "expert_model_parallel_size 16 does not divide the model's num_experts 8; choose a divis"),
        (
            1,
            3,
            "expert_tensor_parallel_size 3 does not divide the model's moe_intermediate_size 32; choose a",
        ),
        (8, 64, "expert_tensor_parallel_size 64 does not divide the model's moe_intermediate_size 32"),
    ],
)
def test_degrees_that_do_not_divide_experts(ep: int, etp: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny("qwen3_moe").check_expert_parallel(ep, etp)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_degrees_that_divide_experts() -> None:
    for ep, etp in ((1, 1), (8, 32), (2, 4)):
        tiny("qwen2_moe").check_expert_parallel(ep, etp)
    dense = tiny("qwen3_head_dim")
    dense.check_expert_parallel(1, 1)
    for ep, etp in ((2, 1), (1, 2)):
        with pytest.raises(ConfigError, match="Qwen3ForCausalLM has no experts; leave expert_model_parallel"):
            dense.check_expert_parallel(ep, etp)


# What is no configuration

NAN, INFINITY, LONG = float("nan"), float("inf"), "x" * 10_000
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
    "vocab_size", "head_dim", "max_position_embeddings",
)  # fmt: skip
EXPERT_SIZES = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
    "shared_expert_intermediate_size",
)  # fmt: skip
NO_SIZES = ("x", "4", 0, -1, 1.0, 2.5, True, NAN, INFINITY, [4], {"a": 4}, 10**30, 2**40 + 1, LONG)
NO_NUMBERS = ("x", "1e-6", None, -1e-6, True, NAN, INFINITY, -INFINITY, [1e-6], {"a": 1}, 10**400, LONG)
NO_FLAGS = ("yes", "false", 0, 1, 1.0, [], [True], {})
NO_OBJECTS = ("x", 1, True, [], [1], LONG)
MALFORMED: list[tuple[str, Any]] = [
    *((key, value) for key in (*SIZES, *EXPERT_SIZES) for value in NO_SIZES),
    *((key, None) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")),
    *((key, v) for key in ("rms_norm_eps", "router_aux_loss_coef", "rope_theta") for v in NO_NUMBERS),
    *(("initializer_range", value) for value in NO_NUMBERS),
    ("rope_theta", 0),
    *((key, value) for key in ("tie_word_embeddings", "norm_topk_prob") for value in NO_FLAGS),
    *((key, value) for key in ("use_sliding_window", "attention_bias") for value in NO_FLAGS),
    *((key, v) for key in ("rope_scaling", "rope_parameters", "quantization_config") for v in NO_OBJECTS),
    *(("mlp_only_layers", value) for value in ("x", 1, True, {"a": 1}, {}, "", False)),
    *(("mlp_only_layers", [0, value]) for value in (True, False, -1, 4, 10**30, 1.0, "1", None, [1], LONG)),
    ("num_hidden_layers", 10_001),
    ("num_hidden_layers", 10**9),
    ("num_experts", 50_001),
    ("num_experts", 10**9),
]  # fmt: skip


def refused(config: Mapping[str, Any], kind: type[ModelError] = MalformedConfigError) -> str:
    """The one short line that is said of it."""
    with pytest.raises(ModelError) as caught:
        model_spec_from_config(config, where="some/config.json")
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert text.startswith("some/config.json: ")
    assert text.isprintable()
    assert len(text) < 400
    return text


@pytest.mark.parametrize(("key", "value"), MALFORMED, ids=lambda value: repr(value)[:30])
def test_malformed_values_are_named(key: str, value: Any) -> None:
    assert key in refused({**QWEN2, key: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "x"}, "hidden_size must be a positive integer, not 'x'"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers must be at most 10000, not 10001"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number that is not negative, not None"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, not 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be a JSON object, not 'yarn'"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers must be numbers of layers, 0 to 3, not 4"),
        ({"mlp_only_layers": 4}, "mlp_only_layers must be a list of layer numbers, not 4"),
        (
            {"num_experts": 50_001},
            "num_experts 50001 in each of num_hidden_layers 4 are more than the 200000 that are read",
        ),
    ],
)
def test_what_is_said_of_them(change: dict[str, Any], said: str) -> None:
    assert refused({**QWEN2, **change}) == f"some/config.json: {said}"


def test_the_largest_sizes() -> None:
    largest = {"num_hidden_layers": 10_000, "num_experts": 20, "num_experts_per_tok": 20, "vocab_size": 2**40}
    spec = model_spec_from_config({**QWEN3, **largest})
    assert (spec.num_layers, spec.vocab_size, spec.moe and spec.moe.num_experts) == (10_000, 2**40, 20)
    assert "num_experts 21" in refused({**QWEN3, **largest, "num_experts": 21})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"factor": None}, "factor"),
        ({"factor": "x"}, "factor"),
        ({"factor": 0}, "factor"),
        ({"factor": NAN}, "factor"),
        ({"rope_theta": "x"}, "rope_theta"),
        ({"original_max_position_embeddings": [1]}, "original_max_position_embeddings"),
        ({"attention_factor": "x"}, "attention_factor"),
        ({"beta_fast": [32]}, "beta_fast"),
        ({"beta_slow": True}, "beta_slow"),
        ({"mscale": "x"}, "mscale"),
        ({"mscale_all_dim": INFINITY}, "mscale_all_dim"),
        ({"truncate": "x"}, "truncate"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_malformed_rope(key: str, change: dict[str, Any], named: str) -> None:
    model_spec_from_config({**DENSE, key: YARN})
    assert f" {named} must be " in refused({**DENSE, key: YARN | change})


def test_a_scaling_without_factor() -> None:
    assert " factor must be " in refused({**DENSE, "rope_scaling": {"type": "linear"}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": [["Qwen2ForCausalLM"]]}, "architecture ['Qwen2ForCausalLM'] is not supported"),
        ({"architectures": "Qwen2ForCausalLM"}, "architecture None is not supported"),
        ({"architectures": [None]}, "architecture None is not supported"),
        ({"architectures": []}, "architecture None is not supported"),
        ({"architectures": {"a": 1}}, "architecture None is not supported"),
        ({"architectures": ["a\nb\x1b[31m"]}, r"architecture a\nb\x1b[31m is not supported"),
        ({"architectures": [LONG]}, "xxx...xxx"),
        ({"hidden_act": ["silu"]}, "hidden_act ['silu'] is not supported"),
        ({"hidden_act": LONG}, "hidden_act 'xxx"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope type ['yarn'] is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope parameters of their own for 'full_attention' are not supported",
        ),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok 61 is more than num_experts 60"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 8"),
        ({"hidden_size": 65}, "hidden_size 65 is not a multiple of num_attention_heads 8"),
        ({"quantization_config": {"quant_method": "x\ny"}}, "quantised (unknown method) source"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"attention_bias": True}, "attention_bias is true"),
    ],
)
def test_what_is_not_for_braid(change: dict[str, Any], said: str) -> None:
    assert said in refused({**QWEN2, **change}, ModelError)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": ' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "\x00", "NaN"]
)
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_model_spec(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'} ")
    assert "\n" not in str(caught.value)
