"""Adapters that store whole modules (PEFT's modules_to_save): PEFT -> Megatron -> PEFT gives every byte back;
a merge is PEFT's merge; which modules a name means is what PEFT makes of it; training refuses them.
"""

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from converters.adapter import (
    ADAPTER_FILE,
    adapter_map,
    adapter_to_mcore,
    check_adapter_checkpoint,
    open_adapter,
    saved_tensors,
    to_peft,
)
from converters.mcore.reader import DistReader
from converters.merge import merge, plan_merge
from engine.errors import CheckpointError, ConfigError, ModelError
from engine.model.lora_spec import CONFIG_FILE, LoraSpec, read_lora_config
from engine.model.spec import ModelSpec, load_model_spec, model_spec_from_config
from tests.launch.runs import everything_in, forget_launch_variables
from tests.support.models import MODELS, save_tiny_model

from .adapters import refused
from .conftest import assert_identical, edit_json, tensors_of

PREFIX = "base_model.model."
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEAD, NORM = PREFIX + LM_HEAD, f"{PREFIX}model.norm.weight"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QV = ["q_proj", "v_proj"]
ADAPTERS: Mapping[str, dict[str, Any]] = {
    "embeddings": {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": QV, "modules_to_save": ["lm_head"]},
    "tied": {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied by the head": {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "every norm": {"modules_to_save": ["norm"]},
    "last norm": {"modules_to_save": ["model.norm"], "r": 3, "use_rslora": True},
    "linears": {"modules_to_save": ["down_proj", "k_proj"]},
    "block": {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["mlp", "input_layernorm"]},
    "one layer": {"modules_to_save": ["model.layers.1", "0.mlp.up_proj"]},
}


class Bases:
    """Models and adapters, each made once; not to be changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.model = cache(self._model)
        self.adapter = cache(self._adapter)

    def _model(self, name: str, dtype: torch.dtype = FP32) -> Path:
        return save_tiny_model(name, self._root / f"{name}-{dtype}", dtype=dtype, num_hidden_layers=2)

    def _adapter(self, model: str, setting: str, dtype: torch.dtype = FP32) -> Path:
        directory = self._root / f"{model}-{setting}-{dtype}"
        return train(self.model(model, dtype), directory, dtype=dtype, **ADAPTERS[setting])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def load(directory: Path, dtype: torch.dtype = FP32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def lora_config(**changes: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**(defaults | changes))


def train(base: Path, directory: Path, *, dtype: torch.dtype = FP32, **changes: Any) -> Path:
    """An adapter that PEFT saves after a step in which everything that it trains has moved."""
    torch.manual_seed(7)
    model = get_peft_model(load(base, dtype), lora_config(**changes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(3))
    return model.eval()(tokens).logits


def stored_whole(adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT stored of whole modules, by the base's names."""
    tensors = load_file(adapter / ADAPTER_FILE)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if ".lora_" not in name}


def edit_tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / ADAPTER_FILE)
    edit(tensors)
    save_file(tensors, adapter / ADAPTER_FILE, metadata={"format": "pt"})


# Round trip


@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_head_dim"])
@pytest.mark.parametrize("setting", ADAPTERS)
def test_round_trip_is_byte_identical(bases: Bases, tmp_path: Path, model: str, setting: str) -> None:
    base, source = bases.model(model), bases.adapter(model, setting)
    report = adapter_to_mcore(base, source, tmp_path / "mcore")
    back = to_peft(tmp_path / "mcore", tmp_path / "peft")
    for name in (ADAPTER_FILE, CONFIG_FILE):
        assert (tmp_path / "peft" / name).read_bytes() == (source / name).read_bytes()
    tensors = load_file(source / ADAPTER_FILE)
    assert report.tensors == back.tensors == len(tensors)
    assert report.bytes == back.bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("setting", ["every norm", "linears", "embeddings"])
def test_checkpoint_holds_each_tensor_as_its_own(bases: Bases, tmp_path: Path, setting: str) -> None:
    base, source = bases.model("qwen2_untied"), bases.adapter("qwen2_untied", setting)
    adapter_to_mcore(base, source, tmp_path / "mcore")
    reader = DistReader(tmp_path / "mcore")
    weights = check_adapter_checkpoint(reader, load_model_spec(base))
    whole = stored_whole(source)
    assert whole
    assert reader.tensors.keys() == weights.keys()
    names = {name: f"adapter.modules_to_save.{name}" for name in whole}
    assert set(names.values()) == {name for name in reader.tensors if "lora_" not in name}
    found = {name: reader.read(key, weights[key]) for name, key in names.items()}
    assert_identical(found, whole)


