"""Adapters: PEFT -> Megatron -> PEFT gives every byte back; a merge is PEFT's merge and changes no source."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from converters.adapter import (
    ADAPTER_FILE,
    adapter_to_mcore,
    check_adapter_checkpoint,
    holds_adapter,
    new_adapter_config,
    to_peft,
    write_adapter_companions,
)
from converters.convert import to_hf, to_mcore
from converters.mcore.reader import DistReader
from converters.merge import merge
from engine.config.options import LoraOptions
from engine.errors import CheckpointError, ConfigError
from engine.model.lora_spec import CONFIG_FILE, lora_from_options, read_lora_config
from engine.model.spec import load_model_spec
from engine.storage.manifest import MANIFEST_FILE, check_manifest, read_manifest
from tests.launch.runs import everything_in
from tests.support.models import save_adapter

from .adapters import COMPANIONS, DTYPES, Bases
from .conftest import assert_identical, edit_json, tensors_of


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(3))
    return model.eval()(tokens).logits


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Round trip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model", "setting"),
    [
        *product(["qwen2_tied", "qwen3_head_dim"], ["all-linear", "subset"]),
        ("qwen2_moe", "experts"),
        ("qwen2_moe", "shared experts"),
        ("qwen3_moe", "experts"),
    ],
)
def test_round_trip_is_byte_identical(
    bases: Bases, tmp_path: Path, model: str, setting: str, dtype: str
) -> None:
    base, source = bases.model(model), bases.adapter(model, setting, dtype)
    report = adapter_to_mcore(base, source, tmp_path / "mcore")
    assert holds_adapter(tmp_path / "mcore")
    back = to_peft(tmp_path / "mcore", tmp_path / "new" / "peft")

    assert names_in(tmp_path / "new" / "peft") == {ADAPTER_FILE, CONFIG_FILE, MANIFEST_FILE}
    for name in (ADAPTER_FILE, CONFIG_FILE):
        assert (tmp_path / "new" / "peft" / name).read_bytes() == (source / name).read_bytes()
    tensors = load_file(source / ADAPTER_FILE)
    for made, kind in ((tmp_path / "mcore", "mcore-adapter"), (tmp_path / "new" / "peft", "peft")):
        manifest = read_manifest(made)
        assert (manifest.kind, check_manifest(made, manifest)) == (kind, [])
    assert report.tensors == back.tensors == len(tensors)
    assert report.bytes == back.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[dtype]}
    assert names_in(tmp_path) == {"mcore", "new"}  # no staging directory
    assert not list((tmp_path / "mcore").rglob("*.safetensors"))


def test_peft_loads_what_came_back(bases: Bases, tmp_path: Path) -> None:
    base, source = bases.model("qwen3_head_dim"), bases.adapter("qwen3_head_dim", "patterns")
    adapter_to_mcore(base, source, tmp_path / "mcore")
    to_peft(tmp_path / "mcore", tmp_path / "peft")
    expected = logits_of(PeftModel.from_pretrained(load(base), source))
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(base), tmp_path / "peft")), expected)


def test_fp32_that_an_adapter_dtype_holds_exactly_is_narrowed(bases: Bases, tmp_path: Path) -> None:
    """A run keeps its adapters in fp32; before its first step they are still those it started from."""
    base, source = bases.model("qwen2_tied"), bases.adapter("qwen2_tied", "subset", "bf16")
    wide = Path(shutil.copytree(source, tmp_path / "wide"))
    tensors = {name: tensor.float() for name, tensor in load_file(source / ADAPTER_FILE).items()}
    save_file(tensors, wide / ADAPTER_FILE, metadata={"format": "pt"})
    adapter_to_mcore(base, wide, tmp_path / "mcore")
    config = (source / CONFIG_FILE).read_bytes()
    write_adapter_companions(base, tmp_path / "mcore", config=config, dtype=torch.bfloat16)
    to_peft(tmp_path / "mcore", tmp_path / "same")
    assert (tmp_path / "same" / ADAPTER_FILE).read_bytes() == (source / ADAPTER_FILE).read_bytes()

    next(iter(tensors.values()))[0, 0] += 1e-6  # no bf16 number
    save_file(tensors, wide / ADAPTER_FILE, metadata={"format": "pt"})
    adapter_to_mcore(base, wide, tmp_path / "trained")
    write_adapter_companions(base, tmp_path / "trained", config=config, dtype=torch.bfloat16)
    to_peft(tmp_path / "trained", tmp_path / "fp32")
    assert_identical(load_file(tmp_path / "fp32" / ADAPTER_FILE), tensors)


def test_neither_kind_of_checkpoint_passes_for_the_other(bases: Bases, tmp_path: Path) -> None:
    base = bases.model("qwen2_tied")
    adapter_to_mcore(base, bases.adapter("qwen2_tied", "subset"), tmp_path / "adapter")
    to_mcore(base, tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight is missing"):
        to_hf(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no LoRA adapter"):
        to_peft(tmp_path / "full", tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not exist"):
        to_peft(tmp_path / "none", tmp_path / "out")
    assert names_in(tmp_path) == {"adapter", "full"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"r": 5}, r"q_proj_lora_A has shape \[3, 64\], .* asks for \[5, 64\]"),
        ({"target_modules": ["q_proj"]}, r"v_proj_lora_A has no place in the model \(and 15 more\)"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj"]}, r"k_proj_lora_A is missing"),
        ({"target_modules": ["lm_head"]}, "'lm_head' is none of the linears"),
        ({"use_dora": True}, "DoRA is not supported"),
    ],
)
def test_checkpoint_that_does_not_fit_its_own_configuration(
    bases: Bases, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    adapter_to_mcore(
        bases.model("qwen3_head_dim"), bases.adapter("qwen3_head_dim", "rslora"), tmp_path / "mcore"
    )
    config = tmp_path / "mcore" / "hf_companions" / CONFIG_FILE
    edit_json(config, lambda content: content.update(changes))
    with pytest.raises(CheckpointError, match=named):
        to_peft(tmp_path / "mcore", tmp_path / "out")
    assert names_in(tmp_path) == {"mcore"}


# Whether a checkpoint is one of a run with these flags


@pytest.mark.parametrize(
    ("words", "same", "others"),
    [
        (["all-linear"], ["down_proj,up_proj,gate_proj,o_proj", "v_proj,k_proj,q_proj"], ["q_proj"]),
        (["v_proj", "q_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj"]),
        ([".*q_proj"], [".*q_proj"], ["q_proj"]),
    ],
)
def test_a_run_knows_its_checkpoint(
    bases: Bases, tmp_path: Path, words: list[str], same: list[str], others: list[str]
) -> None:
    """The checkpoint's configuration was written by the run; flags may say the same in another way."""
    base = bases.model("qwen3_head_dim")
    spec = load_model_spec(base)
    lora = lora_from_options(LoraOptions(target_modules=words, lora_rank=4))
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / CONFIG_FILE).write_bytes(new_adapter_config(lora, str(base), spec))
    source = save_adapter(base, tmp_path / "source", target_modules=list(_names(lora.target_modules)))
    shutil.copyfile(source / ADAPTER_FILE, tmp_path / "peft" / ADAPTER_FILE)
    adapter_to_mcore(base, tmp_path / "peft", tmp_path / "mcore")

    reader = DistReader(tmp_path / "mcore")
    for target in (words, same):
        again = lora_from_options(LoraOptions(target_modules=target, lora_rank=4))
        assert check_adapter_checkpoint(reader, spec, again) == check_adapter_checkpoint(reader, spec)
    check_adapter_checkpoint(reader, spec, read_lora_config(tmp_path / "peft"))
    for options, named in (
        (LoraOptions(target_modules=others, lora_rank=4), "target_modules"),
        (LoraOptions(target_modules=words, lora_rank=8), "r"),
        (LoraOptions(target_modules=words, lora_rank=4, use_rslora=True), "use_rslora"),
        (LoraOptions(target_modules=words, lora_rank=4, lora_alpha=5.0), "lora_alpha"),
    ):
        with pytest.raises(CheckpointError, match=rf"LoRA run with another {named} \("):
            check_adapter_checkpoint(reader, spec, lora_from_options(options))


