"""What a directory says of itself, and every way in which it can say it wrongly."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.convert import to_hf, to_mcore
from converters.mcore.reader import DistReader
from engine.errors import CheckpointError
from engine.storage.files import bytes_of
from engine.storage.manifest import (
    MANIFEST_FILE,
    FileEntry,
    FileProblem,
    Manifest,
    SourceEntry,
    check_manifest,
    files_below,
    hash_file,
    hash_files,
    model_digest,
    read_manifest,
    write_manifest,
)

from .conftest import MakeModel, edit_json, tensors_of


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a manifest that is right."""
    target = tmp_path / "made"
    (target / "inner" / "deep").mkdir(parents=True)
    for name, content in {"a": b"one", "inner/b": b"", "inner/deep/é b": b"three"}.items():
        (target / name).write_bytes(content)
    write_manifest(
        target,
        Manifest(
            kind="hf",
            created="2026-01-01T00:00:00+00:00",
            command="braid convert --model 'a b'",
            versions={"braid": "1"},
            plan="p",
            source=SourceEntry(path="/source", sha256="s"),
            tensors={"model.norm.weight": "t"},
            files=hash_files(target, files_below(target)),
        ),
    )
    return target


def problems(directory: Path) -> list[FileProblem]:
    return check_manifest(directory, read_manifest(directory))


# Round trip


def test_it_is_read_as_it_was_written(directory: Path) -> None:
    manifest = read_manifest(directory)
    assert manifest.files == {
        "a": FileEntry(bytes=3, sha256=sha256(b"one")),
        "inner/b": FileEntry(bytes=0, sha256=sha256(b"")),
        "inner/deep/é b": FileEntry(bytes=5, sha256=sha256(b"three")),
    }
    assert manifest.source == SourceEntry(path="/source", sha256="s")
    changed = replace(manifest, plan="q")
    write_manifest(directory, changed)
    assert read_manifest(directory) == changed
    assert problems(directory) == []
    assert {path.name for path in directory.iterdir()} == {"a", "inner", MANIFEST_FILE}
    assert json.loads((directory / MANIFEST_FILE).read_text())["format"] == 1


def test_hashes_of_large_files(tmp_path: Path) -> None:
    content = os.urandom(8_000_000) + b"and more"
    (tmp_path / "x").write_bytes(content)
    (tmp_path / "y").write_bytes(content[1:])
    assert hash_file(tmp_path / "x") == FileEntry(bytes=8_000_008, sha256=sha256(content))
    for workers in (1, 3):
        entries = hash_files(tmp_path, ["y", "x"], workers=workers)
        assert list(entries) == ["y", "x"]
        assert entries["y"] == FileEntry(bytes=8_000_007, sha256=sha256(content[1:]))


def test_digest_of_a_model_depends_on_every_part_and_on_no_order() -> None:
    tensors = {"b": ("bfloat16", (2, 3), "11"), "a": ("float32", (4,), "22"), "a.b": ("float32", (), "33")}
    lines = "a float32 4 22\na.b float32  33\nb bfloat16 2,3 11\n"
    digest = model_digest(tensors)
    assert digest == sha256(lines.encode())
    assert model_digest(dict(reversed(tensors.items()))) == digest
    others = [
        tensors | {"b": ("float16", (2, 3), "11")},
        tensors | {"b": ("bfloat16", (3, 2), "11")},
        tensors | {"b": ("bfloat16", (2, 3), "12")},
        {name + "x": entry for name, entry in tensors.items()},
        {name: tensors[name] for name in ("a", "b")},
    ]
    assert len({digest, *map(model_digest, others)}) == 6


# What is wrong with the files


def test_every_problem_is_found(directory: Path) -> None:
    (directory / "inner" / "deep" / "é b").unlink()
    (directory / "inner" / "b").write_bytes(b"x")
    (directory / "a").write_bytes(b"0ne")
    (directory / "inner" / "new").write_bytes(b"")
    (directory / ".hidden").symlink_to("nowhere")
    found = problems(directory)
    assert sorted(found, key=lambda item: item.name) == [
        FileProblem(name=".hidden", problem="surplus"),
        FileProblem(name="a", problem="sha256", expected=sha256(b"one"), found=sha256(b"0ne")),
        FileProblem(name="inner/b", problem="size", expected="0", found="1"),
        FileProblem(name="inner/deep/é b", problem="missing"),
        FileProblem(name="inner/new", problem="surplus"),
    ]


def test_a_directory_in_a_file_s_place(directory: Path) -> None:
    (directory / "a").unlink()
    (directory / "a").mkdir()
    assert problems(directory) == [FileProblem(name="a", problem="missing")]


@pytest.mark.parametrize("bit", range(0, 24, 5))
def test_a_flipped_bit(directory: Path, bit: int) -> None:
    data = bytearray(b"one")
    data[bit // 8] ^= 1 << bit % 8
    (directory / "a").write_bytes(data)
    assert [(item.name, item.problem) for item in problems(directory)] == [("a", "sha256")]


# What is wrong with the manifest


def refused(directory: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_manifest(directory)
    assert "\n" not in str(caught.value)
    assert MANIFEST_FILE in str(caught.value)


def test_no_manifest(tmp_path: Path) -> None:
    refused(tmp_path, "it was not written by braid, or its writing was interrupted")
    refused(tmp_path / "none", "has no")


def test_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).mkdir()
    refused(tmp_path, "cannot be read")


def test_torn_manifest(directory: Path) -> None:
    whole = (directory / MANIFEST_FILE).read_bytes()
    for keep in (0, 1, 40, len(whole) // 2, len(whole) - 2):
        (directory / MANIFEST_FILE).write_bytes(whole[:keep])
        refused(directory, "is damaged .*; the directory cannot be trusted")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"3", b"null", b'"x"', b"{}", b"[" * 100_000])
