"""`--dry_run` of every command that has it: what would be done is printed, and nothing is written."""

from pathlib import Path

import pytest

from converters.convert import to_mcore
from engine.config.bench import TrainBenchConfig
from engine.config.parse import parse
from launch.bench.dry import group_sizes
from launch.bench.paper import draw_bench
from launch.cli import main
from launch.memory import GIB, peak
from launch.processes import World
from tests.launch.runs import Place, everything_in
from tests.support.models import save_adapter

WORLD = World(rank=0, size=8, local_rank=0, local_size=8, started=False)


def printed(place: Place, *words: str, code: int = 0) -> str:
    """What a command prints, which changes no file."""
    before = everything_in(place.root)
    assert main([*words, "--dry_run"]) == code
    assert everything_in(place.root) == before
    return place.capsys.readouterr().out


def test_bench_train(place: Place) -> None:
    words = ("--shape", "qwen2.5-7b", "--nproc_per_node", "8", "--pipeline_model_parallel_size", "2")
    more = ("--global_batch_size", "8", "--output_dir", str(place.out))
    found = printed(place, "bench", "train", *words, *more)
    assert "shape: qwen2.5-7b\n" in found
    assert "layout: 8 ranks = TP 1 x PP 2 x CP 1 x DP 4" in found
    assert "pp1 dp3  layers 14-27" in found
    assert "memory of a rank on a GPU, an estimate in GiB: bfloat16" in found
    assert "global batch 8 = 1 (micro-batch) x 2 (accumulation) x 4 (data parallel)" in found
    assert "9 steps" in found
    assert "2 steps of warm-up, 5 measured, 2 under timers or traced" in found


def test_bench_comm(place: Place) -> None:
    words = ("--nproc_per_node", "8", "--tensor_model_parallel_size", "2", "--context_parallel_size", "2")
    found = printed(place, "bench", "comm", *words, "--device", "cpu", "--sizes", "1MiB", "4MiB")
    assert "layout: 8 ranks = TP 2 x PP 1 x CP 2 x DP 2" in found
    assert "groups (ranks): tp (2), cp (2), dp_cp (4), world (8), over gloo" in found
    assert "messages: 1 MiB, 4 MiB" in found
    assert "5 timed calls" in found
    assert "buffers of a rank: 10 MiB at most" in found


def test_bench_sweep_names_the_memory_of_each_case(place: Place) -> None:
    words = ("--shape", "qwen2.5-7b", "--nproc_per_node", "8", "--pipeline_model_parallel_sizes", "1", "3")
    found = printed(place, "bench", "sweep", *words, "--micro_batch_sizes", "1")
    (row,) = [line for line in found.splitlines() if "tp4-pp1-mb1" in line]
    config, _ = parse(
        TrainBenchConfig,
        [*words[:4], "--tensor_model_parallel_size", "4", "--global_batch_size", "32"],
    )
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    memory = f"{peak(draw_bench(config, WORLD)) / GIB:.1f}"
    assert cells == ["tp4-pp1-mb1", "4", "1", "1", "1", "2", "1", "16", "none", memory]
    assert "global batch 32" in found
    assert "  tp8-pp1-mb1: " in found, "28 heads are not for eight ranks"
    assert "  tp1-pp3-mb1: " in found


def test_group_sizes_are_those_of_more_than_one_rank() -> None:
    words = ["--shape", "tiny-moe", "--expert_model_parallel_size", "4", "--tensor_model_parallel_size", "2"]
    config, _ = parse(TrainBenchConfig, words)
    assert group_sizes(draw_bench(config, WORLD).layout) == {"tp": 2, "dp_cp": 4, "ep": 4, "world": 8}


def test_convert_to_mcore(place: Place) -> None:
    words = ("--model", str(place.model), "--output_dir", str(place.out), "--tensor_model_parallel_size", "2")
    found = printed(place, "convert", "--to", "mcore", *words)
    assert f"model: {place.model} (Qwen3ForCausalLM, " in found
    assert "layout: 2 ranks = TP 2 x PP 1" in found
    assert "ranks 0 1" in found
    assert "__0_0.distcp" in found
    assert "GB needed" in found
    assert "checked: configuration, names and shapes of all tensors, output directory and room" in found


