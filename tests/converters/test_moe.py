"""Mixtures of experts: the same bytes back, Megatron's own keys and shapes, and what does not fit refused."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from converters.convert import to_hf, to_mcore
from converters.hf.reader import HfReader
from converters.inspect import inspect_checkpoint
from converters.inspection import Inspection, TensorGroup, grouped
from converters.mapping import hf_tensors, weight_map
from converters.mcore.companions import write_companions
from converters.mcore.frame import extra_state_keys
from converters.mcore.places import Place, name_at, place_of, stacked_axes, stacks_layers
from converters.mcore.reader import DistReader, check_checkpoint, surplus_names
from converters.transfer import TransferOptions
from converters.verify import verify
from engine.errors import CheckpointError, ModelError
from engine.model.spec import load_model_spec
from tests.support.models import MOE_MODELS, save_tiny_model

from .conftest import assert_identical, change, edit_json, tensors_of
from .inspecting import edit_metadata, one_problem, without_braid_files

ROOT = Path(__file__).parents[2]
DTYPES = (torch.bfloat16, torch.float32)
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
LAYER_FC1 = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
MakeMoe = Callable[..., Path]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> MakeMoe:
    """`moe(kind, dtype, form)`: a model in form "hf" or "mcore", not to be changed."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(kind: str, dtype: torch.dtype = torch.bfloat16, form: str = "hf") -> Path:
        root = made.get((kind, dtype))
        if root is None:
            root = made[kind, dtype] = tmp_path_factory.mktemp(kind)
            save_tiny_model(kind, root / "hf", dtype=dtype)
            to_mcore(root / "hf", root / "mcore")
        return root / form

    return make


@pytest.fixture
def checkpoint(moe: MakeMoe, tmp_path: Path) -> Path:
    """A checkpoint of stacked layers, to be damaged at will."""
    return Path(shutil.copytree(moe("qwen3_moe", form="mcore"), tmp_path / "mcore"))


@pytest.fixture
def by_layer(moe: MakeMoe, tmp_path: Path) -> Path:
    """A checkpoint whose layers are of two kinds, to be damaged at will."""
    return Path(shutil.copytree(moe("qwen2_moe", form="mcore"), tmp_path / "by_layer"))


# Names


@pytest.mark.parametrize(
    ("name", "stacked", "place"),
    [
        ("embedding.word_embeddings.weight", True, Place(key="embedding.word_embeddings.weight")),
        ("decoder.layers.3.mlp.router.weight", True, Place(key="decoder.layers.mlp.router.weight", layer=3)),
        ("decoder.layers.3.mlp.router.weight", False, Place(key="decoder.layers.3.mlp.router.weight")),
        ("decoder.layers.3.mlp.experts.linear_fc1.weight17", True, Place(key=FC1, layer=3, expert=17)),
        ("decoder.layers.1.mlp.experts.linear_fc1.weight0", False, Place(key=LAYER_FC1, expert=0)),
    ],
)
def test_places_and_names(name: str, stacked: bool, place: Place) -> None:
    assert place_of(name, stacked=stacked) == place
    assert name_at(place.key, place.lead) == name
    assert stacked_axes(place.key) == (place.layer is not None, place.expert is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MOE_MODELS)
def test_the_map_covers_the_tensors_and_inverts(moe: MakeMoe, kind: str, dtype: torch.dtype) -> None:
    """Names and shapes are exactly the files'; every expert's parts merge to the whole."""
    spec, source = load_model_spec(moe(kind, dtype)), tensors_of(moe(kind, dtype))
    weights, reader = weight_map(spec), HfReader(moe(kind, dtype))
    found = {name: tuple(tensor.shape) for name, tensor in hf_tensors(weights).items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in source.items()}
    for weight in weights.values():
        if ".experts." in weight.name or "shared_experts" in weight.name:
            full = weight.to_megatron(reader.read_slice)
            assert tuple(full.shape) == tuple(weight.shape)
            shards = [weight.to_megatron(reader.read_slice, rank, 2) for rank in range(2)]
            assert torch.equal(weight.merge(shards), full), weight.name
            assert_identical(weight.to_hf(full), {tensor.name: source[tensor.name] for tensor in weight.hf})


