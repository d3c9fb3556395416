"""What the tests of `inspect_checkpoint` share: making checkpoints, and looking at what is found."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.adapter import adapter_to_mcore
from converters.conversion import carry_out
from converters.convert import plan_to_mcore
from converters.inspect import inspect_checkpoint
from converters.inspection import BoxShape, ContentSummary, Inspection
from engine.errors import UserError
from engine.storage.manifest import MANIFEST_FILE
from tests.support.models import save_adapter, save_tiny_model

FC2 = "decoder.layers.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def convert(model: Path, directory: Path) -> Path:
    """A converted checkpoint whose manifest knows a command."""
    carry_out(plan_to_mcore(model), directory, command="braid convert --to mcore")
    return directory


def make_adapter(root: Path) -> tuple[Path, Path]:
    """A PEFT directory and the checkpoint that it becomes."""
    base = save_tiny_model("qwen2_tied", root / "base")
    save_adapter(base, root / "peft", r=3, target_modules=["q_proj", "down_proj"])
    adapter_to_mcore(base, root / "peft", root / "mcore")
    return root / "peft", root / "mcore"


def without_braid_files(checkpoint: Path, copy: Path) -> Path:
    """A copy of the checkpoint as another program would have written it."""
    shutil.copytree(checkpoint, copy)
    for name in ("braid.json", "hf_companions", "hf_layout", "trainer_state.json", MANIFEST_FILE):
        shutil.rmtree(copy / name, ignore_errors=True)
        (copy / name).unlink(missing_ok=True)
    return copy


def content(found: Inspection, name: str) -> ContentSummary:
    (summary,) = [item for item in found.contents if item.content == name]
    return summary


def boxes_of(found: Inspection) -> dict[str, tuple[BoxShape, ...]]:
    return {tensor.name: tensor.boxes for tensor in found.tensors}


def box(count: int, *sizes: int) -> tuple[BoxShape, ...]:
    return (BoxShape(sizes=sizes, count=count),)


def one_problem(directory: Path, file: str, *parts: str) -> Inspection:
    """The directory has one problem, in `file`, whose line has all of `parts`."""
    found = inspect_checkpoint(directory)
    (problem,) = found.problems
    assert problem.file == file
    assert problem.text.isprintable()
    for part in parts:
        assert part in problem.text
    assert not found.good
    return found


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        inspect_checkpoint(path)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def edit_metadata(checkpoint: Path, edit: Callable[[Any], None]) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    edit(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
