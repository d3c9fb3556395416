"""Every layout computes what transformers computes: loss, every weight's gradient, weights after three AdamW
steps.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.mapping import Weight, weight_map
from engine.config.options import OptimizerOptions, ParallelOptions
from engine.model.spec import load_model_spec
from tests.support.models import FEW_KV_HEADS, MODELS
from tests.support.reference import Reference, train_reference
from tests.support.training import LayoutResult, merge, random_rows, train_layout
from tests.support.workers import WorkerPool

LAYOUTS: Mapping[str, tuple[int, ParallelOptions, int]] = {
    # name: processes, degrees, layers of the model
    "TP2": (2, ParallelOptions(tensor_model_parallel_size=2), 2),
    "TP4": (4, ParallelOptions(tensor_model_parallel_size=4), 2),
    "PP2": (2, ParallelOptions(pipeline_model_parallel_size=2), 2),
    "PP3 with 5 layers": (3, ParallelOptions(pipeline_model_parallel_size=3), 5),
    "PP2xVPP2": (
        2,
        ParallelOptions(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        4,
    ),
    "DP2": (2, ParallelOptions(), 2),
    "TP2xPP2": (4, ParallelOptions(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 2),
    "TP2xDP2": (4, ParallelOptions(tensor_model_parallel_size=2), 2),
    "PP2xDP2": (4, ParallelOptions(pipeline_model_parallel_size=2), 2),
    "TP2xPP2xVPP2": (
        4,
        ParallelOptions(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        4,
    ),
}
ROWS = 4
LEARNING_RATES = (1e-3, 2e-3, 3e-3)  # a warm-up
# AdamW divides a gradient by its own size. With the usual epsilon of 1e-8 an element whose gradient is
# rounding noise moves by a full learning rate in a random direction - two runs of transformers with the rows
# in another order differ by 1e-4 there - and comparing it would test the noise. Real gradients are about 1e-3
# here.
ADAM_EPSILON = 1e-5


def global_batches(model_dir: Path) -> list[list]:
    vocabulary = load_model_spec(model_dir).vocab_size
    return [
        random_rows(ROWS, vocabulary=vocabulary, longest=24, seed=seed) for seed in range(len(LEARNING_RATES))
    ]


def train_on(
    pool: WorkerPool,
    world_size: int,
    directory: Path,
    parallel: ParallelOptions,
    *,
    optimizer: Mapping[str, Any] | None = None,
    **changes: Any,
) -> list[LayoutResult]:
    """The three steps under a layout; `optimizer` and `changes` are what differs from the plain run."""
    return pool.run(
        train_layout,
        world_size,
        model_dir=str(directory),
        parallel=parallel,
        optimizer=OptimizerOptions(adam_epsilon=ADAM_EPSILON, **(optimizer or {})),
        steps=global_batches(directory),
        learning_rates=LEARNING_RATES,
        **changes,
    )


def train_plainly(directory: Path, **changes: Any) -> Reference:
    """The same three steps by transformers and torch."""
    return train_reference(
        str(directory), global_batches(directory), LEARNING_RATES, eps=ADAM_EPSILON, **changes
    )


@pytest.fixture(scope="module")
def reference(models):
    @cache
    def run(name: str, layers: int) -> Reference:
        return train_plainly(models(name, layers))

    return run


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value of the tensor."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def assert_parity(
    results: list[LayoutResult],
    expected: Reference,
    model_dir: Path,
    weights: Mapping[str, Weight] | None = None,
) -> None:
    """`weights` is the map of what was trained; the whole model by default."""
    for result in results:
        assert result.losses == results[0].losses, "ranks disagree on the loss"
        for found, wanted in zip(result.losses, expected.losses, strict=True):
            assert abs(found - wanted) <= 1e-5 * wanted
        assert abs(result.eval_loss - expected.losses[0]) <= 1e-5 * expected.losses[0]
        for found, wanted in zip(result.grad_norms, expected.grad_norms, strict=True):
            assert abs(found - wanted) <= 1e-4 * wanted
    weights = weights or weight_map(load_model_spec(model_dir))
    gradients = merge(results, weights, "gradients")
    assert gradients.keys() == expected.gradients.keys()
    assert_within(
        {n: relative_error(gradients[n], expected.gradients[n]) for n in gradients}, 1e-4, "gradient"
    )
    trained = merge(results, weights, "weights")
    assert trained.keys() == expected.weights.keys()
    # No element is off by 1e-4, and the update as a whole is right to 1e-4 of its length.
    differences = {n: trained[n] - expected.weights[n] for n in trained}
    assert_within({n: float(d.abs().max()) for n, d in differences.items()}, 1e-4, "weight")
    errors = {}
    for name, difference in differences.items():
        update = expected.weights[name] - expected.start[name]
        # A key bias shifts all keys, which softmax does not see but for the rotation: its gradient is a small
        # difference of large terms, and transformers itself moves by 4e-5 when the rows change order.
        conditioning = 10.0 if name.endswith("k_proj.bias") else 1.0
        errors[name] = float(difference.norm() / update.norm()) / conditioning
    assert_within(errors, 1e-4, "update of")
    check_copies(results)


def assert_within(errors: Mapping[str, float], bound: float, what: str) -> None:
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound, f"{what} {worst} differs by {errors[worst]:.2e}"


def check_copies(results: list[LayoutResult]) -> None:
    """The last stage's copy of tied embeddings equals the first stage's, in gradients and after the
    updates.
    """
    name = "embedding.word_embeddings.weight"
    for copy in (result for result in results if result.copies):
        place = copy.replica, copy.tp_rank
        original = next(r for r in results if name in r.gradients and (r.replica, r.tp_rank) == place)
        assert torch.equal(copy.copies[f"gradient {name}"], original.gradients[name])
        assert torch.equal(copy.copies[f"weight {name}"], original.weights[name])


# More ranks than key/value heads share a head between ranks: a matter of TP alone.
CASES = [
    (model, layout) for model in MODELS for layout in LAYOUTS if model != FEW_KV_HEADS or layout == "TP4"
]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_layout_equals_transformers(workers: WorkerPool, models, reference, model: str, layout: str) -> None:
    world_size, parallel, layers = LAYOUTS[layout]
    directory = models(model, layers)
    results = train_on(workers, world_size, directory, parallel)
    assert_parity(results, reference(model, layers), directory)
