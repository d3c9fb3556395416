"""A LoRA configuration means what it means to PEFT; what would mean something else is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from engine.config.options import LoraOptions
from engine.errors import ConfigError, ModelError
from engine.model.lora_spec import (
    ALL_LINEAR,
    CONFIG_FILE,
    LoraSpec,
    LowRank,
    lora_from_options,
    read_lora_config,
)
from engine.model.spec import ModelSpec, model_spec_from_config
from tests.support.models import MODELS

LAYERS = 4
# PEFT saves the dictionaries of patterns sorted by key; keys that overlap are in that order here, too.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "longer ends of names": {"target_modules": ["self_attn.o_proj", "2.mlp.up_proj"]},
    "full names": {
        "target_modules": ["model.layers.0.self_attn.k_proj", "model.layers.3.mlp.gate_proj", "o_proj"]
    },
    "regular expression": {"target_modules": r"model\.layers\.[13]\..*(q_proj|down_proj)"},
    "all linears": {"target_modules": "all-linear"},
    "all linears, written otherwise": {"target_modules": "All-Linear", "r": 3},
    "excluded names": {"target_modules": "all-linear", "exclude_modules": ["v_proj", "1.mlp.up_proj"]},
    "excluded by a regular expression": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "exclude_modules": r".*\.layers\.[02]\..*",
    },
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 2},
    "the first layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    "some layers": {"target_modules": ["gate_proj", "o_proj"], "layers_to_transform": [0, 3]},
    "layers with a pattern": {
        "target_modules": ["gate_proj", "o_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
    },
    "layers with patterns that have groups": {
        "target_modules": ["k_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": ["h", "(layers|blocks)"],
    },
    "layers beside full names": {
        "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
        "layers_to_transform": [1],
    },
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 8, "mlp.down_proj": 2}},
    "ranks by regular expressions": {
        "target_modules": "all-linear",
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 6, r"layers\.1\.mlp\.\w+": 2, "up_proj": 8},
    },
    "alphas": {"target_modules": "all-linear", "alpha_pattern": {r"layers\.[23]\..*_proj": 12, "o_proj": 5}},
    "rank-stabilised": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 5},
    "rank-stabilised with patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"k_proj": 7, r"layers\.2\.mlp\..*": 3},
        "alpha_pattern": {"k_proj": 11},
        "exclude_modules": ["down_proj"],
    },
    "everything together": {
        "target_modules": ["q_proj", "k_proj", "mlp.down_proj"],
        "exclude_modules": r".*layers\.2.*k_proj",
        "layers_to_transform": [1, 2],
        "layers_pattern": ["layers"],
        "rank_pattern": {r"layers\.1\.self_attn\..*": 2},
        "alpha_pattern": {"down_proj": 3},
        "use_rslora": True,
    },
}


def lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | settings))


def peft_model(config: LoraConfig, *, layers: int = LAYERS) -> PeftModel:
    base = AutoModelForCausalLM.from_config(MODELS["qwen3_head_dim"](num_hidden_layers=layers))
    return get_peft_model(base, config)


def made_by_peft(model: PeftModel) -> list[tuple[str, LowRank]]:
    """What PEFT put where, in the model's order."""
    found = []
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            rank = module.lora_A["default"].weight.shape[0]
            found.append((name, LowRank(rank=rank, scaling=module.scaling["default"])))
    return found


def targets_of(lora: LoraSpec, *, layers: int = LAYERS) -> list[tuple[str, LowRank]]:
    return [(place.module, shape) for place, shape in lora.targets(spec_of_model(layers))]


def spec_of_model(layers: int = LAYERS) -> ModelSpec:
    config = MODELS["qwen3_head_dim"](num_hidden_layers=layers).to_dict()
    return model_spec_from_config(config | {"architectures": ["Qwen3ForCausalLM"]})


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_saved_configuration_gives_what_peft_made(tmp_path: Path, setting: str) -> None:
    model = peft_model(lora_config(**SETTINGS[setting]))
    model.save_pretrained(tmp_path)
    lora = read_lora_config(tmp_path)
    expected = made_by_peft(model)
    assert expected
    assert targets_of(lora) == expected
    lora.check(spec_of_model())
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert lora.num_parameters(spec_of_model()) == trainable


def test_full_names_that_all_linear_became_in_a_small_model(tmp_path: Path) -> None:
    """Below twenty names PEFT saves each whole; above, as in the other tests, the ends that they share."""
    model = peft_model(lora_config(target_modules="all-linear"), layers=2)
    model.save_pretrained(tmp_path)
    lora = read_lora_config(tmp_path)
    assert "model.layers.1.mlp.up_proj" in lora.target_modules
    assert targets_of(lora, layers=2) == made_by_peft(model)


