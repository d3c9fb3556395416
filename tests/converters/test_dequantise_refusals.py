"""fp8 sources that are not asked for, cannot be dequantised or are damaged end in one line; the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters.convert import plan_to_mcore, to_hf
from converters.hf.dequantise import open_dequantised
from converters.hf.reader import HfReader
from converters.verify import verify
from engine.errors import ModelError
from engine.model.spec import FP8_REFUSAL
from engine.storage.manifest import read_manifest
from launch.cli import main

from .conftest import change, edit_json, tensors_of
from .fp8 import NORM, UP, Way, make_fp8


def refused(directory: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        plan_to_mcore(directory, dequantise=True)
    assert "\n" not in str(caught.value)


def test_without_the_flag(fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    commands = (
        ["convert", "--to", "mcore", "--model", str(fp8), "--output_dir", out],
        ["merge", "--model", str(fp8), "--adapter", str(fp8), "--output_dir", out],
        ["verify", "--model", str(fp8), "--checkpoint", str(fp8)],
        ["sft", "--model", str(fp8), "--dataset", str(fp8), "--output_dir", out, "--device", "cpu"],
    )
    for command in commands:
        assert main(command) == 2
        assert f"{fp8 / 'config.json'}: {FP8_REFUSAL}\n" in capsys.readouterr().err
    edit_json(fp8 / "config.json", lambda config: config.pop("quantization_config"))
    for command in commands[:3]:
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert f"_proj.weight has dtype F8_E4M3, a {FP8_REFUSAL}\n" in printed
        assert str(fp8 / "model.safetensors") in printed
    assert not Path(out).exists()
    assert FP8_REFUSAL == (
        "quantised (fp8) source; pass --dequantise to convert it to bf16, or convert from the bf16 checkpoint"
    )


def test_a_checkpoint_is_not_compared_with_fp8_weights(plain: Path, fp8: Path) -> None:
    with pytest.raises(ModelError, match="quantised"):
        verify(plain, fp8)


@pytest.mark.parametrize("dequantised", [False, True])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"bits": 4}, "unknown method"),
        ({"quant_method": "a\nb"}, "unknown method"),
        ({"quant_method": ["fp8"]}, "unknown method"),
    ],
)
def test_other_methods_are_refused_by_name(fp8: Path, settings: Any, named: str, dequantised: bool) -> None:
    edit_json(fp8 / "config.json", lambda config: config.update(quantization_config=settings))
    with pytest.raises(ModelError) as caught:
        plan_to_mcore(fp8, dequantise=dequantised)
    assert str(caught.value) == (
        f"{fp8 / 'config.json'}: quantised ({named}) source; convert from the unquantised checkpoint"
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fmt": "e5m2"}, r"config\.json: quantised \(fp8, fmt e5m2\) source; only e4m3"),
        ({"fmt": 5}, r"fmt 5\) source; only e4m3"),
        ({"weight_block_size": [128]}, r"weight_block_size must be null or two .*, not \[128\]"),
        ({"weight_block_size": [128, 0]}, "weight_block_size must"),
        ({"weight_block_size": [128, True]}, "weight_block_size must"),
        ({"weight_block_size": 128}, "weight_block_size must"),
        ({"weight_block_size": []}, "weight_block_size must"),
        ({"weight_block_size": [128, 64]}, r"has shape \[\d, \d\], not \[.*weight_block_size is \[128, 64\]"),
        ({"weight_block_size": None}, r"not \[\] or \[\d+, 1\] .*config\.json names no weight_block_size"),
    ],
)
def test_settings_that_do_not_fit(fp8: Path, settings: dict[str, Any], match: str) -> None:
    edit_json(fp8 / "config.json", lambda config: config["quantization_config"].update(settings))
    refused(fp8, match)


def test_format_may_be_left_out(fp8: Path) -> None:
    """As transformers does when it saves one."""
    edit_json(fp8 / "config.json", lambda config: config["quantization_config"].pop("fmt"))
    assert open_dequantised(fp8).dtype(UP) == torch.bfloat16


def test_a_source_that_is_not_quantised(plain: Path) -> None:
    refused(plain, r"config\.json: no quantization_config .*leave out --dequantise")


SCALE = f"{UP}_scale_inv"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(SCALE), f"weight {UP} is in fp8, but its scale {SCALE} is missing"),
    "misshapen": (
        lambda t: t.__setitem__(SCALE, t[SCALE].T.contiguous()),
        rf"scale {SCALE} has shape \[2, 3\], not \[3, 2\] for a weight of shape \[300, 160\]",
    ),
    "scalar": (lambda t: t.__setitem__(SCALE, torch.tensor(1.0)), r"has shape \[\], not \[3, 2\]"),
    "nan": (lambda t: t[SCALE][2].fill_(float("nan")), f"scale {SCALE} holds nan or inf"),
    "inf": (lambda t: t[SCALE][0, 1].fill_(float("inf")), f"scale {SCALE} holds nan or inf"),
    "integers": (lambda t: t.__setitem__(SCALE, t[SCALE].int()), f"scale {SCALE} has dtype I32, not one of"),
    "exponents": (
        lambda t: t.__setitem__(SCALE, t[SCALE].to(torch.float8_e8m0fnu)),
        f"{SCALE} has dtype F8_E8M0, a quantised source; convert from the unquantised checkpoint",
    ),
    "twice": (
        lambda t: t.__setitem__(f"{UP}_scale", t[SCALE].clone()),
        f"{UP} has two scales, {SCALE} and {UP}_scale; keep one",
    ),
    "no weight": (lambda t: t.pop(UP), f"scale {SCALE} is there, but its weight {UP} is missing"),
    "weight in bf16": (
        lambda t: t.__setitem__(UP, t[UP].bfloat16()),
        f"scale {SCALE} is there, but its weight {UP} is in BF16, not in fp8",
    ),
    "scale of nothing": (
        lambda t: t.__setitem__("model.x.weight_scale", torch.ones(())),
        r"scale model\.x\.weight_scale is there, but its weight model\.x\.weight is missing",
    ),
    "norm in fp8": (
        lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn), f"{NORM}_scale": torch.ones(())}),
        f"{NORM} is in fp8 and has shape .160.; only matrices are dequantised",
    ),
    "e5m2": (
        lambda t: [t.__setitem__(UP, t[UP].float().to(torch.float8_e5m2)), t.pop(SCALE)],
        f"{UP} has dtype F8_E5M2, a quantised source; convert from the unquantised checkpoint",
    ),
    "bytes": (
        lambda t: [t.__setitem__(UP, t[UP].view(torch.uint8)), t.pop(SCALE)],
        f"{UP} has dtype U8, a quantised source",
    ),
    "shape": (
        lambda t: t.update({UP: t[UP][:200].clone(), SCALE: t[SCALE][:2].clone()}),
        rf"{UP} has shape \[200, 160\], config\.json asks for \[300, 160\]",
    ),
    "surplus": (lambda t: t.__setitem__("model.extra", torch.ones(1)), r"model\.extra has no place"),
    "weights gone": (lambda t: [t.pop(UP), t.pop(SCALE)], rf"weight {UP} \[300, 160\] is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sources(fp8: Path, damage: str) -> None:
    edit, match = DAMAGES[damage]
    change(fp8, edit)
    refused(fp8, match)


def test_nan_in_the_scale_of_a_whole_tensor(plain: Path, tmp_path: Path) -> None:
    make_fp8(plain, tmp_path / "fp8", Way(block=None))
    change(tmp_path / "fp8", lambda t: t[SCALE].fill_(float("nan")))
    refused(tmp_path / "fp8", f"scale {SCALE} holds nan or inf")


def test_fp8_data_of_the_wrong_size(fp8: Path) -> None:
    path = fp8 / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[UP]["shape"] = [300, 161]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ModelError, match=r"shape \[300, 161\] and dtype F8_E4M3 has 48000 bytes"):
        HfReader(fp8)


# Command line


@pytest.mark.parametrize("flag", ["--dequantise", "--dequantize"])
def test_command(fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    words = ["convert", "--to", "mcore", "--model", str(fp8), "--output_dir", str(tmp_path / "mcore"), flag]
    assert main([*words, "--dry_run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert main([*words, "--torch_dtype", "float16", "--tensor_model_parallel_size", "2"]) == 0
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    expected = open_dequantised(fp8, dtype=torch.float16).read(UP)
    assert torch.equal(tensors_of(tmp_path / "hf")[UP], expected)
    assert f"{flag} --torch_dtype float16" in read_manifest(tmp_path / "mcore").command


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--to hf --checkpoint M --dequantise", "--dequantise does not go with --to hf"),
        ("--to mcore --model M --adapter M --dequantise", "--dequantise does not go with --adapter"),
        ("--to mcore --model M --dequantise maybe", "dequantise must be true or false, not 'maybe'"),
        ("--to mcore --model M --dequantise --dequantize", "are the same option"),
        ("--to mcore --model M --dequantise --tensor_model_parallel_size 8", "num_attention_heads 4"),
    ],
)
def test_flags_that_do_not_go_together(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, named: str
) -> None:
    given = [str(fp8) if word == "M" else word for word in words.split()]
    assert main(["convert", *given, "--output_dir", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_command_without_the_flag_does_not_offer_it(fp8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", str(fp8), "--checkpoint", str(fp8), "--dequantise"]) == 2
    printed = capsys.readouterr().err
    assert "unknown option --dequantise" in printed
    assert "dequantize" not in printed
