"""Adapters: PEFT -> Megatron -> PEFT gives every byte back; a merge is PEFT's merge and changes no source;
what cannot be used is refused in one line.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache
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
from engine.errors import CheckpointError, ConfigError, ModelError
from engine.model.lora_spec import CONFIG_FILE, lora_from_options, read_lora_config
from engine.model.spec import load_model_spec
from launch.cli import main
from tests.launch.runs import everything_in
from tests.support.models import FEW_KV_HEADS, save_adapter, save_tiny_model

from .conftest import assert_identical, edit_json, tensors_of

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")
ADAPTERS: Mapping[str, dict[str, Any]] = {
    "all-linear": {},
    "subset": {"target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"], "rank_pattern": {"o_proj": 3}},
    "rslora": {"use_rslora": True, "r": 3, "target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "patterns": {
        "rank_pattern": {r"layers\.1\.mlp\.\w+": 2, "q_proj": 6},
        "alpha_pattern": {"down_proj": 5, "k_proj": 3},
        "exclude_modules": ["v_proj"],
    },
    "both": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "layers_to_transform": [0, 3],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {r"layers\.3\..*": 3},
    },
    "alpha 6": {"lora_alpha": 6},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Bases:
    """Models and adapters, each made once; not to be changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.model = cache(self._model)
        self.adapter = cache(self._adapter)

    def _model(self, name: str, dtype: str = "fp32") -> Path:
        directory = save_tiny_model(name, self._root / f"{name}-{dtype}", dtype=DTYPES[dtype])
        for companion in COMPANIONS:
            (directory / companion).write_bytes(b"\xef\xbb\xbf " + companion.encode() + b"\r\n")
        (directory / "modeling_evil.py").write_text("raise SystemExit")
        return directory

    def _adapter(self, model: str, setting: str, dtype: str = "fp32") -> Path:
        directory = self._root / f"{model}-{setting}-{dtype}"
        save_adapter(self.model(model), directory, **ADAPTERS[setting])
        if dtype != "fp32":
            tensors = load_file(directory / ADAPTER_FILE)
            narrow = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
            save_file(narrow, directory / ADAPTER_FILE, metadata={"format": "pt"})
        return directory


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


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
@pytest.mark.parametrize("setting", ["all-linear", "subset"])
@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_head_dim"])
def test_round_trip_is_byte_identical(
    bases: Bases, tmp_path: Path, model: str, setting: str, dtype: str
) -> None:
    base, source = bases.model(model), bases.adapter(model, setting, dtype)
    report = adapter_to_mcore(base, source, tmp_path / "mcore")
    assert holds_adapter(tmp_path / "mcore")
    back = to_peft(tmp_path / "mcore", tmp_path / "new" / "peft")

    assert names_in(tmp_path / "new" / "peft") == {ADAPTER_FILE, CONFIG_FILE}
    for name in (ADAPTER_FILE, CONFIG_FILE):
        assert (tmp_path / "new" / "peft" / name).read_bytes() == (source / name).read_bytes()
    tensors = load_file(source / ADAPTER_FILE)
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
    (tmp_path / "peft" / CONFIG_FILE).write_bytes(new_adapter_config(lora, str(base)))
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
    assert names_in(tmp_path / "new" / "merged") == names_in(base) - {"modeling_evil.py"}
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


# Command line


def refused(words: list[str], root: Path, capsys: pytest.CaptureFixture[str], *named: str) -> None:
    """Exit code 2, one line that holds all of `named`, nothing changed below `root`."""
    before = everything_in(root)
    capsys.readouterr()
    code = main(words)
    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert printed.err.startswith(f"braid {words[0]}: error: ")
    assert printed.err.count("\n") == 1, printed.err
    assert printed.out == ""
    for part in named:
        assert part in printed.err
    assert everything_in(root) == before


def merge_words(base: Path, adapter: Path, out: Path, *more: str) -> list[str]:
    return ["merge", "--model", str(base), "--adapter", str(adapter), "--output_dir", str(out), *more]


def convert_words(base: Path, adapter: Path, out: Path, *more: str) -> list[str]:
    words = merge_words(base, adapter, out, *more)
    return ["convert", "--to", "mcore", *words[1:]]


