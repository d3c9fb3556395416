"""`inspect_checkpoint` says what every kind of checkpoint is, and counts what safetensors counts."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from converters.convert import to_mcore
from converters.inspect import inspect_checkpoint
from converters.inspection import grouped
from engine.config.options import ParallelOptions
from engine.storage.metadata import DistChunk, DistTensor, write_metadata
from tests.support.models import save_tiny_model
from tests.support.training import save_after_idle_step
from tests.support.workers import WorkerPool

from .conftest import MakeModel, edit_json, tensors_of
from .inspecting import EMBEDDING, FC2, box, boxes_of, content, make_adapter, without_braid_files

ROOT = Path(__file__).parents[2]
PADDING = (1024 - 1003) * 32


@pytest.fixture(scope="module")
def trained(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint, of TP2 x PP2; not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    model = save_tiny_model("qwen2_untied", root / "model")
    parallel = ParallelOptions(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    workers.run(
        save_after_idle_step, 4, model_dir=str(model), parallel=parallel, output_dir=str(root / "run")
    )
    return root / "run" / "checkpoint-0"


@pytest.fixture(scope="module")
def foreign(models: MakeModel, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Megatron itself saves under TP4, without any file of braid's; not to be changed."""
    root = tmp_path_factory.mktemp("foreign")
    job = ("4", str(models("qwen2-tied")), str(converted))
    words = ["-m", "tests.converters.megatron_worker", str(root / "store"), str(root / "iter_0000123"), *job]
    result = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return root / "iter_0000123"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A PEFT directory and the checkpoint that it becomes; not to be changed."""
    return make_adapter(tmp_path_factory.mktemp("adapter"))


def test_a_converted_checkpoint(converted: Path, models: MakeModel) -> None:
    found = inspect_checkpoint(converted)
    source = tensors_of(models("qwen2-tied"))
    elements = sum(tensor.numel() for tensor in source.values())
    assert (found.kind, found.step, found.problems, found.notes) == ("converted", None, (), ())
    assert found.model is not None
    assert found.model.described_by == "config.json"
    assert (found.model.architecture, found.model.num_layers) == ("Qwen2ForCausalLM", 3)
    assert (found.model.hidden_size, found.model.ffn_hidden_size, found.model.head_dim) == (32, 48, 4)
    assert (found.model.num_attention_heads, found.model.num_query_groups) == (8, 4)
    assert (found.model.vocab_size, found.model.tied_embeddings) == (1003, True)
    assert found.model.parameters == elements
    assert [item.content for item in found.contents] == ["weights"]
    weights = content(found, "weights")
    assert weights.elements == elements + PADDING
    assert weights.bytes == 2 * weights.elements
    assert weights.dtypes == ("bfloat16",)
    assert (weights.keys, weights.tensors, weights.boxes) == (9, 2 + 3 * 7, 2 + 3 * 7)
    assert found.layout is not None
    assert (found.layout.source, found.layout.tp, found.layout.pp) == ("deduced", 1, None)
    assert found.manifest is not None
    assert (found.manifest.kind, found.manifest.command) == ("mcore", "braid convert --to mcore")
    assert found.manifest.source_path == str(models("qwen2-tied"))
    assert found.manifest.tensors == len(source)
    on_disk = {p.relative_to(converted).as_posix(): p for p in converted.rglob("*") if p.is_file()}
    assert {file.name: file.bytes for file in found.files} == {
        name: path.stat().st_size for name, path in on_disk.items()
    }


def test_stacked_and_numbered_layers_are_one_group(converted: Path, models: MakeModel) -> None:
    stacked = {group.name: group for group in grouped(inspect_checkpoint(converted).tensors)}
    assert len(stacked) == 9
    assert (stacked[FC2].layers, stacked[FC2].first.shape) == (3, (3, 32, 48))
    assert stacked[EMBEDDING].layers is None
    numbered = {group.name: group for group in grouped(inspect_checkpoint(models("qwen3")).tensors)}
    assert len(numbered) == 3 + 11
    down = numbered["model.layers.*.mlp.down_proj.weight"]
    assert (down.layers, down.first.shape, down.bytes) == (3, (32, 48), 3 * 32 * 48 * 2)
    assert numbered["lm_head.weight"].layers is None


def test_a_layer_of_another_shape_has_a_group_of_its_own(tmp_path: Path) -> None:
    chunks = [
        DistChunk(offsets=(0,), sizes=(size,), file="__0_0.distcp", start=0, length=8) for size in (2, 2, 3)
    ]
    tensors = [
        DistTensor(key=f"decoder.layers.{i}.x", shape=chunk.sizes, dtype=torch.int8, chunks=(chunk,))
        for i, chunk in enumerate(chunks)
    ]
    write_metadata(tmp_path / ".metadata", tensors)
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / "__0_0.distcp").write_bytes(bytes(8))
    groups = grouped(inspect_checkpoint(tmp_path).tensors)
    assert [(group.name, group.layers) for group in groups] == [
        ("decoder.layers.*.x", 2),
        ("decoder.layers.2.x", None),
    ]


def test_a_checkpoint_of_a_run(trained: Path) -> None:
    found = inspect_checkpoint(trained)
    assert (found.kind, found.problems) == ("training", ())
    assert (found.step, found.step_source, found.total_steps) == (0, "trainer_state.json", 1)
    assert found.layout is not None
    assert (found.layout.source, found.layout.writers) == ("trainer_state.json", 4)
    assert (found.layout.tp, found.layout.pp, found.layout.vpp) == (2, 2, 1)
    assert (found.layout.cp, found.layout.dp) == (1, 1)
    assert (found.layout.ep, found.layout.etp) == (None, None)  # it has no experts
    boxes = boxes_of(found)
    assert boxes[FC2] == box(8, 1, 64, 48)
    assert boxes["decoder.layers.mlp.linear_fc1.weight"] == box(16, 1, 48, 64)
    assert boxes["decoder.layers.self_attention.linear_qkv.layer_norm_weight"] == box(4, 1, 64)
    assert boxes[EMBEDDING] == box(2, 256, 64)
    weights, optimizer = content(found, "weights"), content(found, "optimizer")
    assert found.model is not None
    assert weights.elements == found.model.parameters
    # Main weights and both moments, all of them fp32.
    assert optimizer.elements == 3 * weights.elements
    assert optimizer.bytes == 4 * optimizer.elements
    assert optimizer.tensors == 3 * weights.tensors


def test_the_layout_of_experts(
    workers: WorkerPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ep` and `etp` of a model that has some; a checkpoint of a time before is read without them."""
    from launch.inspect import inspect

    model = save_tiny_model("qwen3_moe", tmp_path / "model")
    parallel = ParallelOptions(expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    run = tmp_path / "run"
    workers.run(save_after_idle_step, 4, model_dir=str(model), parallel=parallel, output_dir=str(run))
    checkpoint = run / "checkpoint-0"
    degrees = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 4}
    assert json.loads((checkpoint / "trainer_state.json").read_text())["layout"] == {
        **degrees,
        "ep": 2,
        "etp": 2,
    }
    found = inspect_checkpoint(checkpoint)
    assert found.good
    assert found.layout is not None
    assert (found.layout.dp, found.layout.ep, found.layout.etp) == (4, 2, 2)
    capsys.readouterr()
    assert inspect([str(checkpoint)]) == 0
    assert "tp 1, pp 1, vpp 1, cp 1, dp 4, ep 2, etp 2, 4 ranks wrote" in capsys.readouterr().out

    edit_json(checkpoint / "trainer_state.json", lambda state: state.update(layout=degrees))
    (checkpoint / "braid-manifest.json").unlink()
    found = inspect_checkpoint(checkpoint)
    assert found.good
    assert found.layout is not None
    assert (found.layout.dp, found.layout.ep, found.layout.etp) == (4, None, None)


