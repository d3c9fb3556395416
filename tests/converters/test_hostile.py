"""Models made to do harm, through the command line: refused in one line, or read as if the harm were not
there; nothing is written but the output, nothing of theirs is run.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from tests.launch.runs import braid, everything_in

from .conftest import MakeModel, change, edit_json, tensors_of
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
    replace_header,
    sparse,
    to_hf,
    to_mcore,
)

# Sources


def twice_in_a_header(path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    entry = json.loads(text)[NORM]
    replace_header(path, text[:-1] + b',"' + NORM.encode() + b'":' + json.dumps(entry).encode() + b"}")


def claims(shape: list[int], count: int) -> Callable[[dict[str, Any]], Any]:
    """An edit of a header, whose last tensor becomes one of that shape."""

    def edit(header: dict[str, Any]) -> None:
        last = max((name for name in header if name[0] != "_"), key=lambda n: header[n]["data_offsets"][1])
        begin = header[last]["data_offsets"][0]
        header[last] |= {"shape": shape, "data_offsets": [begin, begin + 2 * count]}

    return edit


def offsets(moved: Callable[[int, int], list[int]]) -> Edit:
    def edit(header: dict[str, Any]) -> None:
        header[GATE]["data_offsets"] = moved(*header[GATE]["data_offsets"])

    return lambda model: edit_header(model / SINGLE, edit)


def pickled(name: str) -> Edit:
    def edit(model: Path) -> None:
        torch.save(load_file(model / SINGLE), model / name)
        (model / SINGLE).unlink()

    return edit


ONE_FILE: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "link out of the directory": (lambda m: link_out(m / SINGLE), (SINGLE, "is a link to", "elsewhere")),
    "dangling link": (
        lambda m: ((m / SINGLE).unlink(), (m / SINGLE).symlink_to("gone")),
        (SINGLE, "does not exist"),
    ),
    "link in a circle": (
        lambda m: ((m / SINGLE).unlink(), (m / SINGLE).symlink_to(SINGLE)),
        (SINGLE, "does not exist"),
    ),
    "directory for a file": (
        lambda m: ((m / SINGLE).unlink(), (m / SINGLE).mkdir()),
        (SINGLE, "is not a regular file"),
    ),
    "truncated in its data": (
        lambda m: os.truncate(m / SINGLE, (m / SINGLE).stat().st_size - 1),
        (SINGLE, "is truncated"),
    ),
    "truncated in its header": (
        lambda m: os.truncate(m / SINGLE, 100),
        (SINGLE, "truncated inside its header"),
    ),
    "empty": (lambda m: os.truncate(m / SINGLE, 0), (SINGLE, "not a safetensors file")),
    "header of 200 MB": (
        lambda m: sparse(m / SINGLE, 200_000_100, (200_000_000).to_bytes(8, "little") + b"{"),
        (SINGLE, "header of 200000000 bytes"),
    ),
    "header of 90 MB of nothing": (
        lambda m: sparse(m / SINGLE, 90_000_008, (90_000_000).to_bytes(8, "little")),
        (SINGLE, "header is not valid JSON"),
    ),
    "overlapping": (offsets(lambda a, b: [a - 64, b - 64]), (SINGLE, GATE, "overlaps the tensor before it")),
    "out of range": (offsets(lambda a, b: [a + 10**15, b + 10**15]), (SINGLE, "leaves a gap")),
    "offsets of many digits": (offsets(lambda a, b: [a, 10**4299]), (SINGLE, GATE, "is malformed")),
    "a quadrillion elements, in a small file": (
        lambda m: edit_header(m / SINGLE, claims([10**15], 10**15)),
        (SINGLE, "is truncated"),
    ),
    "a dimension beyond 64 bits": (
        lambda m: edit_header(m / SINGLE, claims([2**70, 0], 0)),
        (SINGLE, "is malformed"),
    ),
    "ten thousand dimensions": (
        lambda m: edit_header(m / SINGLE, claims([1] * 10_000, 1)),
        (SINGLE, "is malformed"),
    ),
    "twice in a header": (lambda m: twice_in_a_header(m / SINGLE), (SINGLE, "a key occurs twice")),
    "metadata that is no metadata": (
        lambda m: edit_header(m / SINGLE, lambda header: header.update(__metadata__=[1])),
        (SINGLE, "__metadata__"),
    ),
    "wrong shape": (
        lambda m: change(m, lambda t: t.update({GATE: torch.zeros(32, 48, dtype=torch.bfloat16)})),
        (GATE, "[32, 48]", "[48, 32]"),
    ),
    "name of several lines": (
        lambda m: change(m, lambda t: t.update({"a\r\nbraid: all well\x1b[2J": torch.zeros(1)})),
        ("has no place in the model",),
    ),
    "pickles, .bin": (pickled("pytorch_model.bin"), ("pytorch_model.bin", "only safetensors are read")),
    "pickles, .pt": (pickled("model.pt"), ("model.pt", "only safetensors are read")),
    "tokenizer that is a link": (
        lambda m: link_out(m / "tokenizer.json"),
        ("tokenizer.json", "is a link to", "elsewhere"),
    ),
    "tokenizer that is a pipe": (
        lambda m: ((m / "tokenizer.json").unlink(), os.mkfifo(m / "tokenizer.json")),
        ("tokenizer.json", "is not a regular file"),
    ),
}


@pytest.mark.parametrize("harm", ONE_FILE)
def test_model_of_one_file(place: Place, model: Path, harm: str) -> None:
    edit, named = ONE_FILE[harm]
    edit(model)
    place.refused(to_mcore(model), *named)


def first_shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


def entry(name: str) -> Edit:
    return lambda m: edit_json(m / INDEX, lambda index: index["weight_map"].update({NORM: name}))


def file_of_several_lines(directory: Path) -> None:
    (directory / "a\nb.safetensors").write_bytes(b"rubbish")
    entry("a\nb.safetensors")(directory)


def tensor_in_two_shards(directory: Path) -> None:
    """The second file is one of the index, and holds one tensor more than the index says."""
    first, *_, last = sorted(directory.glob("model-*.safetensors"))
    both = load_file(last) | {min(load_file(first)): torch.zeros(1)}
    save_file(both, last, {"format": "pt"})


def reshape_in_a_shard(directory: Path) -> None:
    shard = directory / json.loads((directory / INDEX).read_text())["weight_map"][GATE]
    save_file(load_file(shard) | {GATE: torch.zeros(32, 48, dtype=torch.bfloat16)}, shard, {"format": "pt"})


SHARDS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "index with ..": (
        entry("../elsewhere/secret.safetensors"),
        ("../elsewhere/secret.safetensors", NOT_PLAIN),
    ),
    "index with .. alone": (entry(".."), (NOT_PLAIN,)),
    "index with an absolute path": (entry("/etc/passwd"), ("/etc/passwd", NOT_PLAIN)),
    "index with NUL": (entry("model-00001\0.safetensors"), (NOT_PLAIN,)),
    "index with a backslash": (entry("..\\elsewhere\\secret.safetensors"), (NOT_PLAIN,)),
    "index with a lone surrogate": (entry("\ud800.safetensors"), (NOT_PLAIN,)),
    "index with a name of several lines": (file_of_several_lines, (NOT_PLAIN,)),
    "index with a name too long": (entry("x" * 5000), ("does not exist",)),
    "index that names pickles": (
        entry("pytorch_model.bin"),
        ("pytorch_model.bin", "only safetensors are read"),
    ),
    "index that names itself": (entry(INDEX), (INDEX,)),
    "index of 200 MB": (lambda m: sparse(m / INDEX, 200_000_000, b"{"), (INDEX, "is larger than")),
    "index that is a link": (lambda m: link_out(m / INDEX), (INDEX, "is a link to")),
    "index without end": (
        lambda m: (m / INDEX).write_text('{"weight_map":' * 9999),
        (INDEX, "not valid JSON"),
    ),
    "shard that is a link": (lambda m: link_out(first_shard(m)), ("model-00001", "is a link to")),
    "shard that is missing": (lambda m: first_shard(m).unlink(), ("model-00001", "does not exist")),
    "shard that is truncated": (
        lambda m: os.truncate(first_shard(m), 30_000),
        ("model-00001", "is truncated"),
    ),
    "tensor in two shards": (tensor_in_two_shards, ("-of-00004.safetensors", "too; keep one of them")),
    "wrong shape": (reshape_in_a_shard, (GATE, "[32, 48]", "[48, 32]")),
}


@pytest.mark.parametrize("harm", SHARDS)
def test_model_of_several_files(place: Place, sharded: Path, harm: str) -> None:
    edit, named = SHARDS[harm]
    edit(sharded)
    place.refused(to_mcore(sharded), *named)


def test_tensors_that_claim_terabytes(place: Place, model: Path) -> None:
    """In a file that is as large as it says, but takes no room: as much is neither allocated nor written."""
    rows = 10**12 // 64
    edit_json(model / "config.json", lambda config: config.update(vocab_size=rows))
    tensors = load_file(model / SINGLE)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, model / SINGLE, {"format": "pt"})
    content = (model / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    end = len(content) - 8 - length
    entry = {"dtype": "BF16", "shape": [rows, 32], "data_offsets": [end, end + rows * 64]}
    edit_header(model / SINGLE, lambda header: header.update({"model.embed_tokens.weight": entry}))
    os.truncate(model / SINGLE, (model / SINGLE).stat().st_size + rows * 64)
    before = sorted(place.root.rglob("*"))
    place.capsys.readouterr()
    try:
        assert main([*to_mcore(model), "--output_dir", str(place.out)]) == 2
    finally:
        (model / SINGLE).unlink()  # a copy or an archive of it would take the room
    assert len(place.capsys.readouterr().err.splitlines()) == 1
    assert sorted([*place.root.rglob("*"), model / SINGLE]) == before


def test_processes_of_their_own(place: Place, sharded: Path) -> None:
    """What a shell sees: refused before there is a plan, after it, and when all weights are written."""
    (place.root / "full").mkdir()
    (place.root / "full" / "kept").write_text("x")
    harms: tuple[tuple[Edit, Path, str], ...] = (
        (lambda m: link_out(m / "tokenizer.json"), place.out, "tokenizer.json is a link to"),
        (lambda m: None, place.root / "full", "is not empty"),
        (lambda m: first_shard(m).unlink(), place.out, "does not exist"),
    )
    for edit, out, named in harms:
        edit(sharded)
        before = everything_in(place.root)
        run = braid(*to_mcore(sharded), "--output_dir", str(out), cache=place.root.parent / "cache")
        assert (run.code, run.stdout, run.left_running) == (2, "", ())
        assert len(run.stderr.splitlines()) == 1, run.stderr
        assert run.stderr.startswith("braid convert: error: ")
        assert named in run.stderr
        assert everything_in(place.root) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_that_are_no_numbers(
    place: Place, models: MakeModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Quiet and signalling NaNs of any payload, infinities, denormals: bytes like others."""
    model = Path(shutil.copytree(models("qwen2-tied", dtype), tmp_path / "model"))
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    generator = torch.Generator().manual_seed(1)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            limits = torch.iinfo(bits)
            noise = torch.randint(limits.min, limits.max, tensor.shape, generator=generator, dtype=bits)
            tensors[name] = noise.view(dtype)
        tensors[NORM] = torch.full((32,), float("nan"), dtype=dtype)

    change(model, edit)
    assert any(tensor.isnan().any() for name, tensor in tensors_of(model).items() if name != NORM)
    checkpoint = shutil.move(place.converts(to_mcore(model)), tmp_path / "checkpoint")
    out = place.converts(to_hf(checkpoint))
    assert (out / SINGLE).read_bytes() == (model / SINGLE).read_bytes()