# There and back


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MOE_MODELS)
def test_files_come_back_byte_by_byte(
    moe: MakeMoe, tmp_path: Path, kind: str, dtype: torch.dtype, workers: int
) -> None:
    source, options = moe(kind, dtype), TransferOptions(workers=workers)
    to_mcore(source, tmp_path / "mcore", options=options)
    to_hf(tmp_path / "mcore", tmp_path / "hf", options=options)
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "hf").iterdir()} >= names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("kind", MOE_MODELS)
def test_many_files_and_another_dtype(
    moe: MakeMoe, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of a layer lie in several files; bf16 is kept exactly in fp32."""
    from converters.mcore import layout

    monkeypatch.setitem(layout.plan_checkpoint.__kwdefaults__, "file_size", 100_000)
    to_mcore(moe(kind), tmp_path / "mcore", dtype=torch.float32, options=TransferOptions(workers=2))
    key = FC1 if kind == "qwen3_moe" else LAYER_FC1
    tensor = DistReader(tmp_path / "mcore").tensors[key]
    assert len({chunk.file for chunk in tensor.chunks}) > (1 if kind == "qwen3_moe" else 0)
    assert len(list((tmp_path / "mcore").glob("*.distcp"))) > 3
    to_hf(tmp_path / "mcore", tmp_path / "hf", dtype=torch.bfloat16, max_shard_size=50_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert_identical(tensors_of(moe(kind)), tensors_of(tmp_path / "hf"))


# Megatron's format


def test_keys_and_shapes_of_stacked_layers(moe: MakeMoe) -> None:
    """All layers have experts: [layers, experts, ...]."""
    shapes = {n: t.shape for n, t in DistReader(moe("qwen3_moe", form="mcore")).tensors.items()}
    assert shapes == {
        "embedding.word_embeddings.weight": (512, 64),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (4, 64),
        "decoder.layers.self_attention.linear_qkv.weight": (4, 256, 64),
        "decoder.layers.self_attention.q_layernorm.weight": (4, 16),
        "decoder.layers.self_attention.k_layernorm.weight": (4, 16),
        "decoder.layers.self_attention.linear_proj.weight": (4, 64, 128),
        "decoder.layers.pre_mlp_layernorm.weight": (4, 64),
        "decoder.layers.mlp.router.weight": (4, 8, 64),
        FC1: (4, 8, 64, 64),
        FC1.replace("fc1", "fc2"): (4, 8, 64, 32),
        "decoder.final_layernorm.weight": (64,),
        "output_layer.weight": (512, 64),
    }


def test_keys_and_shapes_of_layers_of_two_kinds(moe: MakeMoe) -> None:
    """Nothing is stacked but the experts of a layer."""
    spec = load_model_spec(moe("qwen2_moe"))
    assert not stacks_layers(spec)
    shapes = {n: t.shape for n, t in DistReader(moe("qwen2_moe", form="mcore")).tensors.items()}
    weights = weight_map(spec)
    assert shapes.keys() == {place_of(name, stacked=False).key for name in weights}
    of_layer = {
        layer: {
            n.removeprefix(f"decoder.layers.{layer}.mlp."): s
            for n, s in shapes.items()
            if f".{layer}.mlp" in n
        }
        for layer in range(4)
    }
    assert of_layer[0] == {
        "linear_fc1.layer_norm_weight": (64,), "linear_fc1.weight": (192, 64), "linear_fc2.weight": (64, 96),
    }  # fmt: skip
    assert of_layer[1] == of_layer[2] == of_layer[3]
    assert of_layer[1] == {
        "router.weight": (8, 64),
        "experts.experts.linear_fc1.weight": (8, 64, 64),
        "experts.experts.linear_fc2.weight": (8, 64, 32),
        "shared_experts.linear_fc1.weight": (96, 64),
        "shared_experts.linear_fc2.weight": (64, 48),
        "shared_experts.gate_weight": (1, 64),
    }


def test_an_expert_is_where_it_should_be(moe: MakeMoe) -> None:
    gate, up = (
        tensors_of(moe("qwen3_moe"))[f"model.layers.2.mlp.experts.5.{name}_proj.weight"]
        for name in ("gate", "up")
    )
    whole = torch.empty(4, 8, 64, 64, dtype=torch.bfloat16)
    DistReader(moe("qwen3_moe", form="mcore")).read_region(FC1, (0, 0, 0, 0), whole)
    assert torch.equal(whole[2, 5], torch.cat([gate, up]))


@pytest.mark.parametrize("ep_size", [1, 2])
def test_megatrons_own_model_loads_and_saves(moe: MakeMoe, tmp_path: Path, ep_size: int) -> None:
    """Every expert-parallel rank gets its experts, and what the ranks save together converts back."""
    jobs: list[str] = []
    for kind in MOE_MODELS:
        (tmp_path / kind).mkdir()
        jobs += [str(moe(kind)), str(moe(kind, form="mcore")), str(tmp_path / kind)]
    module, store = "tests.converters.moe_worker", str(tmp_path / "store")
    commands = [[sys.executable, "-m", module, store, str(r), str(ep_size), *jobs] for r in range(ep_size)]
    running = [subprocess.Popen(c, cwd=ROOT, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    for kind in MOE_MODELS:
        found = inspect_checkpoint(tmp_path / kind)
        assert found.good, found.problems
        assert verify(moe(kind), tmp_path / kind).same
        write_companions(moe(kind), tmp_path / kind)
        to_hf(tmp_path / kind, tmp_path / f"{kind}_hf")
        assert_identical(tensors_of(moe(kind)), tensors_of(tmp_path / f"{kind}_hf"))


@pytest.mark.parametrize("kind", MOE_MODELS)
def test_states_of_transformer_engine(moe: MakeMoe, kind: str) -> None:
    """One a module and layer, and of the experts' linears one an expert."""
    spec = load_model_spec(moe(kind))
    keys = list(extra_state_keys(spec))
    assert len(keys) == len(set(keys))
    assert DistReader(moe(kind, form="mcore")).objects.keys() == set(keys)
    linear = "mlp.experts.experts.linear_fc2._extra_state"
    if kind == "qwen3_moe":
        assert {
            f"decoder.layers.{linear}/shard_3.7_4.8",
            "decoder.layers.pre_mlp_layernorm._extra_state/shard_0_4",
        } <= set(keys)
        assert len(keys) == 4 * (6 + 2 * 8) + 1
        assert not any("mlp.linear" in key or "shared" in key for key in keys)
    else:
        assert {
            f"decoder.layers.3.{linear}/shard_7_8", "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1",
            "decoder.layers.1.mlp.shared_experts.linear_fc1._extra_state/shard_0_1",
        } <= set(keys)  # fmt: skip
        assert len(keys) == 5 + 3 * (6 + 2 * 8) + 1


def test_run_config_describes_the_experts(moe: MakeMoe) -> None:
    """By the names of Megatron-Bridge's GPTModelProvider."""
    first, second = (
        yaml.safe_load((moe(kind, form="mcore") / "run_config.yaml").read_text())["model"]
        for kind in MOE_MODELS
    )
    common = {
        "num_moe_experts": 8, "moe_ffn_hidden_size": 32, "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.001, "moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall",
    }  # fmt: skip
    assert first.items() >= {
        **common, "moe_router_topk": 2, "moe_router_pre_softmax": True, "moe_shared_expert_gate": True,
        "moe_shared_expert_intermediate_size": 48,
    }.items()  # fmt: skip
    assert first["moe_layer_freq"] == [0, 1, 1, 1]
    assert second.items() >= {
        **common, "moe_router_topk": 3, "moe_router_pre_softmax": False, "moe_shared_expert_gate": False,
        "moe_shared_expert_intermediate_size": None, "moe_layer_freq": 1,
    }.items()  # fmt: skip


# What does not fit


def refused(checkpoint: Path, match: str) -> None:
    weights = weight_map(load_model_spec(checkpoint / "hf_companions"))
    with pytest.raises(CheckpointError, match=match) as caught:
        check_checkpoint(DistReader(checkpoint), weights)
    assert "\n" not in str(caught.value)
    assert not inspect_checkpoint(checkpoint).good


def reshape(checkpoint: Path, key: str, shape: tuple[int, ...]) -> None:
    """Let `.metadata` speak of another shape, with the boxes that it leaves room for."""

    def edit(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[key]
        entry.size = torch.Size(shape)
        fits = [
            len(chunk.sizes) == len(shape)
            and all(o + n <= s for o, n, s in zip(chunk.offsets, chunk.sizes, shape, strict=True))
            for chunk in entry.chunks
        ]
        entry.chunks = [chunk for chunk, good in zip(entry.chunks, fits, strict=True) if good]

    edit_metadata(checkpoint, edit)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((4, 7, 64, 64), r"shape \[4, 7, 64, 64\], so no expert 7; this is a checkpoint of another model"),
        ((4, 0, 64, 64), r"so no expert 0"),
        ((3, 8, 64, 64), r"so no layer 3"),
        ((4,), r"shape \[4\], so no expert 0"),
        ((), r"shape \[\], so no layer 0"),
        ((4, 8, 64, 65), r"experts\.linear_fc1\.weight0 has shape \[64, 65\], .* asks for \[64, 64\]"),
        ((4, 8, 64), r"weight0 has shape \[64\], .* asks for \[64, 64\]"),
        (
            (4, 9, 64, 64),
            r"layers\.0\.mlp\.experts\.linear_fc1\.weight8 has no place in the model \(and 3 mo",
        ),
        ((5, 8, 64, 64), r"layers\.4\.mlp\.experts\.linear_fc1\.weight0 has no place .* \(and 7 more\)"),
    ],
)
def test_shapes_of_stacked_experts(checkpoint: Path, shape: tuple[int, ...], match: str) -> None:
    reshape(checkpoint, FC1, shape)
    refused(checkpoint, match)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((7, 64, 64), r"layers\.1\.mlp.* has shape \[7, 64, 64\], so no expert 7"),
        ((64, 64), r"weight0 has shape \[64\], the model's config.json asks for \[64, 64\]"),
        ((9, 64, 64), r"decoder\.layers\.1\.mlp\.experts\.linear_fc1\.weight8 has no place in the model;"),
    ],
)
def test_shapes_of_the_experts_of_a_layer(by_layer: Path, shape: tuple[int, ...], match: str) -> None:
    reshape(by_layer, LAYER_FC1, shape)
    refused(by_layer, match)