def test_a_run_without_its_files_is_told_from_its_boxes(trained: Path, tmp_path: Path) -> None:
    copy = without_braid_files(trained, tmp_path / "checkpoint-70")
    found = inspect_checkpoint(copy)
    assert (found.kind, found.step, found.step_source) == ("megatron", 70, "directory name")
    assert (found.problems, found.notes, found.manifest) == ((), (), None)
    assert found.layout is not None
    assert (found.layout.source, found.layout.tp, found.layout.pp) == ("deduced", 2, None)
    assert found.layout.writers == 4
    assert found.model is not None
    assert (found.model.described_by, found.model.architecture) == ("tensors", None)
    assert (found.model.num_layers, found.model.hidden_size, found.model.ffn_hidden_size) == (4, 64, 96)
    assert (found.model.vocab_size, found.model.tied_embeddings) == (512, False)
    assert found.model.parameters == content(found, "weights").elements


def test_what_megatron_saved(foreign: Path, models: MakeModel) -> None:
    found = inspect_checkpoint(foreign)
    assert (found.kind, found.problems, found.notes) == ("megatron", (), ())
    assert (found.step, found.step_source) == (123, "directory name")
    assert found.layout is not None
    assert (found.layout.source, found.layout.tp) == ("deduced", 4)
    assert boxes_of(found)[FC2] == box(3 * 4, 1, 32, 12)
    elements = sum(tensor.numel() for tensor in tensors_of(models("qwen2-tied")).values())
    assert content(found, "weights").elements == elements + PADDING
    assert (content(found, "optimizer").keys, content(found, "optimizer").elements) == (1, 2)
    assert found.model is not None
    assert (found.model.num_layers, found.model.vocab_size) == (3, 1024)
    assert found.model.tied_embeddings is True


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_a_hugging_face_directory_counts_as_safetensors_does(models: MakeModel, shard_size: str) -> None:
    directory = models("qwen3", torch.bfloat16, shard_size)
    expected = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                part = opened.get_slice(name)
                size = math.prod(part.get_shape()) * 2
                expected[name] = (tuple(part.get_shape()), part.get_dtype(), size, (file.name,))
    found = inspect_checkpoint(directory)
    assert (found.kind, found.problems, found.layout) == ("huggingface", (), None)
    assert {
        t.name: (t.shape, {"bfloat16": "BF16"}[t.dtype], t.bytes, t.files) for t in found.tensors
    } == expected
    weights = content(found, "weights")
    assert weights.bytes == sum(size for _, _, size, _ in expected.values())
    assert weights.tensors == len(expected)
    assert found.model is not None
    assert found.model.parameters == weights.elements
    assert len({file for tensor in found.tensors for file in tensor.files}) == len(
        list(directory.glob("*.safetensors"))
    )


