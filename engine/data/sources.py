"""Where rows come from: files, directories, hub data sets, and which of their rows are taken."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.data.hub import read_table
from engine.errors import ConfigError, DataError, first_line

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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the options say of all data sets."""

    use_hf: bool | None = None
    """Ids are Hugging Face's; None: ModelScope's where its package is installed."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Keys of rows by the name they get."""


class Split(NamedTuple):
    """Rows for training and rows held out for evaluation, each in the order they came in."""

    train: list[Row]
    val: list[Row]


def load_rows(datasets: Sequence[str], *, seed: int, how: Reading = Reading()) -> list[list[Row]]:
    """Read every data set and take `#N` rows where asked.

    Sampling is without replacement, depends on (seed, position in `datasets`) only, and keeps the order of
    the file. An N beyond the number of rows takes whole passes over them and samples the rest.

    DataError: a file is missing, empty, malformed or of an unknown kind, or the hub cannot be reached.
    """
    parts = []
    for index, text in enumerate(datasets):
        ref = DatasetRef.parse(text)
        found = list(_read(ref, how))
        if not found:
            raise DataError(f"{ref.name} holds no rows; give a data set with at least one")
        if ref.sample is not None:
            found = [found[i] for i in _sample_indices(len(found), ref.sample, seed=seed, index=index)]
        parts.append(found)
    return parts


def check_probabilities(probabilities: Sequence[float], count: int) -> None:
    """ConfigError: there is not one for each of `count` data sets, one is not positive, or they do not sum to
    1.
    """
    if len(probabilities) != count:
        raise ConfigError(
            f"interleave_prob has {len(probabilities)} numbers for {count} data sets; give one for each"
        )
    if min(probabilities) <= 0 or abs(sum(probabilities) - 1) > 1e-6:
        shown = " ".join(map(str, probabilities))
        raise ConfigError(f"interleave_prob must be positive and sum to 1, not {shown}")


def interleave(
    parts: Sequence[Sequence[Row]], probabilities: Sequence[float], *, until_all: bool, seed: int
) -> list[Row]:
    """Rows of all `parts` in their orders, each next one from a part drawn by `probabilities`, until one is
    drawn that has none left. With `until_all` parts begin again, until every one has been through.
    """
    random, shares = np.random.default_rng(seed), np.array(probabilities) / sum(probabilities)
    rows: list[Row] = []
    taken = np.zeros(len(parts), dtype=np.int64)
    sizes = np.array([len(part) for part in parts])
    while not (until_all and (taken >= sizes).all()):
        drawn = int(random.choice(len(parts), p=shares))
        if not until_all and taken[drawn] == sizes[drawn]:
            break
        rows.append(parts[drawn][taken[drawn] % sizes[drawn]])
        taken[drawn] += 1
    return rows


def stream_rows(datasets: Sequence[str], how: Reading = Reading()) -> Iterator[Row]:
    """The rows of every data set in turn, read as they are asked for; `name#N` takes the first N.

    DataError: as load_rows, when the reader gets there.
    """
    for text in datasets:
        ref = DatasetRef.parse(text)
        rows = iter(_read(ref, how, streaming=True))
        yield from rows if ref.sample is None else itertools.islice(rows, ref.sample)


def dataset_files(dataset: str) -> list[Path]:
    """The files behind a data set's name; none for a hub id."""
    path = Path(DatasetRef.parse(dataset).name).expanduser()
    return _files_in(path) if path.is_dir() else [path] if path.exists() else []


def sizes_of(dataset: str) -> dict[Path, int] | None:
    """Bytes of the files behind a data set's name; None for a hub id. DataError as for reading them, as far
    as it is known without.
    """
    ref = DatasetRef.parse(dataset)
    found = _local_files(ref)
    return None if found is None else {path: path.stat().st_size for path in found}


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


def _read(ref: DatasetRef, how: Reading, *, streaming: bool = False) -> Iterable[Row]:
    rows = _read_as_it_is(ref, how, streaming=streaming)
    return _renamed(ref.name, rows, how.columns) if how.columns else rows


def _renamed(name: str, rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if not number and not columns.keys() & row.value.keys():
            raise DataError(
                f"columns names {', '.join(columns)}, of which {name} has none; its rows have "
                f"{', '.join(row.value)}"
            )
        yield replace(row, value={columns.get(key, key): value for key, value in row.value.items()})


def _read_as_it_is(ref: DatasetRef, how: Reading, *, streaming: bool) -> Iterable[Row]:
    files = _local_files(ref)
    if files is not None:
        return itertools.chain.from_iterable(map(_read_file, files))
    table = read_table(ref.name, use_hf=how.use_hf, streaming=streaming)
    return (_row(ref.name, number, value) for number, value in enumerate(table, start=1))


def _local_files(ref: DatasetRef) -> list[Path] | None:
    """None for what can only be a hub id."""
    path = Path(ref.name).expanduser()
    if path.is_dir():
        files = _files_in(path)
        if not files:
            raise DataError(f"directory {ref.name} holds no .jsonl, .json or .parquet file")
        return files
    if path.exists():
        return [path]
    if ref.looks_like_path:
        raise DataError(f"data set {ref.name} does not exist; check the path")
    if ref.name.count("/") != 1:
        raise DataError(f"data set {ref.name} is neither a file nor a hub id of the form org/name")
    return None


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
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _row(source: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{source}, row {number}: holds {type(value).__name__}, not an object with keys")
    return Row(source=source, number=number, value=value)
