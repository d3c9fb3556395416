"""What goes in comes out, file by file: weights, index, configuration, tokenizer, licence; whoever wrote
them, and through the checkpoint of a real run.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from converters.hf.reader import DTYPES
from converters.mcore.reader import DistReader
from engine.storage.files import bytes_of, dtype_name
from launch.cli import main
from launch.tiny import build_tiny_qwen3
from tests.launch.runs import braid, forget_launch_variables, question_rows, write_rows

from .conftest import MakeModel, assert_identical, edit_json, tensors_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "braid-manifest.json"
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "LICENSE",
)  # fmt: skip
DTYPE_NAMES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_launch_variables(monkeypatch)


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file but Python's, which does not travel, and the manifest, which a source does not have."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.suffix != ".py" and path.name != MANIFEST
    }


def round_trip(source: Path, root: Path, *words: str, to_mcore: Sequence[str] = ()) -> Path:
    """The directory that comes back; `words` are further flags of the way back."""
    checkpoint, back = root / "checkpoint", root / "back"
    command = ["convert", "--to", "mcore", "--model", str(source), "--output_dir", str(checkpoint)]
    assert main([*command, *to_mcore]) == 0
    command = ["convert", "--to", "hf", "--checkpoint", str(checkpoint), "--output_dir", str(back)]
    assert main([*command, *words]) == 0
    return back


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen2", "qwen3", "qwen3-tied"])
def test_every_file_comes_back(
    models: MakeModel, tmp_path: Path, kind: str, dtype: str, shard_size: str
) -> None:
    source = models(kind, DTYPE_NAMES[dtype], shard_size)
    expected = files_of(source)
    assert expected.keys() >= set(COMPANIONS)
    assert (INDEX in expected) == (shard_size == "40KB") == (SINGLE not in expected)
    assert json.loads(expected["config.json"])["tie_word_embeddings"] == kind.endswith("tied")
    back = round_trip(source, tmp_path)
    assert files_of(back) == expected
    assert (back / MANIFEST).is_file()


# Files of other programs


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a program writes a safetensors file."""

    metadata: dict[str, str] | None = None
    in_data: Callable[[list[str]], list[str]] = sorted
    """Order of the tensors' data."""
    in_header: Callable[[list[str]], list[str]] = sorted
    indent: int | None = None
    ascii_only: bool = False
    align: int = 1
    spaces: int = 0

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        end, entries, parts = 0, {}, []
        codes = {dtype: code for code, dtype in DTYPES.items()}
        for name in self.in_data(list(tensors)):
            tensor = tensors[name]
            start, end = end, end + tensor.nbytes
            entries[name] = {
                "data_offsets": [start, end], "shape": list(tensor.shape), "dtype": codes[tensor.dtype]
            }  # fmt: skip
            parts.append(bytes(bytes_of(tensor.contiguous())))
        header = {"__metadata__": self.metadata} if self.metadata is not None else {}
        header |= {name: entries[name] for name in self.in_header(list(tensors))}
        text = json.dumps(header, indent=self.indent, ensure_ascii=self.ascii_only).encode()
        text += b" " * (self.spaces + (-len(text) - self.spaces) % self.align)
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
        with safe_open(path, "pt") as library:  # it is a file, to those who made the format
            assert set(library.keys()) == set(tensors)


def backwards(names: list[str]) -> list[str]:
    return sorted(names, reverse=True)


def shuffled(names: list[str]) -> list[str]:
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(5)).tolist()
    return [sorted(names)[place] for place in order]


STYLES = {
    "no metadata": Style(),
    "foreign metadata": Style(metadata={"总": "é\n", "total_size": "1", "format": "mlx"}),
    "data in another order": Style(in_data=backwards),
    "header in another order than the data": Style(in_data=shuffled, in_header=backwards),
    "indented": Style(metadata={"format": "pt"}, indent=2, align=8),
    "ascii": Style(metadata={"总": "é"}, ascii_only=True),
    "padded to a page": Style(align=4096),
    "a thousand spaces": Style(metadata={"format": "pt"}, spaces=1001),
    "not aligned": Style(metadata={"odd": "x"}, in_data=shuffled, spaces=1),
}


def empty_of_weights(source: Path, target: Path) -> Path:
    """A copy of a model without its weight files."""
    ignore = shutil.ignore_patterns("*.safetensors", INDEX)
    return Path(shutil.copytree(source, target, ignore=ignore))


@pytest.mark.parametrize("style", STYLES)
def test_one_file_of_another_program(models: MakeModel, tmp_path: Path, style: str) -> None:
    source = empty_of_weights(models("qwen3"), tmp_path / "source")
    STYLES[style].write(source / SINGLE, tensors_of(models("qwen3")))
    assert (source / SINGLE).read_bytes() != (models("qwen3") / SINGLE).read_bytes()
    assert files_of(round_trip(source, tmp_path)) == files_of(source)


def by_layer(name: str) -> str:
    parts = name.split(".")
    return f"layer {parts[2]} (of 3).safetensors" if parts[1] == "layers" else "the rest.safetensors"


