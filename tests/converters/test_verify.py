"""What `verify` says of two sets of weights: every tensor with its digests, whatever is in it, by blocks."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

import converters.verify as module
from converters.convert import to_mcore
from converters.hf.reader import HfReader
from converters.mapping import hf_tensors, weight_map
from converters.mcore.reader import DistReader
from converters.verify import TensorReport, VerifyReport, verify
from engine.errors import CheckpointError, ModelError
from engine.model.spec import load_model_spec

from .conftest import KINDS, MakeModel, change, edit_json, tensors_of

Edit = Callable[[dict[str, torch.Tensor]], Any]
EMBEDDING, NORM, UP = "model.embed_tokens.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def by_name(report: VerifyReport) -> dict[str, TensorReport]:
    found = {tensor.name: tensor for tensor in report.tensors}
    assert len(found) == len(report.tensors)
    return found


def changed(source: Path, target: Path, edit: Edit) -> Path:
    """A copy of a one-file model with other tensors."""
    shutil.copytree(source, target)
    change(target, edit)
    return target


def printed(report: VerifyReport) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.table())
    return capture.get()


@pytest.mark.parametrize("other", ["hf", "mcore"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_reported_with_its_digest(
    models: MakeModel, tmp_path: Path, kind: str, other: str
) -> None:
    source = models(kind)
    if other == "mcore":
        to_mcore(source, tmp_path / "mcore")
    report = verify(source, source if other == "hf" else tmp_path / "mcore")
    assert report.same
    assert report.not_finite() == []
    stored = tensors_of(source)
    assert [t.name for t in report.tensors] == list(hf_tensors(weight_map(load_model_spec(source))))
    for entry in json.loads(json.dumps(report.as_dict(), allow_nan=False))["tensors"]:
        tensor = stored.pop(entry["name"])
        digest = sha256(tensor)
        assert entry == {
            "name": entry["name"],
            "status": "same",
            "shape": list(tensor.shape),
            "dtype": "bfloat16",
            "sha256": digest,
            "nan": 0,
            "inf": 0,
            "other_shape": list(tensor.shape),
            "other_dtype": "bfloat16",
            "other_sha256": digest,
            "other_nan": 0,
            "other_inf": 0,
            "max_abs_diff": 0.0,
        }
    assert not stored


def test_digests_of_both_sides_where_they_differ(models: MakeModel, tmp_path: Path) -> None:
    source = models("qwen2")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][40, 3] += 1.0
        tensors[NORM] = tensors[NORM].float()
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(5, dtype=torch.bfloat16)
        del tensors["lm_head.weight"]
        tensors["model.extra"] = torch.full((3, 2), 7.0)
        tensors["model.scalar"] = torch.tensor(1.0)

    other = changed(source, tmp_path / "other", edit)
    found, mine, theirs = by_name(verify(source, other)), tensors_of(source), tensors_of(other)
    expected = {
        UP: "values",
        NORM: "dtype",
        "model.layers.0.self_attn.q_proj.bias": "shape",
        "lm_head.weight": "missing",
        "model.extra": "surplus",
        "model.scalar": "surplus",
    }
    assert {name: t.status for name, t in found.items() if t.status != "same"} == expected
    for name, tensor in found.items():
        assert (tensor.model and tensor.model.sha256) == (sha256(mine[name]) if name in mine else None)
        known = name in theirs and theirs[name].dim()
        assert (tensor.other and tensor.other.sha256) == (sha256(theirs[name]) if known else None)
    assert found[NORM].max_abs_diff == 0.0
    assert found["lm_head.weight"].max_abs_diff is None
    assert (found["model.extra"].expected, found["model.extra"].found) == ("", "[3, 2] float32")


def test_digests_of_a_checkpoint_of_another_model(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen3"), tmp_path / "mcore")
    found = by_name(verify(models("qwen2"), tmp_path / "mcore"))
    name = "decoder.layers.self_attention.q_layernorm.weight"
    norms = [f"model.layers.{i}.self_attn.q_norm.weight" for i in range(3)]
    stacked = torch.stack([tensors_of(models("qwen3"))[norm] for norm in norms])
    assert found[name].status == "surplus"
    assert found[name].other is not None
    assert found[name].other.sha256 == sha256(stacked)
    query = found["model.layers.0.self_attn.q_proj.weight"]
    assert query.status == "shape"
    assert query.found == "decoder.layers.0.self_attention.linear_qkv.weight [96, 32] bfloat16"
    assert query.model is not None
    assert query.model.sha256 == sha256(tensors_of(models("qwen2"))[query.name])
    assert query.other is not None
    assert query.other.sha256 is None


def test_a_checkpoint_without_configuration(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen2-tied"), tmp_path / "mcore")
    shutil.rmtree(tmp_path / "mcore" / "hf_companions")
    (tmp_path / "mcore" / "braid.json").unlink()
    report = verify(models("qwen2-tied"), tmp_path / "mcore")
    assert report.same
    assert len(report.tensors) == len(tensors_of(models("qwen2-tied")))


# NaN and Inf


def fill(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM][:5] = torch.tensor([float("nan"), float("nan"), float("inf"), float("-inf"), -0.0])
    tensors[UP][-1, -1] = float("inf")


def test_nan_and_inf_are_counted_and_not_refused(model: Path, tmp_path: Path) -> None:
    change(model, fill)
    to_mcore(model, tmp_path / "mcore")
    for other in (model, tmp_path / "mcore"):
        report = verify(model, other)
        assert report.same
        assert report.not_finite() == [
            "model.layers.2.mlp.up_proj.weight holds 0 NaN and 1 Inf",
            "model.norm.weight holds 2 NaN and 2 Inf",
        ]
        norm = by_name(report)[NORM].as_dict()
        assert [norm[key] for key in ("nan", "inf", "other_nan", "other_inf", "max_abs_diff")] == [
            2,
            2,
            2,
            2,
            0,
        ]


def test_nan_on_one_side_is_a_difference(model: Path, tmp_path: Path) -> None:
    other = changed(model, tmp_path / "other", fill)
    report = verify(model, other)
    assert {t.name for t in report.differences} == {NORM, UP}
    assert report.not_finite() == [
        "model.layers.2.mlp.up_proj.weight holds 0 NaN and 0 Inf; in the other 0 NaN and 1 Inf",
        "model.norm.weight holds 0 NaN and 0 Inf; in the other 2 NaN and 2 Inf",
    ]
    found = {
        t["name"]: t["max_abs_diff"]
        for t in json.loads(json.dumps(report.as_dict(), allow_nan=False))["tensors"]
    }
    assert (found[NORM], found[UP]) == ("nan", "inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_element_is_counted_wherever_it_is(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.randn(1000).to(dtype)
    tensor[place] = value
    content = module._Content()
    content.add(tensor)
    stored = content.stored((1000,), dtype)
    assert (stored.nan, stored.inf) == ((1, 0) if value != value else (0, 1))


def test_negative_zero_is_not_zero(model: Path, tmp_path: Path) -> None:
    change(model, lambda t: t[NORM][:1].fill_(0.0))
    other = changed(model, tmp_path / "other", lambda t: t[NORM][:1].neg_())
    (difference,) = verify(model, other).differences
    assert (difference.name, difference.status, difference.max_abs_diff) == (NORM, "values", 0.0)


# Tied embeddings


def test_a_stored_lm_head_of_tied_embeddings(model: Path, tmp_path: Path) -> None:
    other = changed(model, tmp_path / "other", lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    same = verify(model, other)
    assert same.same
    assert by_name(same)["lm_head.weight"].status == "same"
    assert verify(other, model).same
    change(other, lambda t: t["lm_head.weight"][5, 5].add_(1.0))
    report = verify(model, other)
    assert [(t.name, t.status) for t in report.differences] == [("lm_head.weight", "values")]
    with pytest.raises(ModelError, match=r"lm_head\.weight differs"):
        verify(other, model)


# Blocks


@pytest.mark.parametrize("other", ["hf", "mcore"])
def test_no_tensor_is_read_whole(
    models: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    source = models("qwen3")
    to_mcore(source, tmp_path / "mcore")
    largest: dict[str, int] = {}

    def watch(reader: type, key: str) -> None:
        original = reader.read_rows

        def read_rows(self: Any, name: str, start: int, stop: int, out: Any = None) -> torch.Tensor:
            rows = original(self, name, start, stop, out)
            largest[key] = max(largest.get(key, 0), rows.nbytes)
            return rows

        monkeypatch.setattr(reader, "read_rows", read_rows)

    watch(HfReader, "hf")
    watch(DistReader, "mcore")
    for reader in (HfReader, DistReader):
        monkeypatch.setattr(reader, "read", lambda *args: pytest.fail("a tensor was read whole"))
    monkeypatch.setattr(module, "_BLOCK", 1000)
    report = verify(source, source if other == "hf" else tmp_path / "mcore")
    assert report.same
    assert by_name(report)[EMBEDDING].model is not None
    assert {k: v <= 1000 for k, v in largest.items()} == dict.fromkeys({"hf", other}, True)
    digests = {t.name: t.model.sha256 for t in report.tensors if t.model is not None}
    assert digests == {name: sha256(tensor) for name, tensor in tensors_of(source).items()}


def test_equal_bytes_are_hashed_once(
    models: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, hashed = models("qwen2"), []
    original = module.bytes_of
    monkeypatch.setattr(module, "bytes_of", lambda t: hashed.append(t.nbytes) or original(t))
    monkeypatch.setattr(module, "_BLOCK", 640)
    size = sum(t.nbytes for t in tensors_of(source).values())
    assert verify(source, source).same
    assert sum(hashed) == size
    hashed.clear()
    # Ten rows of 64 bytes a block: the second half of 48 rows begins in the third block, of five.
    other = changed(source, tmp_path / "other", lambda t: t[UP][24, 0].add_(1.0))
    assert not verify(source, other).same
    assert sum(hashed) == size + (48 - 20) * 64


@pytest.fixture(scope="module")
def two(models: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a copy of it, and a checkpoint of it."""
    directory = tmp_path_factory.mktemp("two")
    shutil.copytree(models("qwen2-tied"), directory / "other")
    to_mcore(models("qwen2-tied"), directory / "mcore")
    return models("qwen2-tied"), directory / "other", directory / "mcore"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), block=st.sampled_from([1, 64, 700, 5000, 4_000_000]), workers=st.integers(1, 4))
