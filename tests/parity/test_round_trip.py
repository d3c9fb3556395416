"""Hugging Face -> Megatron shards at TP2 x PP2 x VPP2 -> Hugging Face: every byte of every tensor comes
back.
"""

from pathlib import Path

import pytest
import torch

from converters.convert import to_hf
from converters.hf.reader import HfReader
from engine.config.options import ParallelOptions
from tests.support.models import MODELS, save_tiny_model
from tests.support.training import save_after_idle_step
from tests.support.workers import WorkerPool


@pytest.mark.parametrize("model", MODELS)
def test_weights_come_back_from_every_rank(workers: WorkerPool, model: str, tmp_path: Path) -> None:
    source = save_tiny_model(model, tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"kept": true}')
    parallel = ParallelOptions(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    workers.run(
        save_after_idle_step, 4, model_dir=str(source), parallel=parallel, output_dir=str(tmp_path / "run")
    )
    to_hf(tmp_path / "run" / "checkpoint-0", tmp_path / "back")
    before, after = HfReader(source), HfReader(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert torch.equal(before.read(name).view(torch.uint8), after.read(name).view(torch.uint8)), name
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
