"""Runs whose data-parallel ranks share gradients, or weights too: resumed bitwise and under other layouts."""

from pathlib import Path

import pytest
import torch

from engine.storage.reader import TorchDistReader
from launch.tiny import build_tiny_qwen3
from tests.parity.test_resume import LORA, TP2_DP2, TP2_PP2, Runs, assert_continued, losses
from tests.support.models import save_tiny_model_with_words
from tests.support.workers import WorkerPool

STRATEGIES = ["optim_grads", "optim_grads_params"]


@pytest.fixture(scope="module")
def runs(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("sharding-resume")
    model_dir = build_tiny_qwen3(root / "model", hidden_size=32, intermediate_size=64)
    return Runs(workers, model_dir, root)


def sharding(strategy: str) -> list[str]:
    return ["--data_parallel_sharding_strategy", strategy]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, master weights and moments."""
    reader = TorchDistReader(checkpoint)
    found = {}
    for key, stored in reader.tensors.items():
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        found[key] = reader.read_region(key, (0,) * whole.ndim, whole)
    return found


def assert_bitwise(straight: Path, resumed: Path) -> None:
    """After the third step, to the last tensor of the last checkpoint."""
    expected = losses(straight)
    assert losses(resumed) == {step: expected[step] for step in (4, 5, 6)}
    expected = losses(straight, "eval_loss")
    assert losses(resumed, "eval_loss") == {step: expected[step] for step in (4, 6)}
    wanted, found = tensors(straight / "checkpoint-6"), tensors(resumed / "checkpoint-6")
    assert wanted.keys() == found.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in wanted)
    for key, tensor in wanted.items():
        assert torch.equal(tensor, found[key]), key


HALF = ["--torch_dtype", "bfloat16"]
MOMENTS = ["--exp_avg_dtype", "bfloat16", "--exp_avg_sq_dtype", "bfloat16", "--adam_beta2", "0.95"]
ON_THE_HOST = ["--gradient_checkpointing", "true", "--optimizer_cpu_offload", "true"]


@pytest.mark.parametrize(
    ("strategy", "further", "world_size"),
    [
        *((strategy, [], 2) for strategy in STRATEGIES),
        *((strategy, [*LORA, *TP2_DP2, "--lora_dropout", "0.2"], 4) for strategy in STRATEGIES),
        *((strategy, [*HALF, *ON_THE_HOST], 2) for strategy in STRATEGIES),
        ("optim_grads", [*HALF, *LORA], 2),
        ("optim_grads_params", MOMENTS, 2),
        ("no_shard", HALF, 2),
    ],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    runs: Runs, strategy: str, further: list[str], world_size: int
) -> None:
    """With an evaluation before and after the checkpoint."""
    flags = [*sharding(strategy), *further, "--split_dataset_ratio", "0.1", "--eval_steps", "2"]
    name = f"{strategy}{''.join(further)}"
    straight = runs.start(name, [*flags, "--save_steps", "3"], world_size=world_size)
    resumed = runs.start(f"{name}-resumed", flags, world_size=world_size, resume=straight / "checkpoint-3")
    assert_bitwise(straight, resumed)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_another_layout_continues_the_run(runs: Runs, strategy: str, lora: bool) -> None:
    """And such a run continues one of another layout; the checkpoints have the same tensors."""
    flags = [*LORA, "--lora_dropout", "0"] if lora else []
    name = f"{strategy}-{lora}"
    sharded = runs.start(f"{name}-sharded", [*flags, *sharding(strategy), "--save_steps", "3"])
    other = runs.start(f"{name}-other", [*flags, *TP2_DP2, "--save_steps", "3"])
    first, second = (tensors(run / "checkpoint-6") for run in (sharded, other))
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in first.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in second.items()
    }
    for target, words in (("stages", TP2_PP2), ("replicas", ["--context_parallel_size", "2"])):
        resumed = runs.start(f"{name}-{target}", [*flags, *words], resume=sharded / "checkpoint-3")
        assert_continued(sharded, resumed)
    back = runs.start(
        f"{name}-back", [*flags, *sharding(strategy)], world_size=2, resume=other / "checkpoint-3"
    )
    assert_continued(other, back)


def test_a_run_goes_from_strategy_to_strategy(runs: Runs) -> None:
    straight = runs.start("all", [*sharding("no_shard"), "--save_steps", "3"], world_size=2)
    for strategy in ("optim", *STRATEGIES):
        resumed = runs.start(
            f"to-{strategy}", sharding(strategy), world_size=2, resume=straight / "checkpoint-3"
        )
        assert_continued(straight, resumed)
    sharded = runs.start("from", [*sharding("optim_grads_params"), "--save_steps", "3"], world_size=2)
    plain = runs.start("back", sharding("no_shard"), world_size=2, resume=sharded / "checkpoint-3")
    assert_continued(sharded, plain)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_experts_go_from_ranks_that_share_rows_to_ranks_that_have_some(
    workers: WorkerPool, tmp_path: Path, strategy: str
) -> None:
    """Expert parallelism has an optimizer of its own for experts; and back."""
    runs = Runs(workers, save_tiny_model_with_words("qwen2_moe", tmp_path / "model"), tmp_path)
    flags, apart = [*sharding(strategy), "--save_steps", "3"], ["--expert_model_parallel_size", "2"]
    sharded = runs.start("sharded", flags, world_size=2)
    other = runs.start("apart", [*apart, "--save_steps", "3"], world_size=2, resume=sharded / "checkpoint-3")
    assert_continued(sharded, other)
    back = runs.start("back", [*flags, *TP2_DP2], resume=other / "checkpoint-3")
    assert_continued(sharded, back)