@pytest.mark.parametrize("setting", SETTINGS)
def test_peft_reads_what_is_written(tmp_path: Path, setting: str) -> None:
    lora_config(**SETTINGS[setting]).save_pretrained(tmp_path / "peft")
    lora = read_lora_config(tmp_path / "peft")
    config = lora.to_config("some/base", spec_of_model())
    assert config["target_modules"] != ALL_LINEAR
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    loaded = LoraConfig.from_pretrained(tmp_path)
    assert loaded.base_model_name_or_path == "some/base"
    assert made_by_peft(peft_model(loaded)) == targets_of(lora)
    again = read_lora_config(tmp_path)
    assert targets_of(again) == targets_of(lora)
    assert again.to_config("some/base", spec_of_model()) == config


def test_every_field_survives_the_configuration(tmp_path: Path) -> None:
    lora = LoraSpec(
        r=6,
        lora_alpha=2.5,
        lora_dropout=0.125,
        target_modules=("k_proj", "q_proj"),
        rank_pattern={"q_proj": 3},
        alpha_pattern={"q_proj": 0.5, "k_proj": 4.0},
        use_rslora=True,
        exclude_modules=("1.self_attn.q_proj",),
        layers_to_transform=(0, 1),
        layers_pattern=("layers", "h"),
    )
    (tmp_path / CONFIG_FILE).write_text(json.dumps(lora.to_config("", spec_of_model())), encoding="utf-8")
    assert read_lora_config(tmp_path) == lora
    loaded = LoraConfig.from_pretrained(tmp_path)
    assert (loaded.r, loaded.lora_alpha, loaded.lora_dropout) == (6, 2.5, 0.125)
    assert (loaded.rank_pattern, loaded.alpha_pattern) == ({"q_proj": 3}, {"q_proj": 0.5, "k_proj": 4})
    assert (loaded.layers_to_transform, loaded.layers_pattern) == ([0, 1], ["layers", "h"])
    # Readers other than PEFT want whole numbers where there is no fraction.
    assert isinstance(lora.to_config("", spec_of_model())["alpha_pattern"]["k_proj"], int)


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["v_proj", "q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["q_proj v_proj"], ("q_proj", "v_proj")),
        (["q_proj,v_proj"], ("q_proj", "v_proj")),
        (["q_proj, v_proj", "mlp.up_proj"], ("mlp.up_proj", "q_proj", "v_proj")),
        (["down_proj"], ("down_proj",)),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        ([r"model\.layers\.\d{1,2}\.mlp\.up_proj"], r"model\.layers\.\d{1,2}\.mlp\.up_proj"),
        (["all-linear"], ALL_LINEAR),
        (["All-Linear"], ALL_LINEAR),
        (["ALL-LINEAR"], ALL_LINEAR),
    ],
)
def test_target_modules_as_flags(words: list[str], target: str | tuple[str, ...]) -> None:
    lora = lora_from_options(LoraOptions(target_modules=words))
    assert lora.target_modules == target
    lora.check(spec_of_model())


