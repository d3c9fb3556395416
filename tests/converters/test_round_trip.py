"""HF -> Megatron -> HF gives every tensor back, byte by byte; verify agrees and notices a change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.convert import to_hf, to_mcore
from converters.verify import verify
from engine.errors import CheckpointError, ConfigError, ModelError, OutputError

from .conftest import KINDS, MakeModel, assert_identical, change, edit_json, tensors_of


@pytest.mark.parametrize("shard_size", [5_000_000_000, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_byte_identical(
    models: MakeModel, tmp_path: Path, kind: str, dtype: torch.dtype, shard_size: int
) -> None:
    source = models(kind, dtype, "5GB" if shard_size > 40_000 else "40KB")
    report = to_mcore(source, tmp_path / "mcore")
    back = to_hf(tmp_path / "mcore", tmp_path / "new" / "hf", max_shard_size=shard_size)

    assert_identical(tensors_of(source), tensors_of(tmp_path / "new" / "hf"))
    assert back.tensors == len(tensors_of(source))
    assert report.bytes >= back.bytes == sum(t.nbytes for t in tensors_of(source).values())
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (tmp_path / "new" / "hf" / name).read_bytes() == (source / name).read_bytes()
    files = {path.name for path in (tmp_path / "new" / "hf").iterdir()}
    assert "modeling_evil.py" not in files
    assert ("model.safetensors" in files) == (shard_size > 40_000)
    assert {path.name for path in tmp_path.iterdir()} == {"mcore", "new"}  # no staging directory
    assert verify(source, tmp_path / "mcore").same
    assert verify(source, tmp_path / "new" / "hf").same


def test_transformers_loads_the_shards(models: MakeModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    to_mcore(models("qwen3"), tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "hf", max_shard_size=40_000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_identical(tensors_of(models("qwen3")), dict(loaded.state_dict()))


def test_nan_inf_and_negative_zero_survive(model: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][:3] = torch.tensor([float("nan"), -0.0, float("-inf")])

    change(model, edit)
    to_mcore(model, tmp_path / "mcore")
    assert verify(model, tmp_path / "mcore").same


def test_redundant_lm_head_of_tied_embeddings_is_kept(model: Path, tmp_path: Path) -> None:
    change(model, lambda t: t.__setitem__("lm_head.weight", t["model.embed_tokens.weight"].clone()))
    to_mcore(model, tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert_identical(tensors_of(model), tensors_of(tmp_path / "hf"))


def test_mixed_dtypes_come_back(model: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"):
            tensors[name] = torch.randn(tensors[name].shape)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    change(model, edit)
    to_mcore(model, tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert_identical(tensors_of(model), tensors_of(tmp_path / "hf"))
    to_hf(tmp_path / "mcore", tmp_path / "half", dtype=torch.float16)
    assert {t.dtype for t in tensors_of(tmp_path / "half").values()} == {torch.float16}


def test_dtype_is_converted_and_named_in_the_configuration(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen2", torch.float32), tmp_path / "mcore", dtype=torch.bfloat16)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    expected = {n: t.bfloat16() for n, t in tensors_of(models("qwen2", torch.float32)).items()}
    assert_identical(expected, tensors_of(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    report = verify(models("qwen2", torch.float32), tmp_path / "hf")
    assert {d.status for d in report.differences} == {"dtype"}
    assert 0 < max(d.max_abs_diff or 0 for d in report.differences) < 0.05


def test_verify_names_the_changed_element(models: MakeModel, tmp_path: Path) -> None:
    source, name = models("qwen2-tied"), "model.layers.2.mlp.up_proj.weight"
    to_mcore(source, tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    change(tmp_path / "hf", lambda t: t[name][3, 4].add_(2.0))
    report = verify(source, tmp_path / "hf")
    assert not report.same
    assert [(d.name, d.status) for d in report.differences] == [(name, "values")]
    assert report.differences[0].max_abs_diff == pytest.approx(2.0, abs=0.05)
    assert report.table().row_count == 1
    assert json.loads(json.dumps(report.as_dict()))["differences"][0]["name"] == name
    to_mcore(tmp_path / "hf", tmp_path / "changed")
    assert [d.name for d in verify(source, tmp_path / "changed").differences] == [name]


def test_verify_reports_missing_surplus_shape_and_configuration(model: Path, models: MakeModel) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(2)
        tensors["model.layers.0.self_attn.k_proj.bias"] = torch.zeros(3, dtype=torch.bfloat16)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    change(model, edit)
    edit_json(model / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    report = verify(models("qwen2-tied"), model)
    assert {(d.name, d.status) for d in report.differences} == {
        ("model.norm.weight", "missing"),
        ("model.extra", "surplus"),
        ("model.layers.0.self_attn.k_proj.bias", "shape"),
        ("lm_head.weight", "values"),
    }
    assert report.config == ("norm_epsilon: 1e-06, 0.001",)


def test_verify_against_a_checkpoint_of_another_model(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen3"), tmp_path / "mcore")
    report = verify(models("qwen2"), tmp_path / "mcore")
    status = {d.name: d.status for d in report.differences}
    assert status["model.layers.0.self_attn.q_proj.bias"] == "missing"
    assert status["model.layers.0.self_attn.q_proj.weight"] == "shape"
    assert status["decoder.layers.self_attention.q_layernorm.weight"] == "surplus"
    assert report.config


def test_output_directory_in_use(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        to_mcore(model, tmp_path / "out")
    assert (tmp_path / "out" / "keep").read_text() == "x"


def test_a_failure_leaves_nothing(model: Path, tmp_path: Path) -> None:
    to_mcore(model, tmp_path / "mcore")
    data = tmp_path / "mcore" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore", "model"]


def test_to_hf_refuses_what_is_not_the_model(model: Path, tmp_path: Path) -> None:
    to_mcore(model, tmp_path / "mcore")
    with pytest.raises(ConfigError, match="max_shard_size"):
        to_hf(tmp_path / "mcore", tmp_path / "hf", max_shard_size=0)
    edit_json(tmp_path / "mcore" / "hf_companions" / "config.json", lambda c: c.update(num_hidden_layers=2))
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.2\..* has no place"):
        to_hf(tmp_path / "mcore", tmp_path / "hf")
    edit_json(tmp_path / "mcore" / "hf_companions" / "config.json", lambda c: c.update(num_hidden_layers=4))
    with pytest.raises(CheckpointError, match="no layer 3"):
        to_hf(tmp_path / "mcore", tmp_path / "hf")
    (tmp_path / "mcore" / "braid.json").unlink()
    with pytest.raises(CheckpointError, match=r"braid\.json"):
        to_hf(tmp_path / "mcore", tmp_path / "hf")


def test_companion_that_is_a_link_out_of_the_directory(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"vocab\.json is a link to"):
        to_mcore(model, tmp_path / "mcore")


def test_conversion_needs_no_megatron_transformers_or_process_group(
    models: MakeModel, tmp_path: Path
) -> None:
    code = f"""
import sys
from converters.convert import to_mcore, to_hf
from converters.verify import verify
to_mcore({str(models("qwen3"))!r}, {str(tmp_path / "m")!r})
to_hf({str(tmp_path / "m")!r}, {str(tmp_path / "h")!r})
assert verify({str(models("qwen3"))!r}, {str(tmp_path / "h")!r}).same
import torch.distributed
assert not torch.distributed.is_initialized()
found = [m for m in sys.modules if m.split(".")[0] in ("megatron", "transformers")
         or m.startswith(("engine.data", "engine.training"))]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_one_file_is_what_the_library_would_write(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen3"), tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    save_file(load_file(models("qwen3") / "model.safetensors"), tmp_path / "x", {"format": "pt"})
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (tmp_path / "x").read_bytes()