def _names(target: str | tuple[str, ...]) -> tuple[str, ...]:
    """What save_adapter shall target; a regular expression here is the end of a name behind `.*`."""
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    if isinstance(target, tuple):
        return target
    return everything if target == "all-linear" else (target.removeprefix(".*"),)


# Merge


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("qwen2_tied", "all-linear"),
        ("qwen2_tied", "both"),
        ("qwen3_head_dim", "rslora"),
        ("qwen3_head_dim", "patterns"),
        ("qwen2_moe", "experts"),
        ("qwen2_moe", "shared experts"),
        ("qwen3_moe", "experts"),
    ],
)
def test_merge_is_that_of_peft(bases: Bases, tmp_path: Path, model: str, setting: str) -> None:
    base, adapter = bases.model(model), bases.adapter(model, setting)
    before = everything_in(base), everything_in(adapter)
    report = merge(base, adapter, tmp_path / "new" / "merged")

    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    found = logits_of(load(tmp_path / "new" / "merged"))
    assert (found - logits_of(expected)).abs().max() <= 1e-6
    assert (found - logits_of(load(base))).abs().max() > 1e-2  # the adapter says something
    assert (everything_in(base), everything_in(adapter)) == before
    assert report.tensors == len(tensors_of(base))
    for name in ("config.json", "generation_config.json", *COMPANIONS):
        assert (tmp_path / "new" / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert names_in(tmp_path / "new" / "merged") == names_in(base) - {"modeling_evil.py"} | {MANIFEST_FILE}
    assert names_in(tmp_path / "new") == {"merged"}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", [None, torch.float16, torch.float32])
def test_the_sum_is_taken_in_fp32_and_rounded_once(
    bases: Bases, tmp_path: Path, dtype: str, target: torch.dtype | None
) -> None:
    """Alpha 6 of rank 4: a scale of 1.5, which shows where it is applied."""
    base, adapter = bases.model("qwen2_tied", "bf16"), bases.adapter("qwen2_tied", "alpha 6", dtype)
    merge(base, adapter, tmp_path / "merged", dtype=target)
    stored, low_rank = tensors_of(base), load_file(adapter / ADAPTER_FILE)
    expected, changed = {}, 0
    for name, weight in stored.items():
        wide, prefix = weight.float(), f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if prefix + "A.weight" in low_rank:
            a, b = (low_rank[f"{prefix}{kind}.weight"].float() for kind in "AB")
            wide, changed = wide + 1.5 * (b @ a), changed + 1
        expected[name] = wide.to(target or torch.bfloat16)
    assert changed == len(low_rank) // 2 == 28
    assert_identical(tensors_of(tmp_path / "merged"), expected)
    named = json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"]
    assert named == str(target or torch.bfloat16).removeprefix("torch.")


def test_merged_shards(bases: Bases, tmp_path: Path) -> None:
    base, adapter = bases.model("qwen3_head_dim"), bases.adapter("qwen3_head_dim", "patterns")
    merge(base, adapter, tmp_path / "one")
    merge(base, adapter, tmp_path / "many", max_shard_size=60_000)
    assert "model.safetensors" in names_in(tmp_path / "one")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert "model.safetensors" not in names_in(tmp_path / "many")
    assert_identical(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))
    assert_identical(dict(load(tmp_path / "many").state_dict()), tensors_of(tmp_path / "one"))
    # A merged model in shards is a base like any other.
    merge(tmp_path / "many", adapter, tmp_path / "twice", max_shard_size=60_000)
    name = "model.layers.1.mlp.up_proj.weight"
    one, two, start = (tensors_of(d)[name] for d in (tmp_path / "one", tmp_path / "twice", base))
    torch.testing.assert_close(two - one, one - start, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="max_shard_size"):
        merge(base, adapter, tmp_path / "none", max_shard_size=0)
    assert not (tmp_path / "none").exists()