def test_other_flags() -> None:
    lora = lora_from_options(
        LoraOptions(
            lora_rank=4,
            lora_alpha=6.0,
            lora_dropout=0.25,
            target_modules=["q_proj", "k_proj"],
            use_rslora=True,
            rank_pattern={"k_proj": 9},
            alpha_pattern={r"layers\.1\..*": 12.0},
        )
    )
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (4, 6.0, 0.25, True)
    found = dict(targets_of(lora))
    assert found["model.layers.0.self_attn.q_proj"] == LowRank(rank=4, scaling=3.0)
    assert found["model.layers.1.self_attn.k_proj"] == LowRank(rank=9, scaling=4.0)
    assert "model.layers.0.self_attn.v_proj" not in found


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["all-linear", "q_proj"]}, "all-linear stands alone"),
        ({"target_modules": ["q_proj,All-Linear"]}, "all-linear stands alone"),
        ({"target_modules": []}, "name at least one"),
        ({"target_modules": ["q_proj", "query"]}, "'query' is none of the linears"),
        ({"target_modules": ["proj"]}, "'proj' is none of the linears"),
        ({"target_modules": ["lm_head"]}, "'lm_head' is none of the linears"),
        ({"target_modules": ["model.layers.4.mlp.up_proj"]}, "'model.layers.4.mlp.up_proj' is none"),
        ({"target_modules": ["(q|k)_proj"]}, "'(q|k)_proj' is none of the linears"),  # not the whole name
        ({"target_modules": [".*_proj", "lm_head"]}, "'.*_proj' is none of the linears"),
        ({"target_modules": [".*(q_proj"]}, "'.*(q_proj' is not a regular expression"),
        ({"rank_pattern": {"q_proj[": 4}}, "'q_proj[' is not a regular expression"),
        ({"alpha_pattern": {"*": 4.0}}, "'*' is not a regular expression"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, not 0"),
        ({"lora_rank": -2, "use_rslora": True}, "lora_rank must be at least 1, not -2"),
        ({"lora_alpha": 0.0}, "lora_alpha must be positive, not 0"),
        ({"lora_alpha": -1.0}, "lora_alpha must be positive, not -1"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be positive, not inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be positive, not nan"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), not 1"),
        ({"lora_dropout": -0.1}, "lora_dropout must be in [0, 1), not -0.1"),
        ({"rank_pattern": {"k_proj": 0}}, "rank 0 and scale 0 at model.layers.0.self_attn.k_proj"),
        (
            {"rank_pattern": {r"layers\.1\..*": -1}, "use_rslora": True},
            "rank -1 and scale 0 at model.layers.1",
        ),
        ({"alpha_pattern": {"up_proj": 0.0}}, "scale 0 at model.layers.0.mlp.up_proj"),
    ],
)
def test_flags_that_cannot_be(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        lora_from_options(LoraOptions(**options)).check(spec_of_model())
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_description_without_any_linear_is_refused() -> None:
    """check() looks at fields that have no flag, too."""
    for changes, named in (
        ({"exclude_modules": ".*"}, "no linear of the model is left"),
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern: 'q_porj' is none of the linears"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "takes in lm_head too"),
        ({"target_modules": r".*"}, "takes in lm_head too"),
        ({"target_modules": ("q_proj",), "layers_to_transform": (7,)}, "no linear of the model is left"),
    ):
        with pytest.raises(ConfigError, match=named):
            LoraSpec(**({"r": 4, "lora_alpha": 8.0} | changes)).check(spec_of_model())


# Settings that PEFT itself saves -> what the refusal names.
UNSUPPORTED: Mapping[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "bias 'all'": {"bias": "all"},
    "bias 'lora_only'": {"bias": "lora_only"},
    "lora_bias True": {"lora_bias": True},
    "init_lora_weights 'pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights 'olora'": {"init_lora_weights": "olora"},
    "task_type 'SEQ_CLS'": {"task_type": "SEQ_CLS"},
    "trainable_token_indices [3, 5]": {"trainable_token_indices": [3, 5]},
    "layer_replication [[0, 2], [1, 3]]": {"layer_replication": [[0, 2], [1, 3]]},
    "alora_invocation_tokens [7]": {"alora_invocation_tokens": [7]},
    "fan_in_fan_out True": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("named", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, named: str) -> None:
    lora_config(target_modules=["q_proj"]).save_pretrained(tmp_path)
    read_lora_config(tmp_path)  # the same without the setting is good
    lora_config(**({"target_modules": ["q_proj"]} | UNSUPPORTED[named])).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as error:
        read_lora_config(tmp_path)
    assert named in str(error.value)
    assert CONFIG_FILE in str(error.value)


def test_another_kind_of_adapter_is_refused_by_name(tmp_path: Path) -> None:
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="peft_type 'PROMPT_TUNING' is not supported"):
        read_lora_config(tmp_path)


@pytest.mark.parametrize("initialisation", [True, False, "gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_read(tmp_path: Path, initialisation: Any) -> None:
    torch.manual_seed(0)
    model = peft_model(lora_config(target_modules=["q_proj"], init_lora_weights=initialisation))
    model.save_pretrained(tmp_path)
    assert targets_of(read_lora_config(tmp_path)) == made_by_peft(model)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "has no adapter_config.json"),
        ('{"r": ', "is not readable JSON"),
        (b"\xff\xfe\x00", "is not readable JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "peft_type None is not supported"),
        ({"r": ...}, "is malformed: KeyError 'r'"),
        ({"lora_alpha": ...}, "is malformed: KeyError 'lora_alpha'"),
        ({"target_modules": ...}, "is malformed: KeyError 'target_modules'"),
        ({"r": "many"}, "is malformed: ValueError"),
        ({"r": None}, "is malformed: TypeError"),
        ({"target_modules": 3}, "is malformed: TypeError"),
        ({"rank_pattern": ["q_proj"]}, "is malformed"),
        ({"alpha_pattern": {"q_proj": "much"}}, "is malformed: ValueError"),
        ({"layers_to_transform": ["first"]}, "is malformed: ValueError"),
        ({"target_modules": "(q_proj"}, "'(q_proj' is not a regular expression"),
        ({"rank_pattern": {"[": 1}}, "'[' is not a regular expression"),
        ({"unheard_of": {"a": 1}}, "unheard_of {'a': 1} is not supported"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: Any, named: str) -> None:
    """A mapping is what differs from a good configuration; `...` takes an entry away."""
    path = tmp_path / CONFIG_FILE
    if isinstance(content, dict):
        config = LoraSpec(r=4, lora_alpha=8.0).to_config("", spec_of_model()) | content
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as error:
        read_lora_config(tmp_path)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_outside_the_decoder_layers_is_refused(tmp_path: Path) -> None:
    """PEFT adapts an lm_head that is named; here that must be an error, not an adapter less."""
    model = peft_model(lora_config(target_modules=["q_proj", "lm_head"]))
    model.save_pretrained(tmp_path)
    assert "lm_head" in dict(made_by_peft(model))
    lora = read_lora_config(tmp_path)
    with pytest.raises(ConfigError, match="'lm_head' is none of the linears"):
        lora.check(spec_of_model())
