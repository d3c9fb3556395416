"""Checkpoints made to do harm, through the command line: refused in one line, or read as if the harm were not
there; nothing is written but the output, nothing of theirs is run.
"""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.storage.metadata import METADATA_FILE
from launch.cli import main

from .conftest import MakeModel, assert_identical, edit_json, tensors_of
from .hostile import (
    GATE,
    INDEX,
    NORM,
    NOT_PLAIN,
    SINGLE,
    Edit,
    Evil,
    Place,
    edit_header,
    link_out,
    sparse,
    to_hf,
    to_mcore,
)


@pytest.fixture
def checkpoint(place: Place, models: MakeModel) -> Path:
    """Of the Qwen3 in several files; to be damaged at will."""
    path = place.root / "checkpoint"
    model = models("qwen3", torch.bfloat16, "40KB")
    assert main([*to_mcore(model), "--output_dir", str(path)]) == 0
    place.capsys.readouterr()
    return path


def first_header(layout: Path) -> Path:
    return min(layout.glob("*.header"))


def other_tensors(layout: Path) -> None:
    def rename(header: dict[str, Any]) -> None:
        name = next(name for name in header if name[0] != "_")
        header["model.other.weight"] = header.pop(name)

    edit_header(first_header(layout), rename)


def renamed(name: str) -> Edit:
    """A file of another name, in the index too."""

    def edit(layout: Path) -> None:
        header = first_header(layout)
        before = header.name.removesuffix(".header")
        header.rename(layout / f"{name}.header")
        text = (layout / INDEX).read_text()
        (layout / INDEX).write_text(text.replace(json.dumps(before), json.dumps(name)))

    return edit


def index_that_disagrees(layout: Path) -> None:
    names = {NORM: "../../elsewhere/new.safetensors", GATE: "/tmp/new.safetensors"}
    edit_json(layout / INDEX, lambda index: index["weight_map"].update(names))


def one_tensor_twice(layout: Path) -> None:
    """As many tensors as the model has, but one of them is another once more."""
    headers = {path: json.loads(path.read_bytes()[8:]) for path in sorted(layout.glob("*.header"))}
    (first, dropped), (second, doubled) = [
        (path, name)
        for path, header in headers.items()
        for name in header
        if name.endswith(("layers.0.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight"))
    ]
    assert first != second
    edit_header(first, lambda header: header.update({doubled: header.pop(dropped)}))
    edit_json(layout / INDEX, lambda index: index["weight_map"].pop(dropped))


def overlapping(layout: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        for name in header.keys() - {"__metadata__"}:
            begin, end = header[name]["data_offsets"]
            header[name]["data_offsets"] = [0, end - begin]

    edit_header(max(layout.glob("*.header")), edit)


def key_twice_in_the_index(layout: Path) -> None:
    text = (layout / INDEX).read_text().strip()
    (layout / INDEX).write_text(
        text[:-1] + ', "weight_map": ' + json.dumps(json.loads(text)["weight_map"]) + "}"
    )


def header_of_several_lines(layout: Path) -> None:
    (layout / "a\nbraid: all well.safetensors.header").write_bytes(b"rubbish")


LAYOUTS_IGNORED: dict[str, Edit] = {
    "other tensors": other_tensors,
    "name with dots in front": renamed("..x.safetensors"),
    "hidden name": renamed(".x.safetensors"),
    "name of code": renamed("sitecustomize.py"),
    "name of a companion": renamed("config.json"),
    "name of a pickle": renamed("x.distcp"),
    "name of the single file": renamed(SINGLE),
    "index that leads out": index_that_disagrees,
    "index that is missing": lambda layout: (layout / INDEX).unlink(),
    "header that is missing": lambda layout: first_header(layout).unlink(),
    "header too many": lambda layout: shutil.copy(first_header(layout), layout / "x.safetensors.header"),
    "one tensor twice": one_tensor_twice,
    "file for a directory": lambda layout: (shutil.rmtree(layout), layout.write_text("x")),
    "empty": lambda layout: (shutil.rmtree(layout), layout.mkdir()),
}


@pytest.mark.parametrize("harm", LAYOUTS_IGNORED)
def test_layout_that_is_ignored(place: Place, checkpoint: Path, models: MakeModel, harm: str) -> None:
    LAYOUTS_IGNORED[harm](checkpoint / "hf_layout")
    out = place.converts(to_hf(checkpoint))
    assert [path.name for path in out.glob("*.safetensors*")] == [SINGLE]
    assert_identical(tensors_of(models("qwen3", torch.bfloat16, "40KB")), tensors_of(out))


LAYOUTS_REFUSED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "overlapping": (overlapping, ("overlaps the tensor before it",)),
    "not even a header": (lambda layout: first_header(layout).write_bytes(b"rubbish!" * 9), ("its header",)),
    "header of 200 MB": (lambda layout: sparse(first_header(layout), 200_000_000), ("is larger than",)),
    "header that is a link": (lambda layout: link_out(first_header(layout)), ("is a link to",)),
    "name of several lines": (header_of_several_lines, (NOT_PLAIN,)),
    "index of 200 MB": (lambda layout: sparse(layout / INDEX, 200_000_000, b"{"), ("is larger than",)),
    "index with a key twice": (key_twice_in_the_index, ("a key occurs twice",)),
    "index without end": (lambda layout: (layout / INDEX).write_text("[" * 99_999), ("not valid JSON",)),
    "index that is a link": (lambda layout: link_out(layout / INDEX), ("is a link to",)),
}


