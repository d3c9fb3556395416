"""LoRA on a 0.5 B shape holds weights once, and gradients and optimizer states for adapters only."""

import gc

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.config.options import OptimizerOptions, ParallelOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.data.batches import collate
from engine.model.lora_spec import LoraSpec
from engine.model.spec import model_spec_from_config
from tests.support.training import random_rows, release
from tests.support.workers import WorkerPool

QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


def train_and_count(rank: int, world_size: int) -> dict[str, int]:
    """Two steps in bf16 on one rank; bytes of all living tensors afterwards, and what they should be."""
    from engine.model.lora import initialize_adapters
    from engine.model.provider import build_chunks
    from engine.runtime import mcore
    from engine.runtime.platform import open_platform
    from engine.training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
    from engine.training.step import train_step

    gc.collect()
    before = living_bytes()
    platform = open_platform(device="cpu", dtype="bfloat16", transformer_impl="torch", local_rank=rank)
    spec, lora = model_spec_from_config(QWEN2_5_0_5B), LoraSpec(r=8, lora_alpha=16)
    layout = ParallelLayout.resolve(ParallelOptions(), num_layers=spec.num_layers, world_size=world_size)
    groups = mcore.initialize(layout, platform, seed=1)
    chunks = build_chunks(spec, layout, platform, RecomputeOptions(), groups, lora)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.uniform_(-0.02, 0.02)
    initialize_adapters(chunks, seed=1, groups=groups)
    models = wrap_data_parallel(chunks, OptimizerOptions(), groups)
    optimizer = build_optimizer(models, OptimizerOptions(), groups, platform.dtype)
    rows = random_rows(1, vocabulary=1000, longest=16, seed=0)
    batch = collate(rows, pad_id=0, pad_to_multiple_of=1)
    for _ in range(2):
        set_learning_rate(optimizer, 1e-3, 0.0)
        result = train_step(models, optimizer, [batch], groups, platform.device)
        assert result.grad_norm is not None
        assert result.grad_norm > 0
    frozen = [p for p in chunks[0].parameters() if not p.requires_grad]
    assert all(p.grad is None and getattr(p, "main_grad", None) is None for p in frozen)
    del result
    gc.collect()
    counts = {
        "alive": living_bytes() - before,
        "weights": sum(p.nbytes for p in frozen),
        "adapter elements": sum(p.numel() for p in chunks[0].parameters() if p.requires_grad),
        "expected elements": lora.num_parameters(spec),
        "expected weights": spec.num_parameters(),
    }
    release(models)
    return counts


def living_bytes() -> int:
    """Bytes of the distinct storages of all tensors in this process. Tensors around others have none of their
    own; earlier tests in the process may have left some.
    """
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and not is_traceable_wrapper_subclass(found):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_frozen_weights_have_neither_gradients_nor_states(workers: WorkerPool) -> None:
    (counts,) = workers.run(train_and_count, 1)
    assert counts["adapter elements"] == counts["expected elements"]
    assert counts["weights"] == 2 * counts["expected weights"]
    # fp32 adapters: weight, gradient and two moments; a share for alignment of the buffers and small tables.
    adapter_bytes = 16 * counts["adapter elements"]
    assert counts["alive"] >= counts["weights"] + adapter_bytes
    assert counts["alive"] <= counts["weights"] + 1.02 * adapter_bytes + 4e6
