"""Where rows come from: files, directories, hub data sets, and which of their rows are taken."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import ConfigError, DataError

ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
# Names that end like files are never looked up on the hub: a typo in a path is no reason to go online.
_FILE_SUFFIXES = (*ROW_SUFFIXES, ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst")
_SAMPLE = re.compile(r"#(\d+)\Z")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as its source holds it."""

    source: str
    """File path or hub id."""

    number: int
    """Position in the source, counted from 1; for JSONL the line number."""

    value: dict[str, Any]
    """The row's keys and values."""

    @property
    def place(self) -> str:
        """`source, row number`, the way every message about a row begins."""
        return f"{self.source}, row {self.number}"


@dataclass(frozen=True, kw_only=True)
class DatasetRef:
    """A data set as the command line names it."""

    name: str
    """Path of a file or directory, or a hub id."""

    sample: int | None
    """Number of rows to take, from `name#N`; None takes all."""

    @classmethod
    def parse(cls, text: str) -> "DatasetRef":
        """Split `path_or_id#N`; N is digits at the very end. DataError: the name is empty, or N is 0."""
        match = _SAMPLE.search(text)
        name = text[: match.start()] if match else text
        sample = int(match[1]) if match else None
        if not name:
            raise DataError(f"data set {text!r} has no name; give a file, a directory or a hub id")
        if sample == 0:
            raise DataError(f"data set {text!r} asks for 0 rows; give a number above 0 or leave #0 out")
        return cls(name=name, sample=sample)

    @property
    def looks_like_path(self) -> bool:
        """Whether the name cannot be a hub id: file suffix, leading `.`, `/` or `~`, or several slashes."""
        return (
            self.name.lower().endswith(_FILE_SUFFIXES)
            or self.name.startswith((".", "/", "~"))
            or self.name.count("/") > 1
        )


class Split(NamedTuple):
    """Rows for training and rows held out for evaluation, each in the order they came in."""

    train: list[Row]
    val: list[Row]


def load_rows(datasets: Sequence[str], *, seed: int) -> list[Row]:
    """Read every data set in turn and take `#N` rows where asked.

    Sampling is without replacement, depends on (seed, position in `datasets`) only, and keeps the order of
    the file. An N beyond the number of rows takes whole passes over them and samples the rest.

    DataError: a file is missing, empty, malformed or of an unknown kind, or the hub cannot be reached.
    """
    rows: list[Row] = []
    for index, text in enumerate(datasets):
        ref = DatasetRef.parse(text)
        found = list(_read(ref))
        if not found:
            raise DataError(f"{ref.name} holds no rows; give a data set with at least one")
        if ref.sample is not None:
            found = [found[i] for i in _sample_indices(len(found), ref.sample, seed=seed, index=index)]
        rows.extend(found)
    return rows


def stream_rows(datasets: Sequence[str]) -> Iterator[Row]:
    """The rows of every data set in turn, read as they are asked for; `name#N` takes the first N.

    DataError: as load_rows, when the reader gets there.
    """
    for text in datasets:
        ref = DatasetRef.parse(text)
        rows = iter(_read(ref, streaming=True))
        yield from rows if ref.sample is None else itertools.islice(rows, ref.sample)


def dataset_files(dataset: str) -> list[Path]:
    """The files behind a data set's name; none for a hub id."""
    path = Path(DatasetRef.parse(dataset).name).expanduser()
    return _files_in(path) if path.is_dir() else [path] if path.exists() else []


def split_rows(rows: Sequence[Row], ratio: float, seed: int) -> Split:
    """Hold out about `ratio` of the rows, chosen by `seed`; both parts have at least one row when ratio > 0.

    ConfigError: ratio outside [0, 1). DataError: ratio > 0 with fewer than two rows.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"split_dataset_ratio is {ratio}; it must be at least 0 and below 1")
    if ratio == 0:
        return Split(train=list(rows), val=[])
    if len(rows) < 2:
        raise DataError(f"split_dataset_ratio={ratio} needs at least 2 rows to split; there are {len(rows)}")
    num_val = min(max(round(len(rows) * ratio), 1), len(rows) - 1)
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[np.random.default_rng(seed).permutation(len(rows))[:num_val]] = True
    return Split(
        train=[row for row, out in zip(rows, held_out, strict=True) if not out],
        val=[row for row, out in zip(rows, held_out, strict=True) if out],
    )


def _sample_indices(num_rows: int, wanted: int, *, seed: int, index: int) -> list[int]:
    passes, rest = divmod(wanted, num_rows)
    # The position takes part in the seed so that the same file named twice does not give the same sample
    # twice.
    chosen = np.sort(np.random.default_rng([seed, index]).permutation(num_rows)[:rest])
    return list(range(num_rows)) * passes + chosen.tolist()


def _read(ref: DatasetRef, *, streaming: bool = False) -> Iterable[Row]:
    path = Path(ref.name).expanduser()
    if path.is_dir():
        files = _files_in(path)
        if not files:
            raise DataError(f"directory {ref.name} holds no .jsonl, .json or .parquet file")
        return itertools.chain.from_iterable(map(_read_file, files))
    if path.exists():
        return _read_file(path)
    if ref.looks_like_path:
        raise DataError(f"data set {ref.name} does not exist; check the path")
    if ref.name.count("/") != 1:
        raise DataError(f"data set {ref.name} is neither a file nor a hub id of the form org/name")
    return _read_hub(ref.name, streaming=streaming)


def _files_in(directory: Path) -> list[Path]:
    entries = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    return [entry for entry in entries if entry.suffix.lower() in ROW_SUFFIXES]


def _read_file(path: Path) -> Iterator[Row]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of an unknown kind; give a .jsonl, .json or .parquet file")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, row {number}: not valid JSON ({error}); mend the line") from error
            yield _row(str(path), number, value)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); is it a .jsonl file?") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: holds {type(values).__name__}, not a list of rows; wrap them in [ ]")
    for number, value in enumerate(values, start=1):
        yield _row(str(path), number, value)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield _row(str(path), number, value)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error


def _read_hub(name: str, *, streaming: bool) -> Iterable[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hub data set {name} needs `pip install datasets`; or pass a local file") from error
    try:
        table = datasets.load_dataset(name, split="train", streaming=streaming)
    except Exception as error:  # the hub client raises many types, and none is a bug of this program
        raise DataError(
            f"hub data set {name}: the hub could not be reached or has no such data set with a train split "
            f"({type(error).__name__}: {_first_line(error)}); pass a local file"
        ) from error
    return (_row(name, number, value) for number, value in enumerate(table, start=1))


def _row(source: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{source}, row {number}: holds {type(value).__name__}, not an object with keys")
    return Row(source=source, number=number, value=value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
