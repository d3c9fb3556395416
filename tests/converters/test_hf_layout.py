"""Weight files as they are laid out: what the safetensors library would write, or the source's own again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from converters.convert import to_hf, to_mcore
from converters.hf.layout import (
    LAYOUT_DIR,
    PlannedTensor,
    fits,
    keep_layout,
    kept_layout,
    plan_layout,
    source_layout,
)
from converters.hf.reader import HfReader
from engine.errors import CheckpointError, ConfigError
from tests.launch.runs import everything_in

from .conftest import MakeModel, assert_identical, edit_json, tensors_of, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KINDS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16,
    torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64,
)  # fmt: skip


def planned(tensors: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items()]


# Anew


def test_file_equals_the_library_for_all_dtypes(tmp_path: Path) -> None:
    tensors = {f"t{i % 3}.{dtype}": torch.ones(i + 1, 3).to(dtype) for i, dtype in enumerate(KINDS)}
    tensors |= {"empty": torch.zeros(0, 4), "no columns": torch.zeros(3, 0)}
    tensors |= {"é": torch.ones(1), "Z": torch.ones(1)}
    write_tensors(tmp_path, tensors)
    save_file(tensors, tmp_path / "library", {"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "library").read_bytes()
    assert_identical({n: HfReader(tmp_path).read(n) for n in tensors}, tensors)


def test_header_of_a_scalar_equals_the_library() -> None:
    tensors = {"scalar": torch.tensor(1.5), "row": torch.ones(2, dtype=torch.bfloat16)}
    (file,) = plan_layout(planned(tensors)).files
    assert save(tensors, {"format": "pt"})[: len(file.header)] == file.header


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 10) for i in range(5)}
    write_tensors(tmp_path, tensors, max_shard_size=121)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 15 * 40
    assert index["weight_map"]["t0"] == index["weight_map"]["t1"] == "model-00001-of-00004.safetensors"
    assert index["weight_map"]["t4"] == "model-00004-of-00004.safetensors"
    assert_identical({n: HfReader(tmp_path).read(n) for n in tensors}, tensors)
    for path in tmp_path.glob("*.safetensors"):
        assert path.read_bytes() == save(load_file(path), {"format": "pt"})


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    tensors = {"transposed": torch.randn(3, 4).T, "slice": torch.randn(8, 4)[2:4, 1:]}
    write_tensors(tmp_path, tensors)
    assert torch.equal(HfReader(tmp_path).read("transposed"), tensors["transposed"])
    assert torch.equal(HfReader(tmp_path).read("slice"), tensors["slice"])


@pytest.mark.parametrize("size", [0, -1])
def test_size_of_a_file_is_positive(size: int) -> None:
    with pytest.raises(ConfigError, match=f"max_shard_size must be a positive number of bytes, not {size}"):
        plan_layout(planned({"x": torch.ones(2)}), max_shard_size=size)


# The source's own files


def rewrite(model: Path, lay_out: Callable[[dict[str, Any]], tuple[str, bytes]]) -> None:
    """Write the header anew: `lay_out` takes the parsed one and returns its text and the data behind it."""
    data = (model / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    text, body = lay_out({"header": header, "body": body})
    (model / SINGLE).write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + body)


def other_writer(found: dict[str, Any]) -> tuple[str, bytes]:
    """As another program might: tensors in reverse order of data, names in another, spaces, own metadata."""
    header, body = found["header"], found["body"]
    header.pop("__metadata__", None)
    entries: dict[str, Any] = {}
    data = b""
    for name in sorted(header, key=lambda name: header[name]["data_offsets"], reverse=True):
        first, last = header[name]["data_offsets"]
        entries[name] = header[name] | {"data_offsets": [len(data), len(data) + last - first]}
        data += body[first:last]
    ordered = {name: entries[name] for name in sorted(entries)}
    return json.dumps({**ordered, "__metadata__": {"made": "elsewhere é"}}, indent=1) + "  ", data


def there_and_back(source: Path, root: Path) -> Path:
    to_mcore(source, root / "mcore")
    to_hf(root / "mcore", root / "hf")
    return root / "hf"


def weight_files(directory: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in everything_in(directory).items() if "safetensors" in name}


def test_files_of_another_writer_come_back(model: Path, tmp_path: Path) -> None:
    rewrite(model, other_writer)
    assert set(weight_files(model)) == {SINGLE}
    back = there_and_back(model, tmp_path)
    assert weight_files(back) == weight_files(model)


def test_shards_and_index_come_back(sharded: Path, tmp_path: Path) -> None:
    """Also where they have names and an index that Braid would not give them."""
    first = min(sharded.glob("model-*.safetensors"))
    first.rename(sharded / "model-part.of-many.safetensors")

    def edit(index: dict[str, Any]) -> None:
        places = index["weight_map"]
        index["weight_map"] = {
            name: "model-part.of-many.safetensors" if places[name] == first.name else places[name]
            for name in reversed(places)
        }
        index["metadata"]["extra"] = 1

    edit_json(sharded / INDEX, edit)
    assert len(weight_files(sharded)) > 3
    back = there_and_back(sharded, tmp_path)
    assert weight_files(back) == weight_files(sharded)


def test_another_dtype_or_size_is_laid_out_anew(sharded: Path, tmp_path: Path) -> None:
    to_mcore(sharded, tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "wide", dtype=torch.float32)
    assert (tmp_path / "wide" / SINGLE).exists()
    assert_identical(tensors_of(tmp_path / "wide"), {n: t.float() for n, t in tensors_of(sharded).items()})
    to_hf(tmp_path / "mcore", tmp_path / "one", max_shard_size=10**9)
    assert (tmp_path / "one" / SINGLE).read_bytes() == save(tensors_of(sharded), {"format": "pt"})
    to_mcore(sharded, tmp_path / "cast", dtype=torch.float32)
    to_hf(tmp_path / "cast", tmp_path / "cast-back")
    assert (tmp_path / "cast-back" / SINGLE).exists()


def test_checkpoint_without_the_layout_is_laid_out_anew(sharded: Path, tmp_path: Path) -> None:
    """Or with a part of it."""
    to_mcore(sharded, tmp_path / "mcore")
    expected = save(tensors_of(sharded), {"format": "pt"})
    min((tmp_path / "mcore" / LAYOUT_DIR).glob("*.header")).unlink()
    to_hf(tmp_path / "mcore", tmp_path / "some")
    assert (tmp_path / "some" / SINGLE).read_bytes() == expected
    shutil.rmtree(tmp_path / "mcore" / LAYOUT_DIR)
    to_hf(tmp_path / "mcore", tmp_path / "none")
    assert (tmp_path / "none" / SINGLE).read_bytes() == expected


HEADER = f"{SINGLE}.header"


def link(layout: Path) -> None:
    (layout / HEADER).rename(layout.parent / "elsewhere")
    (layout / HEADER).symlink_to("../elsewhere")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda layout: (layout / HEADER).write_bytes(b""), "is truncated inside its header"),
        (lambda layout: (layout / HEADER).write_bytes(b"\2" + bytes(7) + b"[]"), "is not a JSON object"),
        (link, "is a link to"),
    ],
)
def test_damaged_layout_is_refused(
    model: Path, tmp_path: Path, edit: Callable[[Path], Any], match: str
) -> None:
    to_mcore(model, tmp_path / "mcore")
    edit(tmp_path / "mcore" / LAYOUT_DIR)
    with pytest.raises(CheckpointError, match=rf"{match}.*or remove .*{LAYOUT_DIR}") as caught:
        to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert "\n" not in str(caught.value)


def hostile(layout: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of the kept header."""
    path = layout / HEADER
    header = json.loads(path.read_bytes()[8:])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize("entry", [{"dtype": "F16"}, {"shape": [4, 8]}])
