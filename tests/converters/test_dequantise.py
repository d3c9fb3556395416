"""fp8 checkpoints become bf16 or fp32 ones, bit by bit what the formula says and what transformers makes of
them.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from converters.convert import plan_to_mcore, to_hf, to_mcore
from converters.hf import dequantise, reader
from converters.hf.dequantise import DequantisedSource, Fp8Scheme, open_dequantised
from converters.hf.reader import HfReader
from converters.mcore.companions import read_source_info
from converters.transfer import TransferOptions
from converters.verify import verify
from engine.errors import ModelError
from engine.model.spec import load_model_spec
from engine.storage.manifest import read_manifest

from .conftest import assert_identical, change, edit_json, tensors_of
from .fp8 import NORM, UP, Way, dequantise_one, make_fp8, quantise

INDEX = "model.safetensors.index.json"


# Values

WAYS = {
    "128": Way(),
    "bf16 scales": Way(scale_dtype=torch.bfloat16),
    "divides": Way(block=(4, 4)),
    "uneven": Way(block=(7, 9), scale_dtype=torch.float16),
    "wide": Way(block=(4, 1000)),
    "tall": Way(block=(1000, 8)),
    "one": Way(block=None, suffix="_scale"),
    "one, [1]": Way(block=None, scalar=(1,)),
    "one, [1, 1]": Way(block=None, scalar=(1, 1)),
    "rows": Way(block=None, by_row=True, suffix="_scale"),
}


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_values_are_stored_ones_times_their_scales(
    plain: Path, tmp_path: Path, way: Way, dtype: torch.dtype | None
) -> None:
    expected = make_fp8(plain, tmp_path / "fp8", way)
    report = to_mcore(tmp_path / "fp8", tmp_path / "mcore", dtype=dtype, dequantise=True)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    wanted = {name: tensor.to(dtype or torch.bfloat16) for name, tensor in expected.items()}
    assert_identical(wanted, tensors_of(tmp_path / "hf"))
    # Not the original either: the quantisation really took place.
    assert not torch.equal(wanted[UP], tensors_of(plain)[UP].to(wanted[UP].dtype))
    assert report.bytes >= sum(tensor.nbytes for tensor in wanted.values())


def test_fp32_is_not_rounded_to_bf16_on_the_way(fp8: Path, tmp_path: Path) -> None:
    values = open_dequantised(fp8, dtype=torch.float32).read(UP)
    assert not torch.equal(values, values.bfloat16().float())
    assert torch.equal(open_dequantised(fp8).read(UP), values.bfloat16())


@pytest.mark.parametrize("way", [Way(block=(4, 4)), Way(block=(32, 4), scale_dtype=torch.bfloat16)])
def test_transformers_makes_the_same_of_every_weight(plain: Path, tmp_path: Path, way: Way) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    make_fp8(plain, tmp_path / "fp8", way)
    tensors, source = load_file(tmp_path / "fp8" / "model.safetensors"), open_dequantised(tmp_path / "fp8")
    theirs = Fp8Dequantize(None)
    checked = 0
    for name in source.names():
        scale = tensors.get(name + way.suffix)
        if scale is None or any(
            size % of for size, of in zip(tensors[name].shape, way.block or (), strict=True)
        ):
            continue  # transformers takes no blocks that do not divide
        values = theirs._dequantize_one(tensors[name], scale, output_dtype=torch.bfloat16)
        assert torch.equal(source.read(name), values), name
        checked += 1
    assert checked >= 10


def test_transformers_loads_both_to_the_same_model(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    make_fp8(plain, tmp_path / "fp8", Way(block=(4, 4)))
    to_mcore(tmp_path / "fp8", tmp_path / "mcore", dequantise=True)
    to_hf(tmp_path / "mcore", tmp_path / "hf", max_shard_size=200_000)
    ours, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values()), loading
    assert ours.dtype == torch.bfloat16
    asked = FineGrainedFP8Config(weight_block_size=(4, 4), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=asked)
    assert_identical(dict(theirs.state_dict()), dict(ours.state_dict()))


def test_nan_and_zero_weights_survive(fp8: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[UP].view(torch.uint8)[3, :3] = torch.tensor([0x7F, 0x80, 0x00], dtype=torch.uint8)

    change(fp8, edit)
    to_mcore(fp8, tmp_path / "mcore", dequantise=True)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    values = tensors_of(tmp_path / "hf")[UP]
    assert values[3, 0].isnan()
    assert values.isnan().sum() == 1
    assert values[3, 1:3].tolist() == [0.0, 0.0]
    assert values[3, 1:3].signbit().tolist() == [True, False]


# Reading by rows


@pytest.mark.parametrize("way", [WAYS["128"], WAYS["uneven"], WAYS["one"], WAYS["rows"]])
def test_rows_are_those_of_the_whole(
    plain: Path, tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_fp8(plain, tmp_path / "fp8", way)[UP].bfloat16()
    source = open_dequantised(tmp_path / "fp8")
    for elements in (1, 1000, 250_000):  # one row, some, all at once
        monkeypatch.setattr(dequantise, "_STEP_ELEMENTS", elements)
        for start, stop in ((0, 300), (0, 0), (300, 300), (5, 6), (6, 8), (127, 129), (3, 298), (256, 300)):
            assert torch.equal(source.read_rows(UP, start, stop), expected[start:stop])
    out = torch.empty(2, 160, dtype=torch.bfloat16)
    assert source.read_rows(UP, 126, 128, out) is out
    assert torch.equal(out, expected[126:128])
    assert torch.equal(source.read_slice(UP, 1, 100, 150), expected[:, 100:150])


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    block=st.tuples(st.integers(1, 24), st.integers(1, 24)) | st.none(),
    by_row=st.booleans(),
    cut=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    seed=st.integers(0, 1000),
)
def test_rows_of_any_weight(
    shape: tuple[int, int], block: tuple[int, int] | None, by_row: bool, cut: tuple[int, int], seed: int
) -> None:
    way = Way(block=block, by_row=by_row)
    weight, scale = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), way)
    start, stop = sorted(min(row, shape[0]) for row in cut)
    with TemporaryDirectory() as directory:
        save_file({"x.weight": weight, "x.weight_scale": scale}, Path(directory, "model.safetensors"))
        source = DequantisedSource(HfReader(directory), Fp8Scheme(block=block), dtype=torch.float32)
        rows = source.read_rows("x.weight", start, stop)
    assert source.names() == ["x.weight"]
    assert torch.equal(rows, dequantise_one(weight, scale, way)[start:stop])


def test_only_the_bytes_of_the_rows_and_their_scales_are_read(
    fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read, sizes = open_dequantised(fp8), reader.read_into, list[int]()

    def counted(path: Path, start: int, out: Tensor) -> None:
        sizes.append(out.nbytes)
        read(path, start, out)

    monkeypatch.setattr(reader, "read_into", counted)
    source.read_rows(UP, 120, 130)
    assert sizes == [10 * 160, 2 * 2 * 4]  # ten rows in fp8; two rows of two scales in fp32


def test_little_memory_and_several_workers_change_nothing(fp8: Path, tmp_path: Path) -> None:
    to_mcore(fp8, tmp_path / "one", dequantise=True)
    options = TransferOptions(workers=3, max_memory=4_000_000)
    to_mcore(fp8, tmp_path / "three", dequantise=True, options=options)
    one, three = (read_manifest(tmp_path / name) for name in ("one", "three"))
    assert one.files == three.files
    assert one.tensors == three.tensors


def test_scales_in_another_file_than_their_weights(plain: Path, tmp_path: Path) -> None:
    expected = make_fp8(plain, tmp_path / "fp8", Way())
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    (tmp_path / "fp8" / "model.safetensors").unlink()
    places = {name: "b.safetensors" if "scale" in name else "a.safetensors" for name in tensors}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, tmp_path / "fp8" / file)
    (tmp_path / "fp8" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    source = open_dequantised(tmp_path / "fp8")
    assert_identical(
        {name: source.read(name) for name in source.names()},
        {name: tensor.bfloat16() for name, tensor in expected.items()},
    )


# What is written


def test_the_checkpoint_speaks_of_bf16(fp8: Path, tmp_path: Path) -> None:
    to_mcore(fp8, tmp_path / "mcore", dequantise=True)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    before = json.loads((fp8 / "config.json").read_text())
    before.pop("quantization_config")
    for directory in (tmp_path / "mcore" / "hf_companions", tmp_path / "hf"):
        assert json.loads((directory / "config.json").read_text()) == before | {"torch_dtype": "bfloat16"}
        assert (directory / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "mcore" / "hf_layout").exists()
    info = read_source_info(tmp_path / "mcore")
    assert (info.architecture, info.dtype, info.hf_dtypes) == ("Qwen3ForCausalLM", "bfloat16", None)
    assert load_model_spec(tmp_path / "hf") == load_model_spec(fp8, fp8=True)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_configuration_names_the_dtype(fp8: Path, tmp_path: Path, key: str | None) -> None:
    def edit(config: dict[str, Any]) -> None:
        del config["torch_dtype"]
        if key is not None:
            config[key] = "float8_e4m3fn"

    edit_json(fp8 / "config.json", edit)
    to_mcore(fp8, tmp_path / "mcore", dequantise=True, dtype=torch.float32)
    config = json.loads((tmp_path / "mcore" / "hf_companions" / "config.json").read_text())
    assert {k: v for k, v in config.items() if k.endswith("dtype")} == {key or "dtype": "float32"}


def test_the_export_and_the_checkpoint_are_one_model(fp8: Path, tmp_path: Path) -> None:
    to_mcore(fp8, tmp_path / "mcore", dequantise=True)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert verify(tmp_path / "hf", tmp_path / "mcore").same
    to_mcore(tmp_path / "hf", tmp_path / "again")
    digests = {read_manifest(tmp_path / name).source.sha256 for name in ("mcore", "hf", "again")}
    assert len(digests) == 1


def test_weights_that_are_not_in_fp8_keep_their_dtype(fp8: Path, tmp_path: Path) -> None:
    change(fp8, lambda t: t.__setitem__(NORM, t[NORM].float() + 1e-4))
    to_mcore(fp8, tmp_path / "mcore", dequantise=True)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    back, stored = tensors_of(tmp_path / "hf"), load_file(fp8 / "model.safetensors")
    assert_identical({NORM: back[NORM]}, {NORM: stored[NORM]})
    assert {tensor.dtype for name, tensor in back.items() if name != NORM} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_lm_head_of_tied_embeddings(fp8: Path, tmp_path: Path) -> None:
    edit_json(fp8 / "config.json", lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        plan_to_mcore(fp8, dequantise=True)
    change(fp8, lambda t: t.__setitem__("lm_head.weight", t["model.embed_tokens.weight"].clone()))
    to_mcore(fp8, tmp_path / "mcore", dequantise=True)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_scales_of_activations_are_left_out(fp8: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[UP.replace("weight", "activation_scale")] = torch.tensor(0.5)
        tensors[UP.replace("weight", "input_scale")] = torch.tensor(0.5)

    change(fp8, edit)
    edit_json(fp8 / "config.json", lambda c: c["quantization_config"].update(activation_scheme="static"))
    to_mcore(fp8, tmp_path / "mcore", dequantise=True)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf").keys() == set(open_dequantised(fp8).names())
    assert not any("scale" in name for name in tensors_of(tmp_path / "hf"))


def test_another_block_size_is_another_plan(plain: Path, tmp_path: Path) -> None:
    make_fp8(plain, tmp_path / "fp8", Way(block=(300, 300)))
    before = plan_to_mcore(tmp_path / "fp8", dequantise=True).digest()
    assert plan_to_mcore(tmp_path / "fp8", dequantise=True).digest() == before
    edit_json(
        tmp_path / "fp8" / "config.json",
        lambda config: config["quantization_config"].update(weight_block_size=[500, 500]),
    )
    assert plan_to_mcore(tmp_path / "fp8", dequantise=True).digest() != before
