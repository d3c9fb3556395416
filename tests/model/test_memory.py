"""The estimate of memory against peaks that were measured on an H200, and against what layouts share out."""

from dataclasses import replace
from typing import Any

import pytest

from engine.config.options import OptimizerOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.model.lora_spec import LoraSpec
from engine.model.memory import Workload, estimate, most_in_flight
from launch.bench.shapes import spec_of_shape
from tests.support.layouts import degrees

GIB = 2**30
LORA = LoraSpec(r=16, lora_alpha=32)
BF16_MOMENTS = OptimizerOptions(exp_avg_dtype="bfloat16", exp_avg_sq_dtype="bfloat16")
MLP_ACT = RecomputeOptions(recompute_granularity="selective", recompute_modules=["mlp_act"])


def workload(
    shape: str, world_size: int = 1, *, short: dict[str, Any] | None = None, **changes: Any
) -> Workload:
    """A pack of 4,096 tokens in bf16 unless it is changed; `short` are degrees."""
    spec = spec_of_shape(shape)
    layout = ParallelLayout.resolve(
        degrees(**(short or {})), num_layers=spec.num_layers, world_size=world_size
    )
    work = Workload(
        spec=spec,
        layout=layout,
        recompute=RecomputeOptions(),
        optimizer=OptimizerOptions(),
        lora=None,
        dtype="bfloat16",
        use_te=False,
        fp8=False,
        tokens=4096,
        micro_batches=16,
    )
    return replace(work, **changes)


# The most that torch had allocated in the steps of `braid bench train` on one H200, in GiB.
PEAKS: dict[str, tuple[float, Workload]] = {
    "7b": (118.2, workload("qwen2.5-7b", optimizer=BF16_MOMENTS)),
    "7b te": (118.2, workload("qwen2.5-7b", optimizer=BF16_MOMENTS, use_te=True)),
    "7b x 2, mlp_act": (
        127.0,
        workload("qwen2.5-7b", optimizer=BF16_MOMENTS, tokens=2 * 4096, recompute=MLP_ACT),
    ),
    "7b x 2, mlp_act, te": (
        127.1,
        workload("qwen2.5-7b", optimizer=BF16_MOMENTS, tokens=2 * 4096, recompute=MLP_ACT, use_te=True),
    ),
    "7b fp8": (127.9, workload("qwen2.5-7b", optimizer=BF16_MOMENTS, use_te=True, fp8=True)),
    "3b x 4": (104.2, workload("qwen2.5-3b", tokens=4 * 4096)),
    "3b x 4, te": (104.2, workload("qwen2.5-3b", tokens=4 * 4096, use_te=True)),
    "1.5b x 2": (43.0, workload("qwen2.5-1.5b", tokens=2 * 4096)),
    "1.5b x 2, mlp_act": (39.1, workload("qwen2.5-1.5b", tokens=2 * 4096, recompute=MLP_ACT)),
    "1.5b x 4": (59.1, workload("qwen2.5-1.5b", tokens=4 * 4096)),
    "1.5b x 4, mlp_act, moments in bf16": (
        45.7,
        workload("qwen2.5-1.5b", optimizer=BF16_MOMENTS, tokens=4 * 4096, recompute=MLP_ACT),
    ),
    "8b lora x 2": (56.0, workload("qwen3-8b", lora=LORA, tokens=2 * 4096)),
}


@pytest.mark.parametrize("name", PEAKS)
def test_estimate_is_near_what_was_measured(name: str) -> None:
    measured, work = PEAKS[name]
    (rank,) = estimate(work)
    assert rank.total / GIB == pytest.approx(measured, rel=0.01)


def test_states_are_18_bytes_a_parameter_and_shared_by_data_parallel_ranks() -> None:
    parameters = spec_of_shape("qwen2.5-7b").num_parameters()
    (alone,) = estimate(workload("qwen2.5-7b"))
    assert alone.lasting == 18 * parameters
    (shared, *_) = estimate(workload("qwen2.5-7b", 4))
    assert shared.lasting == (2 + 4 + 12 / 4) * parameters
    whole = OptimizerOptions(use_distributed_optimizer=False)
    assert estimate(workload("qwen2.5-7b", 4, optimizer=whole))[0].lasting == alone.lasting
    half = OptimizerOptions(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5)
    assert estimate(workload("qwen2.5-7b", optimizer=half))[0].lasting == (2 + 4 + 6) * parameters
    # A run in fp32 has no master weights.
    assert estimate(workload("qwen2.5-7b", dtype="float32"))[0].lasting == 16 * parameters


