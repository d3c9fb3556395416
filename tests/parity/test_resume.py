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
from engine.storage.metadata import DistTensor
from engine.storage.reader import TorchDistReader
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


def losses(output: Path, kind: str = "loss") -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[kind] for record in records if kind in record}


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


MOMENTS = ("--exp_avg_dtype", "bfloat16", "--exp_avg_sq_dtype", "bfloat16", "--adam_beta2", "0.95")


def moments(checkpoint: Path) -> dict[str, DistTensor]:
    """What a checkpoint says of the optimizer's states."""
    tensors = TorchDistReader(checkpoint).tensors
    return {key: tensor for key, tensor in tensors.items() if key.startswith("optimizer.state.exp_avg")}


def test_a_run_with_bf16_moments_is_bitwise_the_uninterrupted_one(runs: Runs, tmp_path: Path) -> None:
    """At DP2 x TP2. The checkpoint has moments as they were, in 2 bytes each."""
    straight = runs.start("moments", [*TP2_DP2, *MOMENTS, "--save_steps", "3"])
    resumed = runs.start("moments-resumed", [*TP2_DP2, *MOMENTS], resume=straight / "checkpoint-3")
    expected = losses(straight)
    assert losses(resumed) == {step: expected[step] for step in (4, 5, 6)}
    last = straight / "checkpoint-6", resumed / "checkpoint-6"
    assert_same_weights(weights(last[0], tmp_path / "a"), weights(last[1], tmp_path / "b"))
    stored, again = (moments(path) for path in last)
    assert stored
    assert {tensor.dtype for tensor in (*stored.values(), *again.values())} == {torch.bfloat16}
    readers = [TorchDistReader(path) for path in last]
    for key, tensor in stored.items():
        first, second = (torch.empty(tensor.shape, dtype=tensor.dtype) for _ in readers)
        for reader, whole in zip(readers, (first, second), strict=True):
            reader.read_region(key, (0,) * whole.ndim, whole)
        assert torch.equal(first, second), key


def test_another_layout_continues_a_run_with_bf16_moments(runs: Runs) -> None:
    """Moments come over as they are. From there, sums in another order round a few of the new ones to the
    neighbour: losses agree as closely as with fp32 moments.
    """
    straight = runs.start("moments-plain", [*TP2_DP2, *MOMENTS, "--save_steps", "3"])
    assert_continued(
        straight, runs.start("moments-stages", [*TP2_PP2, *MOMENTS], resume=straight / "checkpoint-3")
    )


@pytest.mark.parametrize("into", ["bfloat16", "float32"])
def test_a_run_may_go_on_with_moments_of_another_dtype(runs: Runs, straight: Path, into: str) -> None:
    """Its first loss is still the uninterrupted run's: the weights are those of the checkpoint."""
    flags, source = [*TP2_PP2, *MOMENTS], straight
    if into == "float32":
        source, flags = runs.start("moments-before", [*flags, "--save_steps", "3"]), TP2_PP2
    resumed = runs.start(f"moments-into-{into}", flags, resume=source / "checkpoint-3")
    assert losses(resumed)[4] == losses(source)[4]
    assert {str(tensor.dtype) for tensor in moments(resumed / "checkpoint-6").values()} == {f"torch.{into}"}


@pytest.mark.parametrize("fraction", ["0.4", "1"])
def test_states_move_between_host_and_device(
    runs: Runs, straight: Path, fraction: str, tmp_path: Path
) -> None:
    """Checkpoints do not tell where states were: a run that goes on with the optimizer on the host, and one
    that goes on without it, are bitwise the run that never had it there.
    """
    host = [*TP2_PP2, "--optimizer_cpu_offload", "true", "--optimizer_offload_fraction", fraction]
    resumed = runs.start(f"host-{fraction}", host, resume=straight / "checkpoint-3")
    expected = losses(straight)
    assert losses(resumed) == {step: expected[step] for step in (4, 5, 6)}
    whole = runs.start(f"host-straight-{fraction}", [*host, "--save_steps", "3"])
    assert losses(whole) == expected
    back = runs.start(f"host-back-{fraction}", TP2_PP2, resume=whole / "checkpoint-3")
    final = weights(straight / "checkpoint-6", tmp_path / "straight")
    for name, run in (("resumed", resumed), ("whole", whole), ("back", back)):
        assert_same_weights(final, weights(run / "checkpoint-6", tmp_path / name))