@pytest.mark.parametrize("setting", ["embeddings", "linears", "every norm"])
def test_round_trip_of_several_dtypes(bases: Bases, tmp_path: Path, setting: str) -> None:
    """PEFT keeps A and B of a bf16 base in fp32, and whole modules in bf16."""
    base, source = bases.model("qwen3_head_dim", BF16), bases.adapter("qwen3_head_dim", setting, BF16)
    tensors = load_file(source / ADAPTER_FILE)
    assert {tensor.dtype for tensor in stored_whole(source).values()} == {BF16}
    assert {tensor.dtype for tensor in tensors.values()} == {BF16, FP32}
    adapter_to_mcore(base, source, tmp_path / "mcore")
    to_peft(tmp_path / "mcore", tmp_path / "peft")
    for name in (ADAPTER_FILE, CONFIG_FILE):
        assert (tmp_path / "peft" / name).read_bytes() == (source / name).read_bytes()


# Merge


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("qwen3_head_dim", "embeddings"),
        ("qwen3_head_dim", "embedding"),
        ("qwen2_untied", "head"),
        ("qwen3_head_dim", "every norm"),
        ("qwen2_tied", "last norm"),
        ("qwen2_tied", "linears"),
        ("qwen3_head_dim", "linears"),
        ("qwen2_tied", "block"),
        ("qwen3_head_dim", "one layer"),
        ("qwen2_tied", "tied"),
        ("qwen2_tied", "tied by the head"),
        ("qwen3_head_dim", "tied"),  # nothing is tied there; PEFT ignores the word, too
    ],
)
def test_merge_is_that_of_peft(bases: Bases, tmp_path: Path, model: str, setting: str) -> None:
    base, adapter = bases.model(model), bases.adapter(model, setting)
    before = everything_in(base), everything_in(adapter)
    merge(base, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    found = logits_of(load(tmp_path / "merged"))
    assert (found - logits_of(expected)).abs().max() <= 1e-6
    assert (found - logits_of(load(base))).abs().max() > 1e-2
    assert (everything_in(base), everything_in(adapter)) == before
    merged, start = tensors_of(tmp_path / "merged"), tensors_of(base)
    assert merged.keys() == start.keys()
    whole = {name: tensor for name, tensor in stored_whole(adapter).items() if name in start}
    assert_identical({name: merged[name] for name in whole}, whole)
    assert not any(torch.equal(merged[name], start[name]) for name in whole)
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("target", [None, FP16, FP32])
def test_whole_modules_are_rounded_once(bases: Bases, tmp_path: Path, target: torch.dtype | None) -> None:
    base, adapter = bases.model("qwen3_head_dim", BF16), bases.adapter("qwen3_head_dim", "embeddings")
    whole = stored_whole(adapter)
    assert {tensor.dtype for tensor in whole.values()} == {FP32}
    merge(base, adapter, tmp_path / "merged", dtype=target)
    merged = tensors_of(tmp_path / "merged")
    expected = {name: tensor.to(target or BF16) for name, tensor in whole.items()}
    assert_identical({name: merged[name] for name in whole}, expected)
    assert {tensor.dtype for tensor in merged.values()} == {target or BF16}


@pytest.mark.parametrize("setting", ["embedding", "head", "embeddings"])
def test_merge_that_would_untie_is_refused(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    """PEFT's own merge leaves such a model with two different tensors, which its config.json ties."""
    base, adapter = bases.model("qwen2_tied"), bases.adapter("qwen2_tied", setting)
    merged = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    assert not torch.equal(merged.model.embed_tokens.weight, merged.lm_head.weight)
    words = ["merge", "--model", str(base), "--adapter", str(adapter), "--output_dir", str(tmp_path / "out")]
    for more in ((), ("--dry_run",)):
        refused([*words, *more], tmp_path, capsys, f"{EMBEDDING} and {LM_HEAD}", "tie_word_embeddings")
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        merge(base, adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_merge_into_an_untied_copy_of_a_tied_base(bases: Bases, tmp_path: Path) -> None:
    """What the refusal advises."""
    base, adapter = bases.model("qwen2_tied"), bases.adapter("qwen2_tied", "embedding")
    untied = Path(shutil.copytree(base, tmp_path / "untied"))
    tensors = tensors_of(base)
    save_file(tensors | {LM_HEAD: tensors[EMBEDDING].clone()}, untied / "model.safetensors", {"format": "pt"})
    edit_json(untied / "config.json", lambda config: config.update(tie_word_embeddings=False))
    merge(untied, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    found = logits_of(load(tmp_path / "merged"))
    assert (found - logits_of(expected)).abs().max() <= 1e-6


@pytest.mark.parametrize("case", ["two equal ones", "embedding as it was", "head as it was"])
def test_tied_embeddings_that_stay_equal(bases: Bases, tmp_path: Path, case: str) -> None:
    """Whatever the names: these need no untying."""
    base = bases.model("qwen2_tied")
    before = tensors_of(base)[EMBEDDING]
    setting, edit = {
        "two equal ones": ("embeddings", lambda t: t.update({HEAD: t[PREFIX + EMBEDDING].clone()})),
        "embedding as it was": ("embedding", lambda t: t.update({PREFIX + EMBEDDING: before.clone()})),
        "head as it was": ("head", lambda t: t.update({HEAD: before.clone()})),
    }[case]
    adapter = Path(shutil.copytree(bases.adapter("qwen2_tied", setting), tmp_path / "adapter"))
    edit_tensors(adapter, edit)
    merge(base, adapter, tmp_path / "merged")
    after = tensors_of(tmp_path / "merged")[EMBEDDING]
    assert torch.equal(after, before) is (case != "two equal ones")
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    assert (logits_of(load(tmp_path / "merged")) - logits_of(expected)).abs().max() <= 1e-6


def test_tied_base_that_stores_its_head_too(bases: Bases, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases.model("qwen2_tied"), tmp_path / "base"))
    tensors = tensors_of(base)
    save_file(tensors | {LM_HEAD: tensors[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})
    adapter = bases.adapter("qwen2_tied", "tied")
    merge(base, adapter, tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert merged.keys() == tensors.keys() | {LM_HEAD}
    assert_identical({name: merged[name] for name in (EMBEDDING, LM_HEAD)}, stored_whole(adapter))


def test_another_scale_is_another_plan(bases: Bases, tmp_path: Path) -> None:
    """Files of an interrupted merge are taken over by the same plan only."""
    adapter = Path(shutil.copytree(bases.adapter("qwen2_tied", "linears"), tmp_path / "adapter"))
    before = plan_merge(bases.model("qwen2_tied"), adapter).digest()
    edit_json(adapter / CONFIG_FILE, lambda config: config.update(lora_alpha=16))
    assert plan_merge(bases.model("qwen2_tied"), adapter).digest() != before


# Which modules a name means


def spec_of(model: str, **sizes: Any) -> ModelSpec:
    config = MODELS[model](**sizes)
    name = type(config).__name__.replace("Config", "ForCausalLM")
    return model_spec_from_config(config.to_dict() | {"architectures": [name]})


def made_by_peft(model: str, layers: int, **changes: Any) -> tuple[set[str], set[str]]:
    """Tensors that PEFT stores whole, and modules that it gives a low-rank adapter."""
    base = AutoModelForCausalLM.from_config(MODELS[model](num_hidden_layers=layers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(base, lora_config(**changes))
        names = [name.removeprefix(PREFIX) for name in get_peft_model_state_dict(peft)]
    low_rank = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    return {name for name in names if ".lora_" not in name}, low_rank


def made_here(model: str, layers: int, **changes: Any) -> tuple[set[str], set[str]]:
    lora = LoraSpec(r=4, lora_alpha=8.0, **{name: tuple(value) for name, value in changes.items()})
    spec = spec_of(model, num_hidden_layers=layers)
    lora.check(spec)
    targets = {place.module for place, _ in lora.targets(spec)}
    return set(saved_tensors(spec, lora)), targets


@pytest.mark.parametrize(
    "names",
    [
        ["norm"],
        ["_norm"],
        ["layernorm", "k_norm"],
        ["head"],
        ["1.mlp.down_proj"],  # of layers 1 and 11
        ["layers.1.mlp"],
        ["model.layers.0.self_attn.v_proj", "2.mlp.gate_proj"],
        ["embed_tokens", "model.embed_tokens"],
        ["self_attn", "11.mlp"],
        ["model.layers.10", "model.norm"],
    ],
)
def test_names_mean_what_they_mean_to_peft(names: list[str]) -> None:
    targets = {"target_modules": ["k_proj", "gate_proj"], "modules_to_save": names}
    whole, low_rank = made_by_peft("qwen3_head_dim", 12, **targets)
    assert whole
    assert made_here("qwen3_head_dim", 12, **targets) == (whole, low_rank)


_MODULES = (
    "model.embed_tokens", "model.layers.0", "model.layers.0.input_layernorm", "model.layers.1.self_attn",
    "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.k_norm", "model.layers.1.mlp",
    "model.layers.0.mlp.up_proj", "model.norm", "lm_head",
)  # fmt: skip


@given(
    cuts=st.lists(st.tuples(st.sampled_from(_MODULES), st.floats(0, 0.99)), min_size=1, max_size=2),
    targets=st.sampled_from([["q_proj"], ["o_proj", "up_proj"], ["0.self_attn.k_proj", "down_proj"]]),
)
@settings(deadline=None, max_examples=25)
def test_any_end_of_a_name_that_is_taken_means_what_it_means_to_peft(
    cuts: list[tuple[str, float]], targets: list[str]
) -> None:
    changes = {
        "target_modules": targets,
        "modules_to_save": [name[int(share * len(name)) :] for name, share in cuts],
    }
    try:
        here = made_here("qwen3_head_dim", 2, **changes)
    except ConfigError:
        return
    assert here == made_by_peft("qwen3_head_dim", 2, **changes)


def test_peft_stumbles_over_what_is_refused_for_its_low_rank_adapter() -> None:
    changes = {"target_modules": ["q_proj"], "modules_to_save": ["proj"]}
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        made_by_peft("qwen3_head_dim", 2, **changes)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj has the low-rank adapter"):
        made_here("qwen3_head_dim", 2, **changes)


def test_peft_stores_nothing_of_a_name_that_is_refused_as_unknown() -> None:
    for name in ("score", "foo", "act_fn", "q_pro.", ".*norm"):  # ends of names, never expressions
        changes = {"target_modules": ["k_proj"], "modules_to_save": [name]}
        assert made_by_peft("qwen2_tied", 2, **changes)[0] == set()
        with pytest.raises(ConfigError, match=f"modules_to_save: '{re.escape(name)}' is none of the model's"):
            made_here("qwen2_tied", 2, **changes)


def test_the_configuration_keeps_both_words(tmp_path: Path) -> None:
    config = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": True}
    lora_config(**config).save_pretrained(tmp_path)
    lora = read_lora_config(tmp_path)
    assert (lora.modules_to_save, lora.ensure_weight_tying) == (("embed_tokens",), True)
    written = lora.to_config("", spec_of("qwen2_tied"))
    assert written | config == written
    plain = LoraSpec(r=4, lora_alpha=8.0).to_config("", spec_of("qwen2_tied"))
    assert plain["modules_to_save"] is None
    assert "ensure_weight_tying" not in plain


# Refusals


SCORE = ["embed_tokens", "lm_head", "score"]
# What is set in the configuration, or done to the tensors, of an adapter of q and v with both embeddings ->
# what the message names.
WRONG_CONFIGS: Mapping[str, dict[str, Any]] = {
    "modules_to_save: 'score' is none of the model's modules with weights": {"modules_to_save": SCORE},
    "modules_to_save: 'act_fn' is none of": {"modules_to_save": ["act_fn"]},
    "layers.0.self_attn.q_proj has the low-rank adapter of": {"modules_to_save": ["_proj"]},
    "self_attn has the low-rank adapter of model.layers.0.self_attn.q_proj": {"modules_to_save": ["f_attn"]},
    "model.layers.0.mlp.up_proj would be stored once more in": {"modules_to_save": ["mlp", "up_proj"]},
    "no linear of the model is left": {"modules_to_save": QV},
    "modules_to_save must be a list of names": {"modules_to_save": "lm_head"},
    "TypeError modules_to_save must be": {"modules_to_save": [3]},
    "'(' is not a regular expression": {"modules_to_save": ["("]},
    "'(?i)norm' is not a regular expression": {"modules_to_save": ["(?i)norm"]},
    "'(?i)q_proj' is not a regular expression": {"rank_pattern": {"(?i)q_proj": 2}},
    "DoRA is not supported": {"use_dora": True},
    "bias 'all' is not supported": {"bias": "all"},
    "trainable_token_indices [3] is not supported": {"trainable_token_indices": [3]},
}
WRONG_TENSORS: Mapping[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    f"{HEAD} [512, 64] is missing; the files do not fit {CONFIG_FILE}": lambda t: t.pop(HEAD),
    f"{NORM} has no place": lambda t: t.update({NORM: t[HEAD][0].clone()}),
    f"{LM_HEAD} has no place in the model": lambda t: t.update({LM_HEAD: t[HEAD].clone()}),
    f"{HEAD} has shape [511, 64]": lambda t: t.update({HEAD: t[HEAD][1:].clone()}),
    f"{HEAD} has dtype I8": lambda t: t.update({HEAD: t[HEAD].to(torch.int8)}),
}


@pytest.mark.parametrize("command", ["merge", "convert --to mcore"])
@pytest.mark.parametrize("named", [*WRONG_CONFIGS, *WRONG_TENSORS])
def test_broken_adapters(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str, command: str
) -> None:
    base = bases.model("qwen3_head_dim")
    adapter = Path(shutil.copytree(bases.adapter("qwen3_head_dim", "embeddings"), tmp_path / "adapter"))
    if named in WRONG_CONFIGS:
        edit_json(adapter / CONFIG_FILE, lambda config: config.update(WRONG_CONFIGS[named]))
    else:
        edit_tensors(adapter, WRONG_TENSORS[named])
    words = ["--model", str(base), "--adapter", str(adapter), "--output_dir", str(tmp_path / "out")]
    where = CONFIG_FILE if named in WRONG_CONFIGS else str(adapter)
    refused([*command.split(), *words], tmp_path, capsys, named, where)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["embed_tokens"]}, r"lm_head\.weight has no place in the model"),
        ({"modules_to_save": None}, r"has no place in the model \(and 1 more\)"),
        ({"modules_to_save": ["embed_tokens", "lm_head", "q_norm"]}, r"q_norm\.weight is missing"),
        ({"modules_to_save": ["embed_tokens", "lm_head", "score"]}, "'score' is none of the model's modules"),
        ({"modules_to_save": "lm_head"}, "must be a list of names"),
    ],
)
def test_checkpoint_that_does_not_fit_its_own_configuration(
    bases: Bases, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    base, adapter = bases.model("qwen3_head_dim"), bases.adapter("qwen3_head_dim", "embeddings")
    adapter_to_mcore(base, adapter, tmp_path / "mcore")
    config = tmp_path / "mcore" / "hf_companions" / CONFIG_FILE
    edit_json(config, lambda content: content.update(changes))
    with pytest.raises(CheckpointError, match=named):
        to_peft(tmp_path / "mcore", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"mcore"}


# Training


@pytest.mark.parametrize("words", ["--nproc_per_node 2", "--nproc_per_node 1", "--dry_run"])
def test_training_from_such_an_adapter_is_refused(
    bases: Bases,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
) -> None:
    forget_launch_variables(monkeypatch)
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    run = ["sft", "--model", str(bases.model("qwen3_head_dim")), "--dataset", str(tmp_path / "rows.jsonl")]
    run += ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--train_type", "lora", *words.split()]
    for setting, named in (("embeddings", "embed_tokens, lm_head"), ("every norm", "norm")):
        adapter = bases.adapter("qwen3_head_dim", setting)
        refused(
            [*run, "--adapter", str(adapter)], tmp_path, capsys, f"{adapter} has modules_to_save {named}:"
        )
    refused([*run, "--modules_to_save", "lm_head"], tmp_path, capsys, "--modules_to_save: training whole")


def test_a_run_does_not_take_such_a_checkpoint_for_its_own(bases: Bases, tmp_path: Path) -> None:
    base, adapter = bases.model("qwen2_tied"), bases.adapter("qwen2_tied", "tied")
    adapter_to_mcore(base, adapter, tmp_path / "mcore")
    reader, spec = DistReader(tmp_path / "mcore"), load_model_spec(base)
    plain = LoraSpec(r=4, lora_alpha=8.0, target_modules=("q_proj", "v_proj"))
    with pytest.raises(CheckpointError, match=r"LoRA run with another modules_to_save \("):
        check_adapter_checkpoint(reader, spec, plain)
    opened = open_adapter(adapter, spec)
    assert check_adapter_checkpoint(reader, spec, opened.lora) == adapter_map(spec, opened.lora)
