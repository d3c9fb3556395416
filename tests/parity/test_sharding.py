"""What the data-parallel ranks shard does not change what is trained."""

from pathlib import Path

import pytest
import torch

from engine.config.options import OptimizerOptions
from tests.support.models import save_tiny_model
from tests.support.sharding import ShardedResult, train_sharded, whole
from tests.support.training import random_rows
from tests.support.workers import WorkerPool


def train(workers: WorkerPool, model_dir: Path, strategy: str | None, **changes: str) -> list[ShardedResult]:
    # Gradients are clipped, and each rank adds up two micro-batches a step.
    options = OptimizerOptions(
        use_distributed_optimizer=strategy != "no_shard", data_parallel_sharding_strategy=strategy
    )
    steps = [random_rows(4, vocabulary=500, longest=24, seed=seed) for seed in range(4)]
    return workers.run(
        train_sharded,
        2,
        model_dir=str(model_dir),
        optimizer=options,
        steps=steps,
        learning_rate=1e-3,
        **changes,
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen3_odd_vocabulary", tmp_path_factory.mktemp("sharding") / "model")


@pytest.fixture(scope="module")
def expected(workers: WorkerPool, model_dir: Path) -> list[ShardedResult]:
    return train(workers, model_dir, None)


@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads", "optim_grads_params"])
def test_strategies_train_the_same_weights(
    workers: WorkerPool, model_dir: Path, expected: list[ShardedResult], strategy: str
) -> None:
    results = train(workers, model_dir, strategy)
    assert results[0].losses == pytest.approx(expected[0].losses, rel=1e-5)
    assert results[0].grad_norms == pytest.approx(expected[0].grad_norms, rel=1e-5)
    sharded = strategy in ("optim_grads", "optim_grads_params")
    found = whole(results) if sharded else results[0].weights
    assert found.keys() == expected[0].weights.keys()
    for name, wanted in expected[0].weights.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)


def test_sharded_weights_train_in_bf16(workers: WorkerPool, model_dir: Path) -> None:
    found = train(workers, model_dir, "optim_grads_params", dtype="bfloat16")[0]
    wanted = train(workers, model_dir, None, dtype="bfloat16")[0]
    assert found.losses == pytest.approx(wanted.losses, rel=2e-3)
