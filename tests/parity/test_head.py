"""The head with its loss over tensor-parallel ranks, which share the vocabulary, against fp64."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.options import OptimizerOptions
from tests.support.layouts import degrees
from tests.support.models import save_tiny_model
from tests.support.training import open_run, release
from tests.support.workers import WorkerPool

TOKENS, HIDDEN = 24, 64
# Name: ranks, vocabulary. Megatron pads to a multiple of 128, of which ranks hold equal parts.
VOCABULARIES = {
    "TP2, no padding": (2, 256),
    "TP2, a rank with some": (2, 201),
    "TP2, a rank with nothing else": (2, 60),
    "TP4, a rank with two columns and one with none": (4, 130),
    "TP4, one rank holds all": (4, 31),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank has after the backward pass of the head."""

    loss: float
    weight: Tensor
    weight_grad: Tensor
    hidden_grad: Tensor
    """Of the rank's own tokens."""
    columns: int
    blocks: list[tuple[int, int]]
    """Rows and columns of logits, as they were made."""


def hidden_states() -> Tensor:
    return torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(3))


def run_head(
    rank: int,
    world_size: int,
    *,
    model_dir: str,
    index: list[int],
    labels: list[int],
    block_bytes: int,
    scale: float | None = None,
) -> Found:
    """The output layer of a real model, wrapped as for training, on random hidden states."""
    import engine.model.head as head

    _, _, groups, models, _ = open_run(
        rank, world_size, model_dir, degrees(tp=world_size), OptimizerOptions()
    )
    chunk = models[0].module
    chunk.config.grad_scale_func = None if scale is None else lambda loss: loss * scale
    own = hidden_states().chunk(world_size)[groups.tp_rank].requires_grad_()
    targets = head.Targets(index=torch.tensor(index).long(), labels=torch.tensor(labels).long())
    blocks, statistics, usual = [], head.logit_statistics, head._BLOCK_BYTES["cpu"]

    def watch(logits: Tensor, places: Tensor) -> Any:
        blocks.append((logits.shape[0], logits.shape[1]))
        return statistics(logits, places)

    head.logit_statistics, head._BLOCK_BYTES["cpu"] = watch, block_bytes
    try:
        models[0].zero_grad_buffer()
        loss = chunk.output_layer(own, targets=targets, columns=chunk.first_padding_column)
        (loss if scale is None else loss * scale).backward()
    finally:
        head.logit_statistics, head._BLOCK_BYTES["cpu"] = statistics, usual
    weight = chunk.output_layer.weight
    assert weight.grad_added_to_main_grad
    found = Found(
        loss=float(loss),
        weight=weight.detach().clone(),
        weight_grad=weight.main_grad.clone(),
        hidden_grad=own.grad.clone(),
        columns=chunk.first_padding_column,
        blocks=blocks,
    )
    release(models)
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("heads")
    return {
        vocabulary: save_tiny_model(
            "qwen2_untied", root / str(vocabulary), num_hidden_layers=1, vocab_size=vocabulary
        )
        for _, vocabulary in VOCABULARIES.values()
    }


