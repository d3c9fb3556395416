"""What a rank keeps for the backward pass falls by the activations that are computed again."""

import gc
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.options import OptimizerOptions, ParallelOptions, RecomputeOptions
from engine.data.batches import collate
from engine.data.template import EncodedRow
from tests.support.models import save_adapter, save_tiny_model
from tests.support.training import open_run, release
from tests.support.workers import WorkerPool

LAYERS, TOKENS, WIDTH = 3, 512, 640
ACTIVATION = TOKENS * WIDTH * 4


class Made(TorchDispatchMode):
    """The memory of all tensors that operations make, without keeping it, but that of `known` tensors. What
    autograd or a closure holds is alive, whichever hooks it went through.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.known:
                    self.storages[reference.cdata] = (reference, storage.nbytes())
        return out

    def alive(self) -> int:
        """Bytes of those that are still there."""
        gc.collect()
        if dist.get_world_size() > 1:
            time.sleep(0.05)  # threads of gloo let go of what they sent a moment after an exchange
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def kept_bytes(
    rank: int,
    world_size: int,
    *,
    model_dir: str,
    recompute: Mapping[str, Any],
    adapter: str | None,
    tokens: int = TOKENS,
    parallel: ParallelOptions | None = None,
) -> tuple[int, int]:
    """Bytes that live on after the forward pass of one document, and after its backward pass."""
    from engine.training.step import DeviceBatch

    options = OptimizerOptions(), RecomputeOptions(**recompute)
    _, platform, groups, models, _ = open_run(
        rank, world_size, model_dir, parallel or ParallelOptions(), *options, adapter=adapter
    )
    ids = np.arange(tokens, dtype=np.int32) % 500
    row = EncodedRow(input_ids=ids, supervised=np.ones(tokens, dtype=bool))
    placed = DeviceBatch.place(collate([row], pad_id=0, pad_to_multiple_of=1), groups, platform.device)
    models[0].zero_grad_buffer()
    weights = list(models[0].parameters())
    buffers = [weight.main_grad for weight in weights if weight.requires_grad]
    with Made([*weights, *buffers]) as made:
        loss = models[0](placed.tokens, document_params=placed.documents, position_ids=placed.position_ids)
        forward = made.alive()
        loss.backward()
        del loss, placed
    backward = made.alive()
    release(models)
    return forward, backward


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_mlp_act_keeps_no_activation(workers: WorkerPool, tmp_path: Path, lora: bool) -> None:
    shape = {"hidden_size": 32, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    directory = save_tiny_model("qwen2_untied", tmp_path / "model", **shape)
    adapter = str(save_adapter(directory, tmp_path / "adapter")) if lora else None

    def measure(*modules: str) -> tuple[int, int]:
        recompute = {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
        arguments = {"model_dir": str(directory), "adapter": adapter, "recompute": recompute}
        (found,) = workers.run(kept_bytes, 1, **arguments)
        return found

    (everything, left), (less, also_left) = measure(), measure("mlp_act")
    # Plain torch keeps silu(gate) too, for the product with up; in the whole linear it is computed again.
    assert everything - less == LAYERS * ACTIVATION * (1 if lora else 2)
    # The backward pass, too, lets go of what it computed again.
    assert max(left, also_left) < ACTIVATION / 20


def test_mlp_act_does_nothing_for_adapters_with_dropout(workers: WorkerPool, tmp_path: Path) -> None:
    """Each keeps an input of its own, which is why the command refuses it."""
    shape = {"hidden_size": 32, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    directory = save_tiny_model("qwen2_untied", tmp_path / "model", **shape)
    adapter = str(save_adapter(directory, tmp_path / "adapter", lora_dropout=0.1))
    again = {"recompute_granularity": "selective", "recompute_modules": ["mlp_act"]}
    found = [
        workers.run(kept_bytes, 1, model_dir=str(directory), adapter=adapter, recompute=recompute)[0][0]
        for recompute in ({}, again)
    ]
    assert found[0] == found[1]
