"""`inspect_checkpoint` sees what is missing, cut off or out of place, and refuses in one line what it cannot
describe.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from converters.adapter import ADAPTER_FILE
from converters.hf.reader import INDEX_FILE, SINGLE_FILE
from converters.inspect import inspect_checkpoint
from engine.errors import CheckpointError, ModelError
from engine.storage.manifest import MANIFEST_FILE

from .conftest import MakeModel, edit_json
from .inspecting import EMBEDDING, FC2, content, edit_metadata, make_adapter, one_problem, refused


@pytest.fixture
def unlisted(checkpoint: Path) -> Path:
    """One without a manifest."""
    (checkpoint / MANIFEST_FILE).unlink()
    return checkpoint


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A PEFT directory and the checkpoint that it becomes; not to be changed."""
    return make_adapter(tmp_path_factory.mktemp("adapter"))


# Megatron


def test_a_truncated_and_a_missing_file(unlisted: Path) -> None:
    data = unlisted / "__0_0.distcp"
    size = data.stat().st_size
    with open(data, "r+b") as file:
        file.truncate(size - 1)
    found = one_problem(unlisted, "__0_0.distcp", "is cut off", f"{size - 1} bytes", str(size))
    assert content(found, "weights").keys == 9
    data.unlink()
    one_problem(unlisted, "__0_0.distcp", "does not exist", "23 boxes")


def test_a_file_that_is_cut_off_behind_its_tensors(unlisted: Path) -> None:
    """Empty `_extra_state` objects are all that is in it."""
    path = unlisted / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    one_problem(unlisted, "__1_0.distcp", "cut off within an object")


def test_a_manifest_knows_every_file(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").unlink()
    one_problem(checkpoint, "__1_0.distcp", "is missing", MANIFEST_FILE)
    (checkpoint / "__1_0.distcp").write_bytes(b"")
    found = inspect_checkpoint(checkpoint)
    assert {problem.file for problem in found.problems} == {"__1_0.distcp"}


def test_sizes_that_the_manifest_does_not_say(checkpoint: Path) -> None:
    (checkpoint / "run_config.yaml").write_text("x")
    (checkpoint / "mine.txt").write_text("x")
    found = one_problem(checkpoint, "run_config.yaml", "has 1 bytes", MANIFEST_FILE)
    assert found.notes == (f"mine.txt is not in {MANIFEST_FILE}",)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1, "files": {"a": 3}}', '{"format": 1, "versions": [3]}']
)
def test_a_damaged_manifest(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST_FILE).write_text(text)
    assert one_problem(checkpoint, MANIFEST_FILE).manifest is None


def test_a_rank_whose_file_is_lost(unlisted: Path) -> None:
    """Every rank saves its random generators, be there no tensor in its file."""
    state = {"step": 7, "total_steps": 9, "layout": {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 3}}
    (unlisted / "trainer_state.json").write_text(json.dumps(state))
    found = one_problem(unlisted, "trainer_state.json", "no file of rank 2,", "3 ranks")
    assert (found.kind, found.step) == ("training", 7)
    shutil.copyfile(unlisted / "__1_0.distcp", unlisted / "__2_0.distcp")
    assert inspect_checkpoint(unlisted).good


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{}",
        '{"step": -1, "layout": {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}}',
        '{"step": 1, "layout": {"tp": 1, "pp": 1, "vpp": 1, "cp": 1}}',
        '{"step": 1, "layout": {"tp": 0, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}}',
        '{"step": 1, "layout": {"tp": "2", "pp": 1, "vpp": 1, "cp": 1, "dp": 1}}',
        '{"step": 1, "layout": {"tp": 1000000, "pp": 1000000, "vpp": 1, "cp": 1, "dp": 1}}',
        '{"step": 1, "layout": 3}',
    ],
)
def test_a_damaged_state(unlisted: Path, state: str) -> None:
    (unlisted / "trainer_state.json").write_text(state)
    found = one_problem(unlisted, "trainer_state.json")
    assert found.kind == "training"
    assert found.layout is not None
    assert (found.layout.source, found.step) == ("deduced", None)


def test_boxes_that_do_not_fill_their_tensor(checkpoint: Path) -> None:
    edit_metadata(checkpoint, lambda m: m.state_dict_metadata[FC2].chunks.pop())
    one_problem(checkpoint, ".metadata", FC2, f"{2 * 32 * 48} of {3 * 32 * 48} elements")