def test_manifest_that_is_none(directory: Path, content: bytes) -> None:
    (directory / MANIFEST_FILE).write_bytes(content)
    refused(directory, "is damaged")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.pop("files"),
        lambda m: m.pop("source"),
        lambda m: m.pop("kind"),
        lambda m: m.update(surplus=1),
        lambda m: m.update(files=[]),
        lambda m: m.update(files={"a": 3}),
        lambda m: m.update(files={"a": {"bytes": 3}}),
        lambda m: m.update(source="x"),
        lambda m: m["source"].update(more=1),
    ],
)
def test_manifest_with_other_fields(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(directory / MANIFEST_FILE, edit)
    refused(directory, "is damaged")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "inner/../../a", "..", "a\\b", "a\0b"])
def test_manifest_that_leads_out_of_the_directory(directory: Path, name: str) -> None:
    edit_json(directory / MANIFEST_FILE, lambda m: m["files"].update({name: {"bytes": 1, "sha256": ""}}))
    refused(directory, "leaves the directory")


def test_manifest_of_another_format(directory: Path) -> None:
    edit_json(directory / MANIFEST_FILE, lambda m: m.update(format=2))
    refused(directory, "has not the format 1; use the braid version that wrote it")


# Of conversions


def test_a_conversion_describes_what_it_made(models: MakeModel, tmp_path: Path) -> None:
    source, mcore, hf = models("qwen3"), tmp_path / "mcore", tmp_path / "hf"
    before = datetime.now(UTC).replace(microsecond=0)
    to_mcore(source, mcore)
    to_hf(mcore, hf)
    tensors = tensors_of(source)
    digests = {name: sha256(bytes(bytes_of(tensor))) for name, tensor in tensors.items()}
    described = {name: ("bfloat16", tuple(t.shape), digests[name]) for name, t in tensors.items()}
    for made, kind, origin in ((mcore, "mcore", source), (hf, "hf", mcore)):
        manifest = read_manifest(made)
        assert check_manifest(made, manifest, workers=2) == []
        assert set(manifest.files) == set(files_below(made))
        assert manifest.kind == kind
        assert manifest.source == SourceEntry(path=str(origin), sha256=model_digest(described))
        assert manifest.tensors == digests
        assert manifest.versions["braid"] == metadata.version("braid")
        assert manifest.versions["torch"] == torch.__version__
        assert before <= datetime.fromisoformat(manifest.created) <= datetime.now(UTC)
    assert "hf_companions/tokenizer.json" in read_manifest(mcore).files
    assert "hf_layout/model.safetensors.header" in read_manifest(mcore).files


def test_plan_and_digest_follow_source_and_options(models: MakeModel, tmp_path: Path) -> None:
    """The plan is that of these very files; the digest that of the model, wherever it lies."""
    source, sharded = models("qwen3"), models("qwen3", torch.bfloat16, "40KB")
    to_mcore(source, tmp_path / "a")
    to_mcore(source, tmp_path / "b")
    to_mcore(sharded, tmp_path / "c")
    to_mcore(source, tmp_path / "d", dtype=torch.float32)
    a, b, c, d = (read_manifest(tmp_path / name) for name in "abcd")
    assert a.plan == b.plan
    assert len({a.plan, c.plan, d.plan}) == 3
    assert a.source.sha256 == b.source.sha256 == c.source.sha256 == d.source.sha256
    assert a.tensors == c.tensors == d.tensors


def test_tied_head_counts_once(models: MakeModel, tmp_path: Path) -> None:
    """A stored copy of the embedding is written again, but read once."""
    to_mcore(models("qwen2-tied"), tmp_path / "mcore")
    edit_json(tmp_path / "mcore" / "braid.json", lambda info: info.update(lm_head_copy=True))
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert "lm_head.weight" in tensors_of(tmp_path / "hf")
    assert set(read_manifest(tmp_path / "hf").tensors) == set(tensors_of(models("qwen2-tied")))
    assert read_manifest(tmp_path / "hf").source.sha256 == read_manifest(tmp_path / "mcore").source.sha256


def test_digests_see_neither_boxes_nor_padding(models: MakeModel, tmp_path: Path) -> None:
    """The digest of a tensor is that of its bytes in the source, also through boxes and padding."""
    to_mcore(models("qwen2"), tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "hf", dtype=torch.float32)
    assert DistReader(tmp_path / "mcore").shape("output_layer.weight") == (1024, 32)
    first, second = read_manifest(tmp_path / "mcore"), read_manifest(tmp_path / "hf")
    assert first.tensors == second.tensors
    head = tensors_of(models("qwen2"))["lm_head.weight"]
    assert first.tensors["lm_head.weight"] == sha256(bytes(bytes_of(head)))
