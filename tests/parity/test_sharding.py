"""What the data-parallel ranks shard does not change what is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.options import OptimizerOptions, ParallelOptions, RecomputeOptions
from tests.support.layouts import degrees
from tests.support.models import save_adapter, save_tiny_model
from tests.support.sharding import ShardedResult, train_sharded, whole
from tests.support.training import random_rows
from tests.support.workers import WorkerPool

STRATEGIES = ["no_shard", "optim", "optim_grads", "optim_grads_params"]
SHARDED = STRATEGIES[2:]
STEPS = 8


def train(
    workers: WorkerPool,
    model_dir: Path,
    strategy: str | None,
    parallel: ParallelOptions | None = None,
    ranks: int = 2,
    **changes: Any,
) -> list[ShardedResult]:
    # Gradients are clipped, and each of two ranks adds up two micro-batches a step.
    options = OptimizerOptions(
        use_distributed_optimizer=strategy != "no_shard", data_parallel_sharding_strategy=strategy
    )
    steps = [random_rows(4, vocabulary=500, longest=24, seed=seed) for seed in range(STEPS)]
    return workers.run(
        train_sharded,
        ranks,
        model_dir=str(model_dir),
        parallel=parallel or ParallelOptions(),
        optimizer=options,
        steps=steps,
        learning_rate=1e-3,
        **changes,
    )


def assert_same_curve(found: ShardedResult, wanted: ShardedResult) -> None:
    assert len(wanted.losses) == STEPS
    assert wanted.losses[-1] != wanted.losses[0]
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
    assert found.grad_norms == pytest.approx(wanted.grad_norms, rel=1e-5)


class Kind:
    """A model, tied embeddings and an adapter among them, and how it trains where nothing is sharded."""

    def __init__(self, workers: WorkerPool, name: str, root: Path, *, lora: bool) -> None:
        self.model_dir = save_tiny_model(name, root / "model", num_hidden_layers=2)
        self.more: dict[str, Any] = {}
        if lora:
            self.more["adapter"] = str(save_adapter(self.model_dir, root / "adapter"))
        self.expected = train(workers, self.model_dir, None, **self.more)


@pytest.fixture(
    scope="module",
    params=[("qwen3_odd_vocabulary", False), ("qwen2_tied", False), ("qwen2_tied", True)],
    ids=["qwen3", "tied", "lora"],
)
def kind(
    request: pytest.FixtureRequest, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> Kind:
    name, lora = request.param
    return Kind(workers, name, tmp_path_factory.mktemp("sharding"), lora=lora)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_train_the_same_weights(workers: WorkerPool, kind: Kind, strategy: str) -> None:
    results = train(workers, kind.model_dir, strategy, **kind.more)
    assert_same_curve(results[0], kind.expected[0])
    found = whole(results) if strategy in SHARDED else results[0].weights
    assert found.keys() == kind.expected[0].weights.keys()
    for name, wanted in kind.expected[0].weights.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("short", "ranks"),
    [({"tp": 2}, 4), ({"cp": 2}, 4), ({"tp": 2}, 2), ({}, 4), ({}, 1)],
    ids=["TP2xDP2", "CP2xDP2", "TP2", "DP4", "DP1"],
)
@pytest.mark.parametrize("strategy", SHARDED)
def test_layouts_train_the_same(
    workers: WorkerPool, kind: Kind, strategy: str, short: dict[str, int], ranks: int
) -> None:
    """With layers computed again; a single data-parallel rank has nobody to share with."""
    again = RecomputeOptions(gradient_checkpointing=True)
    results = train(workers, kind.model_dir, strategy, degrees(**short), ranks, recompute=again, **kind.more)
    assert_same_curve(results[0], kind.expected[0])


@pytest.fixture(scope="module")
def experts(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind(workers, "qwen2_moe", tmp_path_factory.mktemp("sharded-experts"), lora=False)


@pytest.mark.parametrize(("short", "ranks"), [({}, 2), ({"tp": 2}, 4)], ids=["DP2", "TP2xDP2"])
@pytest.mark.parametrize("strategy", SHARDED)
def test_experts_train_the_same(
    workers: WorkerPool, experts: Kind, strategy: str, short: dict[str, int], ranks: int
) -> None:
    """All ranks share what a tensor rank has of the experts, which is all of them."""
    results = train(workers, experts.model_dir, strategy, degrees(**short), ranks)
    assert_same_curve(results[0], experts.expected[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("strategy", SHARDED)
def test_half_precision_is_that_of_the_distributed_optimizer(
    workers: WorkerPool, kind: Kind, strategy: str, dtype: str
) -> None:
    found = train(workers, kind.model_dir, strategy, dtype=dtype, **kind.more)[0]
    wanted = train(workers, kind.model_dir, None, dtype=dtype, **kind.more)[0]
    assert found.losses == pytest.approx(wanted.losses, rel=2e-3)