def test_layout_of_another_model_is_not_used(model: Path, tmp_path: Path, entry: dict[str, Any]) -> None:
    to_mcore(model, tmp_path / "mcore")
    hostile(tmp_path / "mcore" / LAYOUT_DIR, lambda header: header["model.norm.weight"].update(entry))
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert (tmp_path / "hf" / SINGLE).read_bytes() == (model / SINGLE).read_bytes()


def test_layout_with_a_gap_is_refused(model: Path, tmp_path: Path) -> None:
    to_mcore(model, tmp_path / "mcore")
    hostile(tmp_path / "mcore" / LAYOUT_DIR, lambda header: header.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match="leaves a gap before it"):
        to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["../x.safetensors", ".hidden.safetensors", "x.py", "config.json"])
def test_names_of_kept_files_are_plain_safetensors(models: MakeModel, tmp_path: Path, name: str) -> None:
    tensors = planned(tensors_of(models("qwen2")))
    layout = plan_layout(tensors, max_shard_size=40_000)
    plan = {tensor.name: tensor for tensor in tensors}
    assert fits(layout, plan)
    files = (replace(layout.files[0], name=name), *layout.files[1:])
    assert not fits(replace(layout, files=files), plan)
    assert layout.index is not None
    index = layout.index.replace(layout.files[0].name.encode(), name.encode())
    assert not fits(replace(layout, files=files, index=index), plan)


@pytest.mark.parametrize("index", [None, b"", b"[]", b'{"weight_map": {}}', b"\xff"])
def test_kept_index_must_be_that_of_the_files(models: MakeModel, index: bytes | None) -> None:
    tensors = planned(tensors_of(models("qwen2")))
    layout = plan_layout(tensors, max_shard_size=40_000)
    assert not fits(replace(layout, index=index), {tensor.name: tensor for tensor in tensors})


def test_layout_is_kept_and_found(sharded: Path, tmp_path: Path) -> None:
    layout = source_layout(HfReader(sharded))
    assert kept_layout(tmp_path) is None
    keep_layout(layout, tmp_path)
    keep_layout(layout, tmp_path)  # a run writes it again
    kept = kept_layout(tmp_path)
    assert kept is not None
    assert sorted(kept.files, key=lambda file: file.name) == sorted(layout.files, key=lambda file: file.name)
    assert kept.index == layout.index == (sharded / INDEX).read_bytes()