def test_an_axis_of_any_size_takes_no_time(checkpoint: Path) -> None:
    reshape(checkpoint, FC1, (2**61, 2**61, 64, 64))
    weights = weight_map(load_model_spec(checkpoint / "hf_companions"))
    assert len(surplus_names(DistReader(checkpoint), weights)) == 10_000


def test_a_box_that_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    edit_metadata(checkpoint, lambda m: m.state_dict_metadata[FC1].chunks.pop(13))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.linear_fc1\.weight5 is incomplete"):
        to_hf(checkpoint, tmp_path / "hf")
    one_problem(checkpoint, ".metadata", f"{FC1}: its parts hold")


def test_a_key_that_is_missing_or_that_is_an_expert_s_own_name(checkpoint: Path) -> None:
    """Only Megatron's keys are an expert's place; a number of any length is none."""

    def rename(metadata: Any) -> None:
        metadata.state_dict_metadata.pop(FC1.replace("fc1", "fc2"))

    edit_metadata(checkpoint, rename)
    refused(checkpoint, r"weight decoder\.layers\.0\.mlp\.experts\.linear_fc2\.weight0 is missing")
    assert place_of(f"decoder.layers.0.mlp.experts.linear_fc1.weight{'9' * 5000}").expert is None


def test_tensors_that_hold_all_experts_are_refused(moe: MakeMoe, tmp_path: Path) -> None:
    model = Path(shutil.copytree(moe("qwen3_moe"), tmp_path / "model"))

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            head = f"model.layers.{layer}.mlp.experts."
            parts = [
                torch.cat([tensors.pop(f"{head}{expert}.{name}_proj.weight") for name in ("gate", "up")])
                for expert in range(8)
            ]
            tensors[f"{head}gate_up_proj"] = torch.stack(parts)

    change(model, fuse)
    match = r"0\.mlp\.experts\.gate_up_proj holds all experts of a layer at once \(and 3 more\); save"
    with pytest.raises(ModelError, match=match) as caught:
        to_mcore(model, tmp_path / "mcore")
    assert "\n" not in str(caught.value)
    one_problem(model, "config.json", "holds all experts of a layer at once", "save_pretrained")


