"""What a running model asks of a checkpoint, and what it may lack."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from converters.convert import to_mcore
from engine.errors import CheckpointError
from engine.storage.reader import TorchDistReader
from engine.training.shards import load_state
from tests.support.models import save_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TorchDistReader:
    root = tmp_path_factory.mktemp("shards")
    to_mcore(save_tiny_model("qwen3_head_dim", root / "model"), root / "mcore")
    return TorchDistReader(root / "mcore")


def asked(key: str) -> dict[str, ShardedObject]:
    return {"found": ShardedObject(key, torch.tensor([7]), (1,), (0,), replica_id=0)}


def test_a_module_keeps_its_own_state_where_the_checkpoint_has_none(checkpoint: TorchDistReader) -> None:
    """A checkpoint of the torch layers has no states of Transformer Engine's modules."""
    assert load_state(checkpoint, asked("decoder.layers.mlp.new._extra_state"))["found"] == torch.tensor([7])
    stored = next(key for key in checkpoint.objects if "._extra_state" in key)
    key, _, place = stored.partition("/shard_")
    index, count = map(int, place.split("_"))
    wanted = {"found": ShardedObject(key, torch.tensor([7]), (count,), (index,), replica_id=0)}
    assert load_state(checkpoint, wanted)["found"] is None, "the stored one, which is empty"


def test_any_other_object_must_be_there(checkpoint: TorchDistReader) -> None:
    with pytest.raises(CheckpointError, match="rng/shard_0_1 is missing"):
        load_state(checkpoint, asked("rng"))
