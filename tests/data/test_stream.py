"""Rows that are streamed: every row once a pass, batches independent of the layout, exact positions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from engine.data.loader import StepBatch
from engine.data.stream import Encoding, StreamLoader, StreamPlan
from engine.data.template import ChatTemplate
from engine.errors import DataError
from tests.data.tiny import CHATML, make_tokenizer
from tests.launch.runs import write_rows

ROWS = 50


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(make_tokenizer(CHATML))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": f"answer {n} " + "and so on " * (n * 7 % 5)},
            ]
        }
        for n in range(ROWS)
    ]
    return write_rows(tmp_path_factory.mktemp("stream") / "rows.jsonl", rows)


def a_loader(template: ChatTemplate, data: Path | str, **changes: Any) -> StreamLoader:
    plan = {"global_batch_size": 4, "data_parallel_size": 1, "accumulation": 4, "total_steps": 30, "seed": 3}
    encoding = {"max_length": 512, "capacity": None, "vocab_size": 10**6, "truncation_strategy": "delete"}
    values = {
        "datasets": [str(data)],
        "buffer_rows": 16,
        "dp_rank": 0,
        "pad_id": 0,
        "pad_to_multiple_of": 1,
        "pad_rows_to_multiple_of": 1,
        "num_workers": 0,
    }
    for name, value in changes.items():
        target = next((group for group in (plan, encoding, values) if name in group), values)
        target[name] = value
    unit = "rows" if encoding["capacity"] is None else "packs"
    return StreamLoader(
        plan=StreamPlan(**plan, unit=unit),
        encoding=Encoding(template=template, system=None, **encoding),
        **values,
    )


def documents(batches: Iterable[StepBatch]) -> list[list[tuple[int, ...]]]:
    """The documents of every step, each as its token ids, sorted."""
    found = []
    for batch in batches:
        step = []
        for micro in batch.micro_batches:
            bounds = micro.cu_seqlens.tolist()
            for start, length in zip(bounds, micro.lengths, strict=False):
                step.append(tuple(micro.tokens[start : start + length].tolist()))
        found.append(sorted(step))
    return found


@pytest.mark.parametrize("capacity", [None, 512])
def test_every_row_once_a_pass(template: ChatTemplate, data: Path, capacity: int | None) -> None:
    loader = a_loader(template, data, capacity=capacity, global_batch_size=1, accumulation=1, total_steps=120)
    passes: list[list[tuple[int, ...]]] = []
    rows: list[tuple[int, ...]] = []
    for batch, step in zip(loader.steps(), documents(loader.steps()), strict=True):
        rows += step
        if len(rows) == ROWS:
            passes.append(sorted(rows))
            rows = []
            if len(passes) == 2:
                assert batch.position is not None
                assert batch.position["epoch"] == 1
                break
    assert len(set(passes[0])) == ROWS
    assert passes[0] == passes[1]


@pytest.mark.parametrize("capacity", [None, 512])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_position_continues_exactly(
    template: ChatTemplate, data: Path, capacity: int | None, workers: int
) -> None:
    """From any step on, buffers and passes half taken among them."""
    loader = a_loader(template, data, capacity=capacity, num_workers=workers)
    straight = list(loader.steps())
    for cut in (1, 3, 7, 13, 20):
        again = list(a_loader(template, data, capacity=capacity).steps(cut, straight[cut - 1].position))
        assert [batch.step for batch in again] == list(range(cut, 30))
        for found, wanted in zip(again, straight[cut:], strict=True):
            assert found.position == wanted.position
            for ours, theirs in zip(found.micro_batches, wanted.micro_batches, strict=True):
                assert ours.tokens.equal(theirs.tokens)
                assert ours.loss_mask.equal(theirs.loss_mask)


@pytest.mark.parametrize("capacity", [None, 512])
def test_ranks_share_the_steps_of_one(template: ChatTemplate, data: Path, capacity: int | None) -> None:
    alone = documents(a_loader(template, data, capacity=capacity).steps())
    shared = {"data_parallel_size": 2, "accumulation": 2}
    ranks = [
        documents(a_loader(template, data, capacity=capacity, dp_rank=r, **shared).steps()) for r in (0, 1)
    ]
    assert [sorted(first + second) for first, second in zip(*ranks, strict=True)] == alone
    assert all(first and second for first, second in zip(*ranks, strict=True))


def test_another_seed_is_another_order(template: ChatTemplate, data: Path) -> None:
    first, second = (documents(a_loader(template, data, seed=seed).steps()) for seed in (3, 4))
    assert first != second


def test_what_is_left_out_is_counted(template: ChatTemplate, data: Path) -> None:
    loader = a_loader(template, data, max_length=60, total_steps=2, buffer_rows=ROWS)
    list(loader.steps())
    assert loader.report.rows == ROWS
    assert 0 < loader.report.deleted < ROWS
    assert loader.report.kept == ROWS - loader.report.deleted


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_consumer(template: ChatTemplate, data: Path, tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"no row of .* is left"):
        list(a_loader(template, data, max_length=4, num_workers=workers).steps())
    with pytest.raises(DataError, match="vocab_size is 10"):
        list(a_loader(template, data, vocab_size=10, num_workers=workers).steps())
    broken = tmp_path / "broken.jsonl"
    broken.write_text(data.read_text().splitlines()[0] + "\n{oops\n")
    with pytest.raises(DataError, match="row 2: not valid JSON"):
        list(a_loader(template, broken, num_workers=workers).steps())


def test_name_n_takes_the_first_rows(template: ChatTemplate, data: Path) -> None:
    loader = a_loader(template, f"{data}#5", global_batch_size=5, accumulation=5, total_steps=2)
    first, second = documents(loader.steps())
    assert first == second
    assert len(set(first)) == 5


def test_the_fingerprint_knows_what_it_stands_for(template: ChatTemplate, data: Path, tmp_path: Path) -> None:
    plain = a_loader(template, data).fingerprint
    assert a_loader(template, data, seed=9, dp_rank=0).fingerprint == plain
    for changes in ({"max_length": 256}, {"capacity": 512}, {"buffer_rows": 17}):
        assert a_loader(template, data, **changes).fingerprint != plain
    longer = tmp_path / data.name
    longer.write_text(data.read_text() + data.read_text())
    assert a_loader(template, longer).fingerprint != plain