# Code


def test_code_beside_the_weights_is_not_run(place: Place, model: Path) -> None:
    """Neither what config.json names, nor what is called like a module that the command imports."""
    mark = place.root / "elsewhere" / "ran"
    code = f"open({str(mark)!r}, 'w').write(__name__)\nclass Evil: pass\n"
    names = ("modeling_evil", "configuration_evil", "tokenization_evil", "modeling_qwen2", "sitecustomize",
             "conftest", "setup", "__init__", "torch", "json", "safetensors", "yaml", "launch")  # fmt: skip
    for name in names:
        (model / f"{name}.py").write_text(code)
    auto = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    harm = {
        "auto_map": auto,
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": "modeling_evil.Evil"}},
    }
    edit_json(model / "config.json", lambda config: config.update(harm))
    (model / "tokenizer_config.json").write_text(json.dumps(harm | {"tokenizer_class": "Evil"}))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    checkpoint = place.root / "checkpoint"
    for words, out in ((to_mcore(model), checkpoint), (to_hf(checkpoint), place.out)):
        run = braid(*words, "--output_dir", str(out), cache=place.root / "cache")
        assert (run.code, run.stderr) == (0, "")
    assert main(["verify", "--model", str(model), "--checkpoint", str(checkpoint)]) == 0
    assert not mark.exists()
    for out in (checkpoint, place.out):
        assert not [path for path in out.rglob("*") if path.suffix in (".py", ".bin")]
    assert (place.out / "config.json").read_bytes() == (model / "config.json").read_bytes()