def supervised(vocabulary: int) -> tuple[list[int], list[int]]:
    """Every second token or so, unevenly over the ranks; labels from both ends of the vocabulary."""
    index = [0, 1, 2, 5, 7, 8, 9, 13, 14, 21]
    return index, [(vocabulary - 1) * (i % 2) + (i // 2) * (1 - 2 * (i % 2)) for i in range(len(index))]


@pytest.mark.parametrize("block_rows", [3, 1000], ids=["several blocks", "one block"])
@pytest.mark.parametrize("case", VOCABULARIES)
def test_loss_and_gradients_over_ranks_equal_fp64(
    workers: WorkerPool, directories: dict[int, Path], case: str, block_rows: int
) -> None:
    size, vocabulary = VOCABULARIES[case]
    index, labels = supervised(vocabulary)
    part = -(-vocabulary // 128) * 128 // size
    found: list[Found] = workers.run(
        run_head,
        size,
        timeout=60.0,
        model_dir=str(directories[vocabulary]),
        index=index,
        labels=labels,
        block_bytes=block_rows * part * 4,
    )
    weight = torch.cat([rank.weight[: rank.columns] for rank in found]).double().requires_grad_()
    assert len(weight) == vocabulary
    hidden = hidden_states()[:, 0].double().requires_grad_()
    wanted = F.cross_entropy(hidden[index] @ weight.T, torch.tensor(labels), reduction="sum")
    of_hidden, of_weight = torch.autograd.grad(wanted, [hidden, weight])

    assert all(rank.loss == found[0].loss for rank in found), "ranks disagree on the loss"
    assert abs(found[0].loss - float(wanted)) <= 1e-6 * float(wanted)
    hidden_grad = torch.cat([rank.hidden_grad for rank in found])[:, 0]
    assert relative(hidden_grad, of_hidden) < 1e-6
    assert relative(torch.cat([rank.weight_grad[: rank.columns] for rank in found]), of_weight) < 1e-6
    # Tokens without a target: no logits, and a gradient of exactly zero. So have padding rows.
    silent = torch.ones(TOKENS, dtype=torch.bool)
    silent[index] = False
    assert not hidden_grad[silent].any()
    for rank in found:
        assert not rank.weight_grad[rank.columns :].any()
        made = sum(rows for rows, _ in rank.blocks)
        assert made == (len(index) if rank.columns else 0)
        assert all(columns == rank.columns for _, columns in rank.blocks)
        assert all(rows <= block_rows for rows, _ in rank.blocks)


def test_the_scale_of_float16_leaves_the_same_gradients(
    workers: WorkerPool, directories: dict[int, Path]
) -> None:
    """Scaled gradients, 256 times as large, as the optimizer expects them."""
    size, vocabulary = VOCABULARIES["TP2, a rank with some"]
    index, labels = supervised(vocabulary)
    arguments = {"model_dir": str(directories[vocabulary]), "index": index, "labels": labels}
    plain, scaled = (
        workers.run(run_head, size, block_bytes=2**20, scale=scale, **arguments) for scale in (None, 256.0)
    )
    for a, b in zip(plain, scaled, strict=True):
        assert a.loss == b.loss
        assert relative(b.weight_grad / 256, a.weight_grad.double()) < 1e-6
        assert relative(b.hidden_grad / 256, a.hidden_grad.double()) < 1e-6


def test_a_micro_batch_without_targets_gives_zeros(workers: WorkerPool, directories: dict[int, Path]) -> None:
    size, vocabulary = VOCABULARIES["TP2, a rank with some"]
    found: list[Found] = workers.run(
        run_head, size, model_dir=str(directories[vocabulary]), index=[], labels=[], block_bytes=2**20
    )
    for rank in found:
        assert rank.loss == 0
        assert rank.blocks == []
        assert not rank.hidden_grad.any()
        assert not rank.weight_grad.any()


def evaluate_head(rank: int, world_size: int, *, model_dir: str) -> tuple[float, float, list[str]]:
    """Loss in training and in evaluation, and what evaluation called of what makes gradients."""
    import engine.model.head as head

    _, _, _, models, _ = open_run(rank, world_size, model_dir, degrees(), OptimizerOptions())
    chunk, called = models[0].module, []
    targets = head.Targets(index=torch.tensor([0, 3]), labels=torch.tensor([5, 6]))
    own = hidden_states()

    def loss() -> float:
        return float(chunk.output_layer(own, targets=targets, columns=chunk.first_padding_column))

    trained = loss()
    usual = {name: getattr(head, name) for name in ("add_product", "logits_to_gradients")}
    try:
        for name in usual:
            setattr(head, name, lambda *arguments, name=name: called.append(name))
        with torch.no_grad():
            evaluated = loss()
    finally:
        for name, function in usual.items():
            setattr(head, name, function)
    release(models)
    return trained, evaluated, called


def test_evaluation_computes_no_gradients(workers: WorkerPool, directories: dict[int, Path]) -> None:
    ((trained, evaluated, called),) = workers.run(evaluate_head, 1, model_dir=str(directories[201]))
    assert evaluated == trained
    assert called == []
