"""Files written from a source: in bounded memory, hashed on the way, the same whoever and how many write."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from converters.conversion import Conversion, carry_out
from converters.source import Source
from converters.transfer import (
    RECORDS_DIR,
    Crew,
    FileRecord,
    OutputFile,
    Piece,
    TensorData,
    TransferOptions,
    read_record,
    whole_tensor,
    write_files,
)
from engine.errors import ModelError, OutputError
from engine.storage.files import bytes_of

from .conftest import MemorySource, hf_files

ROOT = Path(__file__).parents[2]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def raw(tensor: Tensor) -> bytes:
    return bytes(bytes_of(tensor.contiguous()))


def write(
    directory: Path, files: Sequence[OutputFile], source: Source, **options: Any
) -> dict[str, FileRecord]:
    directory.mkdir(exist_ok=True)
    return write_files(files, directory, source, TransferOptions(**options))


def whole(name: str, source: Source, dtype: torch.dtype | None = None) -> OutputFile:
    return OutputFile(name=name, parts=(whole_tensor(source, name, dtype or source.dtype(name)),))


# What is written


def test_bytes_and_digests(tmp_path: Path) -> None:
    """Several tensors and files; a file begins, ends and goes on between tensors with given bytes."""
    tensors = {"a": torch.randn(70, 31), "b": torch.randn(9).bfloat16(), "c": torch.randn(2, 3, 4).double()}
    source = MemorySource(tensors)
    a, b, c = (whole_tensor(source, name, tensor.dtype) for name, tensor in tensors.items())
    files = [
        OutputFile(name="one", parts=(b"head", a, b"", b"between", b, b"tail")),
        OutputFile(name="two", parts=(c,)),
        OutputFile(name="three", parts=(b"no tensor",)),
        OutputFile(name="four", parts=()),
    ]
    records = write(tmp_path, files, source)
    expected = {
        "one": b"head" + raw(tensors["a"]) + b"between" + raw(tensors["b"]) + b"tail",
        "two": raw(tensors["c"]),
        "three": b"no tensor",
        "four": b"",
    }
    assert {name: (tmp_path / name).read_bytes() for name in expected} == expected
    assert {path.name for path in tmp_path.iterdir()} == {RECORDS_DIR, *expected}
    for name, data in expected.items():
        assert (records[name].nbytes, records[name].sha256) == (len(data), sha256(data))
    digests = {name: sha256(raw(tensor)) for name, tensor in tensors.items()}
    assert records["one"].tensors == {"a": digests["a"], "b": digests["b"]}
    assert records["two"].tensors == {"c": digests["c"]}
    assert records["three"].tensors == {}
    assert [read_record(tmp_path, file) for file in files] == [records[file.name] for file in files]


def test_files_of_many_blocks(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(999, 1001), "y": torch.randint(-9, 9, (300_000,)).half()}
    options = {"max_memory": 1_000_000}
    assert tensors["x"].nbytes > 10 * TransferOptions(**options).block_bytes
    records = write(tmp_path, hf_files(tensors), MemorySource(tensors), **options)
    expected = save(tensors, {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    record = records["model.safetensors"]
    assert record.sha256 == sha256(expected)
    assert record.tensors == {name: sha256(raw(tensor)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Element by element as torch does; the digest is of what was stored."""
    tensor = (torch.randn(3000, 13) * 100).to(stored)
    tensor[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e30])
    source = MemorySource({"x": tensor})
    records = write(tmp_path, [whole("x", source, dtype)], source, max_memory=500_000)
    assert (tmp_path / "x").read_bytes() == raw(tensor.to(dtype))
    assert records["x"].tensors == {"x": sha256(raw(tensor))}


def test_pieces_and_rows_of_zeros(tmp_path: Path) -> None:
    tensors = {"q": torch.randn(8, 5), "k": torch.randn(4, 5)}
    pieces = [("q", 0, 4), ("k", 0, 2), (None, 0, 3), ("q", 4, 8), ("k", 2, 4), (None, 0, 1000)]
    data = TensorData(
        pieces=tuple(Piece(name=name, start=start, stop=stop) for name, start, stop in pieces),
        dtype=torch.bfloat16,
        row_elements=5,
    )
    file = OutputFile(name="x", parts=(data,))
    records = write(tmp_path, [file], MemorySource(tensors), max_memory=500)
    q, k = (tensors[name].bfloat16() for name in "qk")
    zeros = torch.zeros(3, 5).bfloat16(), torch.zeros(1000, 5).bfloat16()
    expected = torch.cat([q[:4], k[:2], zeros[0], q[4:], k[2:], zeros[1]])
    assert (tmp_path / "x").read_bytes() == raw(expected)
    assert file.nbytes == expected.nbytes
    assert records["x"].tensors == {name: sha256(raw(tensor)) for name, tensor in tensors.items()}


