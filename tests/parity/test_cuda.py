"""The same parity over NCCL on real GPUs, and Transformer Engine against the torch layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.adapter import open_adapter
from converters.convert import to_hf
from converters.mapping import weight_map
from engine.config.options import MoeOptions, OptimizerOptions, ParallelOptions
from engine.model.spec import load_model_spec
from tests.parity.test_experts import AUX_LOSS_COEF
from tests.parity.test_experts import LAYOUTS as EXPERT_LAYOUTS
from tests.parity.test_lora_experts import EXPERTS, LINEARS
from tests.parity.test_transformers import LAYOUTS, assert_parity, train_on, train_plainly
from tests.support.models import MODELS, MOE_MODELS, save_adapter, save_tiny_model
from tests.support.reference import train_reference
from tests.support.training import merge, random_rows, save_after_idle_step, train_layout
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


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("layout", "adapter"),
    [("EP2", False), ("EP2", True), ("EP2xTP2", False), ("EP2xTP2", True), ("ETP2xTP2", False)],
)
@pytest.mark.parametrize("model", MOE_MODELS)
def test_experts_over_nccl(gpus: WorkerPool, model: str, layout: str, adapter: bool, tmp_path: Path) -> None:
    world_size, parallel, layers = EXPERT_LAYOUTS[layout]
    directory = save_tiny_model(model, tmp_path / "model", num_hidden_layers=layers)
    weights, made = None, None
    if adapter:
        settings = {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS}
        made = str(save_adapter(directory, tmp_path / "adapter", **settings))
        weights = open_adapter(made, load_model_spec(directory)).weights
    moe = MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF)
    results = train_on(gpus, world_size, directory, parallel, moe=moe, adapter=made)
    expected = train_plainly(directory, aux_loss_coef=AUX_LOSS_COEF, adapter_dir=made)
    assert_parity(results, expected, directory, weights)


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
EXPERT_CASES = [
    ("torch", {}),
    ("te", {}),
    ("torch", {"expert_model_parallel_size": 2}),
    ("te", {"expert_model_parallel_size": 2}),
    ("te", {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("model", "impl", "degrees"),
    [
        *((model, *case) for model in ("qwen2_tied", "qwen3_head_dim") for case in BF16_CASES),
        *((model, *case) for model in MOE_MODELS for case in EXPERT_CASES),
    ],
    ids=lambda case: str(case),
)
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
    if model.startswith("qwen3"):
        shape["head_dim"] = 64
    if model in MOE_MODELS:
        shape |= {"moe_intermediate_size": 128, "num_hidden_layers": 2}
    directory = save_tiny_model(model, tmp_path / "model", **shape)
    spec = load_model_spec(directory)
    settings = {"target_modules": LINEARS[model], "target_parameters": EXPERTS} if model in LINEARS else {}
    adapter = str(save_adapter(directory, tmp_path / "adapter", scale=0.02, **settings)) if lora else None
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


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_head_dim", *MOE_MODELS])
def test_transformer_engine_and_torch_read_each_others_checkpoints(
    gpus: WorkerPool, model: str, tmp_path: Path
) -> None:
    """Weights go through both and come back byte by byte."""
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    source, saved = save_tiny_model(model, tmp_path / "source", dtype=torch.bfloat16), None
    for number, impl in enumerate(("te", "torch", "te")):
        run = tmp_path / f"run-{number}"
        gpus.run(
            save_after_idle_step,
            1,
            model_dir=str(source),
            parallel=ParallelOptions(),
            output_dir=str(run),
            resume=saved,
            dtype="bfloat16",
            transformer_impl=impl,
        )
        saved = str(run / "checkpoint-0")
    to_hf(tmp_path / "run-2" / "checkpoint-0", tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
