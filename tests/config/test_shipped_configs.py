"""Every YAML file in configs/ parses, fits the real model that it is named after, and passes a dry run, also
through the script of its own that some have in launch/.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.batch import resolve_batch_shape
from engine.config.options import SftConfig
from engine.config.parallel import ParallelLayout
from engine.config.parse import parse
from engine.model.memory import Workload, estimate
from engine.model.spec import ModelSpec, model_spec_from_config
from launch.blueprint import draw_lora
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


def _experts(width: int) -> dict[str, Any]:
    """What both sizes of Qwen3-MoE have in common, and the width of an expert."""
    return {
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
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
    "qwen3_30b_a3b": (_shape(48, 2048, 6144, 32, 4) | _experts(768), 30.5),
    "qwen3_235b_a22b": (_shape(94, 4096, 12288, 64, 4) | _experts(1536), 235.0),
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
        match = re.fullmatch(
            r"(qwen[\d_]+(?:b(?:_a\d+b)?|tiny))_(?:[a-z]+_)?(?:(?:(\d+)x)?(\d+)gpu|cpu)", path.stem
        )
        assert match, f"{path.name} is not named MODEL_METHOD_[NODESx]GPUSgpu.yaml or MODEL_cpu.yaml"
        assert match[1] in SHAPES, f"{path.name}: add the shape of {match[1]} to this test"
        return cls(model=match[1], nodes=int(match[2] or 1), processes=int(match[3]) if match[3] else None)


def spec_of(model: str) -> ModelSpec:
    config = SHAPES[model][0]
    family, moe = model.split("_")[0].capitalize(), "Moe" if "num_experts" in config else ""
    return model_spec_from_config({"architectures": [f"{family}{moe}ForCausalLM"], **config})


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
    spec.check_expert_parallel(layout.ep, layout.etp)
    layout.check_micro_batches(resolve_batch_shape(config.batch, data_parallel_size=layout.dp).accumulation)
    for dataset in [*config.data.dataset, *config.data.val_dataset]:
        assert (ROOT / dataset.split("#")[0]).is_file(), f"{dataset} is not shipped"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer([(DATA_DIR / "demo.jsonl").read_text(encoding="utf-8")], directory, vocab_size=300)
    return directory


@pytest.fixture(scope="session")
def small_model(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """small_model(name): with as many layers, heads and experts as the real model, each of them tiny."""

    @cache
    def make(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        real = SHAPES[name][0]
        kept = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
        kind = "qwen3_head_dim" if name.startswith("qwen3") else "qwen2_untied"
        tiny: dict[str, Any] = {"hidden_size": 2 * real["num_attention_heads"], "intermediate_size": 64}
        if "num_experts" in real:
            kind, kept = "qwen3_moe", (*kept, "num_experts", "num_experts_per_tok")
            tiny["moe_intermediate_size"] = 2
        if kind.startswith("qwen3"):
            tiny["head_dim"] = 2
        save_tiny_model(kind, directory, **tiny, **{key: real[key] for key in kept})
        for file in tokenizer.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        return directory

    return make


def dry_run(model: Path, tmp_path: Path) -> list[str]:
    """The flags beside the configuration's."""
    data = write_rows(tmp_path / "rows.jsonl", question_rows())
    words = ["--model", str(model), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    return [*words, "--dry_run", "--device", "cpu", "--torch_dtype", "float32"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_passes_a_dry_run(
    path: Path,
    small_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forget_launch_variables(monkeypatch)
    monkeypatch.setenv("BRAID_CACHE", str(tmp_path / "cache"))
    name = Name.of(path)
    words = ["sft", "--config", str(path), *dry_run(small_model(name.model), tmp_path)]
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
    assert f"{SHAPES[name.model][0]['num_hidden_layers']} layers" in printed.out
    assert "8 rows -> 8 sequences" in printed.out
    assert not (tmp_path / "out").exists()


SCRIPTS: Mapping[str, str] = {
    "qwen2_5_7b_full_8gpu.sh": "8 ranks = TP 2 x PP 1 x CP 1 x DP 4, sequence",
    "qwen2_5_14b_full_8gpu.sh": "8 ranks = TP 4 x PP 1 x CP 1 x DP 2, sequence",
    "qwen2_5_72b_full_4x8gpu.sh": "32 ranks = TP 8 x PP 4 x CP 1 x DP 1, sequence",
    "qwen3_8b_lora_1gpu.sh": "1 ranks = TP 1 x PP 1 x CP 1 x DP 1, sequence",
    "qwen3_32b_full_2x8gpu.sh": "16 ranks = TP 8 x PP 2 x CP 1 x DP 1, sequence",
    "qwen3_30b_a3b_8gpu.sh": "8 ranks = TP 4 x PP 1 x CP 1 x DP 2, experts EP 8 x ETP 1",
    "qwen3_235b_a22b_16x8gpu.sh": "128 ranks = TP 4 x PP 8 x CP 1 x DP 4, experts EP 8 x ETP 1",
}


def test_every_launch_script_has_its_layout_here() -> None:
    assert {path.name for path in (ROOT / "launch").glob("qwen*.sh")} == set(SCRIPTS)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`braid` is there as it is where it is installed, and nothing is known of nodes and processes."""
    (tmp_path / "bin").mkdir()
    braid = tmp_path / "bin" / "braid"
    braid.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m launch.cli "$@"\n')
    braid.chmod(0o755)
    forget_launch_variables(monkeypatch)
    monkeypatch.setenv("PATH", f"{braid.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("BRAID_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize("script", SCRIPTS)
def test_launch_script_passes_a_dry_run(
    script: str, small_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = Name.of(Path(script))
    # Whatever number of GPUs this machine has.
    monkeypatch.setenv("NPROC_PER_NODE", str(name.processes))
    if name.nodes > 1:
        monkeypatch.setenv("NODE_RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "localhost")
    command = [ROOT / "launch" / script, *dry_run(small_model(name.model), tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SCRIPTS[script] in done.stdout


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(("node", "code"), [(0, 0), (1, 0), (2, 2)])
def test_a_pod_of_kubeflow_finds_its_place(
    node: int, code: int, small_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of launch/kubernetes/trainjob.yaml with the variables of Kubeflow's torch runtime."""
    text = (ROOT / "launch" / "kubernetes" / "trainjob.yaml").read_text(encoding="utf-8")
    runtime, job = yaml.safe_load_all(text)
    trainer = job["spec"]["trainer"]
    place = {
        "NNODES": trainer["numNodes"],
        "NPROC_PER_NODE": trainer["numProcPerNode"],
        "NODE_RANK": node,
        "MASTER_ADDR": "qwen3-32b-full-node-0-0.qwen3-32b-full",
        "MASTER_PORT": 29500,
    }
    for variable, value in place.items():
        monkeypatch.setenv(f"PET_{variable}", str(value))
    here = [word for word in trainer["args"] if "=/data/" not in word]
    command = [*trainer["command"], *here, *dry_run(small_model("qwen3_32b"), tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr[-2000:]
    assert code or SCRIPTS["qwen3_32b_full_2x8gpu.sh"] in done.stdout
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    # Kubeflow tells their place to a job and a container of this name only.
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert (replicated["name"], container["name"]) == ("node", "node")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_memory_that_a_config_names_is_what_is_estimated(path: Path) -> None:
    name, text = Name.of(path), path.read_text(encoding="utf-8")
    config, _ = parse(SftConfig, ["--config", str(path)])
    if config.model.device == "cpu":
        pytest.skip("no GPU, no estimate")
    spec, processes = spec_of(name.model), config.launch.nproc_per_node or 1
    layout = ParallelLayout.resolve(
        config.parallel, num_layers=spec.num_layers, world_size=processes * name.nodes
    )
    shape = resolve_batch_shape(config.batch, data_parallel_size=layout.dp)
    work = Workload(
        spec=spec,
        layout=layout,
        recompute=config.recompute,
        optimizer=config.optimizer,
        lora=draw_lora(config, spec, layout),
        dtype=config.model.torch_dtype or "bfloat16",
        use_te=False,
        fp8=False,
        tokens=shape.micro_batch_size * config.data.max_length,
        micro_batches=shape.accumulation,
    )
    (named,) = re.findall(r"--dry_run\s+estimates\s+(\d+) GiB", text)
    assert int(named) == round(max(memory.total for memory in estimate(work)) / 2**30)
