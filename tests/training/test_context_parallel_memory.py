"""What a rank keeps for the backward pass falls with the number of context-parallel ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config.options import OptimizerOptions, ParallelOptions
from engine.data.batches import collate
from engine.data.template import EncodedRow
from tests.support.models import save_tiny_model
from tests.support.training import open_run, release
from tests.support.workers import WorkerPool

TOKENS = 16384


def activation_bytes(rank: int, world_size: int, *, model_dir: str, comm_type: str) -> int:
    """Bytes of the distinct tensors that autograd holds at the end of one forward pass of a document."""
    from engine.training.step import DeviceBatch

    parallel = ParallelOptions(context_parallel_size=world_size, cp_comm_type=comm_type)  # type: ignore[arg-type]
    _, platform, groups, models, _ = open_run(rank, world_size, model_dir, parallel, OptimizerOptions())
    layout = groups.layout
    ids = np.arange(TOKENS, dtype=np.int32) % 500
    row = EncodedRow(input_ids=ids, supervised=np.ones(TOKENS, dtype=bool))
    batch = collate(
        [row],
        pad_id=0,
        pad_to_multiple_of=layout.micro_batch_multiple,
        pad_rows_to_multiple_of=layout.document_multiple,
    )
    placed = DeviceBatch.place(batch, groups, platform.device)
    weights = {parameter.untyped_storage().data_ptr() for parameter in models[0].parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage  # kept, so that no other tensor takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = models[0](
            placed.tokens,
            document_params=placed.documents,
            position_ids=placed.position_ids,
        )
    total = sum(storage.nbytes() for address, storage in held.items() if address not in weights)
    assert torch.isfinite(loss).all()
    del loss
    release(models)
    return total


@pytest.mark.parametrize("comm_type", ["all_gather", "a2a"])
def test_activations_fall(workers: WorkerPool, comm_type: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    directory = save_tiny_model("qwen2_tied", tmp_path / "model", **shape, max_position_embeddings=TOKENS)
    measured = {}
    for size in (1, 2, 4):
        found = workers.run(activation_bytes, size, model_dir=str(directory), comm_type=comm_type)
        measured[size] = max(found)
    # Gathered keys and values are as long as ever; everything else is 1 / size.
    shares = {"all_gather": {2: 0.65, 4: 0.45}, "a2a": {2: 0.55, 4: 0.3}}[comm_type]
    for size, share in shares.items():
        assert measured[size] <= share * measured[1], measured
