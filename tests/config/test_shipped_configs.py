"""Every YAML file in configs/ parses, fits the real model that it is named after, and passes a dry run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.config.batch import resolve_batch_shape
from engine.config.options import SftConfig
from engine.config.parallel import ParallelLayout
from engine.config.parse import parse
from engine.model.spec import ModelSpec, model_spec_from_config
from launch.cli import main
from launch.tiny import DATA_DIR, build_tokenizer
from tests.launch.runs import ROOT, forget_launch_variables, question_rows, write_rows
from tests.support.models import save_tiny_model

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def _shape(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int = 151936, *, tied: bool = False
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


# config.json of the published checkpoints, and their parameters in billions as the model cards say.
SHAPES: Mapping[str, tuple[dict[str, Any], float]] = {
    "qwen2_5_0_5b": (_shape(24, 896, 4864, 14, 2, tied=True), 0.49),
    "qwen2_5_1_5b": (_shape(28, 1536, 8960, 12, 2, tied=True), 1.54),
    "qwen2_5_3b": (_shape(36, 2048, 11008, 16, 2, tied=True), 3.09),
    "qwen2_5_7b": (_shape(28, 3584, 18944, 28, 4, 152064), 7.61),
    "qwen2_5_14b": (_shape(48, 5120, 13824, 40, 8, 152064), 14.7),
    "qwen2_5_32b": (_shape(64, 5120, 27648, 40, 8, 152064), 32.5),
    "qwen2_5_72b": (_shape(80, 8192, 29568, 64, 8, 152064), 72.7),
    "qwen3_0_6b": (_shape(28, 1024, 3072, 16, 8, tied=True), 0.6),
    "qwen3_1_7b": (_shape(28, 2048, 6144, 16, 8, tied=True), 1.7),
    "qwen3_4b": (_shape(36, 2560, 9728, 32, 8, tied=True), 4.0),
    "qwen3_8b": (_shape(36, 4096, 12288, 32, 8), 8.2),
    "qwen3_14b": (_shape(40, 5120, 17408, 40, 8), 14.8),
    "qwen3_32b": (_shape(64, 5120, 25600, 64, 8), 32.8),
    # launch/tiny.py with the vocabulary that its tokenizer reaches.
    "qwen3_tiny": (_shape(4, 128, 384, 4, 2, 2048) | {"head_dim": 48}, 0.0014),
}


@dataclass(frozen=True, kw_only=True)
class Name:
    """What a file name such as qwen3_32b_full_2x8gpu.yaml promises."""

    model: str
    nodes: int
    processes: int | None
    """Per node; None on a CPU, where the file says how many."""

    @classmethod
    def of(cls, path: Path) -> "Name":
        match = re.fullmatch(r"(qwen[\d_]+(?:b|tiny))_(?:[a-z]+_)?(?:(?:(\d+)x)?(\d+)gpu|cpu)", path.stem)
        assert match, f"{path.name} is not named MODEL_METHOD_[NODESx]GPUSgpu.yaml or MODEL_cpu.yaml"
        assert match[1] in SHAPES, f"{path.name}: add the shape of {match[1]} to this test"
        return cls(model=match[1], nodes=int(match[2] or 1), processes=int(match[3]) if match[3] else None)


def spec_of(model: str) -> ModelSpec:
    architecture = "Qwen3ForCausalLM" if model.startswith("qwen3") else "Qwen2ForCausalLM"
    return model_spec_from_config({"architectures": [architecture], **SHAPES[model][0]})


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 1


@pytest.mark.parametrize("model", SHAPES)
def test_shapes_have_the_published_number_of_parameters(model: str) -> None:
    assert spec_of(model).num_parameters() / 1e9 == pytest.approx(SHAPES[model][1], rel=0.02)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_fits_the_real_model(path: Path) -> None:
    name = Name.of(path)
    config, _ = parse(SftConfig, ["--config", str(path)])
    if config.model.model is not None:
        written = re.sub(r"[-.]", "_", Path(config.model.model).name.lower())
        assert re.fullmatch(rf"{name.model}(_instruct|_base)?", written), "file name and model disagree"
    if name.processes is not None:
        assert config.launch.nproc_per_node == name.processes
    assert config.launch.nnodes in (None, name.nodes)
    spec, processes = spec_of(name.model), config.launch.nproc_per_node or 1
    layout = ParallelLayout.resolve(
        config.parallel, num_layers=spec.num_layers, world_size=processes * name.nodes
    )
    spec.check_tensor_parallel(layout.tp)
    layout.check_micro_batches(resolve_batch_shape(config.batch, data_parallel_size=layout.dp).accumulation)
    for dataset in [*config.data.dataset, *config.data.val_dataset]:
        assert (ROOT / dataset.split("#")[0]).is_file(), f"{dataset} is not shipped"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer([(DATA_DIR / "demo.jsonl").read_text(encoding="utf-8")], directory, vocab_size=300)
    return directory


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_passes_a_dry_run(
    path: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With as many layers and heads as the real model, each of them tiny."""
    forget_launch_variables(monkeypatch)
    monkeypatch.setenv("BRAID_CACHE", str(tmp_path / "cache"))
    name = Name.of(path)
    real = SHAPES[name.model][0]
    kept = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    tiny = {key: real[key] for key in kept} | {
        "hidden_size": 2 * real["num_attention_heads"],
        "intermediate_size": 64,
    }
    kind = "qwen3_head_dim" if name.model.startswith("qwen3") else "qwen2_untied"
    model = save_tiny_model(kind, tmp_path / "model", **tiny, **({"head_dim": 2} if "3_" in kind else {}))
    for file in tokenizer.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    data = write_rows(tmp_path / "rows.jsonl", question_rows())
    words = ["sft", "--config", str(path), "--model", str(model), "--dataset", str(data), "--dry_run"]
    words += ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--torch_dtype", "float32"]
    if name.nodes > 1:
        words += [
            "--nnodes",
            str(name.nodes),
            "--node_rank",
            "0",
            "--master_addr",
            "localhost",
            "--master_port",
            "29500",
        ]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert f"{real['num_hidden_layers']} layers" in printed.out
    assert "8 rows -> 8 sequences" in printed.out
    assert not (tmp_path / "out").exists()
