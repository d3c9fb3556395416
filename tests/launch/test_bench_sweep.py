"""`braid bench sweep`: which cases there are, and what becomes of those that fail."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.config.bench import SweepBenchConfig, TrainBenchConfig
from engine.config.parse import flatten, parse
from launch.bench.sweep import Candidate, case_words, draw_sweep, read_case
from launch.cli import main
from launch.processes import World
from tests.launch.runs import assert_one_line, braid

ONE = Candidate(tp=1, pp=1, cp=1, ep=1, micro_batch_size=1, recompute="none")


def drawn(*words: str, processes: int) -> tuple[SweepBenchConfig, list[Candidate], Mapping[str, str]]:
    config, _ = parse(SweepBenchConfig, words)
    world = World(rank=0, size=processes, local_rank=0, local_size=processes, started=False)
    return config, *draw_sweep(config, world)


def test_a_case_that_fails_is_listed_with_its_reason(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    run = braid(
        "bench", "sweep", "--shape", "tiny", "--device", "auto", "--max_length", "64", "--steps", "1",
        "--warmup_steps", "0", "--breakdown", "false", "--tensor_model_parallel_sizes", "1",
        "--pipeline_model_parallel_sizes", "1", "--micro_batch_sizes", "1",
        "--context_parallel_sizes", "2", "1", "--cp_comm_type", "p2p", "--output_dir", str(out),
        cache=cache, NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert run.code == 0, run.stderr
    record = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    best, failed = record["cases"]
    assert (best["name"], failed["name"]) == ("tp1-pp1-mb1", "tp1-pp1-cp2-mb1")
    bench = json.loads((out / "case-002-tp1-pp1-mb1" / "bench.json").read_text(encoding="utf-8"))
    for name in ("tokens_per_s", "tflops_per_device", "mfu", "median_step_s", "peak_memory_gib"):
        assert best[name] == bench[name]
    assert bench["global_batch_size"] == record["global_batch_size"] == 8
    assert best["reason"] is None
    assert "cp_comm_type p2p needs Transformer Engine" in failed["reason"]
    assert (failed["oom"], failed["tokens_per_s"]) == (False, None)
    text = (out / "sweep.md").read_text(encoding="utf-8")
    assert text.index("| tp1-pp1-mb1 |") < text.index("| tp1-pp1-cp2-mb1 |")
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "[1/2] tp1-pp1-cp2-mb1: error" in run.stdout
    assert "[2/2] tp1-pp1-mb1: " in run.stdout


def test_every_layout_that_fits_is_a_candidate() -> None:
    config, fitting, refused = drawn("--shape", "tiny-moe", "--micro_batch_sizes", "1", processes=4)
    names = {candidate.name for candidate in fitting}
    # Two key/value heads and four experts; EP deals out the ranks of a stage.
    assert names == {
        "tp1-pp1-mb1", "tp1-pp1-ep2-mb1", "tp1-pp1-ep4-mb1", "tp1-pp2-mb1", "tp1-pp2-ep2-mb1", "tp1-pp4-mb1",
        "tp2-pp1-mb1", "tp2-pp1-ep2-mb1", "tp2-pp1-ep4-mb1", "tp2-pp2-mb1", "tp2-pp2-ep2-mb1", "tp4-pp1-mb1",
        "tp4-pp1-ep2-mb1", "tp4-pp1-ep4-mb1",
    }  # fmt: skip
    assert "4 processes do not hold TP 4 x PP 4" in refused["tp4-pp4-mb1"]
    assert "cannot be dealt to expert_model_parallel_size 4" in refused["tp1-pp4-ep4-mb1"]
    assert config.batch.global_batch_size == 16


def test_lists_restrict_and_recomputation_multiplies() -> None:
    _, fitting, refused = drawn(
        "--shape", "qwen2.5-7b", "--tensor_model_parallel_sizes", "4", "8", "--pipeline_model_parallel_sizes",
        "1", "--micro_batch_sizes", "1", "2", "--recompute", "none", "full", processes=8,
    )  # fmt: skip
    assert [candidate.name for candidate in fitting] == [
        "tp4-pp1-mb1", "tp4-pp1-mb1-full", "tp4-pp1-mb2", "tp4-pp1-mb2-full"
    ]  # fmt: skip
    assert set(refused) == {"tp8-pp1-mb1", "tp8-pp1-mb1-full", "tp8-pp1-mb2", "tp8-pp1-mb2-full"}


def test_a_case_is_told_everything_that_is_not_swept() -> None:
    config, _, _ = drawn(
        "--shape", "tiny", "--train_type", "lora", "--target_modules", "q_proj", "v_proj", "--rank_pattern",
        '{"q_proj": 4}', "--breakdown", "false", "--learning_rate", "3e-4", "--micro_batch_sizes", "2",
        "--nproc_per_node", "2", "--output_dir", "all", processes=2,
    )  # fmt: skip
    candidate = Candidate(tp=2, pp=1, cp=1, ep=1, micro_batch_size=2, recompute="full")
    words = case_words(config, candidate, Path("here"))
    assert words[:2] == ["bench", "train"]
    told, _ = parse(TrainBenchConfig, words[2:])
    changed = {
        name: value for name, value in flatten(told).items() if value != flatten(TrainBenchConfig())[name]
    }
    assert changed == {
        "shape": "tiny", "train_type": "lora", "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 4}, "breakdown": False, "learning_rate": 3e-4, "output_dir": "here",
        "tensor_model_parallel_size": 2, "per_device_train_batch_size": 2, "global_batch_size": 16,
        "recompute_granularity": "full",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "code", "printed", "oom", "reason"),
    [
        (
            {"oom": True, "error": "out of memory here"},
            1,
            "braid bench: failed: x\n",
            True,
            "out of memory here",
        ),
        (None, 1, "noise\nbraid bench: failed: a rank died\n", False, "failed: a rank died"),
        (None, 1, "braid bench: failed (rank 1):\nTraceback\n  x\nOSError: gone\n", False, "OSError: gone"),
        (None, -9, "", False, "exit code -9"),
    ],
)
def test_a_failure_has_a_reason(
    record: dict[str, Any] | None, code: int, printed: str, oom: bool, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "bench.json"
    if record is not None:
        path.write_text(json.dumps(record), encoding="utf-8")
    case = read_case(ONE, path, code, printed)
    assert (case.oom, case.reason, case.tokens_per_s) == (oom, reason, None)


def test_a_case_that_does_not_end_is_ended(tmp_path: Path, cache: Path) -> None:
    run = braid(
        "bench", "sweep", "--shape", "tiny", "--device", "cpu", "--steps", "100000", "--max_length", "16",
        "--tensor_model_parallel_sizes", "2", "--pipeline_model_parallel_sizes", "1",
        "--micro_batch_sizes", "1", "--case_timeout", "4", cache=cache, NPROC_PER_NODE="2",
    )  # fmt: skip
    assert run.code == 1
    assert "tp2-pp1-mb1: no result after 4 s" in run.stdout
    assert not run.left_running


def test_a_sweep_that_is_ended_leaves_nothing_running(tmp_path: Path, cache: Path) -> None:
    run = braid(
        "bench", "sweep", "--shape", "tiny", "--device", "cpu", "--steps", "100000", "--max_length", "16",
        "--micro_batch_sizes", "1", cache=cache, NPROC_PER_NODE="2", stop_by=signal.SIGTERM,
    )  # fmt: skip
    assert run.code == 128 + signal.SIGTERM
    assert not run.left_running


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": ((), "no model is given"),
    "several nodes": (
        ("--shape", "tiny", "--nnodes", "2", "--node_rank", "0", "--master_addr", "a", "--master_port", "1"),
        "sweep works on one node",
    ),
    "size of nothing": (
        ("--shape", "tiny", "--micro_batch_sizes", "0"),
        "micro_batch_sizes must be at least 1, not 0",
    ),
    "degree of nothing": (
        ("--shape", "tiny", "--context_parallel_sizes", "1", "0"),
        "context_parallel_sizes must be at least 1, not 0",
    ),
    "nothing fits": (("--shape", "tiny", "--tensor_model_parallel_sizes", "3"), "nothing fits: 2 processes"),
    "one layout": (
        ("--shape", "tiny", "--tensor_model_parallel_size", "2"),
        "did you mean --tensor_model_parallel_sizes",
    ),
    "recomputation of one granularity": (
        ("--shape", "tiny", "--recompute_modules", "mlp_act"),
        "recompute_modules",
    ),
    "unknown recomputation": (("--shape", "tiny", "--recompute", "half"), "recompute must be one of none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = BAD[case]
    assert main(["bench", "sweep", *words, "--nproc_per_node", "2"]) == 2
    assert_one_line(capsys.readouterr().err, "bench", named)


def test_a_worker_is_no_place_for_a_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "sweep", "--shape", "tiny"]) == 2
    assert_one_line(capsys.readouterr().err, "bench", "not under torchrun or srun")