def test_a_copy_does_not_count_as_a_reading(tmp_path: Path) -> None:
    source = MemorySource({"x": torch.randn(40, 3)})
    twice = [whole_tensor(source, "x", torch.float32, copy=copy) for copy in (False, True)]
    files = [
        OutputFile(name="both", parts=tuple(twice)),
        OutputFile(name="copy", parts=(twice[1],)),
    ]
    records = write(tmp_path, files, source)
    data = raw(source.tensors["x"])
    assert (tmp_path / "both").read_bytes() == data + data
    assert records["both"].tensors == {"x": sha256(data)}
    assert records["copy"].tensors == {}


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300)), min_size=1, max_size=4),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    workers=st.integers(1, 3),
    shard=st.integers(1, 300_000),
)
def test_any_layout_is_what_the_library_would_write(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, int]],
    stored: torch.dtype,
    dtype: torch.dtype,
    workers: int,
    shard: int,
) -> None:
    directory = tmp_path_factory.mktemp("any")
    tensors = {f"t{number}": torch.randn(shape).to(stored) for number, shape in enumerate(shapes)}
    written = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    source = MemorySource(tensors)
    files = hf_files(written, source, max_shard_size=shard)
    records = write(directory, files, source, workers=workers, max_memory=200_000)
    for file in files:
        if file.name.endswith(".safetensors"):
            names = list(records[file.name].tensors)
            expected = save({name: written[name] for name in names}, {"format": "pt"})
            assert (directory / file.name).read_bytes() == expected
            assert records[file.name].tensors == {name: sha256(raw(tensors[name])) for name in names}
        assert records[file.name].sha256 == sha256((directory / file.name).read_bytes())


# Memory


