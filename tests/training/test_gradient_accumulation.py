"""Gradients of several micro-batches add up in fp32, in the products themselves, whatever the model's dtype
is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.options import OptimizerOptions
from engine.data.batches import collate
from tests.support.layouts import degrees
from tests.support.models import save_tiny_model
from tests.support.training import open_run, random_rows, release
from tests.support.workers import WorkerPool

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def watch(module: torch.nn.Module, seen: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Collect (input, gradient of the output) of every call; returns what ends it."""

    def called(_: Any, arguments: tuple[Tensor, ...], result: tuple[Tensor, Any]) -> None:
        x = arguments[0].detach().clone()
        result[0].register_hook(lambda grad: seen.append((x, grad.clone())))

    return module.register_forward_hook(called).remove


def accumulate(rank: int, world_size: int, *, model_dir: str, dtype: str, rows: int) -> dict[str, Any]:
    """Errors of the accumulated gradients by weight, relative to sums of products in fp64: as they are, and
    with the gradient of every micro-batch rounded to the model's dtype.
    """
    from engine.training.step import run_pipeline

    spec, platform, groups, models, _ = open_run(
        rank, world_size, model_dir, degrees(), OptimizerOptions(), dtype=dtype
    )
    named = dict(models[0].module.named_modules())
    linears = {name: module for name, module in named.items() if name.endswith(LINEARS)}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}
    endings = [watch(module, seen[name]) for name, module in linears.items()]
    drawn = random_rows(rows, vocabulary=spec.vocab_size, longest=32, seed=0)
    batches = [collate([row], pad_id=0, pad_to_multiple_of=1) for row in drawn]
    models[0].zero_grad_buffer()
    run_pipeline(models, batches, groups, device=platform.device, forward_only=False)
    for end in endings:
        end()
    supervised = sum(batch.num_supervised for batch in batches)
    found: dict[str, Any] = {"dtypes": set(), "exact": {}, "rounded": {}, "calls": set()}
    for name, module in linears.items():
        products = [grad.double().flatten(0, -2).T @ x.double().flatten(0, -2) for x, grad in seen[name]]
        wanted = torch.stack(products).sum(0)
        rounded = sum(product.to(platform.dtype).float() for product in products)
        gradient = module.weight.main_grad.double() * supervised
        found["dtypes"].add(module.weight.main_grad.dtype)
        found["calls"].add(len(products))
        found["exact"][name] = float((gradient - wanted).norm() / wanted.norm())
        found["rounded"][name] = float((rounded - wanted).norm() / wanted.norm())
    release(models)
    return found


@pytest.mark.parametrize("rows", [1, 2, 5], ids=lambda rows: f"{rows} micro-batches")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_add_up_in_fp32(workers: WorkerPool, tmp_path: Path, dtype: str, rows: int) -> None:
    directory = save_tiny_model("qwen2_untied", tmp_path / "model", num_hidden_layers=2)
    (found,) = workers.run(accumulate, 1, model_dir=str(directory), dtype=dtype, rows=rows)
    assert found["calls"] == {rows}
    assert found["dtypes"] == {torch.float32}
    assert len(found["exact"]) == 2 * len(LINEARS)
    assert max(found["exact"].values()) < 2e-6, found["exact"]
    if dtype == "bfloat16":  # what rounding each micro-batch's gradient would cost
        assert min(found["rounded"].values()) > 1e-3


def head_gradient(rank: int, world_size: int, *, model_dir: str, tied: bool) -> float:
    """Error of the head's gradient over three micro-batches of a bf16 model, relative to the same head in
    fp64.
    """
    from engine.training.step import run_pipeline

    spec, platform, groups, models, _ = open_run(
        rank, world_size, model_dir, degrees(), OptimizerOptions(), dtype="bfloat16"
    )
    chunk, seen = models[0].module, []
    chunk.output_layer.register_forward_pre_hook(
        lambda module, arguments, named: seen.append((arguments[0].detach(), named["targets"])),
        with_kwargs=True,
    )
    drawn = random_rows(3, vocabulary=spec.vocab_size, longest=32, seed=0)
    batches = [collate([row], pad_id=0, pad_to_multiple_of=1) for row in drawn]
    models[0].zero_grad_buffer()
    run_pipeline(models, batches, groups, device=platform.device, forward_only=False)
    weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    wide = weight.detach().double().requires_grad_()
    for hidden, targets in seen:
        logits = hidden[targets.index, 0].double() @ wide[: spec.vocab_size].T
        torch.nn.functional.cross_entropy(logits, targets.labels, reduction="sum").backward()
    assert wide.grad is not None
    found = weight.main_grad.double() * sum(batch.num_supervised for batch in batches)
    rows = torch.ones(len(weight), dtype=torch.bool)
    if tied:  # rows of tokens that came in have the embedding's gradient too
        rows[torch.cat([batch.tokens.flatten() for batch in batches]).unique()] = False
        assert rows.sum() > 400
    error = float((found - wide.grad)[rows].norm() / wide.grad[rows].norm())
    release(models)
    return error


@pytest.mark.parametrize("model", ["qwen2_untied", "qwen2_tied"])
def test_the_heads_gradient_adds_up_over_micro_batches(
    workers: WorkerPool, tmp_path: Path, model: str
) -> None:
    directory = save_tiny_model(model, tmp_path / "model", num_hidden_layers=1)
    (error,) = workers.run(head_gradient, 1, model_dir=str(directory), tied=model == "qwen2_tied")
    assert error < 1e-2  # logits and their gradients are bf16


def embedding_gradient(rank: int, world_size: int, *, model_dir: str) -> tuple[float, bool]:
    """Error of the embedding's gradient over three micro-batches of a bf16 model, relative to the sum in fp64
    of what arrives at its rows; and whether other rows have none.
    """
    from engine.training.step import run_pipeline

    spec, platform, groups, models, _ = open_run(
        rank, world_size, model_dir, degrees(), OptimizerOptions(), dtype="bfloat16"
    )
    embedding = models[0].module.embedding.word_embeddings
    wanted = torch.zeros(embedding.weight.shape, dtype=torch.float64)

    def called(_: Any, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        tokens = arguments[0].flatten()

        def arrived(grad: Tensor) -> None:
            wanted.index_add_(0, tokens, grad.double().view(len(tokens), -1))

        result.register_hook(arrived)

    embedding.register_forward_hook(called)
    # A token that comes many times is where rounding between would tell.
    drawn = random_rows(3, vocabulary=min(spec.vocab_size, 7), longest=64, seed=0)
    batches = [collate([row], pad_id=0, pad_to_multiple_of=1) for row in drawn]
    models[0].zero_grad_buffer()
    run_pipeline(models, batches, groups, device=platform.device, forward_only=False)
    found = embedding.weight.main_grad.double() * sum(batch.num_supervised for batch in batches)
    error = float((found - wanted).norm() / wanted.norm())
    silent = not found[7:].any()
    release(models)
    return error, silent


def test_the_embeddings_gradient_adds_up_in_fp32(workers: WorkerPool, tmp_path: Path) -> None:
    directory = save_tiny_model("qwen2_untied", tmp_path / "model", num_hidden_layers=1)
    ((error, silent),) = workers.run(embedding_gradient, 1, model_dir=str(directory))
    assert error < 2e-6
    assert silent
