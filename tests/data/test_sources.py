"""Rows are read, sampled and split as asked, and what is wrong is named by file and row."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data import sources
from engine.data.sources import (
    DatasetRef,
    Reading,
    Row,
    check_probabilities,
    dataset_files,
    interleave,
    split_rows,
    stream_rows,
)
from engine.errors import ConfigError, DataError

Write = Callable[..., str]


def load_rows(datasets: list[str], *, seed: int, **how: Any) -> list[Row]:
    """Of all data sets in turn."""
    return [row for part in sources.load_rows(datasets, seed=seed, how=Reading(**how)) for row in part]


def values_of(rows: list[Row]) -> list[int]:
    return [row.value["i"] for row in rows]


@pytest.mark.parametrize(
    ("text", "name", "sample"),
    [
        ("data.jsonl", "data.jsonl", None),
        ("data.jsonl#500", "data.jsonl", 500),
        ("org/name#12", "org/name", 12),
        ("a#1/b.json", "a#1/b.json", None),
        ("a#1#2", "a#1", 2),
        ("a#x", "a#x", None),
    ],
)
def test_reference(text: str, name: str, sample: int | None) -> None:
    assert DatasetRef.parse(text) == DatasetRef(name=name, sample=sample)


@pytest.mark.parametrize("text", ["", "#3", "data.jsonl#0"])
def test_reference_refused(text: str) -> None:
    with pytest.raises(DataError):
        DatasetRef.parse(text)


def test_jsonl_skips_empty_lines_and_numbers_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"i": 1}\r\n\n  \n{"i": 2, "t": "é\u2028"}'.encode())
    rows = load_rows([str(path)], seed=0)
    assert rows == [
        Row(source=str(path), number=1, value={"i": 1}),
        Row(source=str(path), number=4, value={"i": 2, "t": "é\u2028"}),
    ]


def test_json_parquet_and_directory_hold_the_same_rows(tmp_path: Path) -> None:
    values = [{"i": i, "messages": [{"role": "user", "content": str(i)}]} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(values))
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "b.parquet")
    (tmp_path / "README.md").write_text("not rows")
    for name in ("a.json", "b.parquet"):
        rows = load_rows([str(tmp_path / name)], seed=0)
        assert [row.value for row in rows] == values
        assert [row.number for row in rows] == [1, 2, 3]
    rows = load_rows([str(tmp_path)], seed=0)
    assert [row.value for row in rows] == values * 2
    assert rows[4].place == f"{tmp_path / 'b.parquet'}, row 2"


def test_sample_is_seeded_without_replacement_and_in_file_order(write_jsonl: Write) -> None:
    path = write_jsonl({"i": i} for i in range(50))
    taken = values_of(load_rows([f"{path}#20"], seed=1))
    assert len(set(taken)) == 20
    assert taken == sorted(taken)
    assert taken == values_of(load_rows([f"{path}#20"], seed=1))
    assert taken != values_of(load_rows([f"{path}#20"], seed=2))
    assert values_of(load_rows([f"{path}#50"], seed=1)) == list(range(50))


def test_sample_beyond_the_rows_repeats_them(write_jsonl: Write) -> None:
    path = write_jsonl({"i": i} for i in range(4))
    taken = values_of(load_rows([f"{path}#10"], seed=0))
    assert taken[:8] == [0, 1, 2, 3] * 2
    assert sorted(Counter(taken).values()) == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"i": 1}\n{"i": \n', "a.jsonl, row 2: not valid JSON"),
        ("a.jsonl", b'{"i": 1}\n\n"\xff"\n', "a.jsonl, row 3: not valid JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, row 1: holds list"),
        ("a.jsonl", b"\n", "holds no rows"),
        ("a.json", b'[{"i": 1}, 2]', "a.json, row 2: holds int"),
        ("a.json", b'{"i": 1}', "a.json: holds dict, not a list"),
        ("a.json", b'{"i": 1}\n{"i": 2}', "a.json: not valid JSON"),
        ("a.json", b"[]", "holds no rows"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable Parquet file"),
        ("a.csv", b"i\n1\n", "a.csv is of an unknown kind"),
    ],
)
def test_unusable_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows([str(tmp_path / name)], seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directory_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        load_rows([str(tmp_path)], seed=0)


@pytest.mark.parametrize("name", ["org/rows.jsonl", "./rows", "/no/rows", "a/b/c", "rows.parquet#5", "rows"])
def test_missing_path_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=name.removesuffix("#5")) as caught:
        load_rows([name], seed=0)
    assert "hub data set" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    asked: list[tuple[str, str, bool]] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, split, streaming))
        return [{"i": 0}, {"i": 1}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = list(stream_rows(["org/name#1"])) if streaming else load_rows(["org/name#1"], seed=0)
    assert asked == [("org/name", "train", streaming)]
    assert len(rows) == 1
    assert rows[0].source == "org/name"


def test_streamed_rows_are_the_loaded_ones(tmp_path: Path) -> None:
    """Files and directories, read as they are asked for."""
    for name, first in (("a.jsonl", 0), ("b.jsonl", 3)):
        (tmp_path / name).write_text("".join(json.dumps({"i": first + i}) + "\n" for i in range(3)))
    names = [str(tmp_path), str(tmp_path / "b.jsonl")]
    assert list(stream_rows(names)) == load_rows(names, seed=0)
    assert [path.name for path in dataset_files(names[0])] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "c.jsonl").write_text("{broken")
    rows = stream_rows(names)
    assert [next(rows).value["i"] for _ in range(6)] == list(range(6))
    with pytest.raises(DataError, match=r"c\.jsonl, row 1"):
        next(rows)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, split: str, streaming: bool) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DataError, match=r"org/name: Hugging Face could not be reached.*pass a local file"
    ) as caught:
        load_rows(["org/name"], seed=0)
    assert "\n" not in str(caught.value)


def test_split_is_a_seeded_partition() -> None:
    rows = [Row(source="a", number=i + 1, value={"i": i}) for i in range(20)]
    train, val = split_rows(rows, 0.25, seed=3)
    assert len(val) == 5
    assert sorted(values_of(train) + values_of(val)) == list(range(20))
    assert values_of(train) == sorted(values_of(train))
    assert split_rows(rows, 0.25, seed=3) == (train, val)
    assert split_rows(rows, 0.25, seed=4) != (train, val)
    assert split_rows(rows, 0.0, seed=3) == (rows, [])


def test_split_gives_both_parts_a_row() -> None:
    rows = [Row(source="a", number=i + 1, value={}) for i in range(2)]
    assert [len(part) for part in split_rows(rows, 0.001, seed=0)] == [1, 1]
    assert [len(part) for part in split_rows(rows, 0.999, seed=0)] == [1, 1]
    with pytest.raises(DataError, match="at least 2 rows"):
        split_rows(rows[:1], 0.5, seed=0)
    for ratio in (-0.1, 1.0):
        with pytest.raises(ConfigError):
            split_rows(rows, ratio, seed=0)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_get_other_names(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "1", "answer": "2", "id": 3}, {"question": "4"}])
    columns = {"question": "query", "answer": "response"}
    if streaming:
        rows = list(stream_rows([path], Reading(columns=columns)))
    else:
        rows = load_rows([path], seed=0, columns=columns)
    assert [row.value for row in rows] == [{"query": "1", "response": "2", "id": 3}, {"query": "4"}]
    assert rows[1].number == 2


def test_columns_that_no_row_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"query": "1", "response": "2"}])
    with pytest.raises(DataError, match=r"columns names q, of which .*a\.jsonl has none.*query, response"):
        load_rows([path], seed=0, columns={"q": "query"})


def parts_of(*sizes: int) -> list[list[Row]]:
    return [
        [Row(source=str(part), number=i + 1, value={"i": i}) for i in range(size)]
        for part, size in enumerate(sizes)
    ]


def test_interleaving_ends_with_the_first_that_runs_out() -> None:
    parts = parts_of(400, 5000)
    rows = interleave(parts, [0.25, 0.75], until_all=False, seed=1)
    taken = Counter(row.source for row in rows)
    assert taken["0"] == 400
    assert 1000 < taken["1"] < 1400
    for part in (0, 1):  # in order, none twice
        assert [row.number for row in rows if row.source == str(part)] == list(range(1, taken[str(part)] + 1))
    assert rows == interleave(parts, [0.25, 0.75], until_all=False, seed=1)
    assert rows != interleave(parts, [0.25, 0.75], until_all=False, seed=2)


def test_interleaving_until_all_have_been_through() -> None:
    rows = interleave(parts_of(10, 300), [0.5, 0.5], until_all=True, seed=1)
    numbers = [row.number for row in rows if row.source == "0"]
    assert numbers == [i % 10 + 1 for i in range(len(numbers))]
    assert 200 < len(numbers) < 400
    assert rows[-1].source == "1"
    assert rows[-1].number == 300


@pytest.mark.parametrize(
    ("probabilities", "words"),
    [
        ([1.0], "has 1 numbers for 2 data sets"),
        ([0.5, 0.4], "must be positive and sum to 1, not 0.5 0.4"),
        ([1.0, 0.0], "must be positive"),
    ],
)
def test_probabilities_that_do_not_fit(probabilities: list[float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_probabilities(probabilities, 2)
