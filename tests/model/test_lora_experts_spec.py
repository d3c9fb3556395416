"""A LoRA configuration of a model with experts means what it means to PEFT, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from converters.adapter import adapter_map
from converters.mapping import hf_tensors
from engine.config.options import LoraOptions
from engine.errors import ConfigError
from engine.model.lora_spec import CONFIG_FILE, LoraSpec, lora_from_options, read_lora_config
from engine.model.spec import ModelSpec, model_spec_from_config
from tests.support.models import MOE_MODELS

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    ),
    "one of two": ("qwen2_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "one layer": (
        "qwen3_moe",
        {"target_modules": ["v_proj"], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    ),
    "shared and dense": ("qwen2_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "patterns": (
        "qwen2_moe",
        {
            "target_modules": ["o_proj", "shared_expert.up_proj"],
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {"gate_up_proj": 6, r"layers\.1\.mlp\.shared_expert\..*": 2},
            "use_rslora": True,
        },
    ),
    "dense layers": (
        "qwen3_moe_mixed",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.gate_proj.weight", "down_proj.weight", "experts.down_proj"],
            "rank_pattern": {r"mlp\.down_proj\.weight": 6},
            "alpha_pattern": {r"gate_proj\.weight": 3},
        },
    ),
    # PEFT reads names that older versions of transformers had for experts, and names the parameters itself.
    "names of experts": ("qwen3_moe", {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}),
}


MIXED = {"qwen3_moe_mixed": {"mlp_only_layers": [0]}}
"""A Qwen3-MoE with a dense layer first."""


def config_of(model: str) -> Any:
    return MOE_MODELS[model.removesuffix("_mixed")](num_hidden_layers=2, **MIXED.get(model, {}))


def spec_of(model: str) -> ModelSpec:
    config = config_of(model)
    names = [type(config).__name__.replace("Config", "ForCausalLM")]
    return model_spec_from_config(config.to_dict() | {"architectures": names})


def made_by_peft(model: str, config: LoraConfig) -> tuple[PeftModel, dict[str, tuple[int, ...]]]:
    """PEFT's model, and the tensors that it saves."""
    peft = get_peft_model(AutoModelForCausalLM.from_config(config_of(model)), config)
    return peft, {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(peft).items()}


def made_here(model: str, lora: LoraSpec) -> dict[str, tuple[int, ...]]:
    spec = spec_of(model)
    lora.check(spec)
    return {name: tensor.shape for name, tensor in hf_tensors(adapter_map(spec, lora)).items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_saved_configuration_gives_what_peft_made(tmp_path: Path, setting: str) -> None:
    model, settings = SETTINGS[setting]
    peft, expected = made_by_peft(model, LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **settings))
    peft.save_pretrained(tmp_path)
    lora = read_lora_config(tmp_path)
    assert made_here(model, lora) == expected
    trainable = sum(weight.numel() for weight in peft.parameters() if weight.requires_grad)
    assert lora.num_parameters(spec_of(model)) == trainable


@pytest.mark.parametrize("model", [*MOE_MODELS, *MIXED])
def test_peft_reads_what_all_linear_became(tmp_path: Path, model: str) -> None:
    lora = LoraSpec(r=4, lora_alpha=8.0)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(lora.to_config("", spec_of(model))), encoding="utf-8")
    _, expected = made_by_peft(model, LoraConfig.from_pretrained(tmp_path, inference_mode=False))
    found = made_here(model, lora)
    assert found == expected
    assert {name.split(".mlp.")[-1].split(".lora_")[0] for name in found if ".mlp." in name} >= {
        "experts",
        "experts.base_layer",
    }
    dense = {f"layers.0.mlp.{name}.lora_A" for name in ("gate_proj", "up_proj", "down_proj")}
    assert model == "qwen3_moe" or all(any(part in name for name in found) for part in dense)
    assert not [name for name in found if ".gate." in name or "expert_gate" in name]
    again = read_lora_config(tmp_path)
    assert made_here(model, again) == found
    assert again.to_config("", spec_of(model)) == lora.to_config("", spec_of(model))


def test_only_the_experts_of_a_token_work_on_it() -> None:
    spec = spec_of("qwen3_moe")
    lora = LoraSpec(r=4, lora_alpha=8.0, target_modules=(), target_parameters=("down_proj",))
    assert lora.num_parameters(spec) == 2 * 8 * 4 * (32 + 64)
    assert lora.num_parameters(spec, active=True) == 2 * 3 * 4 * (32 + 64)


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        ("qwen3_moe", {"target_modules": ["gate_proj"]}, "can be in (experts are target_parameters)"),
        ("qwen3_moe", {"target_modules": ["gate"]}, "'gate' is none of the linears"),
        ("qwen2_moe", {"target_modules": ["shared_expert_gate"]}, "'shared_expert_gate' is none of"),
        ("qwen2_moe", {"target_modules": [r".*mlp\..*"]}, "takes in model.layers.0.mlp.gate too"),
        ("qwen3_moe", {"target_parameters": ["gate.weight"]}, "'gate.weight' is no parameter of experts"),
        ("qwen3_moe_mixed", {"target_parameters": ["weight"]}, "mlp.down_proj.weight, mlp.experts.gate_up"),
        ("qwen3_moe_mixed", {"target_modules": ["up_proj"]}, "can be in (experts are target_parameters)"),
        (
            "qwen3_moe_mixed",
            {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"], "lora_dropout": 0.1},
            "adapters of dense layers beside experts know no dropout",
        ),
        ("qwen3_moe", {"target_parameters": ["up_proj"]}, "choose from mlp.experts.gate_up_proj and"),
        ("qwen3_moe", {"lora_dropout": 0.1}, "lora_dropout 0.1: adapters of experts know no dropout"),
    ],
)
def test_what_lora_cannot_be_in(model: str, options: dict[str, Any], named: str) -> None:
    lora = lora_from_options(LoraOptions(**({"lora_dropout": 0.0} | options)))
    with pytest.raises(ConfigError) as caught:
        lora.check(spec_of(model))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_dropout_is_for_linears_only() -> None:
    lora_from_options(LoraOptions(target_modules=ATTENTION, lora_dropout=0.1)).check(spec_of("qwen3_moe"))


def test_a_dense_model_has_no_parameters_of_experts() -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "vocab_size": 512,
    }
    lora = lora_from_options(LoraOptions(target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0))
    with pytest.raises(ConfigError, match="the model has no experts: leave it out"):
        lora.check(model_spec_from_config(config))
