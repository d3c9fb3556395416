"""Megatron's checkpoint format: Megatron reads ours, we read Megatron's, and damage or malice is refused."""

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from converters.convert import to_hf, to_mcore
from converters.hf.reader import HfReader
from converters.mapping import HfTensor, Sharded, Weight, weight_map
from converters.mcore.companions import write_companions
from converters.mcore.frame import _COMMON, extra_state_keys, write_frame
from converters.mcore.layout import plan_checkpoint
from converters.mcore.places import place_of
from converters.mcore.reader import DistReader, check_checkpoint
from converters.transfer import TransferOptions, write_files
from engine.errors import CheckpointError
from engine.model.spec import load_model_spec
from engine.storage.reader import check_files

from .conftest import KINDS, MakeModel, MemorySource, assert_identical, tensors_of

ROOT = Path(__file__).parents[2]
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


def test_megatron_loads_and_saves_the_checkpoint(models: MakeModel, tmp_path: Path) -> None:
    """Every tensor-parallel rank gets its part, and what Megatron saves of it converts back to the source."""
    jobs: list[str] = []
    for tp_size, source in ((1, models("qwen2-tied")), (4, models("qwen2")), (2, models("qwen3"))):
        to_mcore(source, tmp_path / f"mcore{tp_size}")
        jobs += [str(tp_size), str(source), str(tmp_path / f"mcore{tp_size}")]
    paths = [str(tmp_path / "store"), str(tmp_path / "saved")]
    command = [sys.executable, "-m", "tests.converters.megatron_worker", *paths, *jobs]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]

    saved = DistReader(tmp_path / "saved")
    assert "optimizer.state.exp_avg.x" in saved.tensors
    assert len(saved.tensors[place_of(QKV).key].chunks) == 3 * 2  # layers, TP ranks
    write_companions(models("qwen3"), tmp_path / "saved")
    to_hf(tmp_path / "saved", tmp_path / "hf")
    assert_identical(tensors_of(models("qwen3")), tensors_of(tmp_path / "hf"))