@pytest.mark.parametrize(
    ("strategy", "lasting", "gathered"),
    [
        # 12 bytes a parameter are shared, then 16, then all 18.
        ("optim", 2 + 4 + 12 / 8, 0),
        ("optim_grads", 2 + 16 / 8, 4 * 1.04e9),
        ("optim_grads_params", 18 / 8, 4 * 1e9 + 2 * 5e8),
    ],
)
def test_gradients_and_weights_are_shared_as_asked(strategy: str, lasting: float, gathered: float) -> None:
    spec = spec_of_shape("qwen2.5-7b")
    options = OptimizerOptions(data_parallel_sharding_strategy=strategy)  # type: ignore[arg-type]
    (rank,) = estimate(workload("qwen2.5-7b", 8, optimizer=options))
    assert rank.lasting == pytest.approx(lasting * spec.num_parameters())
    if strategy == "optim_grads_params":
        matrices = 2 * spec.vocab_size * spec.hidden_size + spec.hidden_size
        layer = (spec.num_parameters() - matrices) / spec.num_layers
        gathered += 2 * (matrices + layer) + 4 * layer
    assert rank.gathered == pytest.approx(gathered)
    assert rank.total > rank.lasting + rank.gathered
    # A single rank has nobody to share with.
    (alone,) = estimate(workload("qwen2.5-7b", optimizer=options))
    assert (alone.lasting, alone.gathered) == (18 * spec.num_parameters(), 0)


def test_stages_have_all_weights_and_a_copy_of_tied_embeddings() -> None:
    spec = spec_of_shape("qwen2.5-1.5b")
    stages = estimate(workload("qwen2.5-1.5b", 4, short={"pp": 4, "split": [5, 8, 8, 7]}))
    total = sum(stage.weights for stage in stages)
    assert total == 2 * (spec.num_parameters() + spec.vocab_size * spec.hidden_size)


def test_experts_share_their_optimizer_with_fewer_ranks() -> None:
    spec = spec_of_shape("qwen3-30b-a3b")
    (rank,) = estimate(workload("qwen3-30b-a3b", 8, short={"tp": 4, "ep": 8}))
    assert spec.moe is not None
    experts = 3 * spec.hidden_size * spec.moe.ffn_hidden_size * spec.moe.num_experts * spec.num_layers
    others = (spec.num_parameters() - experts) / 4
    # Norms and routers are on every rank: a little more than a quarter of the others.
    assert rank.lasting == pytest.approx(18 * experts / 8 + 12 * others, rel=0.01)


@pytest.mark.parametrize(("pp_rank", "in_flight"), [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_1f1b_has_as_many_micro_batches_in_flight_as_stages_are_left(pp_rank: int, in_flight: int) -> None:
    layout = ParallelLayout.resolve(degrees(pp=4), num_layers=8, world_size=4)
    assert most_in_flight([1.0], layout, pp_rank, micro_batches=16) == in_flight
    assert most_in_flight([1.0], layout, pp_rank, micro_batches=2) == min(in_flight, 2)


@pytest.mark.parametrize(("pp_rank", "in_flight"), [(0, 11), (1, 9), (2, 7), (3, 5)])
def test_the_interleaved_schedule_runs_ahead_further(pp_rank: int, in_flight: int) -> None:
    """Twice the ranks behind, all chunks but one of pp micro-batches, and the one at work."""
    layout = ParallelLayout.resolve(degrees(pp=4, vpp=2), num_layers=8, world_size=4)
    assert most_in_flight([1.0, 1.0], layout, pp_rank, micro_batches=16) == in_flight
    # Four micro-batches of the first chunk are there before any of the second.
    assert most_in_flight([1.0, 0.0], layout, pp_rank, micro_batches=16) >= 4


def test_recomputation_of_layers_keeps_what_comes_in() -> None:
    spec, once = spec_of_shape("qwen2.5-7b"), RecomputeOptions(gradient_checkpointing=True)
    (every,) = estimate(workload("qwen2.5-7b", recompute=once))
    (pairs,) = estimate(workload("qwen2.5-7b", recompute=replace(once, recompute_num_layers=2)))
    inputs = 2 * 4096 * spec.hidden_size
    assert every.activations - pairs.activations == 14 * inputs
    (nothing,) = estimate(workload("qwen2.5-7b"))
    # A layer at work has what it would have kept otherwise, twice as much in pairs.
    one = (nothing.activations - every.activations) / 28 + inputs
    assert pairs.layer - every.layer == pytest.approx(one)
    blocks = replace(once, recompute_method="block", recompute_num_layers=7)
    (some,) = estimate(workload("qwen2.5-7b", recompute=blocks))
    assert nothing.activations - some.activations == pytest.approx(7 * (one - inputs))


def test_fp8_has_two_further_copies_of_linears() -> None:
    spec = spec_of_shape("qwen3-8b")
    (plain,) = estimate(workload("qwen3-8b", use_te=True))
    (fp8,) = estimate(workload("qwen3-8b", use_te=True, fp8=True))
    heads = spec.head_dim * (2 * spec.num_attention_heads + 2 * spec.num_query_groups)
    linears = spec.num_layers * spec.hidden_size * (heads + 3 * spec.ffn_hidden_size)
    assert fp8.weights - plain.weights == 2 * linears
    assert fp8.activations < plain.activations


def test_in_fp8_adapters_have_the_activation_that_is_computed_again() -> None:
    """In full training a linear has its own copy, and nothing falls."""
    spec = spec_of_shape("qwen3-8b")
    layers = {"use_te": True, "fp8": True, "recompute": MLP_ACT}
    for lora, fallen in ((None, 0), (LORA, 2 * spec.ffn_hidden_size)):
        (kept,) = estimate(workload("qwen3-8b", use_te=True, fp8=True, lora=lora))
        (again,) = estimate(workload("qwen3-8b", lora=lora, **layers))
        assert kept.activations - again.activations == spec.num_layers * 4096 * fallen
