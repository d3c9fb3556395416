"""Hugging Face -> Megatron shards of one or several layouts -> Hugging Face: every byte of every tensor comes
back.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from converters.convert import to_hf
from converters.hf.reader import HfReader
from engine.config.options import ParallelOptions
from tests.support.models import MODELS, MOE_MODELS, save_tiny_model
from tests.support.training import save_after_idle_step
from tests.support.workers import WorkerPool


def come_back(workers: WorkerPool, source: Path, root: Path, layouts: Sequence[ParallelOptions]) -> None:
    """Load under each layout what the one before saved, on four ranks; the last checkpoint is the source."""
    (source / "tokenizer_config.json").write_text('{"kept": true}')
    saved = None
    for index, parallel in enumerate(layouts):
        run = root / f"run-{index}"
        workers.run(
            save_after_idle_step,
            4,
            model_dir=str(source),
            parallel=parallel,
            output_dir=str(run),
            resume=saved,
        )
        saved = str(run / "checkpoint-0")
    assert saved is not None
    to_hf(saved, root / "back")
    before, after = HfReader(source), HfReader(root / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert torch.equal(before.read(name).view(torch.uint8), after.read(name).view(torch.uint8)), name
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"):
        assert (root / "back" / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("model", MODELS)
def test_weights_come_back_from_every_rank(workers: WorkerPool, model: str, tmp_path: Path) -> None:
    parallel = ParallelOptions(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    come_back(workers, save_tiny_model(model, tmp_path / "source"), tmp_path, [parallel])


@pytest.mark.parametrize("model", MOE_MODELS)
def test_experts_come_back_from_one_layout_after_another(
    workers: WorkerPool, model: str, tmp_path: Path
) -> None:
    source = save_tiny_model(model, tmp_path / "source", num_hidden_layers=2)
    layouts = [
        ParallelOptions(expert_model_parallel_size=4),
        ParallelOptions(),
        ParallelOptions(expert_model_parallel_size=2, expert_tensor_parallel_size=2),
        ParallelOptions(expert_model_parallel_size=2, pipeline_model_parallel_size=2),
    ]
    come_back(workers, source, tmp_path, layouts)