class Counting(Source):
    """One endless tensor that is nowhere; counts what it hands out at once."""

    directory = Path()

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
        self._shape, self._dtype = shape, dtype
        self.largest = self.calls = self.own = 0

    def files(self) -> list[Path]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        assert out is not None
        self.calls += 1
        self.largest = max(self.largest, out.nbytes)
        if out.untyped_storage().nbytes() == out.nbytes:
            self.own += 1
        return out.fill_(start % 100)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reads_are_as_large_as_the_memory_allows(tmp_path: Path, workers: int, dtype: torch.dtype) -> None:
    """The tensor is larger than `max_memory`; with the buffers of all workers, blocks stay within it."""
    options = TransferOptions(workers=workers, max_memory=3_000_000)
    source = Counting((3000, 1024))
    assert source.nbytes("x") > options.max_memory
    files = [whole(f"{name}", source, dtype) for name in "abc"]
    write_files(files, tmp_path, source, options)
    row = 1024 * max(2, dtype.itemsize)
    assert options.block_bytes * 0.5 < source.largest * dtype.itemsize / 2 <= options.block_bytes
    assert workers * 4 * options.block_bytes <= options.max_memory
    assert source.calls == 3 * -(-3000 // (options.block_bytes // row))


def test_a_row_larger_than_a_block_is_read_alone(tmp_path: Path) -> None:
    options = TransferOptions(max_memory=320_000)
    source = Counting((5, 50_000))
    assert source.row_bytes("x") > options.block_bytes
    write_files([whole("x", source)], tmp_path, source, options)
    assert (source.calls, source.largest) == (5, 100_000)
    assert (tmp_path / "x").stat().st_size == 500_000


def test_process_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Measured by the kernel: two tensors of 61 MB at once through a process that is allowed 16 MB."""
    code = f"""
import resource, torch
from pathlib import Path
from converters.transfer import TransferOptions, write_files
from tests.converters.test_transfer import Counting, whole
torch.set_num_threads(1)
options = TransferOptions(workers=2, max_memory=16_000_000)
small, large = Counting((1000, 1024)), Counting((30_000, 1024))
write_files([whole(name, small) for name in "ab"], Path({str(tmp_path)!r}), small, options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_files([whole(name, large) for name in "cd"], Path({str(tmp_path)!r}), large, options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (tmp_path / "c").stat().st_size == 61_440_000
    assert int(result.stdout) < 20_000_000


@pytest.mark.parametrize(
    ("workers", "memory", "expected"),
    [(1, 256_000_000, 4_000_000), (4, 256_000_000, 4_000_000), (4, 20_000_000, 1_000_000), (9, 1, 64_000)],
)
def test_block_sizes(workers: int, memory: int, expected: int) -> None:
    assert TransferOptions(workers=workers, max_memory=memory).block_bytes == expected


# Workers


def test_workers_change_nothing(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(number * 37 % 90 + 1, 64) for number in range(24)}
    source = MemorySource(tensors)
    files = hf_files(tensors, max_shard_size=30_000)
    assert len(files) > 8
    one, many = (
        write(tmp_path / str(workers), files, source, workers=workers, max_memory=200_000 * workers)
        for workers in (1, 5)
    )
    assert one == many
    for file in files:
        assert (tmp_path / "1" / file.name).read_bytes() == (tmp_path / "5" / file.name).read_bytes()


def test_progress_adds_up_to_the_share(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(50, 64) for number in range(8)}
    source, files = MemorySource(tensors), hf_files(tensors, max_shard_size=20_000)
    whole_size = sum(file.nbytes for file in files)
    for attempt in range(2):
        seen: list[int] = []
        write(tmp_path, files, source, workers=3, progress=seen.append)
        assert sum(seen) == whole_size, attempt  # the second time all is there from before
    shares = []
    for rank in range(2):
        seen = []
        write(tmp_path / "crew", files, source, crew=Crew(rank=rank, size=2), progress=seen.append)
        shares.append(sum(seen))
    assert sum(shares) == whole_size
    assert max(shares) < 0.7 * whole_size


class Broken(MemorySource):
    """One tensor cannot be read; the others take their time."""

    def __init__(self, tensors: dict[str, Tensor], bad: str, error: BaseException) -> None:
        super().__init__(tensors)
        self._bad, self._error = bad, error
        self.reads: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        with self._lock:
            self.reads[name] = self.reads.get(name, 0) + 1
        if name == self._bad:
            raise self._error
        time.sleep(0.01)
        return super().read_rows(name, start, stop, out)


@pytest.mark.parametrize("error", [ModelError("shard is gone"), RuntimeError("bug"), KeyboardInterrupt()])
def test_an_error_stops_the_other_workers_and_is_the_one_raised(tmp_path: Path, error: BaseException) -> None:
    tensors = {name: torch.randn(1000, 1000) for name in "abcdef"}
    source = Broken(tensors, "b", error)
    files = [whole(name, source) for name in tensors]
    with pytest.raises(type(error)) as caught:
        write(tmp_path, files, source, workers=3, max_memory=1_000_000)
    assert caught.value is error
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS_DIR]
    assert not list((tmp_path / RECORDS_DIR).iterdir())
    blocks = -(-4_000_000 // 64_000)
    assert all(count < blocks / 2 for count in source.reads.values()), source.reads
    assert source.reads["b"] == 1


# The disk


def test_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    class Looking(MemorySource):
        def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
            assert not (tmp_path / name).exists()
            assert not (tmp_path / RECORDS_DIR / f"{name}.json").exists()
            return super().read_rows(name, start, stop, out)

    source = Looking({"x": torch.randn(1000, 100)})
    (file,) = files = [whole("x", source)]
    write(tmp_path, files, source, max_memory=1)
    assert read_record(tmp_path, file) is not None


def test_finished_files_are_not_written_again(tmp_path: Path) -> None:
    source = Counting((10, 10))
    files = [whole(name, source) for name in "abc"]
    write(tmp_path, files[:2], source)
    assert source.calls == 2
    write(tmp_path, files, source)
    assert source.calls == 3
    (tmp_path / "a").write_bytes(b"short")
    write(tmp_path, files, source)
    assert source.calls == 4


@pytest.mark.parametrize(
    "record", [b"", b"[]", b"{}", b'{"nbytes": 8}', b"\xff", b'{"nbytes": 8, "sha256": "", "tensors": {}}']
)
def test_records_that_are_none(tmp_path: Path, record: bytes) -> None:
    source = Counting((10, 10))
    (file,) = files = [whole("x", source)]
    write(tmp_path, files, source)
    (tmp_path / RECORDS_DIR / "x.json").write_bytes(record)
    assert read_record(tmp_path, file) is None


def test_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """/dev/full stands for the file; whoever asks for the whole conversion gets one line."""
    source = Counting((1000, 1000))
    (tmp_path / "out").mkdir()
    partial = tmp_path / "out" / f"x.{os.uname().nodename}-{os.getpid()}"
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out", [whole("x", source)], source)
    assert not (tmp_path / "out" / "x").exists()


def test_full_disk_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = Counting((1000, 1000))
    plan = Conversion(
        kind="hf", source=source, files=(whole("x", source),), tensors=1, finish=lambda stage: None
    )
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match=r"disk full while writing .*out; make room") as caught:
        carry_out(plan, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_record_is_json_that_says_what_was_written(tmp_path: Path) -> None:
    source = Counting((10, 10))
    write(tmp_path, [whole("x", source)], source)
    record = json.loads((tmp_path / RECORDS_DIR / "x.json").read_text())
    data = (tmp_path / "x").read_bytes()
    assert record == {"nbytes": 200, "sha256": sha256(data), "tensors": {"x": sha256(data)}}