def test_any_changed_bit_is_found(
    two: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, data: Any, block: int, workers: int
) -> None:
    source, other, mcore = two
    tensors = load_file(source / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    words = tensors[name].view(torch.int16).flatten()
    place = data.draw(st.integers(0, words.numel() - 1))
    words[place] ^= 1 << data.draw(st.integers(0, 14))
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(module, "_BLOCK", block)
    before = tensors_of(source)[name].flatten()[place].double()
    after = tensors[name].flatten()[place].double()
    step = float((before - after).abs())
    for report in (verify(source, other, workers=workers), verify(other, mcore, workers=workers)):
        (difference,) = report.differences
        assert (difference.name, difference.status) == (name, "values")
        assert difference.max_abs_diff == pytest.approx(step, nan_ok=True)
        assert difference.model is not None
        assert difference.other is not None
        assert {difference.model.sha256, difference.other.sha256} == {
            sha256(tensors[name]),
            sha256(tensors_of(source)[name]),
        }


def test_workers_change_nothing(models: MakeModel, model: Path, tmp_path: Path) -> None:
    change(model, fill)
    reports = [verify(models("qwen2-tied"), model, workers=workers).as_dict() for workers in (1, 5)]
    assert json.dumps(reports[0]) == json.dumps(reports[1])
    to_mcore(model, tmp_path / "mcore")
    data = tmp_path / "mcore" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is truncated"):
        verify(model, tmp_path / "mcore", workers=3)


def test_integers_on_the_other_side(model: Path, tmp_path: Path) -> None:
    other = changed(model, tmp_path / "other", lambda t: t.update({NORM: t[NORM].to(torch.int32)}))
    (difference,) = verify(model, other).differences
    assert (difference.status, difference.found) == ("dtype", "[32] int32")
    assert 0 < (difference.max_abs_diff or 0) < 1


def test_names_from_a_file_are_printed_as_they_are(model: Path, tmp_path: Path) -> None:
    names = ("[/bold] [red]x", "line\nbreak \x1b[31m")
    other = changed(
        model, tmp_path / "other", lambda t: t.update({n: torch.full((1,), float("nan")) for n in names})
    )
    report = verify(model, other)
    assert {t.name for t in report.differences} == set(names)
    assert "[/bold] [red]x" in printed(report)
    assert r"line\nbreak \x1b[31m" in printed(report)
    assert all(line.isprintable() for line in report.not_finite())


def test_a_configuration_that_differs(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", lambda c: c.update(rms_norm_eps=1e-3))
    report = verify(model, tmp_path / "other")
    assert not report.same
    assert report.differences == ()
    assert report.as_dict()["config"] == ["norm_epsilon: 1e-06, 0.001"]
    assert "1 configuration fields differ" in report.summary()