def test_boxes_on_top_of_each_other(checkpoint: Path) -> None:
    def twice(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata[FC2].chunks
        chunks[1] = chunks[0]

    edit_metadata(checkpoint, twice)
    one_problem(checkpoint, ".metadata", FC2, "incomplete")


def test_another_models_config(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    edit_json(checkpoint / "hf_companions" / "config.json", lambda c: c.update(num_hidden_layers=4))
    one_problem(checkpoint, ".metadata", "no layer 3")
    edit_json(checkpoint / "hf_companions" / "config.json", lambda c: c.update(num_hidden_layers=10**9))
    one_problem(checkpoint, "config.json", "num_hidden_layers must be at most 10000, not 1000000000")


def test_companions_that_were_not_copied(unlisted: Path) -> None:
    shutil.rmtree(unlisted / "hf_companions")
    found = one_problem(unlisted, "braid.json", "copied incompletely")
    assert found.kind == "converted"
    assert found.model is not None
    assert found.model.described_by == "tensors"


def test_an_adapter_of_another_rank(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter[1], tmp_path / "x"))
    (copy / MANIFEST_FILE).unlink()
    edit_json(copy / "hf_companions" / "adapter_config.json", lambda c: c.update(r=5))
    one_problem(copy, ".metadata", "has shape [3, 64]", "asks for [5, 64]")


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_without_a_description(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    refused(checkpoint, "is incomplete", name)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (exec, (f"open({str(self.target)!r}, 'w')",))


def test_hostile_metadata_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    edit_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", Evil(tmp_path / "ran")))
    refused(checkpoint, ".metadata", "builtins.exec")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("digits", [12, 18, 5000])
def test_sizes_that_no_disk_holds(checkpoint: Path, digits: int) -> None:
    def edit(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[EMBEDDING]
        entry.size = (10**digits, 10**digits)

    edit_metadata(checkpoint, edit)
    refused(checkpoint, ".metadata")


def test_files_outside_the_directory_are_not_looked_at(unlisted: Path) -> None:
    def edit(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../x\n"

    edit_metadata(unlisted, edit)
    (unlisted.parent / "x\n").write_bytes(bytes(10**6))
    (problem,) = inspect_checkpoint(unlisted).problems
    assert "not a plain file name" in problem.text
    assert problem.text.isprintable()


def test_a_pipe_is_not_waited_for(unlisted: Path) -> None:
    os.mkfifo(unlisted / "trainer_state.json")
    one_problem(unlisted, "trainer_state.json", "no regular file")


# Hugging Face and PEFT


def test_a_truncated_shard_is_described_all_the_same(sharded: Path) -> None:
    whole = inspect_checkpoint(sharded)
    path = sharded / "model-00002-of-00004.safetensors"
    assert path.exists()
    path.write_bytes(path.read_bytes()[:-5])
    found = one_problem(sharded, path.name, "is truncated")
    assert {tensor.name for tensor in found.tensors} == {tensor.name for tensor in whole.tensors}


def test_a_shard_whose_header_is_damaged(sharded: Path) -> None:
    path = sharded / "model-00002-of-00004.safetensors"
    count = len([tensor for tensor in inspect_checkpoint(sharded).tensors if path.name in tensor.files])
    path.write_bytes(b"\xff" * 100)
    found = one_problem(sharded, path.name, "truncated, or not a safetensors file")
    assert count > 0
    assert content(found, "weights").tensors == 36 - count


def test_a_missing_shard(sharded: Path) -> None:
    path = sharded / "model-00003-of-00004.safetensors"
    count = len([tensor for tensor in inspect_checkpoint(sharded).tensors if path.name in tensor.files])
    path.unlink()
    found = one_problem(sharded, path.name, "does not exist", f"{count} tensors are listed in it")
    assert content(found, "weights").tensors == 36 - count


def test_several_damaged_shards_are_all_named(sharded: Path) -> None:
    (sharded / "model-00001-of-00004.safetensors").unlink()
    (sharded / "model-00004-of-00004.safetensors").write_bytes(b"")
    names = [problem.file for problem in inspect_checkpoint(sharded).problems]
    assert sorted(names) == ["model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index(sharded: Path, text: str) -> None:
    (sharded / INDEX_FILE).write_text(text)
    assert content(one_problem(sharded, INDEX_FILE), "weights").tensors == 36


def test_a_missing_index(sharded: Path) -> None:
    (sharded / INDEX_FILE).unlink()
    assert content(one_problem(sharded, INDEX_FILE, "download it again"), "weights").tensors == 36


def test_an_index_that_lists_too_much(sharded: Path) -> None:
    first = "model-00001-of-00004.safetensors"
    edit_json(sharded / INDEX_FILE, lambda index: index["weight_map"].update(more=first))
    one_problem(sharded, INDEX_FILE, "tensor more is listed")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 2}, "weights of 3 layers, config.json says 2"),
        ({"intermediate_size": 64}, "has another shape"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"hidden_size": "x"}, "hidden_size must be a positive integer, not 'x'"),
        ({"rope_scaling": "x"}, "rope_scaling must be a JSON object, not 'x'"),
        ({"vocab_size": 2**60}, f"vocab_size must be at most {2**40}"),
    ],
)
def test_a_config_that_does_not_fit(model: Path, change: dict[str, Any], said: str) -> None:
    edit_json(model / "config.json", lambda config: config.update(change))
    one_problem(model, "config.json", said)


