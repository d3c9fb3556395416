"""Hostile, damaged and unsuitable directories are refused in one line; the others are read as they are."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.companion_files import copy_companions
from converters.hf.reader import HfReader, check_weights
from converters.mapping import weight_map
from converters.source import row_blocks
from engine.errors import ModelError
from engine.model.spec import load_model_spec

from .conftest import MakeModel, assert_identical, change, edit_json, tensors_of

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def refused(directory: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        check_weights(HfReader(directory), weight_map(load_model_spec(directory)))
    assert "\n" not in str(caught.value)


def first_shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_reads_what_the_library_reads(models: MakeModel) -> None:
    for shard_size in ("5GB", "40KB"):
        directory = models("qwen3", torch.bfloat16, shard_size)
        reader, expected = HfReader(directory), tensors_of(directory)
        assert_identical({name: reader.read(name) for name in reader.tensors}, expected)
        q = expected["model.layers.1.self_attn.q_proj.weight"]
        for axis, start, stop in ((0, 5, 17), (0, 0, 0), (0, 48, 48), (1, 3, 4), (1, 8, 8)):
            part = reader.read_slice("model.layers.1.self_attn.q_proj.weight", axis, start, stop)
            assert part.is_contiguous()
            assert torch.equal(part, q.narrow(axis, start, stop - start))


def test_rows_come_into_the_memory_that_is_given(models: MakeModel) -> None:
    reader, name = HfReader(models("qwen3")), "model.layers.2.mlp.down_proj.weight"
    whole = reader.read(name)
    memory = torch.empty(7, 48, dtype=torch.bfloat16)
    rows = reader.read_rows(name, 20, 27, memory)
    assert rows.data_ptr() == memory.data_ptr()
    assert torch.equal(memory, whole[20:27])
    assert (reader.row_bytes(name), reader.nbytes(name)) == (96, 32 * 96)
    assert row_blocks(reader, name, 1000) == [(0, 10), (10, 20), (20, 30), (30, 32)]
    assert row_blocks(reader, name, 1) == [(row, row + 1) for row in range(32)]


def test_file_that_shrinks_after_it_was_opened(model: Path) -> None:
    reader = HfReader(model)
    os.truncate(model / "model.safetensors", reader.tensors[NORM].stop - 2)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read or changed since it was opened"):
        reader.read(NORM)
    with pytest.raises(ModelError, match="2 too early"):
        reader.read_rows(NORM, 5, 32)


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    data = torch.tensor([1.0, -2.0])
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data.numpy().tobytes()
    )
    assert torch.equal(HfReader(tmp_path).read("x"), data)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "x\0y", "..", ""]
)
def test_index_entry_that_is_no_plain_file_name(sharded: Path, name: str) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].__setitem__(NORM, name))
    refused(sharded, "not a plain file name")


def test_link_out_of_the_directory(model: Path, tmp_path: Path) -> None:
    shutil.move(model / "model.safetensors", tmp_path / "elsewhere")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(model, r"model\.safetensors is a link to .*elsewhere")


def test_link_inside_the_hub_cache_is_followed(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--Qwen--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    check_weights(HfReader(snapshot), weight_map(load_model_spec(snapshot)))
    copy_companions(snapshot, tmp_path)
    assert not (tmp_path / "config.json").is_symlink()

    other = tmp_path / "other"
    shard = first_shard(snapshot)
    other.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(other)
    refused(snapshot, f"{shard.name} is a link")


def test_named_pipe_does_not_block(model: Path) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    refused(model, "not a regular file")


def test_pickles_are_not_read(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, r"pytorch_model\.bin .*only safetensors")
    (model / "pytorch_model.bin").unlink()
    refused(model, r"neither model\.safetensors nor")


def test_index_that_names_pickles(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].__setitem__(NORM, "pytorch_model.bin"))
    refused(sharded, "only safetensors")


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_damaged_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, "index")


def test_missing_shard(sharded: Path) -> None:
    shard = first_shard(sharded)
    shard.unlink()
    refused(sharded, f"{shard.name} does not exist")


def test_tensor_in_the_index_but_not_in_the_shard(sharded: Path) -> None:
    shard = first_shard(sharded).name
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(extra=shard))
    refused(sharded, f"{shard}: tensor extra is listed .* not in the file")


def test_tensor_in_the_shard_but_not_in_the_index(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(NORM))
    refused(sharded, f"tensor {NORM} is not listed")


def test_tensor_in_two_shards(sharded: Path) -> None:
    shutil.copy(first_shard(sharded), sharded / "again.safetensors")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].__setitem__("other", "again.safetensors"))
    refused(sharded, r"again\.safetensors: tensor \S+ is in .* too")


@pytest.mark.parametrize(
    ("keep", "match"),
    [(0, "not a safetensors"), (7, "not a safetensors"), (500, "inside its header"), (-3, "truncated")],
)
def test_truncated_file(model: Path, keep: int, match: str) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(model, rf"model\.safetensors.*{match}")


def test_trailing_bytes(model: Path) -> None:
    with open(model / "model.safetensors", "ab") as file:
        file.write(b"x")
    refused(model, "1 bytes behind the last tensor")


def test_header_larger_than_the_limit(model: Path) -> None:
    (model / "model.safetensors").write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    refused(model, "header of 100000001 bytes")


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b"\xff\xfe{}", b'{"a":1}', b'{"a":{},"a":{}}', b"[" * 100_000, b'{"a":{"dtype":"F32"}}'],
)
def test_header_that_is_no_header(model: Path, header: bytes) -> None:
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(model, r"model\.safetensors: .*header")


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        (lambda a, b: [a - 2, b - 2], "overlaps"),
        (lambda a, b: [a + 2, b + 2], "gap"),
        (lambda a, b: [a, b + 2], "bytes; the file is corrupt"),
        (lambda a, b: [b, a], "ends before it starts"),
        (lambda a, b: [-b, -a], "malformed"),
        (lambda a, b: [a, True], "malformed"),
        (lambda a, b: [a, 1e300], "malformed"),
        (lambda a, b: [a + 10**15, b + 10**15], "gap"),
    ],
)
def test_offsets_that_do_not_tile_the_file(model: Path, offsets: Any, match: str) -> None:
    def edit(header: dict[str, Any]) -> None:
        header[NORM]["data_offsets"] = offsets(*header[NORM]["data_offsets"])

    edit_header(model / "model.safetensors", edit)
    refused(model, match)


def test_quantised_sources(model: Path) -> None:
    def fp8(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = tensors[NORM].to(torch.float8_e4m3fn)

    change(model, fp8)
    refused(model, f"{NORM} has dtype F8_E4M3, a quantised")
    with pytest.raises(ModelError, match="fp8"):
        HfReader(model).read(NORM)
    change(model, lambda tensors: tensors.__setitem__(NORM, torch.zeros(32, dtype=torch.int8)))
    refused(model, f"{NORM} has dtype I8, a quantised")


def test_missing_surplus_and_misshaped(model: Path) -> None:
    change(model, lambda t: t.__setitem__("model.layers.0.mlp.up_proj.weight", torch.zeros(48, 31)))
    refused(model, r"mlp\.up_proj\.weight has shape \[48, 31\], config\.json asks for \[48, 32\]")
    change(model, lambda t: t.__setitem__("model.a\nb", torch.zeros(1)))
    refused(model, r"'model\.a\\nb' has no place in the model")
    change(model, lambda t: [t.pop(NORM), t.pop("model.embed_tokens.weight")])
    refused(model, r"model\.embed_tokens\.weight \[1003, 32\] is missing \(and 1 more\)")


def test_rotary_buffers_are_ignored(model: Path) -> None:
    change(model, lambda t: t.__setitem__("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(2)))
    check_weights(HfReader(model), weight_map(load_model_spec(model)))


def test_lm_head_of_tied_embeddings(model: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][1002, 31] += 1

    change(model, edit)
    refused(model, r"lm_head\.weight differs from model\.embed_tokens\.weight; set tie_word_embeddings")


def test_a_rank_reads_its_part_by_the_mapping(models: MakeModel) -> None:
    reader = HfReader(models("qwen2"))
    weights = weight_map(load_model_spec(models("qwen2")))
    names = ["embedding.word_embeddings.weight", "decoder.layers.2.mlp.linear_fc1.weight"]
    parts = {name: weights[name].to_megatron(reader.read_slice, 1, 2) for name in names}
    embedding = reader.read("model.embed_tokens.weight")
    assert torch.equal(parts[names[0]], torch.cat([embedding[512:], embedding.new_zeros(21, 32)]))
