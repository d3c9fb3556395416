"""Regions of stored tensors under any cut, and checkpoints that would like to run code."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.storage.layout import FileLayout, merge_boxes, write_frame
from engine.storage.metadata import DistBytes
from engine.storage.reader import COMMON_FILE, TorchDistReader, check_files
from tests.converters.hostile import Evil

WHOLE = torch.arange(3 * 8 * 10, dtype=torch.float32).reshape(3, 8, 10).bfloat16()


def save(directory: Path, cuts: tuple[int, int, int], objects: dict[str, bytes] | None = None) -> None:
    """`WHOLE` as the key `x`, cut into so many parts along each dimension, one file a part."""
    directory.mkdir()
    parts, entries = [], list[DistBytes]()
    axes = [torch.arange(size).tensor_split(cut) for size, cut in zip(WHOLE.shape, cuts, strict=True)]
    places = [(a, b, c) for a in axes[0] for b in axes[1] for c in axes[2]]
    for number, place in enumerate(places):
        box = WHOLE[place[0]][:, place[1]][:, :, place[2]].contiguous()
        layout = FileLayout(f"__{number}_0.distcp")
        placed = layout.box(
            "x",
            dtype=WHOLE.dtype,
            shape=tuple(WHOLE.shape),
            offsets=tuple(int(axis[0]) for axis in place),
            sizes=tuple(box.shape),
        )
        content = placed.before + box.view(torch.uint8).numpy().tobytes() + placed.behind
        parts.append(placed.tensor)
        for key, value in (objects or {}).items() if number == 0 else ():
            written, entry = layout.object(key, value)
            content += written
            entries.append(entry)
        (directory / layout.name).write_bytes(content)
    write_frame(directory, merge_boxes(parts), entries, {"plain": [1, 2.5, None]})


@pytest.mark.parametrize("cuts", [(1, 1, 1), (3, 1, 1), (1, 4, 1), (1, 1, 3), (3, 2, 5), (1, 8, 2)])
def test_any_region_under_any_cut(tmp_path: Path, cuts: tuple[int, int, int]) -> None:
    save(tmp_path / "c", cuts)
    reader = TorchDistReader(tmp_path / "c")
    check_files(reader)
    ranges = [st.integers(0, size - 1).flatmap(lambda a, s=size: st.tuples(st.just(a), st.integers(a + 1, s)))
              for size in WHOLE.shape]  # fmt: skip

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.tuples(*ranges))
    def regions(bounds: tuple[tuple[int, int], ...]) -> None:
        wanted = WHOLE[tuple(slice(a, b) for a, b in bounds)]
        out = torch.zeros(wanted.shape, dtype=WHOLE.dtype)
        assert torch.equal(reader.read_region("x", [a for a, _ in bounds], out), wanted)

    regions()
    assert reader.read_common() == {"plain": [1, 2.5, None]}


def test_a_box_that_is_missing(tmp_path: Path) -> None:
    save(tmp_path / "c", (3, 1, 1))
    (tmp_path / "c" / "__1_0.distcp").unlink()
    reader = TorchDistReader(tmp_path / "c")
    part = torch.empty(1, 8, 10, dtype=WHOLE.dtype)
    assert torch.equal(reader.read_region("x", (2, 0, 0), part), WHOLE[2:])
    with pytest.raises(CheckpointError, match="__1_0"):
        reader.read_region("x", (1, 0, 0), part)
    with pytest.raises(CheckpointError, match="__1_0"):
        check_files(reader)


@pytest.mark.parametrize("part", ["object", "common"])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, part: str) -> None:
    """What resuming reads besides tensors is loaded as plain data or not at all."""
    marker = tmp_path / "ran"
    save(tmp_path / "c", (1, 1, 1), objects={"rng/shard_0_1": _archive(Evil(marker), tmp_path)})
    reader = TorchDistReader(tmp_path / "c")
    if part == "common":
        (tmp_path / "c" / COMMON_FILE).write_bytes(_archive(Evil(marker), tmp_path))
    with pytest.raises(CheckpointError, match="is damaged at") as caught:
        reader.read_common() if part == "common" else reader.read_object("rng/shard_0_1")
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_that_pickle_would_run_code(tmp_path: Path) -> None:
    """The test above means something only if the pickle is one that does harm where it is loaded."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def _archive(value: Any, directory: Path) -> bytes:
    torch.save(value, directory / "archive")
    return (directory / "archive").read_bytes()
