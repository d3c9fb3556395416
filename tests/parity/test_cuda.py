"""The same parity over NCCL on real GPUs, and Transformer Engine against the torch layers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from converters.mapping import weight_map
from engine.config.options import OptimizerOptions, ParallelOptions
from engine.model.spec import load_model_spec
from tests.parity.test_transformers import LAYOUTS, assert_parity, train_on, train_plainly
from tests.support.models import MODELS, save_tiny_model
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


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "te"])
@pytest.mark.parametrize("model", MODELS)
def test_bf16_gradients_follow_fp32(gpus: WorkerPool, model: str, impl: str, tmp_path: Path) -> None:
    """bf16 keeps 8 bits: the loss agrees to 1 %, and each gradient points where the fp32 one does."""
    if impl == "te":
        pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    if MODELS[model]().model_type == "qwen3":
        shape["head_dim"] = 64
    directory = save_tiny_model(model, tmp_path / "model", **shape)
    spec = load_model_spec(directory)
    steps = [random_rows(8, vocabulary=spec.vocab_size, longest=96, seed=0)]
    results = gpus.run(
        train_layout,
        1,
        model_dir=str(directory),
        parallel=ParallelOptions(),
        optimizer=OptimizerOptions(),
        steps=steps,
        learning_rates=[0.0],
        dtype="bfloat16",
        transformer_impl=impl,
    )
    reference = train_reference(str(directory), steps, [0.0])
    assert abs(results[0].losses[0] - reference.losses[0]) <= 1e-2 * reference.losses[0]
    gradients = merge(results, weight_map(spec), "gradients")
    for name, wanted in reference.gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradients[name].flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.98, f"{name}: cosine {cosine:.4f}"