# What is told of it


def test_verify_names_the_expert(moe: MakeMoe, tmp_path: Path, by_layer: Path) -> None:
    for kind in MOE_MODELS:
        report = verify(moe(kind), moe(kind, form="mcore"), workers=2)
        assert report.same
        assert report.summary() == f"same model: {len(tensors_of(moe(kind)))} tensors are identical"
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    model = Path(shutil.copytree(moe("qwen2_moe"), tmp_path / "model"))
    change(model, lambda tensors: tensors[name].mul_(2))
    edit_json(model / "config.json", lambda c: c.update(num_experts_per_tok=3))
    report = verify(model, by_layer)
    assert [(item.name, item.status) for item in report.differences] == [(name, "values")]
    assert report.config == ("moe.top_k: 3, 2",)


def test_verify_against_another_number_of_experts(moe: MakeMoe, tmp_path: Path) -> None:
    """Experts that only one side has are told by name; the router has another shape."""
    fewer = save_tiny_model("qwen3_moe", tmp_path / "fewer", dtype=torch.bfloat16, num_experts=7)
    report = verify(fewer, moe("qwen3_moe", form="mcore"))
    surplus = [item.name for item in report.differences if item.status == "surplus"]
    assert surplus == [
        f"decoder.layers.{layer}.mlp.experts.linear_fc{linear}.weight7"
        for linear in (1, 2)
        for layer in range(4)
    ]
    to_mcore(fewer, tmp_path / "mcore")
    report = verify(moe("qwen3_moe"), tmp_path / "mcore")
    names = {item.name for item in report.differences if item.status == "missing"}
    assert names == {
        f"model.layers.{layer}.mlp.experts.7.{part}_proj.weight"
        for layer in range(4)
        for part in ("gate", "up", "down")
    }
    assert "moe.num_experts: 8, 7" in report.config
    shapes = {item.name for item in report.differences if item.status == "shape"}
    assert shapes == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)}