def test_convert_to_hf(place: Place) -> None:
    to_mcore(place.model, place.root / "mcore")
    words = ("--checkpoint", str(place.root / "mcore"), "--output_dir", str(place.out))
    found = printed(place, "convert", "--to", "hf", *words)
    assert f"model: {place.root / 'mcore'} (Qwen3ForCausalLM, " in found
    assert "model.safetensors" in found


def test_merge(place: Place) -> None:
    adapter = save_adapter(place.model, place.root / "adapter")
    words = ("--model", str(place.model), "--adapter", str(adapter), "--output_dir", str(place.out))
    assert "model.safetensors" in printed(place, "merge", *words)


def test_a_conversion_whose_target_is_in_use_is_refused(place: Place) -> None:
    place.out.mkdir()
    (place.out / "mine").touch()
    words = ["convert", "--to", "mcore", "--model", str(place.model), "--output_dir", str(place.out)]
    said = {place.refused([*words, *dry], "is not empty") for dry in ([], ["--dry_run"])}
    assert len(said) == 1


def test_a_conversion_without_room_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("engine.storage.files.shutil.disk_usage", lambda path: Usage)
    words = ["convert", "--to", "mcore", "--model", str(place.model), "--output_dir", str(place.out)]
    said = {place.refused([*words, *dry], "disk full", "0.000 GB free") for dry in ([], ["--dry_run"])}
    assert len(said) == 1


@pytest.mark.parametrize("level", ["weights", "logits"])
def test_verify(place: Place, level: str) -> None:
    to_mcore(place.model, place.root / "mcore")
    sides = ("--model", str(place.model), "--checkpoint", str(place.root / "mcore"))
    found = printed(place, "verify", *sides, "--level", level, "--workers", "3")
    assert f"model: {place.model} (Hugging Face directory (safetensors), " in found
    assert f"checkpoint: {place.root / 'mcore'} (Megatron checkpoint (torch_dist), converted" in found
    assert "every tensor to compare byte by byte, by 3 threads" in found
    assert ("5 prompts, " in found) == (level == "logits")


def test_verify_says_what_differs_without_a_weight(place: Place) -> None:
    to_mcore(place.model, place.root / "mcore")
    config = place.model / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    sides = ("--model", str(place.model), "--checkpoint", str(place.root / "mcore"))
    assert "config.json: norm_epsilon: 1e-05, 1e-06" in printed(place, "verify", *sides, code=1)


def test_verify_of_a_manifest(place: Place) -> None:
    to_mcore(place.model, place.root / "mcore")
    found = printed(place, "verify", "--checkpoint", str(place.root / "mcore"), "--manifest")
    assert "files, " in found
    assert "to hash by" in found


def test_data(place: Place) -> None:
    words = ("--model", str(place.model), "--dataset", str(place.data), "org/rows", "--max_length", "64")
    found = printed(place, "data", *words, "--output_dir", str(place.out))
    assert "max_length: 64" in found
    assert f"data set {place.data}: {place.data}, " in found
    assert "data set org/rows: an id, not looked up" in found
    gone = ["data", "--model", str(place.model), "--dataset", "gone.jsonl", "--dry_run"]
    place.refused(gone, "data set gone.jsonl does not exist")


def test_chat(place: Place, tmp_path: Path) -> None:
    adapter = save_adapter(place.model, tmp_path / "adapter")
    found = printed(place, "chat", "--model", str(adapter))
    assert f"model: {place.model} (Qwen3ForCausalLM, " in found
    assert f"adapter: {adapter}" in found
    (place.model / "chat_template.jinja").unlink()
    place.refused(["chat", "--model", str(place.model), "--dry_run"], "has no chat template")
