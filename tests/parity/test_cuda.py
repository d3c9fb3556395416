"""The same parity over NCCL on real GPUs, and Transformer Engine against the torch layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.adapter import open_adapter
from converters.mapping import weight_map
from engine.config.options import OptimizerOptions, ParallelOptions
from engine.model.spec import load_model_spec
from tests.parity.test_transformers import LAYOUTS, assert_parity, train_on, train_plainly
from tests.support.models import MODELS, save_adapter, save_tiny_model
from tests.support.reference import train_reference
from tests.support.training import merge, random_rows, train_layout
from tests.support.workers import WorkerPool


@pytest.fixture(scope="module")
def gpus() -> Iterator[WorkerPool]:
    pool = WorkerPool(torch.cuda.device_count(), device="cuda")
    yield pool
    pool.close()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_layout_equals_transformers_over_nccl(
    gpus: WorkerPool, model: str, layout: str, tmp_path: Path
) -> None:
    world_size, parallel, layers = LAYOUTS[layout]
    if world_size > gpus.size:
        pytest.skip(f"{layout} needs {world_size} GPUs, {gpus.size} are here")
    directory = save_tiny_model(model, tmp_path / "model", num_hidden_layers=layers)
    results = train_on(gpus, world_size, directory, parallel)
    assert_parity(results, train_plainly(directory), directory)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("comm_type", ["all_gather", "a2a"])
@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_head_dim"])
def test_context_parallelism_over_nccl(gpus: WorkerPool, model: str, comm_type: str, tmp_path: Path) -> None:
    directory = save_tiny_model(model, tmp_path / "model")
    parallel = ParallelOptions(context_parallel_size=2, cp_comm_type=comm_type)  # type: ignore[arg-type]
    results = train_on(gpus, 2, directory, parallel, micro_batch_size=2)
    assert_parity(results, train_plainly(directory), directory)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_lora_equals_peft_over_nccl(gpus: WorkerPool, layout: str, tmp_path: Path) -> None:
    world_size, parallel, _ = LAYOUTS[layout]
    directory = save_tiny_model("qwen3_head_dim", tmp_path / "model")
    adapter = str(save_adapter(directory, tmp_path / "adapter"))
    results = train_on(gpus, world_size, directory, parallel, adapter=adapter)
    weights = open_adapter(adapter, load_model_spec(directory)).weights
    assert_parity(results, train_plainly(directory, adapter_dir=adapter), directory, weights)


# Implementation of the layers, degrees, how context-parallel ranks exchange.
BF16_CASES = [
    ("torch", {}),
    ("te", {}),
    ("torch", {"context_parallel_size": 2, "cp_comm_type": "all_gather"}),
    ("torch", {"context_parallel_size": 2, "cp_comm_type": "a2a"}),
    ("te", {"context_parallel_size": 2, "cp_comm_type": "p2p"}),
    ("te", {"context_parallel_size": 2, "cp_comm_type": "a2a"}),
    ("te", {"tensor_model_parallel_size": 2}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("impl", "degrees"), BF16_CASES, ids=lambda case: str(case))
@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_head_dim"])
def test_bf16_gradients_follow_fp32(
    gpus: WorkerPool, model: str, impl: str, degrees: dict[str, Any], lora: bool, tmp_path: Path
) -> None:
    """bf16 keeps 8 bits: the loss agrees to 1 %, and each gradient points where the fp32 one does."""
    if impl == "te":
        pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    world_size = 2 if degrees else 1
    if world_size > gpus.size:
        pytest.skip(f"needs {world_size} GPUs, {gpus.size} are here")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    if MODELS[model]().model_type == "qwen3":
        shape["head_dim"] = 64
    directory = save_tiny_model(model, tmp_path / "model", **shape)
    spec = load_model_spec(directory)
    adapter = str(save_adapter(directory, tmp_path / "adapter", scale=0.02)) if lora else None
    steps = [random_rows(8, vocabulary=spec.vocab_size, longest=96, seed=0)]
    results = gpus.run(
        train_layout,
        world_size,
        model_dir=str(directory),
        parallel=ParallelOptions(**degrees),
        optimizer=OptimizerOptions(),
        steps=steps,
        learning_rates=[0.0],
        micro_batch_size=2,
        dtype="bfloat16",
        transformer_impl=impl,
        adapter=adapter,
    )
    reference = train_reference(str(directory), steps, [0.0], adapter_dir=adapter)
    assert abs(results[0].losses[0] - reference.losses[0]) <= 1e-2 * reference.losses[0]
    weights = weight_map(spec) if adapter is None else open_adapter(adapter, spec).weights
    gradients = merge(results, weights, "gradients")
    assert gradients.keys() == reference.gradients.keys()
    for name, wanted in reference.gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradients[name].flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.98, f"{name}: cosine {cosine:.4f}"
