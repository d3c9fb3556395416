"""`braid convert` and `braid merge` of adapters: what cannot be used is refused in one line."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.adapter import ADAPTER_FILE, adapter_to_mcore
from converters.merge import merge
from engine.errors import ModelError
from engine.model.lora_spec import CONFIG_FILE
from launch.cli import main
from tests.support.models import FEW_KV_HEADS

from .adapters import Bases, refused
from .conftest import assert_identical, edit_json, tensors_of


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
        ("merge --model MODEL --output_dir OUT", "pass both"),
        ("merge --adapter ADAPTER --output_dir OUT", "pass both"),
        ("merge --model MODEL --adapter ADAPTER", "pass --output_dir"),
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
