"""Truncation is counted, and a cache is taken only when it is whole and of the same making."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.sources import Row
from engine.data.store import StoreReport, TokenStore, build_store
from engine.data.template import ChatTemplate
from engine.errors import ConfigError, DataError
from tests.data.tiny import CHATML, THINKING, ids_of, make_tokenizer, row

# Tokens of a row besides its contents: before the question, between question and answer, behind the answer.
HEAD, MIDDLE, TAIL = 6, 13, 2


def rows_of(*pairs: tuple[str, str]) -> list[Row]:
    return [
        row({"query": query, "response": answer}, number=i + 1) for i, (query, answer) in enumerate(pairs)
    ]


def build(
    rows: Sequence[Row], template: ChatTemplate, cache_dir: Path | None = None, **options: Any
) -> TokenStore:
    chosen = {"system": None, "max_length": 1000, "truncation_strategy": "delete", **options}
    return build_store(rows, template, cache_dir=cache_dir, **chosen)


def contents(store: TokenStore) -> list[tuple[list[int], list[bool]]]:
    return [(encoded.input_ids.tolist(), encoded.supervised.tolist()) for encoded in store]


ROWS = rows_of(("hi", "yo"), ("q" * 40, "a"), ("q", "a" * 50))
LENGTHS = [HEAD + MIDDLE + TAIL + n for n in (4, 41, 51)]


def test_rows_in_order(chatml: ChatTemplate) -> None:
    store = build(ROWS, chatml)
    assert len(store) == 3
    assert store.lengths.tolist() == LENGTHS
    assert store.supervised_counts.tolist() == [3, 2, 51]
    assert (store.lengths.dtype, store.supervised_counts.dtype) == (np.int64, np.int64)
    assert store[2].input_ids[-3:].tolist() == ids_of("a", 259, "\n")
    with pytest.raises(IndexError):
        store[3]
    assert store.report == StoreReport(
        rows=3, kept=3, deleted=0, truncated=0, tokens=sum(LENGTHS), supervised_tokens=56, longest=LENGTHS[2]
    )


def test_more_rows_than_a_batch_of_the_tokenizer(chatml: ChatTemplate) -> None:
    rows = rows_of(*((str(i), str(i)) for i in range(600)))
    store = build(rows, chatml)
    assert len(store) == 600
    assert contents(store)[599] == contents(build(rows[599:], chatml))[0]


def test_delete(chatml: ChatTemplate) -> None:
    store = build(ROWS, chatml, max_length=LENGTHS[1])
    assert store.lengths.tolist() == LENGTHS[:2]
    assert (store.report.kept, store.report.deleted, store.report.truncated) == (2, 1, 0)


def test_right_keeps_the_start_and_drops_rows_without_an_answer(chatml: ChatTemplate) -> None:
    store = build(ROWS, chatml, max_length=30, truncation_strategy="right")
    whole = build(ROWS, chatml)
    assert store[0].input_ids.tolist() == whole[0].input_ids.tolist()
    assert store[1].input_ids.tolist() == whole[2].input_ids[:30].tolist()
    assert store[1].supervised.tolist() == whole[2].supervised[:30].tolist()
    # Row 2 is cut before its answer begins.
    assert store.report == StoreReport(
        rows=3, kept=2, deleted=1, truncated=1, tokens=55, supervised_tokens=3 + 10, longest=30
    )


def test_left_keeps_the_end_and_position_0_is_no_target(chatml: ChatTemplate) -> None:
    store = build(ROWS, chatml, max_length=30, truncation_strategy="left")
    whole = build(ROWS, chatml)
    assert store[2].input_ids.tolist() == whole[2].input_ids[-30:].tolist()
    assert store[2].supervised.tolist() == [False] + [True] * 28 + [False]
    assert store.report == StoreReport(
        rows=3, kept=3, deleted=0, truncated=2, tokens=85, supervised_tokens=3 + 2 + 28, longest=30
    )


def test_a_target_at_position_0_alone_is_none(chatml: ChatTemplate) -> None:
    # Two tokens are left: the turn end, which nothing predicts, and the newline behind it.
    with pytest.raises(DataError, match=r"none of the 3 rows is left: 0 are longer .*, 3 have no answer"):
        build(ROWS, chatml, max_length=2, truncation_strategy="left")
    with pytest.raises(DataError, match=r"none of the 3 rows is left: 3 are longer than max_length=5"):
        build(ROWS, chatml, max_length=5)


def test_bad_options(chatml: ChatTemplate) -> None:
    with pytest.raises(ConfigError, match="max_length"):
        build(ROWS, chatml, max_length=1)
    with pytest.raises(ConfigError, match="truncation_strategy"):
        build(ROWS, chatml, truncation_strategy="middle")


def test_every_problem_names_its_row() -> None:
    refusing = "{% if 'bad' in messages[0].content %}{{ raise_exception('bad') }}{% endif %}"
    template = ChatTemplate(make_tokenizer(refusing + CHATML))
    with pytest.raises(DataError, match=r"^rows.jsonl, row 2: .* refuses the messages: bad"):
        build(rows_of(("hi", "yo"), ("bad", "yo")), template)
    with pytest.raises(DataError, match=r"^rows.jsonl, row 1: has an empty assistant answer"):
        build(rows_of(("hi", "")), template)


def test_fingerprint_tells_what_matters(chatml: ChatTemplate, thinking: ChatTemplate) -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["yo"])
    stores = [
        build(ROWS, chatml),
        build(ROWS[:2], chatml),
        build(ROWS[::-1], chatml),
        build(ROWS, thinking),
        build(ROWS, ChatTemplate(tokenizer)),
        build(ROWS, chatml, system="be"),
        build(ROWS, chatml, max_length=999),
        build(ROWS, chatml, truncation_strategy="left"),
        build(ROWS, chatml, fingerprint_of=["x"]),
    ]
    assert len({store.fingerprint for store in stores}) == len(stores)
    moved = [dataclasses.replace(each, source="elsewhere.jsonl") for each in ROWS]
    assert build(moved, ChatTemplate(make_tokenizer(CHATML))).fingerprint == stores[0].fingerprint


def test_cache_hit_needs_no_tokenizer(
    chatml: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(ROWS, chatml, tmp_path / "deep" / "cache")
    monkeypatch.setattr(ChatTemplate, "tokenize", None)
    again = build(ROWS, chatml, tmp_path / "deep" / "cache")
    monkeypatch.undo()
    plain = build(ROWS, chatml)
    assert contents(first) == contents(again) == contents(plain)
    assert first.fingerprint == again.fingerprint == plain.fingerprint
    assert first.report == again.report == plain.report
    assert isinstance(again._input_ids, np.memmap)
    assert [entry.name for entry in (tmp_path / "deep" / "cache").iterdir()] == [first.fingerprint]


@pytest.mark.parametrize("name", ["input_ids.npy", "supervised.npy", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "grown", "other"])
def test_damaged_cache_is_built_again(
    chatml: ChatTemplate, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = contents(build(ROWS, chatml, tmp_path))
    fingerprint = build(ROWS, chatml, tmp_path).fingerprint
    path = tmp_path / fingerprint / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other":
        other = build(ROWS[:2], chatml, tmp_path).fingerprint
        path.write_bytes((tmp_path / other / name).read_bytes())
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-3], "grown": whole + b"{}"}[damage])
    rebuilt = build(ROWS, chatml, tmp_path)
    assert contents(rebuilt) == expected
    # Bytes behind an array are harmless: it says itself where it ends.
    if not (damage == "grown" and name.endswith(".npy")):
        assert "damaged" in caplog.text
        assert path.read_bytes() == whole
    assert not list(tmp_path.glob(".*"))


def test_cache_that_cannot_be_written(
    chatml: ChatTemplate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = build(ROWS, chatml, tmp_path / "file")
    assert len(store) == 3
    assert "cannot be written" in caplog.text


def test_template_that_rewrites_turns(thinking: ChatTemplate) -> None:
    assert THINKING != CHATML
    store = build(rows_of(("hi", "yo")), thinking)
    block = len("<think></think>") + 2
    assert store.supervised_counts.tolist() == [block + 3]
