"""Mixtures of experts compute what transformers computes under every layout of their experts: loss, auxiliary
loss, every weight's gradient, weights after three AdamW steps.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.config.options import MoeOptions, ParallelOptions, RecomputeOptions
from tests.parity.test_transformers import assert_parity, train_on, train_plainly
from tests.support.layouts import degrees
from tests.support.models import MOE_MODELS, save_tiny_model
from tests.support.reference import Reference
from tests.support.workers import WorkerPool

AUX_LOSS_COEF = 0.1
"""Large enough for its gradient to show: Qwen's own is 0.001."""


LAYOUTS: Mapping[str, tuple[int, ParallelOptions, int]] = {
    # name: processes, degrees, layers of the model
    "one process": (1, degrees(), 2),
    "EP2": (2, degrees(ep=2), 2),
    "EP4": (4, degrees(ep=4), 2),
    "EP2xTP2": (2, degrees(ep=2, tp=2), 2),
    "ETP2xTP2": (2, degrees(tp=2, etp=2), 2),
    "EP2xTP2xDP2": (4, degrees(ep=2, tp=2), 2),
    "EP2xETP2": (4, degrees(ep=2, tp=2, etp=2), 2),
    "EP2xETP2xTP1": (4, degrees(ep=2, etp=2), 2),
    "EP2xPP2": (4, degrees(ep=2, pp=2), 2),
    "EP2xPP2xVPP2": (4, degrees(ep=2, pp=2, vpp=2), 4),
    "EP2xDP2": (4, degrees(ep=2), 2),
    "EP2xCP2": (4, degrees(ep=2, cp=2), 2),
    "TP2xPP2": (4, degrees(tp=2, pp=2), 2),
}


@pytest.fixture(scope="module")
def reference(models):
    @cache
    def run(name: str, layers: int) -> Reference:
        return train_plainly(models(name, layers), aux_loss_coef=AUX_LOSS_COEF)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MOE_MODELS)
def test_layout_equals_transformers(workers: WorkerPool, models, reference, name: str, layout: str) -> None:
    world_size, parallel, layers = LAYOUTS[layout]
    directory, expected = models(name, layers), reference(name, layers)
    moe = MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF)
    results = train_on(workers, world_size, directory, parallel, moe=moe)
    for result in results:
        for found, wanted in zip(result.aux_losses, expected.aux_losses, strict=True):
            assert abs(found - wanted) <= 1e-5 * wanted
    assert_parity(results, expected, directory)


def again(*modules: str) -> RecomputeOptions:
    return RecomputeOptions(recompute_granularity="selective", recompute_modules=list(modules))


@pytest.mark.parametrize("name", MOE_MODELS)
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (
            "EP2xDP2",
            {"moe": MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF, moe_token_dispatcher_type="allgather")},
        ),
        (
            "EP2xETP2",
            {"moe": MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF, moe_token_dispatcher_type="allgather")},
        ),
        ("one process", {"recompute": RecomputeOptions(gradient_checkpointing=True)}),
        ("one process", {"recompute": again("moe")}),
        ("EP2xPP2", {"recompute": RecomputeOptions(gradient_checkpointing=True)}),
        ("EP2xTP2", {"recompute": RecomputeOptions(recompute_granularity="selective")}),
        ("EP2xTP2", {"recompute": again("moe", "mlp_act")}),
        ("EP2xTP2", {"recompute": again("shared_experts", "core_attn")}),
        ("EP2xDP2", {"optimizer": {"use_distributed_optimizer": False}}),
        ("EP2xDP2", {"optimizer": {"overlap_grad_reduce": False}}),
    ],
    ids=[
        "allgather",
        "allgather, ETP",
        "recomputed layers of one process",
        "recomputed experts of one process",
        "recomputed layers",
        "recomputed attention",
        "recomputed experts",
        "recomputed shared experts",
        "unsharded",
        "no overlap",
    ],
)
def test_variants_equal_transformers(
    workers: WorkerPool, models, reference, name: str, layout: str, changes: Mapping[str, Any]
) -> None:
    world_size, parallel, layers = LAYOUTS[layout]
    moe = {"moe": MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF)}
    results = train_on(workers, world_size, models(name, layers), parallel, **{**moe, **changes})
    assert_parity(results, reference(name, layers), models(name, layers))


def test_every_second_layer_with_z_loss(workers: WorkerPool, tmp_path: Path) -> None:
    directory = save_tiny_model("qwen3_moe", tmp_path, num_hidden_layers=4, decoder_sparse_step=2)
    expected = train_plainly(directory, aux_loss_coef=AUX_LOSS_COEF, z_loss_coef=0.05)
    moe = MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF, moe_z_loss_coeff=0.05)
    world_size, parallel, _ = LAYOUTS["EP2xPP2"]
    assert_parity(train_on(workers, world_size, directory, parallel, moe=moe), expected, directory)
