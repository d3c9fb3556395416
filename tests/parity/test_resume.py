"""A run is the same run: twice with one seed, after an interruption, and under another layout."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from converters.adapter import ADAPTER_FILE, holds_adapter, to_peft
from converters.convert import to_hf
from converters.hf.reader import HfReader
from launch.tiny import DATA_DIR, build_tiny_qwen3
from tests.support.training import run_sft
from tests.support.workers import WorkerPool

TP2_PP2 = ["--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("resume") / "model", hidden_size=32, intermediate_size=64)


class Runs:
    """Starts runs of six steps of eight rows on four processes."""

    def __init__(self, workers: WorkerPool, model_dir: Path, root: Path) -> None:
        self.workers, self.model_dir, self.root = workers, model_dir, root

    def start(
        self, name: str, flags: Sequence[str], *, world_size: int = 4, resume: Path | None = None
    ) -> Path:
        output = self.root / name
        if resume is not None:
            shutil.copytree(resume, output / resume.name)
            flags = [*flags, "--resume_from_checkpoint", "auto"]
        words = [
            *("--model", str(self.model_dir), "--output_dir", str(output), "--device", "cpu"),
            *("--dataset", f"{DATA_DIR / 'qa.jsonl'}#40", "--max_length", "256", "--max_steps", "6"),
            *("--global_batch_size", "8", "--learning_rate", "1e-3", "--report_to", "none", *flags),
        ]
        self.workers.run(run_sft, world_size, argv=words)
        return output


def losses(output: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def weights(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    if holds_adapter(checkpoint):
        to_peft(checkpoint, scratch)
        reader = HfReader(scratch, single_file=ADAPTER_FILE)
    else:
        to_hf(checkpoint, scratch)
        reader = HfReader(scratch)
    return {name: reader.read(name).clone() for name in reader.tensors}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs"


def assert_continued(straight: Path, resumed: Path) -> None:
    """After the third step of `straight`, under whatever layout, with the same losses to 1e-5."""
    expected, found = losses(straight), losses(resumed)
    assert sorted(found) == [4, 5, 6]
    for step, loss in found.items():
        assert abs(loss - expected[step]) <= 1e-5 * expected[step]


@pytest.fixture(scope="module")
def runs(workers: WorkerPool, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(workers, model_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def straight(runs: Runs) -> Path:
    """Six steps at TP2 x PP2, with a checkpoint after the third."""
    return runs.start("straight", [*TP2_PP2, "--save_steps", "3"])


def test_resumed_run_is_bitwise_the_uninterrupted_one(runs: Runs, straight: Path, tmp_path: Path) -> None:
    resumed = runs.start("resumed", TP2_PP2, resume=straight / "checkpoint-3")
    expected = losses(straight)
    assert losses(resumed) == {step: expected[step] for step in (4, 5, 6)}
    assert_same_weights(
        weights(straight / "checkpoint-6", tmp_path / "a"), weights(resumed / "checkpoint-6", tmp_path / "b")
    )


def test_one_seed_gives_one_run(runs: Runs, straight: Path, tmp_path: Path) -> None:
    # The second run saves less often, too: saving must not disturb training.
    again = runs.start("again", TP2_PP2)
    assert losses(again) == losses(straight)
    assert_same_weights(
        weights(straight / "checkpoint-6", tmp_path / "a"), weights(again / "checkpoint-6", tmp_path / "b")
    )


@pytest.mark.parametrize(
    ("name", "world_size", "flags"),
    [
        ("DP2", 2, []),
        (
            "PP2xVPP2",
            2,
            ["--pipeline_model_parallel_size", "2", "--virtual_pipeline_model_parallel_size", "2"],
        ),
        ("TP2xDP2", 4, ["--tensor_model_parallel_size", "2"]),
        ("CP2xTP2", 4, ["--context_parallel_size", "2", "--tensor_model_parallel_size", "2"]),
    ],
)
def test_another_layout_continues_the_run(
    runs: Runs, straight: Path, name: str, world_size: int, flags: list[str]
) -> None:
    resumed = runs.start(name, flags, world_size=world_size, resume=straight / "checkpoint-3")
    assert_continued(straight, resumed)


def test_another_seed_gives_another_run(runs: Runs, straight: Path) -> None:
    other = runs.start("other-seed", [*TP2_PP2, "--seed", "7"])
    assert losses(other) != losses(straight)


LORA = ("--train_type", "lora", "--lora_rank", "4", "--weight_decay", "0.01")
TP2_DP2 = ("--tensor_model_parallel_size", "2")


def test_resumed_lora_run_is_bitwise_the_uninterrupted_one(runs: Runs, tmp_path: Path) -> None:
    """With dropout, whose random numbers go on where they stopped, and are not the same on both replicas."""
    flags = [*LORA, *TP2_DP2, "--lora_dropout", "0.2"]
    straight = runs.start("lora", [*flags, "--save_steps", "3"])
    resumed = runs.start("lora-resumed", flags, resume=straight / "checkpoint-3")
    expected = losses(straight)
    assert losses(resumed) == {step: expected[step] for step in (4, 5, 6)}
    assert_same_weights(
        weights(straight / "checkpoint-6", tmp_path / "a"), weights(resumed / "checkpoint-6", tmp_path / "b")
    )


def test_another_layout_continues_the_lora_run(runs: Runs) -> None:
    flags = [*LORA, "--lora_dropout", "0"]
    straight = runs.start("lora-plain", [*flags, *TP2_DP2, "--save_steps", "3"])
    stages = ["--pipeline_model_parallel_size", "2", "--virtual_pipeline_model_parallel_size", "2"]
    resumed = runs.start("lora-stages", [*flags, *stages], world_size=2, resume=straight / "checkpoint-3")
    assert_continued(straight, resumed)


STREAM = (
    "--streaming",
    "true",
    "--packing",
    "true",
    "--shuffle_buffer_size",
    "12",
    "--global_batch_size",
    "2",
)


def test_a_resumed_stream_of_packs_is_bitwise_the_uninterrupted_one(runs: Runs, tmp_path: Path) -> None:
    """Cut in the middle of a pass, with a buffer half taken; and the same data under another layout."""
    straight = runs.start("stream", [*TP2_PP2, *STREAM, "--save_steps", "3"])
    state = json.loads((straight / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stream"]["taken"] > 0
    resumed = runs.start("stream-resumed", [*TP2_PP2, *STREAM], resume=straight / "checkpoint-3")
    expected = losses(straight)
    assert losses(resumed) == {step: expected[step] for step in (4, 5, 6)}
    assert_same_weights(
        weights(straight / "checkpoint-6", tmp_path / "a"), weights(resumed / "checkpoint-6", tmp_path / "b")
    )
    layout = ["--context_parallel_size", "2"]
    assert_continued(straight, runs.start("stream-cp", [*layout, *STREAM], resume=straight / "checkpoint-3"))