def test_commands(bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = bases.model("qwen3_head_dim"), bases.adapter("qwen3_head_dim", "subset", "bf16")
    mcore, peft, merged = tmp_path / "mcore", tmp_path / "peft", tmp_path / "merged"
    tensors = len(load_file(adapter / ADAPTER_FILE))
    capsys.readouterr()
    assert main(convert_words(base, adapter, mcore, "--tensor_model_parallel_size", "2")) == 0
    assert capsys.readouterr().out.startswith(f"{mcore}: {tensors} tensors, ")
    assert main(["convert", "--to", "hf", "--checkpoint", str(mcore), "--output_dir", str(peft)]) == 0
    assert capsys.readouterr().out.startswith(f"{peft}: {tensors} tensors, ")
    for name in (ADAPTER_FILE, CONFIG_FILE):
        assert (peft / name).read_bytes() == (adapter / name).read_bytes()

    words = merge_words(base, peft, merged, "--torch_dtype", "bfloat16", "--max_shard_size", "60KB")
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"{merged}: {len(tensors_of(base))} tensors, ")
    merge(base, adapter, tmp_path / "expected", dtype=torch.bfloat16)
    assert_identical(tensors_of(merged), tensors_of(tmp_path / "expected"))
    assert len(list(merged.glob("*.safetensors"))) > 1


def edit_tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / ADAPTER_FILE)
    edit(tensors)
    save_file(tensors, adapter / ADAPTER_FILE, metadata={"format": "pt"})


def _truncate(adapter: Path) -> None:
    os.truncate(adapter / ADAPTER_FILE, (adapter / ADAPTER_FILE).stat().st_size - 100)


def _link(adapter: Path) -> None:
    (adapter / ADAPTER_FILE).rename(adapter.parent / "outside")
    (adapter / ADAPTER_FILE).symlink_to(adapter.parent / "outside")


