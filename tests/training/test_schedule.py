"""Learning rates equal those of transformers' schedulers."""

import pytest
import torch
from transformers import get_scheduler

from engine.config.options import OptimizerOptions
from engine.training.schedule import LearningRate


@pytest.mark.parametrize(
    ("shape", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.33])
def test_rates_are_those_of_transformers(shape: str, theirs: str, warmup_ratio: float) -> None:
    total = 40
    schedule = LearningRate.from_options(
        OptimizerOptions(learning_rate=3e-4, warmup_ratio=warmup_ratio, lr_scheduler_type=shape), total
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    reference = get_scheduler(
        theirs, optimizer, num_warmup_steps=schedule.warmup_steps, num_training_steps=total
    )
    for step in range(total):
        assert schedule(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        reference.step()


def test_minimum_is_transformers_cosine_with_min_lr() -> None:
    schedule = LearningRate.from_options(
        OptimizerOptions(learning_rate=1e-3, min_lr=1e-4, warmup_ratio=0.1), 30
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    reference = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=30,
        scheduler_specific_kwargs={"min_lr": 1e-4},
    )
    for step in range(30):
        assert schedule(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()


def test_warmup_steps_are_rounded_up() -> None:
    options = OptimizerOptions(warmup_ratio=0.05)
    assert LearningRate.from_options(options, 21).warmup_steps == 2
    assert LearningRate.from_options(options, 20).warmup_steps == 1


def test_steps_of_warmup_override_their_share() -> None:
    schedule = LearningRate.from_options(
        OptimizerOptions(learning_rate=1.0, warmup_ratio=0.5, warmup_steps=4), 100
    )
    assert [schedule(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_warmup_by_the_logarithm() -> None:
    options = OptimizerOptions(
        learning_rate=2.0, warmup_steps=9, warmup_type="log", lr_scheduler_type="constant"
    )
    schedule = LearningRate.from_options(options, 20)
    assert schedule(0) == 0.0
    assert schedule(2) == pytest.approx(1.0)  # log 3 is half of log 9
    assert schedule(8) == schedule(9) == schedule(19) == 2.0
    single = OptimizerOptions(learning_rate=2.0, warmup_steps=1, warmup_type="log")
    assert LearningRate.from_options(single, 20)(0) == 0.0