# Tensor name -> file; how the index is written.
SPLITS: dict[str, tuple[Callable[[str], str], Callable[[dict[str, str]], str]]] = {
    "a file a tensor": (
        lambda name: f"{name}.safetensors",
        lambda places: json.dumps({"weight_map": places}),
    ),
    "a file a layer, names with blanks": (
        by_layer,
        lambda places: json.dumps({"weight_map": dict(reversed(places.items())), "metadata": {}}, indent=4),
    ),
    "norms apart, names not in latin": (
        lambda name: "规范.safetensors" if "norm" in name else "-00001_of-2+@.a.safetensors",
        lambda places: json.dumps({"metadata": {"总": 1.5}, "weight_map": places}, ensure_ascii=False),
    ),
    "one file that has an index": (
        lambda name: "model-00001-of-00001.safetensors",
        lambda places: json.dumps({"metadata": {"total_size": 0}, "weight_map": places}, indent=2) + "\n",
    ),
    "total_parameters, line ends of Windows": (
        lambda name: f"model-{1 + ('mlp' in name):05}-of-00002.safetensors",
        lambda places: json.dumps(
            {"metadata": {"total_parameters": 7, "x": [None]}, "weight_map": places}, indent=1
        ).replace("\n", "\r\n"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen3"])
def test_shards_of_another_program(models: MakeModel, tmp_path: Path, kind: str, split: str) -> None:
    source = empty_of_weights(models(kind), tmp_path / "source")
    write_shards(source, tensors_of(models(kind)), split)
    assert files_of(round_trip(source, tmp_path)) == files_of(source)


def write_shards(directory: Path, tensors: dict[str, Tensor], split: str) -> None:
    file_of, index_of = SPLITS[split]
    places = {name: file_of(name) for name in tensors}
    for number, file in enumerate(sorted(set(places.values()))):
        style = list(STYLES.values())[number % len(STYLES)]
        style.write(directory / file, {n: tensor for n, tensor in tensors.items() if places[n] == file})
    (directory / INDEX).write_bytes(index_of(places).encode())


def test_several_dtypes_and_a_stored_copy_of_tied_embeddings(models: MakeModel, tmp_path: Path) -> None:
    source, tensors = (
        empty_of_weights(models("qwen2-tied"), tmp_path / "source"),
        tensors_of(models("qwen2-tied")),
    )
    tensors = {
        name: tensor.float() if "layernorm" in name else tensor.half() if "bias" in name else tensor
        for name, tensor in tensors.items()
    }
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_shards(source, tensors, "a file a layer, names with blanks")
    assert files_of(round_trip(source, tmp_path)) == files_of(source)


def test_through_a_wider_dtype_and_back(models: MakeModel, tmp_path: Path) -> None:
    source = models("qwen3", torch.bfloat16, "40KB")
    words = ["--torch_dtype", "float32"]
    back = round_trip(source, tmp_path, "--torch_dtype", "bfloat16", to_mcore=words)
    tensors = DistReader(tmp_path / "checkpoint").tensors.values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert files_of(back) == files_of(source)


# Another layout where one is asked for


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_a_size_lays_the_files_out_anew(models: MakeModel, tmp_path: Path, shard_size: str) -> None:
    source = models("qwen3", torch.bfloat16, shard_size)
    back = round_trip(source, tmp_path, "--max_shard_size", "70KB" if shard_size == "40KB" else "40KB")
    files, before = files_of(back), files_of(source)
    assert {name: files[name] for name in COMPANIONS} == {name: before[name] for name in COMPANIONS}
    assert json.loads(files[INDEX])["weight_map"] != json.loads(before.get(INDEX, b"{}")).get("weight_map")
    for name, content in files.items():
        if name.endswith(".safetensors"):
            with safe_open(back / name, "pt") as file:
                data = len(content) - 8 - int.from_bytes(content[:8], "little")
                assert data <= (70_000 if shard_size == "40KB" else 40_000) or len(file.keys()) == 1
    assert_identical(tensors_of(source), tensors_of(back))
    again = round_trip(source, tmp_path / "one", "--max_shard_size", "1GB")
    assert [path.name for path in again.glob("model*")] == [SINGLE]
    assert_identical(tensors_of(source), tensors_of(again))


def test_a_dtype_lays_the_files_out_anew(models: MakeModel, tmp_path: Path) -> None:
    source = models("qwen3", torch.bfloat16, "40KB")
    back = round_trip(source, tmp_path, "--torch_dtype", "float32")
    assert [path.name for path in back.glob("model*")] == [SINGLE]
    assert_identical({n: t.float() for n, t in tensors_of(source).items()}, tensors_of(back))
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"


# Through a run


def test_through_a_run_of_no_steps_at_tp2_pp2(tmp_path: Path) -> None:
    """A sharded source in bf16, not as the libraries would write it; a run in bf16 on four ranks."""
    tiny = build_tiny_qwen3(
        tmp_path / "tiny", hidden_size=32, intermediate_size=64, num_hidden_layers=4, head_dim=8
    )
    source = empty_of_weights(tiny, tmp_path / "source")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(tiny).items()}
    write_shards(source, tensors, "total_parameters, line ends of Windows")
    edit_json(source / "config.json", lambda config: config.update(dtype="bfloat16"))
    (source / "LICENSE").write_text("Apache\r\n")
    data = write_rows(tmp_path / "data.jsonl", question_rows())
    run = braid(
        "sft", "--model", str(source), "--dataset", str(data), "--output_dir", str(tmp_path / "out"),
        "--device", "cpu", "--torch_dtype", "bfloat16", "--max_steps", "0", "--report_to", "none",
        "--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2",
        cache=tmp_path / "cache", NPROC_PER_NODE="4",
    )  # fmt: skip
    assert run.code == 0, run.stderr
    reader = DistReader(tmp_path / "out" / "checkpoint-0")
    (gates,) = (t for key, t in reader.tensors.items() if key == "decoder.layers.mlp.linear_fc1.weight")
    assert gates.dtype == torch.bfloat16
    assert len({chunk.file for chunk in gates.chunks}) > 1, "saved by several ranks"
    assert files_of(tmp_path / "out" / "hf") == files_of(source)