GONE = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
EXTRA = "base_model.model.lm_head.lora_A.weight"
INTEGERS = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
# What is done to an adapter directory -> what the message names.
BROKEN: Mapping[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no directory": (shutil.rmtree, ("adapter does not exist",)),
    "no configuration": (lambda a: (a / CONFIG_FILE).unlink(), (f"has no {CONFIG_FILE}",)),
    "broken configuration": (lambda a: (a / CONFIG_FILE).write_text("{"), (CONFIG_FILE, "not readable JSON")),
    "no weights": (lambda a: (a / ADAPTER_FILE).unlink(), (f"has no {ADAPTER_FILE}",)),
    "only a pickle": (
        lambda a: (a / ADAPTER_FILE).rename(a / "adapter_model.bin"),
        ("adapter_model.bin", "only safetensors are read"),
    ),
    "truncated": (_truncate, (f"{ADAPTER_FILE} is truncated",)),
    "no safetensors": (lambda a: (a / ADAPTER_FILE).write_bytes(b"\xff" * 64), (ADAPTER_FILE,)),
    "link": (_link, (f"{ADAPTER_FILE} is a link to",)),
    "missing tensor": (lambda a: edit_tensors(a, lambda t: t.pop(GONE)), (f"weight {GONE}", "is missing")),
    "surplus tensor": (
        lambda a: edit_tensors(a, lambda t: t.update({EXTRA: torch.zeros(4, 64)})),
        (f"weight {EXTRA} has no place",),
    ),
    "integers": (
        lambda a: edit_tensors(a, lambda t: t.update({INTEGERS: t[INTEGERS].to(torch.int8)})),
        (f"weight {INTEGERS} has dtype I8",),
    ),
    "more targets than tensors": (
        lambda a: edit_json(a / CONFIG_FILE, lambda c: c["target_modules"].append("q_proj")),
        ("q_proj.lora_A.weight", "is missing (and 7 more)"),
    ),
    "fewer targets than tensors": (
        lambda a: edit_json(a / CONFIG_FILE, lambda c: c["target_modules"].remove("up_proj")),
        ("up_proj.lora_", "has no place in the model (and 7 more)"),
    ),
    "another rank": (
        lambda a: edit_json(a / CONFIG_FILE, lambda c: c.update(r=16)),
        ("k_proj.lora_A.weight has shape [4, 64]", "asks for [16, 64]"),
    ),
    "rank zero": (lambda a: edit_json(a / CONFIG_FILE, lambda c: c.update(r=0)), (CONFIG_FILE, "rank 0")),
    "lm_head": (
        lambda a: edit_json(a / CONFIG_FILE, lambda c: c["target_modules"].append("lm_head")),
        (CONFIG_FILE, "'lm_head' is none of the linears"),
    ),
    "DoRA": (
        lambda a: edit_json(a / CONFIG_FILE, lambda c: c.update(use_dora=True)),
        (CONFIG_FILE, "DoRA is not supported"),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters(bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    damage, named = BROKEN[case]
    base = bases.model("qwen3_head_dim")
    adapter = Path(shutil.copytree(bases.adapter("qwen3_head_dim", "subset"), tmp_path / "adapter"))
    damage(adapter)
    for words in (merge_words, convert_words):
        refused(words(base, adapter, tmp_path / "out"), tmp_path, capsys, *named)
    for convert in (merge, adapter_to_mcore):
        with pytest.raises(ModelError):
            convert(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("words", [merge_words, convert_words])
def test_adapter_of_another_base(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Callable[..., list[str]]
) -> None:
    adapter = bases.adapter(FEW_KV_HEADS, "subset")
    refused(
        words(bases.model("qwen3_head_dim"), adapter, tmp_path / "out"),
        tmp_path,
        capsys,
        "layers.0.self_attn.k_proj.lora_B.weight has shape [32, 4]",
        "asks for [96, 4]",
    )


@pytest.mark.parametrize("words", [merge_words, convert_words])
def test_output_directory_in_use(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Callable[..., list[str]]
) -> None:
    base, adapter = bases.model("qwen3_head_dim"), bases.adapter("qwen3_head_dim", "subset")
    (tmp_path / "out").mkdir()
    assert main(words(base, adapter, tmp_path / "out")) == 0  # an empty one may be there
    refused(words(base, adapter, tmp_path / "out"), tmp_path, capsys, "out is not empty")
    back = ["convert", "--to", "hf", "--checkpoint", str(tmp_path / "mcore")]
    adapter_to_mcore(base, adapter, tmp_path / "mcore")
    refused([*back, "--output_dir", str(tmp_path / "out")], tmp_path, capsys, "out is not empty")


def test_damaged_checkpoint(bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mcore = tmp_path / "mcore"
    adapter_to_mcore(bases.model("qwen2_tied"), bases.adapter("qwen2_tied", "subset"), mcore)
    words = ["convert", "--to", "hf", "--checkpoint", str(mcore), "--output_dir", str(tmp_path / "out")]
    data = mcore / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-5000])
    refused(words, tmp_path, capsys, "__0_0.distcp is truncated")
    data.write_bytes(whole)
    (mcore / "braid.json").rename(tmp_path / "braid.json")
    refused(words, tmp_path, capsys, "has no braid.json")
    (tmp_path / "braid.json").rename(mcore / "braid.json")
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("merge --model MODEL --output_dir OUT", "pass all three"),
        ("merge --adapter ADAPTER --output_dir OUT", "pass all three"),
        ("merge --model MODEL --adapter ADAPTER", "pass all three"),
        ("merge --model MODEL --adapter ADAPTER --output_dir OUT --checkpoint MCORE", "unknown"),
        ("merge --model MODEL --adapter ADAPTER --output_dir OUT --max_shard_size much", "max_shard_size"),
        ("merge --model MODEL --adapter ADAPTER --output_dir OUT --max_shard_size 0", "max_shard_size"),
        ("merge --model MODEL --adapter ADAPTER --output_dir OUT --torch_dtype int8", "torch_dtype"),
        ("merge --model NONE --adapter ADAPTER --output_dir OUT", "none does not exist"),
        ("merge --model ADAPTER --adapter ADAPTER --output_dir OUT", "adapter has no config.json"),
        ("merge --model MODEL --adapter MODEL --output_dir OUT", f"model has no {CONFIG_FILE}"),
        ("convert --to mcore --adapter ADAPTER --output_dir OUT", "reads --model"),
        ("convert --to mcore --model MODEL --adapter ADAPTER", "--output_dir"),
        ("convert --to hf --checkpoint MCORE --adapter ADAPTER --output_dir OUT", "--adapter does not go"),
        (
            "convert --to mcore --model MODEL --adapter ADAPTER --output_dir OUT --torch_dtype bfloat16",
            "torch_dtype does not go with a LoRA adapter",
        ),
        (
            "convert --to hf --checkpoint MCORE --output_dir OUT --torch_dtype bfloat16",
            "torch_dtype does not go with a LoRA adapter",
        ),
        (
            "convert --to mcore --model MODEL --adapter ADAPTER --output_dir OUT "
            "--tensor_model_parallel_size 3",
            "tensor_model_parallel_size",
        ),
    ],
)
def test_flags_that_cannot_be(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, named: str
) -> None:
    shutil.copytree(bases.model("qwen2_tied"), tmp_path / "model")
    shutil.copytree(bases.adapter("qwen2_tied", "subset"), tmp_path / "adapter")
    adapter_to_mcore(tmp_path / "model", tmp_path / "adapter", tmp_path / "mcore")
    places = {name: str(tmp_path / name.lower()) for name in ("MODEL", "ADAPTER", "MCORE", "NONE", "OUT")}
    refused([places.get(word, word) for word in words.split()], tmp_path, capsys, named)
