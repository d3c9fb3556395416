"""`braid bench train` on CPU processes: what it leaves, and that its numbers fit each other."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.config.bench import TrainBenchConfig
from engine.config.parse import parse
from engine.data.loader import StepBatch
from engine.data.prepare import PreparedData
from launch.batching import training_loader
from launch.bench.data import random_store
from launch.bench.paper import draw_bench, total_steps
from launch.cli import main
from launch.processes import World
from tests.launch.runs import ROOT, assert_one_line, braid

WORDS = (
    "--shape", "tiny", "--max_length", "128", "--global_batch_size", "4", "--steps", "2",
    "--warmup_steps", "1", "--device", "cpu",
)  # fmt: skip
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "one process": ("--supervised_share", "0.5", "--per_device_train_batch_size", "2"),
    "TP2": ("--tensor_model_parallel_size", "2"),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A benchmark that has run."""

    processes: int
    record: dict[str, Any]
    words: tuple[str, ...]
    directory: Path
    trace: Path
    printed: str


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Measured:
    root = tmp_path_factory.mktemp("bench")
    processes = 2 if request.param == "TP2" else 1
    words = (*WORDS, *CONFIGURATIONS[request.param], "--trace", str(root / "trace.json"))
    run = braid(
        "bench", "train", *words, "--output_dir", str(root / "out"), cache=cache,
        NPROC_PER_NODE=str(processes),
    )  # fmt: skip
    assert run.code == 0, run.stderr
    assert not run.left_running
    return Measured(
        processes=processes,
        record=json.loads((root / "out" / "bench.json").read_text(encoding="utf-8")),
        words=words,
        directory=root / "out",
        trace=root / "trace.json",
        printed=run.stdout,
    )


def batches_of(words: Sequence[str], processes: int) -> list[StepBatch]:
    """The measured steps of a benchmark of one data-parallel rank, made once more."""
    config, _ = parse(TrainBenchConfig, words)
    world = World(rank=0, size=processes, local_rank=0, local_size=processes, started=True)
    blueprint = draw_bench(config, world)
    sequences = total_steps(config) * blueprint.shape.global_batch_size
    store = random_store(config.bench, sequences=sequences, vocab_size=blueprint.spec.vocab_size)
    loader = training_loader(blueprint, PreparedData(train=store, evaluation=None), dp_rank=0)
    first, steps = config.bench.warmup_steps, config.bench.steps
    return list(loader.steps())[first : first + steps]  # type: ignore[arg-type]


def test_rates_fit_each_other(measured: Measured) -> None:
    record = measured.record
    seconds = record["median_step_s"]
    assert len(record["step_seconds"]) == 2
    assert seconds == pytest.approx(statistics.median(record["step_seconds"]))
    assert record["tokens_per_s"] * seconds == pytest.approx(record["tokens_per_step"])
    assert record["tokens_per_s_per_device"] * measured.processes == pytest.approx(record["tokens_per_s"])
    assert record["layout"]["world_size"] == measured.processes
    assert record["peak_memory_gib"] > 0
    assert record["parameters"] == record["trained_parameters"] == 213_696


def test_tokens_and_flops_are_those_of_the_rows_without_padding(measured: Measured) -> None:
    batches, record = batches_of(measured.words, measured.processes), measured.record
    micro_batches = [batch for step in batches for batch in step.micro_batches]
    lengths = [length for batch in micro_batches for length in batch.lengths]
    places = sum(batch.tokens.numel() for batch in micro_batches)
    assert record["tokens_per_step"] == sum(lengths) / 2
    assert record["rows_per_step"] == len(lengths) / 2
    assert record["supervised_tokens_per_step"] == sum(batch.num_supervised for batch in micro_batches) / 2
    assert record["padding_share"] == pytest.approx(1 - sum(lengths) / places)
    # 4 layers of 2 x 64 x 16 x (4 + 2) attention and 3 x 64 x 128 MLP weights, and a head of 512 x 64.
    matmul = 4 * (2 * 64 * 16 * (4 + 2) + 3 * 64 * 128) + 512 * 64
    flops = sum(n * 6 * (matmul + 4 * 64 * n) for n in lengths) / 2
    expected = flops / record["median_step_s"] / measured.processes / 1e12
    assert record["tflops_per_device"] == pytest.approx(expected)


def test_the_share_of_targets_is_what_was_asked(measured: Measured) -> None:
    share = measured.record["supervised_tokens_per_step"] / measured.record["tokens_per_step"]
    if measured.processes == 1:
        assert share == pytest.approx(0.5, abs=0.02)
    else:
        rows = measured.record["rows_per_step"]  # all but the first token of a row
        assert share == pytest.approx(1 - rows / measured.record["tokens_per_step"])


def test_loss_is_that_of_random_weights(measured: Measured) -> None:
    assert measured.record["loss"] == pytest.approx(math.log(512), abs=0.15)


def test_what_a_cpu_does_not_have_is_null(measured: Measured) -> None:
    assert measured.record["mfu"] is None
    environment = measured.record["environment"]
    assert (environment["device"], environment["backend"]) == ("cpu", "gloo")
    assert environment["versions"]["transformer-engine"] is None
    assert environment["versions"]["megatron-core"]
    assert environment["command"].startswith(f"NPROC_PER_NODE={measured.processes} braid bench train --shape")