def test_a_config_that_is_not_for_braid_is_a_note(model: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(hidden_act="gelu"))
    found = inspect_checkpoint(model)
    assert found.good
    assert "hidden_act 'gelu' is not supported" in found.notes[0]


def test_a_tied_head_that_is_stored_is_right(models: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(models("qwen2-tied"), tmp_path / "x"))
    tensors = load_file(directory / SINGLE_FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / SINGLE_FILE)
    assert inspect_checkpoint(directory).good


def test_a_directory_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    found = one_problem(model, "config.json", "has no config.json")
    assert found.model is None


def test_another_architecture_is_a_note(model: Path) -> None:
    edit_json(model / "config.json", lambda c: c.update(architectures=["Llama\nForCausalLM"]))
    found = inspect_checkpoint(model)
    assert found.good
    assert "Llama\\nForCausalLM is not supported" in found.notes[0]
    assert found.model is not None
    assert (found.model.architecture, found.model.hidden_size) == ("Llama\nForCausalLM", 32)
    assert found.model.parameters == content(found, "weights").elements


def test_quantised_weights_are_described(model: Path) -> None:
    header = json.dumps({"x": {"dtype": "F8_E5M2", "shape": [2, 3], "data_offsets": [0, 6]}}).encode()
    (model / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    (model / "config.json").write_text('{"architectures": ["Other"]}')
    found = inspect_checkpoint(model)
    assert content(found, "weights").dtypes == ("F8_E5M2",)
    assert content(found, "weights").bytes == 6


def test_a_shape_that_no_disk_holds(model: Path) -> None:
    """Of a dtype that is not known the bytes do not say how many elements there can be."""
    entry = {"dtype": "F8_E5M2", "shape": [2**40, 2**40], "data_offsets": [0, 6]}
    header = json.dumps({"x": entry}).encode()
    (model / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    refused(model, SINGLE_FILE, "x is larger than any disk")


def test_a_single_file_without_a_header_cannot_be_described(model: Path) -> None:
    (model / SINGLE_FILE).write_bytes(b"x" * 20)
    refused(model, SINGLE_FILE, "not a safetensors file")


def test_peft_without_its_config_and_with_one_that_is_not_for_braid(
    adapter: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapter[0], tmp_path / "x"))
    edit_json(copy / "adapter_config.json", lambda c: c.update(use_dora=True, r=1.5, lora_alpha=math.inf))
    found = inspect_checkpoint(copy)
    assert found.good
    assert "adapter_config.json" in found.notes[0]
    assert found.adapter is not None
    assert (found.adapter.rank, found.adapter.alpha) == (None, None)
    json.dumps(found.as_dict(), allow_nan=False)
    (copy / "adapter_config.json").write_text("{")
    assert one_problem(copy, "adapter_config.json", "not readable JSON").adapter is None
    (copy / "adapter_config.json").unlink()
    one_problem(copy, "adapter_config.json", "copy it beside the weights")
    (copy / ADAPTER_FILE).write_bytes(b"")
    refused(copy, ADAPTER_FILE)


def test_a_link_to_nowhere(model: Path) -> None:
    (model / "notes.txt").symlink_to("nowhere")
    one_problem(model, "notes.txt", "cannot be read")


# What is no checkpoint


def test_a_run_and_its_newest_checkpoint(converted: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000", "hf", ".checkpoint-2000.partial"):
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copyfile(converted / ".metadata", tmp_path / "out" / name / ".metadata")
    (tmp_path / "out" / "args.yaml").write_text("")
    refused(tmp_path / "out", f"pass one in it, such as {tmp_path / 'out' / 'checkpoint-1000'} (and 2 more)")


def test_an_unfinished_conversion(tmp_path: Path) -> None:
    (tmp_path / ".records").mkdir()
    refused(tmp_path, "has not finished")


def test_what_is_no_checkpoint(model: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")
    refused(model / SINGLE_FILE, "is a file; pass the directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is no checkpoint that braid reads", ".metadata", SINGLE_FILE)
    (model / SINGLE_FILE).rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors are read"):
        inspect_checkpoint(model)
    (model / ".metadata").mkdir()
    with pytest.raises(CheckpointError, match="incomplete"):
        inspect_checkpoint(model)