@pytest.mark.parametrize("harm", LAYOUTS_REFUSED)
def test_layout_that_is_refused(place: Place, checkpoint: Path, harm: str) -> None:
    edit, named = LAYOUTS_REFUSED[harm]
    edit(checkpoint / "hf_layout")
    place.refused(to_hf(checkpoint), "hf_layout", *named)


def info(**values: Any) -> Edit:
    return lambda c: edit_json(c / "braid.json", lambda value: value.update(values))


INFOS_REFUSED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no JSON": (lambda c: (c / "braid.json").write_text("{"), ("braid.json is not readable JSON",)),
    "no text": (lambda c: (c / "braid.json").write_bytes(b"\xff"), ("braid.json is not readable JSON",)),
    "without end": (lambda c: (c / "braid.json").write_text("[" * 99_999), ("is not readable JSON",)),
    "of 200 MB": (lambda c: sparse(c / "braid.json", 200_000_000), ("braid.json is larger than",)),
    "a list": (lambda c: (c / "braid.json").write_text("[1]"), ("braid.json has not the format",)),
    "another format": (info(format=2), ("braid.json has not the format",)),
    "a dtype that is none": (info(hf_dtypes={NORM: "int8"}), ("hf_dtypes must map",)),
    "a function for a dtype": (info(hf_dtypes={NORM: "load"}), ("hf_dtypes must map",)),
    "dtypes in a list": (info(hf_dtypes=["bfloat16"]), ("hf_dtypes must map",)),
    "a list for a dtype": (info(adapter_dtype=["bfloat16"]), ("adapter_dtype must be",)),
    "an object for a dtype": (info(adapter_dtype={}), ("adapter_dtype must be",)),
    "missing": (lambda c: (c / "braid.json").unlink(), ("has no braid.json",)),
}


@pytest.mark.parametrize("harm", INFOS_REFUSED)
def test_braid_json_that_is_refused(place: Place, checkpoint: Path, harm: str) -> None:
    edit, named = INFOS_REFUSED[harm]
    edit(checkpoint)
    place.refused(to_hf(checkpoint), *named)


@pytest.mark.parametrize(
    "edit",
    [
        info(tied_embeddings=True, lm_head_copy=True),
        info(architecture=["a\nb"], dtype={"a": "../x"}, hf_dtypes={"../x": "float32"}),
        info(path="../../x", files={"../x": "y"}),
    ],
    ids=["LM head said to be a copy", "odd words", "surplus words"],
)
def test_braid_json_that_cannot_change_weights(
    place: Place, checkpoint: Path, models: MakeModel, edit: Edit
) -> None:
    edit(checkpoint)
    out = place.converts(to_hf(checkpoint))
    assert_identical(tensors_of(models("qwen3", torch.bfloat16, "40KB")), tensors_of(out))


def metadata(edit: Callable[[Any], Any]) -> Edit:
    """Change the content of .metadata, which is a pickle of torch's own classes."""

    def damage(checkpoint: Path) -> None:
        value = pickle.loads((checkpoint / METADATA_FILE).read_bytes())
        edit(value)
        (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(value))

    return damage


FC1 = "decoder.layers.mlp.linear_fc1.weight"
FINAL = "decoder.final_layernorm.weight"


def sized(key: str, *size: int) -> Callable[[Any], Any]:
    return lambda m: setattr(m.state_dict_metadata[key], "size", torch.Size(size))


