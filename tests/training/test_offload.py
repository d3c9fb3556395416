"""Master weights and moments on the host: the same training, and no memory beside the model for them."""

from typing import Any

import numpy as np
import pytest
import torch

from engine.config.options import OptimizerOptions, ParallelOptions
from engine.data.template import EncodedRow
from engine.runtime import offload
from engine.runtime.fsdp import local
from tests.support.models import save_tiny_model
from tests.support.training import loss_curve, open_run, random_rows, release
from tests.support.workers import WorkerPool

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model("qwen2_tied", tmp_path_factory.mktemp("offload") / "model"))


def train(pool: WorkerPool, world_size: int, model_dir: str, dtype: str, **options: Any) -> list[list[float]]:
    rows: list[list[EncodedRow]] = [
        random_rows(4, vocabulary=500, longest=60, seed=seed) for seed in range(STEPS)
    ]
    return pool.run(
        loss_curve,
        world_size,
        model_dir=model_dir,
        optimizer=OptimizerOptions(**options),
        steps=rows,
        learning_rates=[1e-3] * STEPS,
        micro_batch_size=2,
        dtype=dtype,
    )


@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize(
    ("dtype", "strategy"),
    [("bfloat16", None), ("float16", None), ("bfloat16", "optim_grads"), ("float32", "optim_grads_params")],
)
def test_it_is_bitwise_that_without_it(
    workers: WorkerPool, model_dir: str, dtype: str, strategy: str | None, fraction: float
) -> None:
    """On the CPU, where the update is the same kernel on the same numbers."""
    options = {"data_parallel_sharding_strategy": strategy}
    plain = train(workers, 2, model_dir, dtype, **options)
    hosted = train(
        workers,
        2,
        model_dir,
        dtype,
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=fraction,
        **options,
    )
    assert hosted == plain
    assert plain[0][-1] != plain[0][0]


def what_is_kept(rank: int, world_size: int, *, model_dir: str, fraction: float) -> dict[str, Any]:
    _, _, _, models, optimizer = open_run(
        rank,
        world_size,
        model_dir,
        ParallelOptions(),
        OptimizerOptions(optimizer_cpu_offload=True, optimizer_offload_fraction=fraction),
        dtype="bfloat16",
    )
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    mains = [main for group in part.optimizer.param_groups for main in group["params"]]
    hosted = part.optimizer.hosted
    found = {
        "elements": sum(main.numel() for main in mains),
        "hosted": sum(main.numel() for main in hosted),
        "bytes": sum(main.untyped_storage().nbytes() for main in mains),
        "largest": max(main.numel() for main in mains),
        "unreadable": all(bool(main.isnan().all()) for main in hosted if main.numel()),
        "count": len(hosted),
    }
    release(models)
    return found


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_master_weights_on_the_host_have_no_memory_elsewhere(
    workers: WorkerPool, model_dir: str, fraction: float
) -> None:
    for found in workers.run(what_is_kept, 2, model_dir=model_dir, fraction=fraction):
        wanted = fraction * found["elements"]
        assert wanted <= found["hosted"] < wanted + found["largest"] + 1
        assert found["bytes"] == 4 * (found["elements"] - found["hosted"] + found["count"])
        assert found["unreadable"], "whoever reads one must notice"


def whats_left_of_rows(rank: int, world_size: int, *, model_dir: str) -> tuple[int, bool]:
    _, _, _, models, optimizer = open_run(
        rank,
        world_size,
        model_dir,
        ParallelOptions(),
        OptimizerOptions(optimizer_cpu_offload=True, data_parallel_sharding_strategy="optim_grads_params"),
        dtype="bfloat16",
    )
    (part,) = optimizer.chained_optimizers
    mains = [local(main.detach()) for group in part.optimizer.param_groups for main in group["params"]]
    found = (
        sum(main.untyped_storage().nbytes() for main in mains) - 4 * len(mains),
        all(bool(main.isnan().all()) for main in mains),
    )
    release(models)
    return found


def test_rows_on_the_host_have_no_memory_elsewhere(workers: WorkerPool, model_dir: str) -> None:
    """Those of Megatron-FSDP; whoever reads one must notice."""
    assert workers.run(whats_left_of_rows, 2, model_dir=model_dir) == [(0, True)] * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_piece_is_updated_and_handed_to_the_model(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More pieces than are on their way at once, sizes that are no multiple of a piece, and nothing."""
    monkeypatch.setattr(offload, "_PIECE", 1000)
    generator = torch.Generator().manual_seed(0)
    items, gradients = [], []
    for size in (10_500, 1, 0, 3000):
        gradient = torch.randn(size, generator=generator)
        main = torch.full((), float("nan"), device=device).expand(size)
        main.grad = gradient.to(device)
        items.append(
            offload.Hosted(
                main=main,
                master=torch.arange(size, dtype=torch.float32),
                target=torch.zeros(size, dtype=dtype, device=device),
            )
        )
        gradients.append(gradient)
    calls: list[int] = []

    def update(item: offload.Hosted, part: slice, gradient: torch.Tensor) -> None:
        calls.append(len(gradient))
        item.master[part] += 2 * gradient

    offload.update_hosted(items, update)
    assert sum(calls) == sum(len(gradient) for gradient in gradients)
    assert max(calls) == 1000
    for item, gradient in zip(items, gradients, strict=True):
        wanted = torch.from_numpy(np.arange(len(gradient), dtype=np.float32)) + 2 * gradient
        assert torch.equal(item.master, wanted)
        assert torch.equal(item.target.cpu(), wanted.to(dtype))
    offload.update_hosted([], update)
