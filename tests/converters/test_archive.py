"""Boxes of torch_dist checkpoints: rows of what torch itself saved, however it cut and stored a tensor, and
archives that torch reads though it did not write them.
"""

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converters.mcore.reader import DistReader
from engine.errors import CheckpointError
from engine.storage.archive import Box, archive_around
from engine.storage.files import bytes_of
from engine.storage.metadata import DistChunk, DistTensor, write_metadata
from engine.storage.reader import CONFIG_FILE


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def box_of(directory: Path, content: bytes, tensor: Tensor, **described: Any) -> Box:
    """A box whose archive stands between other bytes of its file."""
    (directory / "__0_0.distcp").write_bytes(b"before" * 7 + content + b"behind")
    shape = described.get("shape", tuple(tensor.shape))
    chunk = DistChunk(
        offsets=(0,) * len(shape), sizes=shape, file="__0_0.distcp", start=42, length=len(content)
    )
    dtype = described.get("dtype", tensor.dtype)
    return Box(directory, DistTensor(key="x", shape=shape, dtype=dtype, chunks=(chunk,)), chunk)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each box that was left to torch.load."""
    seen: list[str] = []
    load = torch.load

    def counting(*args: Any, **options: Any) -> Any:
        assert options["weights_only"] is True
        seen.append("load")
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", counting)
    return seen


def rows_of(box: Box, tensor: Tensor) -> None:
    """Every range of rows of the box is that of the tensor."""
    for start, stop in itertools.combinations_with_replacement(range(len(tensor) + 1), 2):
        out = torch.empty(stop - start, *tensor.shape[1:], dtype=tensor.dtype)
        box.read_rows(start, stop, out)
        assert torch.equal(out, tensor[start:stop])


PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("shape", [(5, 3), (4,), (3, 2, 2), (1, 7), (0, 3)])
def test_rows_are_read_in_place(
    tmp_path: Path, loads: list[str], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape).to(dtype)
    rows_of(box_of(tmp_path, saved(tensor), tensor), tensor)
    assert not loads


WHOLE = torch.arange(60.0).reshape(6, 10)
ODD = {
    "transposed": (saved(WHOLE.T), WHOLE.T),
    "part of a larger storage": (saved(WHOLE[2:4]), WHOLE[2:4]),
    "columns of a larger storage": (saved(WHOLE[:, 1:4]), WHOLE[:, 1:4]),
    "expanded": (saved(WHOLE[:1].expand(4, 10)), WHOLE[:1].expand(4, 10)),
    "int64": (saved(WHOLE.long()), WHOLE.long()),
    "parameter": (saved(torch.nn.Parameter(WHOLE)), WHOLE),
    "legacy": (saved(WHOLE, _use_new_zipfile_serialization=False), WHOLE),
    "legacy bf16": (saved(WHOLE.bfloat16(), _use_new_zipfile_serialization=False), WHOLE.bfloat16()),
}


@pytest.mark.parametrize("case", ODD)
def test_other_ways_to_store_a_tensor_are_left_to_torch(tmp_path: Path, loads: list[str], case: str) -> None:
    content, tensor = ODD[case]
    rows_of(box_of(tmp_path, content, tensor), tensor)
    assert loads


def test_one_dimension_of_size_one_may_have_any_stride(tmp_path: Path, loads: list[str]) -> None:
    tensor = torch.arange(6.0).reshape(6, 1).as_strided((6, 1), (1, 9))
    assert tensor.stride() == (1, 9)
    rows_of(box_of(tmp_path, saved(tensor), tensor), tensor)
    assert not loads


@pytest.mark.parametrize(
    ("content", "described"),
    [
        (saved(WHOLE), {"shape": (10, 6)}),
        (saved(WHOLE), {"dtype": torch.float64}),
        (saved(WHOLE.T), {"shape": (6, 10)}),
        (saved(WHOLE.long()), {"dtype": torch.int32}),
        (saved(WHOLE, _use_new_zipfile_serialization=False), {"shape": (60,)}),
        (saved([WHOLE]), {}),
        (saved({"a": 1}), {}),
        (saved(None), {}),
    ],
)
def test_box_that_is_not_what_metadata_says(
    tmp_path: Path, content: bytes, described: dict[str, Any]
) -> None:
    box = box_of(tmp_path, content, WHOLE, **described)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: x at \(0,.*\) is not what \.metadata says"):
        box.read_rows(0, 1, torch.empty(1, 10))


@pytest.mark.parametrize("keep", [0, 10, 100, -1, -30, -200])
def test_damaged_archives(tmp_path: Path, keep: int) -> None:
    box = box_of(tmp_path, saved(WHOLE)[:keep], WHOLE)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged at x; use another checkpoint"):
        box.read_rows(0, 1, torch.empty(1, 10))


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    box = box_of(tmp_path, saved(torch.zeros(1000)), torch.zeros(1000))
    box.read_rows(0, 1, torch.empty(1))
    (tmp_path / "__0_0.distcp").write_bytes(bytes(1500))
    with pytest.raises(CheckpointError, match="cannot be read or changed since it was opened"):
        box.read_rows(900, 1000, torch.empty(100))


# Boxes of one tensor


Cut = tuple[tuple[int, ...], tuple[int, ...]]


def write_checkpoint(directory: Path, key: str, full: Tensor, cuts: list[Cut]) -> None:
    """`full` in boxes (offsets, sizes): every other one in a second file, every third not stored plainly."""
    chunks, ends = [], {0: 0, 1: 0}
    for number, (offsets, sizes) in enumerate(cuts):
        part = full[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
        if number % 3 != 2:
            part = part.clone(memory_format=torch.contiguous_format)
        content, file = saved(part), number % 2
        with open(directory / f"__{file}_0.distcp", "ab") as out:
            out.write(content)
        place = {"file": f"__{file}_0.distcp", "start": ends[file], "length": len(content)}
        chunks.append(DistChunk(offsets=offsets, sizes=sizes, **place))
        ends[file] += len(content)
    tensor = DistTensor(key=key, shape=tuple(full.shape), dtype=full.dtype, chunks=tuple(chunks))
    write_metadata(directory / ".metadata", [tensor])
    (directory / CONFIG_FILE).write_text("{}")


def grid(shape: tuple[int, ...], pieces: tuple[int, ...]) -> list[Cut]:
    """Equal boxes, so many along each dimension."""
    steps = [size // count for size, count in zip(shape, pieces, strict=True)]
    corners = itertools.product(*(range(count) for count in pieces))
    places = (tuple(i * step for i, step in zip(corner, steps, strict=True)) for corner in corners)
    return [(place, tuple(steps)) for place in places]


LAYERED = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
CUTS = {
    "layers one by one": (4, 1, 1),
    "two layers a box": (2, 1, 1),
    "all layers in a box": (1, 1, 1),
    "rows": (4, 3, 1),
    "columns": (4, 1, 4),
    "columns, two layers a box": (2, 1, 2),
    "rows and columns, two layers a box": (2, 2, 4),
    "rows, all layers in a box": (1, 3, 1),
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DistReader]:
    found = {}
    for name, pieces in CUTS.items():
        directory = tmp_path_factory.mktemp("cut")
        write_checkpoint(directory, "decoder.layers.w", LAYERED, grid((4, 6, 8), pieces))
        found[name] = DistReader(directory)
    return found


@pytest.mark.parametrize("cut", CUTS)
@settings(deadline=None)
@given(layer=st.integers(0, 3), ends=st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_rows_of_a_layer_however_it_was_cut(
    readers: dict[str, DistReader], cut: str, layer: int, ends: tuple[int, int]
) -> None:
    start, stop = sorted(ends)
    rows = readers[cut].read_rows(f"decoder.layers.{layer}.w", start, stop)
    assert rows.is_contiguous()
    assert torch.equal(rows, LAYERED[layer, start:stop])


@pytest.mark.parametrize("pieces", [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_rows_of_a_tensor_that_is_not_stacked(tmp_path: Path, pieces: tuple[int, int]) -> None:
    full = torch.randn(8, 4)
    write_checkpoint(tmp_path, "output_layer.weight", full, grid((8, 4), pieces))
    reader, memory = DistReader(tmp_path), torch.empty(5, 4)
    assert reader.read_rows("output_layer.weight", 2, 7, memory).data_ptr() == memory.data_ptr()
    assert torch.equal(memory, full[2:7])


def test_vectors(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    norms, bias = torch.randn(3, 5), torch.randn(6)
    write_checkpoint(tmp_path / "a", "decoder.layers.norm", norms, grid((3, 5), (3, 1)))
    write_checkpoint(tmp_path / "b", "decoder.bias", bias, grid((6,), (3,)))
    assert torch.equal(DistReader(tmp_path / "a").read_rows("decoder.layers.2.norm", 1, 4), norms[2, 1:4])
    assert torch.equal(DistReader(tmp_path / "b").read_rows("decoder.bias", 1, 6), bias[1:])


# Archives that are not written by torch


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("shape", [(1, 3, 5), (4, 16), (7,), (1, 1)])
def test_torch_reads_what_is_put_around_the_data(
    tmp_path: Path, loads: list[str], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape).to(dtype)
    before, behind = archive_around(dtype, shape)
    content = before + bytes(bytes_of(tensor)) + behind
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert found.dtype == dtype
    assert torch.equal(found, tensor)
    assert len(content) == len(saved(tensor))
    assert len(before) % 64 == 0  # so that memory-mapped data is aligned
    loads.clear()
    rows_of(box_of(tmp_path, content, tensor), tensor)
    assert not loads