def groups_of(found: Inspection) -> dict[str, TensorGroup]:
    return {group.name: group for group in grouped(found.tensors)}


def test_inspect_counts_experts(moe: MakeMoe) -> None:
    hf, mcore = (inspect_checkpoint(moe("qwen2_moe", form=form)) for form in ("hf", "mcore"))
    for found in (hf, mcore):
        assert found.good
        assert found.model is not None
        assert (found.model.num_experts, found.model.layers_with_experts) == (8, 3)
        assert (found.model.experts_per_token, found.model.expert_ffn_hidden_size) == (2, 32)
        assert found.model.shared_ffn_hidden_size == 48
    down = groups_of(hf)["model.layers.*.mlp.experts.*.down_proj.weight"]
    assert (down.layers, down.experts, down.bytes) == (3, 8, 3 * 8 * 64 * 32 * 2)
    linear = groups_of(mcore)["decoder.layers.*.mlp.experts.experts.linear_fc1.weight"]
    assert (linear.layers, linear.experts, linear.first.shape) == (3, 8, (8, 64, 64))
    (weights,) = mcore.contents
    assert weights.tensors == len(weight_map(load_model_spec(moe("qwen2_moe"))))
    stacked = inspect_checkpoint(moe("qwen3_moe", form="mcore"))
    linear = groups_of(stacked)[FC1]
    assert (linear.layers, linear.experts, linear.first.shape) == (4, 8, (4, 8, 64, 64))
    assert stacked.contents[0].tensors == len(weight_map(load_model_spec(moe("qwen3_moe"))))
    assert stacked.layout is not None
    assert stacked.layout.tp == 1


@pytest.mark.parametrize("kind", MOE_MODELS)
def test_inspect_knows_a_model_by_its_tensors(moe: MakeMoe, tmp_path: Path, kind: str) -> None:
    found = inspect_checkpoint(without_braid_files(moe(kind, form="mcore"), tmp_path / "other"))
    assert found.good
    assert (found.kind, found.model is not None and found.model.num_layers) == ("megatron", 4)
    assert found.model is not None
    dense = (96, 48) if kind == "qwen2_moe" else (None, None)
    assert (found.model.ffn_hidden_size, found.model.shared_ffn_hidden_size) == dense
    assert (found.model.num_experts, found.model.expert_ffn_hidden_size) == (8, 32)


def test_more_experts_than_any_model_has_are_no_table(checkpoint: Path) -> None:
    (checkpoint / "braid-manifest.json").unlink()
    many = {"num_experts": 10**9, "num_local_experts": 10**9}
    edit_json(checkpoint / "hf_companions" / "config.json", lambda c: c.update(many))
    one_problem(checkpoint, "config.json", "num_local_experts 1000000000 in each of num_hidden_layers 4")


def test_inspect_prints_experts(moe: MakeMoe, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.inspect import inspect

    assert inspect([str(moe("qwen2_moe"))]) == 0
    printed = capsys.readouterr().out
    assert "ffn 96, " in printed
    assert "8 experts of ffn 32 (2 a token) in 3 layers, shared expert of ffn 48, " in printed
    (row,) = [line for line in printed.splitlines() if "experts.*.up_proj" in line]
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["3", "8", "[32, 64]"]
    assert inspect([str(moe("qwen3_moe", form="mcore"))]) == 0
    printed = capsys.readouterr().out
    assert "hidden 64, 8 heads, " in printed
    assert "8 experts of ffn 32 (3 a token), " in printed
    (row,) = [line for line in printed.splitlines() if FC1 in line]
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["4", "8", "[4, 8, 64, 64]"]