def test_adapters_in_either_format(adapter: tuple[Path, Path]) -> None:
    peft, mcore = map(inspect_checkpoint, adapter)
    assert (peft.kind, peft.model, peft.problems) == ("peft", None, ())
    assert (mcore.kind, mcore.problems) == ("adapter", ())
    elements = sum(tensor.numel() for tensor in tensors_of(adapter[0]).values())
    for found in (peft, mcore):
        assert found.adapter is not None
        assert (found.adapter.method, found.adapter.rank, found.adapter.alpha) == ("LORA", 3, 8)
        assert found.adapter.target_modules == ("down_proj", "q_proj")
        assert [item.content for item in found.contents] == ["adapter"]
        assert content(found, "adapter").elements == elements
        assert content(found, "adapter").tensors == 4 * 2 * 2  # layers, projections, A and B
    assert mcore.model is not None
    assert mcore.model.num_layers == 4
    assert mcore.layout is not None
    assert mcore.layout.tp == 1


def test_an_adapter_without_its_files_is_still_one(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    copy = without_braid_files(adapter[1], tmp_path / "x")
    found = inspect_checkpoint(copy)
    assert (found.kind, found.adapter, found.model, found.problems) == ("adapter", None, None, ())


def test_conversions_of_both_directions_are_good(models: MakeModel, tmp_path: Path) -> None:
    for kind in ("qwen2", "qwen3"):
        to_mcore(models(kind), tmp_path / kind, dtype=torch.float32)
        found = inspect_checkpoint(tmp_path / kind)
        assert found.good
        assert content(found, "weights").dtypes == ("float32",)


def test_no_tensor_is_read(
    trained: Path, converted: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor is read")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("os.preadv", refuse)
    for directory in (trained, converted, sharded):
        assert inspect_checkpoint(directory).good


@pytest.mark.parametrize(
    ("name", "step"),
    [("iter_0000123", 123), ("checkpoint-500", 500), ("checkpoint-final", None), ("xcheckpoint-5", None)],
)
def test_the_step_of_a_name(checkpoint: Path, name: str, step: int | None) -> None:
    checkpoint.rename(checkpoint.with_name(name))
    assert inspect_checkpoint(checkpoint.with_name(name)).step == step


def test_the_state_wins_over_the_name(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "checkpoint-9"))
    assert inspect_checkpoint(copy).step == 0


def test_as_dict_is_json_and_has_everything(trained: Path) -> None:
    found = inspect_checkpoint(trained)
    value = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert value["good"] is True
    assert value["bytes"] == sum(tensor["bytes"] for tensor in value["tensors"])
    assert value["file_bytes"] == sum(path.stat().st_size for path in trained.rglob("*") if path.is_file())
    assert value["contents"]["weights"]["boxes"] == content(found, "weights").boxes
    assert value["layout"]["tp"] == 2
    assert value["adapter"] is None
