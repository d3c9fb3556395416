"""What a benchmark runs on: the published shapes, random rows, random weights."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config.bench import BenchOptions, TrainBenchConfig
from engine.config.options import ModelOptions
from engine.data.packing import pack
from engine.errors import ConfigError
from launch.bench.data import random_store
from launch.bench.paper import read_spec
from launch.bench.shapes import SHAPES, spec_of_shape
from tests.launch.bench_worker import initialized
from tests.support.layouts import degrees
from tests.support.workers import WorkerPool

# Parameters of the published checkpoints.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen2-moe-a2.7b": 14_315_784_192,
}


def test_every_published_shape_is_checked() -> None:
    assert set(SHAPES) - set(PARAMETERS) == {"qwen1.5-moe-a2.7b", "tiny", "tiny-moe"}
    assert spec_of_shape("qwen1.5-moe-a2.7b") == spec_of_shape("qwen2-moe-a2.7b")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_checkpoint(name: str) -> None:
    assert spec_of_shape(name.upper()).num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22.0), ("qwen2-moe-a2.7b", 2.7)]
)
def test_few_experts_work_on_a_token(name: str, billions: float) -> None:
    spec = spec_of_shape(name)
    # Published counts of active parameters include the embedding.
    active = spec.train_flops_per_token(0) / 6 + spec.vocab_size * spec.hidden_size
    assert active / 1e9 == pytest.approx(billions, rel=0.03)


def test_some_layers_of_a_shape() -> None:
    some = spec_of_shape("Qwen3-30B-A3B-8-layers")
    assert some.num_layers == 8
    ends = 2 * 151936 * 2048 + 2048  # embedding, head and the last norm
    layers = PARAMETERS["qwen3-30b-a3b"] - ends
    assert some.num_parameters() == ends + layers * 8 // 48
    assert spec_of_shape("tiny-4-layers") == spec_of_shape("tiny")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen2.5-7b-29-layers", "qwen2.5-7b has 28 layers; take from 1 to 28"),
        ("tiny-0-layers", "tiny has 4 layers; take from 1 to 4"),
        ("qwen9-4-layers", "is not known; shapes are qwen2.5-0.5b, "),
        ("qwen2.5-7b--1-layers", "is not known"),
    ],
)
def test_layers_that_a_shape_does_not_have(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        spec_of_shape(name)


def test_only_the_configuration_of_a_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-4b"].config()), encoding="utf-8")
    config = TrainBenchConfig(model=ModelOptions(model=str(tmp_path)))
    assert read_spec(config) == spec_of_shape("qwen3-4b")


def test_packed_rows_fill_enough_packs() -> None:
    options = BenchOptions(max_length=600)
    store = random_store(options, sequences=50, vocab_size=100)
    lengths = store.lengths
    assert 50 <= len(pack(lengths, 600)) <= 55
    assert lengths.min() >= 2
    assert lengths.max() <= 600
    assert 60 < np.median(lengths) < 150
    assert lengths.std() > 50
    again = random_store(options, sequences=50, vocab_size=100)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(store, again, strict=True))
    ids = np.concatenate([row.input_ids for row in store])
    assert (ids.min(), ids.max()) == (0, 99)


def test_even_rows_are_full() -> None:
    store = random_store(BenchOptions(max_length=64, lengths="even"), sequences=7, vocab_size=10)
    assert store.lengths.tolist() == [64] * 7


@pytest.mark.parametrize(("share", "targets"), [(1.0, 9), (0.5, 5), (0.01, 1)])
def test_targets_stand_at_the_end(share: float, targets: int) -> None:
    options = BenchOptions(max_length=10, lengths="even", supervised_share=share)
    row = random_store(options, sequences=1, vocab_size=10)[0]
    # The first token is no target: nothing predicts it.
    assert row.supervised.tolist() == [False] * (10 - targets) + [True] * targets


def test_what_ranks_share_starts_alike(workers: WorkerPool) -> None:
    both = workers.run(initialized, 2, shape="tiny-moe", parallel=degrees(tp=2))
    assert set(both[0]) == set(both[1])
    for name, first in both[0].items():
        second = both[1][name]
        if first.dim() == 1:
            assert (first == 1).all(), name
        else:
            assert first.std() == pytest.approx(0.02, rel=0.2), name
        # With ETP 1 an expert is whole on every rank, as the router is.
        alike = first.dim() == 1 or "router" in name or "experts" in name
        assert torch.equal(first, second) == alike, name


def test_replicas_start_alike(workers: WorkerPool) -> None:
    both = workers.run(initialized, 2, shape="tiny", parallel=degrees())
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_experts_of_ranks_differ_and_the_rest_does_not(workers: WorkerPool) -> None:
    both = workers.run(initialized, 2, shape="tiny-moe", parallel=degrees(ep=2))
    own: Callable[[int], set[str]] = lambda rank: {name for name in both[rank] if "experts" in name}  # noqa: E731
    assert own(0)
    assert not own(0) & own(1)
    assert all(torch.equal(both[0][name], both[1][name]) for name in set(both[0]) - own(0))


def test_biases_are_zero_and_the_tied_copy_is_equal(workers: WorkerPool) -> None:
    both = workers.run(
        initialized,
        2,
        shape="tiny",
        parallel=degrees(pp=2),
        architecture="Qwen2ForCausalLM",
        tie_word_embeddings=True,
    )
    biases = [name for name in both[0] if name.endswith("bias")]
    assert biases
    assert not any(both[0][name].any() for name in biases)
    assert torch.equal(both[0]["embedding.word_embeddings.weight"], both[1]["copy"])