def of_dtype(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda m: setattr(m.state_dict_metadata[FC1].properties, "dtype", dtype)


def placed(**fields: Any) -> Callable[[Any], Any]:
    return lambda m: [
        setattr(info, name, value) for info in m.storage_data.values() for name, value in fields.items()
    ]


def numbered(checkpoint: Path) -> None:
    """A pickle that numbers an object 60,000,000, which makes Python's unpickler reserve a gigabyte."""
    value = pickle.loads((checkpoint / METADATA_FILE).read_bytes())
    number = pickle.NONE + pickle.LONG_BINPUT + (60_000_000).to_bytes(4, "little") + pickle.POP
    (checkpoint / METADATA_FILE).write_bytes(b"\x80\x02" + number + pickle.dumps(value, protocol=2)[2:])


def box_in(checkpoint: Path, content: bytes) -> None:
    """Let the box of the last norm be all of a file."""
    (checkpoint / "x.distcp").write_bytes(content)

    def edit(value: Any) -> None:
        (place,) = (place for index, place in value.storage_data.items() if index.fqn == FINAL)
        place.relative_path, place.offset, place.length = "x.distcp", 0, len(content)

    metadata(edit)(checkpoint)


def compressed(checkpoint: Path) -> None:
    """A box that a few bytes would make very large."""
    plain, packed = BytesIO(), BytesIO()
    torch.save(torch.zeros(32, dtype=torch.bfloat16), plain)
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    box_in(checkpoint, packed.getvalue())


def box_numbered(checkpoint: Path) -> None:
    plain, changed = BytesIO(), BytesIO()
    torch.save(torch.zeros(32, dtype=torch.bfloat16), plain)
    number = pickle.NONE + pickle.LONG_BINPUT + (60_000_000).to_bytes(4, "little") + pickle.POP
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(changed, "w") as after:
        for name in before.namelist():
            data = before.read(name)
            after.writestr(name, data[:2] + number + data[2:] if name.endswith("data.pkl") else data)
    box_in(checkpoint, changed.getvalue())


CHECKPOINTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "file with ..": (metadata(placed(relative_path="../elsewhere/secret")), (NOT_PLAIN,)),
    "file with an absolute path": (metadata(placed(relative_path="/etc/passwd")), (NOT_PLAIN,)),
    "file with NUL": (metadata(placed(relative_path="a\0b")), (NOT_PLAIN,)),
    "file of several lines": (metadata(placed(relative_path="a\nb")), (NOT_PLAIN,)),
    "file that is a link": (lambda c: link_out(c / "__0_0.distcp"), ("__0_0.distcp", "is a link to")),
    "file that is truncated": (lambda c: os.truncate(c / "__0_0.distcp", 200), ("__0_0.distcp", "truncated")),
    "places beyond the file": (metadata(placed(offset=2**62, length=2**62)), (".distcp is truncated",)),
    "a dtype of no weights": (metadata(of_dtype(torch.int64)), ("linear_fc1.weight has dtype int64",)),
    "a dtype of fp8": (metadata(of_dtype(torch.float8_e4m3fn)), ("has dtype float8_e4m3fn",)),
    "another dtype": (metadata(of_dtype(torch.float64)), ("is not what .metadata says of it",)),
    "layers without number": (
        metadata(sized(FC1, 2**62, 96, 32)),
        ("layers.3.mlp.linear_fc1.weight has no",),
    ),
    "rows without number": (metadata(sized(FINAL, 2**62)), ("has shape [4611686018427387904]",)),
    "an object numbered 60,000,000": (numbered, (".metadata is damaged", "60000000")),
    "a box with an object numbered 60,000,000": (box_numbered, ("x.distcp is damaged at " + FINAL,)),
    "a box that is compressed": (compressed, ("x.distcp is damaged at " + FINAL,)),
    "configuration that is a link": (
        lambda c: link_out(c / "hf_companions" / "config.json"),
        ("config.json is a link to",),
    ),
    "tokenizer that is a link": (
        lambda c: link_out(c / "hf_companions" / "tokenizer.json"),
        ("tokenizer.json is a link to",),
    ),
}


@pytest.mark.parametrize("harm", CHECKPOINTS)
def test_checkpoint_that_is_refused(place: Place, checkpoint: Path, harm: str) -> None:
    edit, named = CHECKPOINTS[harm]
    edit(checkpoint)
    place.refused(to_hf(checkpoint), *named)


def test_code_in_a_checkpoint_is_not_run(place: Place, checkpoint: Path) -> None:
    """Neither a pickle's nor Python's."""
    mark = place.root / "elsewhere" / "ran"
    for name in ("common.pt", "trainer_state.pt", "__1_0.distcp", "hf_companions/pytorch_model.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Evil(mark)) + bytes(10_000))
    for name in ("sitecustomize.py", "hf_companions/modeling_evil.py", "hf_layout/conftest.py"):
        (checkpoint / name).write_text(f"open({str(mark)!r}, 'w')")
    out = place.converts(to_hf(checkpoint))
    assert not mark.exists()
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors", ".jinja", ""}
    shutil.rmtree(out)
    metadata(lambda value: setattr(value, "planner_data", Evil(mark)))(checkpoint)
    assert not mark.exists()
    place.refused(to_hf(checkpoint), ".metadata: it names builtins.exec, which has no place in a checkpoint")
