"""What may not change the result does not: recomputation, the kind of optimizer, uneven splits, packing of
rows into micro-batches. And rope scaling is transformers' own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.mapping import weight_map
from engine.config.options import ParallelOptions, RecomputeOptions
from engine.model.spec import load_model_spec
from tests.parity.test_transformers import assert_parity, train_on, train_plainly
from tests.support.models import save_tiny_model
from tests.support.reference import Reference
from tests.support.training import LayoutResult, merge
from tests.support.workers import WorkerPool

VARIANTS: Mapping[str, dict[str, Any]] = {
    "full recomputation": {"recompute": RecomputeOptions(gradient_checkpointing=True)},
    "full recomputation by block": {
        "recompute": RecomputeOptions(
            recompute_granularity="full", recompute_method="block", recompute_num_layers=1
        )
    },
    "selective recomputation": {"recompute": RecomputeOptions(recompute_granularity="selective")},
    **{
        f"recomputation of {' and '.join(modules)}": {
            "recompute": RecomputeOptions(recompute_granularity="selective", recompute_modules=modules)
        }
        for modules in (["mlp_act"], ["core_attn", "mlp_act"], ["mlp"], ["mlp", "mlp_act"])
    },
    "optimizer not sharded": {"optimizer": {"use_distributed_optimizer": False}},
    "optimizer on the host": {"optimizer": {"optimizer_cpu_offload": True}},
    "half of the optimizer on the host": {
        "optimizer": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    },
    "nothing overlapped": {"optimizer": {"overlap_grad_reduce": False, "overlap_param_gather": False}},
    "uneven split": {"parallel": {"decoder_layers_per_stage": [1, 3]}},
    "two rows a micro-batch": {"micro_batch_size": 2},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen3_odd_vocabulary", tmp_path_factory.mktemp("variants") / "model")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return train_plainly(model_dir)


def train(workers: WorkerPool, model_dir: Path, world_size: int, **changes: Any) -> list[LayoutResult]:
    parallel = {"pipeline_model_parallel_size": 2, **changes.pop("parallel", {})}
    return train_on(workers, world_size, model_dir, ParallelOptions(**parallel), **changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_transformers(
    workers: WorkerPool, model_dir: Path, reference: Reference, variant: str
) -> None:
    """PP2 x DP2, except that TP2 takes the place of DP2 for recomputation (it must gather its sequence
    again).
    """
    changes = dict(VARIANTS[variant])
    if "recompute" in changes:
        changes["parallel"] = {"tensor_model_parallel_size": 2}
    assert_parity(train(workers, model_dir, 4, **changes), reference, model_dir)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1000000.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["linear", "yarn"],
)
def test_rope_scaling_equals_transformers(workers: WorkerPool, rope: dict[str, Any], tmp_path: Path) -> None:
    directory = save_tiny_model("qwen2_untied", tmp_path / "model", rope_parameters=rope)
    assert_parity(train(workers, directory, 2), train_plainly(directory), directory)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_fp32(
    workers: WorkerPool, model_dir: Path, reference: Reference, dtype: str
) -> None:
    """Half precision keeps 8 or 11 bits: the loss agrees to 1 %, gradients point where the fp32 ones do."""
    results = train(workers, model_dir, 2, dtype=dtype)
    for found, wanted in zip(results[0].losses, reference.losses, strict=True):
        assert abs(found - wanted) <= 1e-2 * wanted
    gradients = merge(results, weight_map(load_model_spec(model_dir)), "gradients")
    for name, wanted in reference.gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradients[name].flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.95, f"{name}: cosine {cosine:.4f}"
