"""Context parallelism computes what transformers computes, with packed and single documents of any length.

Documents here have 8 to 24 tokens, most of them no multiple of 2 x CP.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.config.options import ParallelOptions, RecomputeOptions
from tests.parity.test_transformers import assert_parity, train_on, train_plainly
from tests.support.models import save_tiny_model
from tests.support.reference import Reference
from tests.support.workers import WorkerPool


def degrees(tp: int = 1, pp: int = 1, cp: int = 2, vpp: int | None = None) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "virtual_pipeline_model_parallel_size": vpp,
    }


# name: processes, degrees, model, layers
LAYOUTS: Mapping[str, tuple[int, dict[str, Any], str, int]] = {
    "CP2": (2, degrees(), "qwen2_tied", 2),
    "CP4": (4, degrees(cp=4), "qwen3_head_dim", 2),
    "CP2xTP2": (4, degrees(tp=2), "qwen2_untied", 2),
    "CP2xPP2": (4, degrees(pp=2), "qwen3_odd_vocabulary", 2),
    "CP2xPP3": (6, degrees(pp=3), "qwen2_tied", 4),
    "CP2xTP2xPP2": (8, degrees(tp=2, pp=2), "qwen3_odd_vocabulary", 2),
    "CP2xPP2xVPP2": (4, degrees(pp=2, vpp=2), "qwen3_head_dim", 4),
    "CP2xDP2": (4, degrees(), "qwen2_tied", 2),
}


class Models:
    """Checkpoints and what transformers makes of them, each once."""

    def __init__(self, root: Path) -> None:
        self.directory = cache(
            lambda name, layers: save_tiny_model(name, root / f"{name}-{layers}", num_hidden_layers=layers)
        )
        self.reference = cache(self._train)

    def _train(self, name: str, layers: int) -> Reference:
        return train_plainly(self.directory(name, layers))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("context-parallel"))


def check(workers: WorkerPool, models: Models, layout: str, comm_type: str, **changes: Any) -> None:
    world_size, options, name, layers = LAYOUTS[layout]
    directory = models.directory(name, layers)
    parallel = ParallelOptions(cp_comm_type=comm_type, **options)  # type: ignore[arg-type]
    results = train_on(workers, world_size, directory, parallel, **changes)
    assert_parity(results, models.reference(name, layers), directory)


CASES = [
    (layout, rows, comm_type)
    for layout in LAYOUTS
    for rows in (1, 2)
    for comm_type in ("all_gather", "a2a")
    # What is packed does not depend on these.
    if rows == 2 or layout not in ("CP2xPP2xVPP2", "CP2xDP2")
]


@pytest.mark.parametrize(("layout", "rows_per_micro_batch", "comm_type"), CASES)
def test_layout_equals_transformers(
    workers: WorkerPool, models: Models, layout: str, rows_per_micro_batch: int, comm_type: str
) -> None:
    check(workers, models, layout, comm_type, micro_batch_size=rows_per_micro_batch)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation(workers: WorkerPool, models: Models, granularity: str) -> None:
    recompute = RecomputeOptions(recompute_granularity=granularity)  # type: ignore[arg-type]
    check(workers, models, "CP2xTP2", "all_gather", recompute=recompute)