def test_parts_add_up_to_the_step(measured: Measured) -> None:
    parts = dict(measured.record["breakdown"])
    assert parts.pop("steps") == 2
    step = parts.pop("step_s")
    assert set(parts) == {
        "forward_s", "backward_s", "communication_s", "optimizer_s", "data_s", "other_s"
    }  # fmt: skip
    assert all(seconds >= 0 for seconds in parts.values())
    assert min(parts[f"{part}_s"] for part in ("forward", "backward", "optimizer", "communication")) > 0
    assert sum(parts.values()) == pytest.approx(step)


def test_files_are_whole(measured: Measured) -> None:
    assert sorted(path.name for path in measured.directory.iterdir()) == [
        "bench.json", "bench.md", "bench.png"
    ]  # fmt: skip
    text = (measured.directory / "bench.md").read_text(encoding="utf-8")
    assert measured.record["environment"]["command"] in text
    assert f"{measured.record['tokens_per_s']:,.1f}" in text
    assert "MFU: model FLOPs / " in text
    assert "further steps under Megatron's timers" in text
    assert (measured.directory / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert f"{measured.record['tokens_per_s']:,.1f}" in measured.printed


def test_the_trace_is_of_a_step(measured: Measured) -> None:
    events = json.loads(measured.trace.read_text(encoding="utf-8"))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert "aten::mm" in names or "aten::addmm" in names or "aten::matmul" in names
    assert any("Backward" in name for name in names)


def test_lora_trains_few_parameters_over_even_rows(tmp_path: Path, cache: Path) -> None:
    run = braid(
        "bench", "train", *WORDS, "--train_type", "lora", "--lengths", "even", "--breakdown", "false",
        "--output_dir", str(tmp_path), cache=cache,
    )  # fmt: skip
    assert run.code == 0, run.stderr
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert record["breakdown"] is None
    assert 0 < record["trained_parameters"] < record["parameters"] / 4
    assert (record["tokens_per_step"], record["rows_per_step"]) == (4 * 128, 4)
    assert record["padding_share"] == 0


OUT_OF_MEMORY = """
import sys, torch
import engine.training.step as step
from launch.cli import main
real, calls = step.train_step, []
def train_step(*args):
    calls.append(1)
    if len(calls) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return real(*args)
from engine.runtime.platform import install_cpu
install_cpu()
step.train_step = train_step
sys.exit(main(sys.argv[1:]))
"""


def test_out_of_memory_is_one_line_and_known_to_a_sweep(tmp_path: Path) -> None:
    words = ["bench", "train", *WORDS, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OUT_OF_MEMORY, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("braid")]
    assert line.startswith(
        "braid bench: failed: out of memory on the device in measured step 2; lower "
        "per_device_train_batch_size, "
    )
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert record["oom"] is True
    assert line.endswith(record["error"])
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


BAD = {
    "no model": ((), "no model is given"),
    "two models": (("--shape", "tiny", "--model", "x"), "both --shape and --model are given"),
    "unknown shape": (("--shape", "qwen9"), "shape 'qwen9' is not known; shapes are qwen2.5-0.5b, "),
    "no directory": (("--model", "/nowhere"), "/nowhere does not exist"),
    "no steps": (("--shape", "tiny", "--steps", "0"), "steps must be at least 1, not 0"),
    "negative warm-up": (("--shape", "tiny", "--warmup_steps", "-1"), "warmup_steps must be at least 0"),
    "no length": (("--shape", "tiny", "--max_length", "1"), "max_length must be at least 2, not 1"),
    "no targets": (("--shape", "tiny", "--supervised_share", "0"), "supervised_share must be in (0, 1]"),
    "unknown flag": (("--shape", "tiny", "--lenght", "even"), "unknown option --lenght; did you mean"),
    "flag of sft": (("--shape", "tiny", "--dataset", "x"), "unknown option --dataset"),
    "unknown lengths": (("--shape", "tiny", "--lengths", "odd"), "lengths must be one of packed, even"),
    "layout": (("--shape", "tiny", "--tensor_model_parallel_size", "3"), "2 processes do not hold TP 3"),
    "heads": (
        ("--shape", "qwen2.5-7b", "--tensor_model_parallel_size", "8", "--nproc_per_node", "8"),
        "tensor_model_parallel_size 8 does not divide the model's num_attention_heads 28",
    ),
    "batch": (("--shape", "tiny", "--global_batch_size", "3"), "global_batch_size 3 is not a multiple"),
    "trace": (("--shape", "tiny", "--trace", "a.txt"), "trace a.txt must end with .json"),
    "experts": (("--shape", "tiny", "--expert_model_parallel_size", "2"), "has no experts"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_rank_starts(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = BAD[case]
    start = () if "--nproc_per_node" in words else ("--nproc_per_node", "2")
    assert main(["bench", "train", *words, *start]) == 2
    assert_one_line(capsys.readouterr().err, "bench", named)


def test_an_output_directory_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    for place in (tmp_path, tmp_path / "mine", tmp_path / "mine" / "below"):
        assert main(["bench", "train", *WORDS, "--nproc_per_node", "2", "--output_dir", str(place)]) == 2
        assert_one_line(capsys.readouterr().err, "bench", str(tmp_path))
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize("words", [[], ["foo"], ["--shape", "tiny"]])
def test_without_a_command_there_is_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    printed = capsys.readouterr()
    if words:
        assert_one_line(printed.err, "bench", words[0], "train, comm, sweep")
    else:
        assert printed.out.startswith("usage: braid bench COMMAND")