def test_keys_and_shapes_are_megatrons(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen3"), tmp_path / "mcore")
    shapes = {key: tensor.shape for key, tensor in DistReader(tmp_path / "mcore").tensors.items()}
    assert shapes == {
        "embedding.word_embeddings.weight": (1024, 32),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 32),
        "decoder.layers.self_attention.linear_qkv.weight": (3, 96, 32),
        "decoder.layers.self_attention.q_layernorm.weight": (3, 6),
        "decoder.layers.self_attention.k_layernorm.weight": (3, 6),
        "decoder.layers.self_attention.linear_proj.weight": (3, 32, 48),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 32),
        "decoder.layers.mlp.linear_fc1.weight": (3, 96, 32),
        "decoder.layers.mlp.linear_fc2.weight": (3, 32, 48),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (1024, 32),
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_itself_reads_the_checkpoint(models: MakeModel, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader, load

    to_mcore(models("qwen2"), tmp_path / "mcore")
    state = {place_of(QKV).key: torch.zeros(3, 64, 32, dtype=torch.bfloat16)}
    load(state, storage_reader=FileSystemReader(tmp_path / "mcore"), no_dist=True)
    weight = weight_map(load_model_spec(models("qwen2")))[QKV]
    assert torch.equal(state[place_of(QKV).key][1], weight.to_megatron(HfReader(models("qwen2")).read_slice))


# What is beside the data


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_names_every_weight_and_state_and_nothing_else(
    models: MakeModel, tmp_path: Path, kind: str
) -> None:
    """As torch's own classes have it."""
    to_mcore(models(kind), tmp_path / "mcore")
    spec = load_model_spec(models(kind))
    metadata = pickle.loads((tmp_path / "mcore" / ".metadata").read_bytes())
    weights = {place_of(name).key for name in weight_map(spec)}
    states = set(extra_state_keys(spec))
    assert metadata.state_dict_metadata.keys() == weights | states
    assert {index.fqn for index in metadata.storage_data} == weights | states
    kinds = {key: type(entry).__name__ for key, entry in metadata.state_dict_metadata.items()}
    assert {key for key in kinds if kinds[key] == "BytesStorageMetadata"} == states
    modules = 8 if spec.qk_norm else 6  # core_attention among them
    assert len(states) == (modules - 1) * 3 + 1
    for index, place in metadata.storage_data.items():
        content = (tmp_path / "mcore" / place.relative_path).read_bytes()
        archive = io.BytesIO(content[place.offset : place.offset + place.length])
        value = torch.load(archive, weights_only=True)
        if index.fqn in states:
            assert value == [None]
        else:
            assert value.dtype == torch.bfloat16


def test_run_config_describes_the_model(models: MakeModel, tmp_path: Path) -> None:
    """By the names of Megatron-Bridge's GPTModelProvider."""
    to_mcore(models("qwen3"), tmp_path / "qwen3")
    to_mcore(models("qwen2-tied"), tmp_path / "qwen2")
    first, second = (
        yaml.safe_load((tmp_path / name / "run_config.yaml").read_text()) for name in ("qwen3", "qwen2")
    )
    sizes = {
        "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8,
        "num_query_groups": 4, "vocab_size": 1003, "seq_length": 64, "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }  # fmt: skip
    assert first["model"].items() >= {
        **sizes, "kv_channels": 6, "qk_layernorm": True, "add_qkv_bias": False,
        "share_embeddings_and_output_weights": False,
    }.items()  # fmt: skip
    assert second["model"].items() >= {
        **sizes, "kv_channels": 4, "qk_layernorm": False, "add_qkv_bias": True,
        "share_embeddings_and_output_weights": True,
    }.items()  # fmt: skip
    spec = load_model_spec(models("qwen3"))
    for config in (first, second):
        model = config["model"]
        assert model["_target_"] == "megatron.bridge.models.gpt_provider.GPTModelProvider"
        assert (model["rotary_base"], model["layernorm_epsilon"]) == (spec.rope.theta, spec.norm_epsilon)
        assert model["activation_func"] == {"_target_": "torch.nn.functional.silu", "_call_": False}
        assert config["checkpoint"]["save_optim"] is False


def test_common_state_and_format(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen2"), tmp_path / "mcore")
    common = torch.load(tmp_path / "mcore" / "common.pt", weights_only=True)
    assert common == dict(_COMMON)
    assert set(common) == {
        "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "content_metadata",
    }  # fmt: skip
    assert json.loads((tmp_path / "mcore" / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }


def test_files_of_a_checkpoint(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen2"), tmp_path / "mcore")
    assert {path.name for path in (tmp_path / "mcore").iterdir()} == {
        ".metadata", "metadata.json", "common.pt", "run_config.yaml", "__0_0.distcp", "__1_0.distcp",
        "braid.json", "braid-manifest.json", "hf_companions", "hf_layout",
    }  # fmt: skip


# Layers and files


def linear(rows: int, columns: int, name: str = "x") -> Weight:
    return Sharded(name=name, hf=(HfTensor(name=f"hf.{name}", shape=(rows, columns)),), axis=0)


def write(directory: Path, tensors: Mapping[str, torch.Tensor], **options: Any) -> None:
    """A checkpoint of these tensors by canonical name."""
    weights = {name: linear(*tensor.shape, name=name) for name, tensor in tensors.items()}
    dtypes = {place_of(name).key: tensor.dtype for name, tensor in tensors.items()}
    plan = plan_checkpoint(weights, dtypes, **options)
    source = MemorySource({f"hf.{name}": tensor for name, tensor in tensors.items()})
    write_files(plan.files, directory, source, TransferOptions())
    write_frame(directory, plan.tensors)


def test_several_files_and_layers_one_by_one(tmp_path: Path) -> None:
    """Layers may come in any order; what is no contiguous tensor is written as it looks."""
    full = torch.randn(4, 6, 5)
    tensors = {f"decoder.layers.{layer}.w": full[layer] for layer in (2, 0, 3, 1)}
    write(tmp_path, tensors | {"decoder.final": torch.ones(3)[None].expand(2, 3)}, file_size=200)
    assert len(list(tmp_path.glob("*.distcp"))) > 1
    reader = DistReader(tmp_path)
    check_files(reader)
    for layer in range(4):
        assert torch.equal(reader.read(f"decoder.layers.{layer}.w", linear(6, 5)), full[layer])
    assert torch.equal(reader.read("decoder.final", linear(2, 3)), torch.ones(2, 3))
    with pytest.raises(CheckpointError, match=r"shape \[6, 5\], the model's config.json asks for \[6, 6\]"):
        reader.read("decoder.layers.0.w", linear(6, 6))


@pytest.mark.parametrize(("file_size", "files"), [(10**9, 1), (2400, 2), (400, 8), (1, 8)])
def test_files_are_of_about_equal_size(file_size: int, files: int) -> None:
    """A tensor is never cut."""
    weights = {f"decoder.x{i}": linear(10, 10, name=f"decoder.x{i}") for i in range(8)}
    plan = plan_checkpoint(weights, dict.fromkeys(weights, torch.float32), file_size=file_size)
    assert [file.name for file in plan.files] == [f"__0_{number}.distcp" for number in range(files)]
    sizes = [file.nbytes for file in plan.files]
    assert max(sizes) < 1.5 * min(sizes)


def test_layers_that_are_missing_or_differ_are_no_plan() -> None:
    layers = {f"decoder.layers.{i}.w": linear(4, 4, name=f"decoder.layers.{i}.w") for i in (0, 2)}
    with pytest.raises(AssertionError, match="not all layers are there"):
        plan_checkpoint(layers, {"decoder.layers.w": torch.float32})
    layers["decoder.layers.1.w"] = linear(4, 5, name="decoder.layers.1.w")
    with pytest.raises(AssertionError, match="differs from other layers"):
        plan_checkpoint(layers, {"decoder.layers.w": torch.float32})


def test_archives_are_aligned_in_their_file(models: MakeModel, tmp_path: Path) -> None:
    to_mcore(models("qwen3"), tmp_path / "mcore")
    starts = [c.start for tensor in DistReader(tmp_path / "mcore").tensors.values() for c in tensor.chunks]
    assert len(starts) == 3 + 3 * 8
    assert all(start % 64 == 0 for start in starts)


# Damage


@pytest.fixture
def checkpoint(models: MakeModel, tmp_path: Path) -> Path:
    to_mcore(models("qwen2-tied"), tmp_path / "mcore")
    return tmp_path / "mcore"


def read_all(checkpoint: Path, weights: Mapping[str, Weight]) -> None:
    reader = DistReader(checkpoint)
    check_checkpoint(reader, weights)
    for name, weight in weights.items():
        reader.read(name, weight)


def refused(checkpoint: Path, match: str) -> None:
    weights = weight_map(load_model_spec(checkpoint / "hf_companions"))
    with pytest.raises(CheckpointError, match=match) as caught:
        read_all(checkpoint, weights)
    assert "\n" not in str(caught.value)


def edit_metadata(checkpoint: Path, edit: Callable[[Any], None]) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    edit(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_incomplete(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    refused(checkpoint, f"is incomplete: it has no {name}")


def test_directory_of_a_run_gives_a_hint(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no metadata\.json; did you mean .*/mcore\?"):
        DistReader(checkpoint.parent)


def test_missing_and_truncated_data(checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    refused(checkpoint, r"__0_0\.distcp is truncated inside decoder\.final_layernorm\.weight")
    data.write_bytes(bytes(len(content)))
    refused(checkpoint, r"__0_0\.distcp is damaged at embedding")
    data.unlink()
    refused(checkpoint, r"__0_0\.distcp does not exist")


def test_missing_chunk_and_missing_key(checkpoint: Path) -> None:
    key = place_of(QKV).key
    edit_metadata(checkpoint, lambda m: m.state_dict_metadata[key].chunks.pop(1))
    refused(checkpoint, f"{QKV} is incomplete")
    edit_metadata(checkpoint, lambda m: m.state_dict_metadata.pop(key))
    refused(checkpoint, r"linear_qkv\.weight is missing")


def test_file_that_is_cut_off_or_gone_is_seen_before_data_are_read(checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"__0_0\.distcp is truncated: it has {size - 1} bytes of {size}"
    ):
        check_files(DistReader(checkpoint))
    data.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp does not exist"):
        check_files(DistReader(checkpoint))


def test_overlapping_chunks(tmp_path: Path) -> None:
    write(tmp_path, {"decoder.x": torch.zeros(4, 2)})

    def halves(metadata: Any) -> None:
        whole = metadata.state_dict_metadata["decoder.x"].chunks[0]
        whole.sizes = torch.Size([2, 2])
        metadata.state_dict_metadata["decoder.x"].chunks = [whole, whole]

    edit_metadata(tmp_path, halves)
    with pytest.raises(CheckpointError, match="is incomplete"):
        DistReader(tmp_path).read("decoder.x", linear(4, 2))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("relative_path", "../x", "not a plain file name"),
        ("relative_path", "/etc/passwd", "not a plain file name"),
        ("relative_path", 3, "is not a name"),
        ("offset", -1, "is not a list of 2 sizes"),
        ("length", 10**15, "truncated"),
        ("transform_descriptors", ["zstd"], "compressed"),
    ],
)
def test_hostile_places(checkpoint: Path, field: str, value: object, match: str) -> None:
    edit_metadata(checkpoint, lambda m: [setattr(info, field, value) for info in m.storage_data.values()])
    refused(checkpoint, match)


def test_extra_state_and_optimizer_take_no_part_but_adapters_do(checkpoint: Path) -> None:
    def edit(metadata: Any, key: str) -> None:
        metadata.state_dict_metadata[key] = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
        index = next(i for i in metadata.storage_data if i.fqn == "decoder.final_layernorm.weight")
        metadata.storage_data[type(index)(key, index.offset)] = metadata.storage_data[index]

    weights = weight_map(load_model_spec(checkpoint / "hf_companions"))
    for key in ("optimizer.state.exp_avg.x", "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"):
        edit_metadata(checkpoint, lambda metadata, key=key: edit(metadata, key))
    check_checkpoint(DistReader(checkpoint), weights)
    edit_metadata(checkpoint, lambda m: edit(m, "decoder.layers.mlp.linear_fc1.adapter.weight"))
    refused(checkpoint, r"linear_fc1\.adapter\.weight has no place")


# Malice


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (exec, (f"open({str(self.target)!r}, 'w')",))


def test_malicious_metadata_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    edit_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", Evil(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()
    refused(checkpoint, r"\.metadata: it names builtins\.exec, which has no place")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps({"a": 1}),
        b"cos\nsystem\n(S'true'\ntR.",
        b"ctorch\nload\n.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__\n.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
    ],
)
def test_metadata_that_is_none(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    refused(checkpoint, r"\.metadata")


def test_malicious_blob_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    blob = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), blob)
    (checkpoint / "__0_0.distcp").write_bytes(blob.getvalue())

    def edit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(blob.getvalue())

    edit_metadata(checkpoint, edit)
    refused(checkpoint, "is damaged at")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["__1_0.distcp", "run_config.yaml", ".metadata", "common.pt", "metadata.json"]
)
def test_full_disk_is_an_os_error(models: MakeModel, tmp_path: Path, name: str) -> None:
    spec = load_model_spec(models("qwen3"))
    weights = weight_map(spec)
    keys = {place_of(weight).key for weight in weights}
    plan = plan_checkpoint(weights, dict.fromkeys(keys, torch.bfloat16))
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_frame(tmp_path, plan.tensors, spec)
