"""`braid bench comm` on CPU processes: every group and operation, and what bandwidths mean."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from launch.bench.collectives import bus_factor
from launch.bench.comm import parse_sizes, size_name
from launch.cli import main
from tests.launch.bench_worker import exchanged, refused
from tests.launch.runs import assert_one_line, braid
from tests.support.workers import WorkerPool

OPERATIONS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


@pytest.mark.parametrize(
    ("flags", "processes", "groups"),
    [
        (("--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2"), 4, {"tp": 2, "pp": 2}),
        (
            ("--context_parallel_size", "2", "--expert_model_parallel_size", "2"),
            2,
            {"cp": 2, "dp_cp": 2, "ep": 2},
        ),
    ],
)
def test_every_group_and_operation_is_measured(
    flags: tuple[str, ...], processes: int, groups: dict[str, int], tmp_path: Path, cache: Path
) -> None:
    run = braid(
        "bench", "comm", *flags, "--sizes", "4KiB", "100000", "--iterations", "2", "--device", "cpu",
        "--output_dir", str(tmp_path), cache=cache, NPROC_PER_NODE=str(processes),
    )  # fmt: skip
    assert run.code == 0, run.stderr
    record = json.loads((tmp_path / "comm.json").read_text(encoding="utf-8"))
    ranks = groups | {"world": processes}
    found = [(one["group"], one["operation"], one["bytes"]) for one in record["exchanges"]]
    assert found == list(itertools.product(ranks, OPERATIONS, (4096, 100_000)))
    for one in record["exchanges"]:
        assert one["ranks"] == ranks[one["group"]]
        assert one["reason"] is None
        assert one["algorithm_gb_s"] == pytest.approx(one["bytes"] / one["seconds"] / 1e9)
        assert one["bus_gb_s"] == pytest.approx(
            one["algorithm_gb_s"] * bus_factor(one["operation"], one["ranks"])
        )
    text = (tmp_path / "comm.md").read_text(encoding="utf-8")
    assert all(f"| {name} ({count}) | all_to_all | 4 KiB |" in text for name, count in ranks.items())
    assert "nccl-tests" in text
    assert (tmp_path / "comm.png").read_bytes().startswith(b"\x89PNG")
    assert "reduce_scatter" in run.stdout


@pytest.mark.parametrize(
    ("operation", "two", "eight"),
    [
        ("all_reduce", 1.0, 1.75),
        ("all_gather", 0.5, 0.875),
        ("reduce_scatter", 0.5, 0.875),
        ("all_to_all", 0.5, 0.875),
        ("send_recv", 1.0, 1.0),
    ],
)
def test_factors_are_those_of_nccl_tests(operation: str, two: float, eight: float) -> None:
    assert (bus_factor(operation, 2), bus_factor(operation, 8)) == (two, eight)


@pytest.mark.parametrize(
    ("operation", "ring", "buffer", "first", "second"),
    [
        ("all_reduce", True, "whole", [10, 12, 14, 16], [10, 12, 14, 16]),
        ("all_gather", True, "whole", [0, 1, 10, 11], [0, 1, 10, 11]),
        ("reduce_scatter", True, "part", [10, 12], [14, 16]),
        ("all_to_all", True, "other", [0, 1, 10, 11], [2, 3, 12, 13]),
        ("send_recv", True, "other", [10, 11, 12, 13], [0, 1, 2, 3]),
        ("send_recv", False, "other", [-1, -1, -1, -1], [0, 1, 2, 3]),
    ],
)
def test_operations_do_what_their_name_says(
    operation: str, ring: bool, buffer: str, first: list[float], second: list[float], workers: WorkerPool
) -> None:
    messages = workers.run(exchanged, 2, operation=operation, ring=ring)
    assert [getattr(message, buffer).tolist() for message in messages] == [first, second]


def test_what_the_backend_does_not_have_is_said(workers: WorkerPool) -> None:
    for answer in workers.run(refused, 2, text="Backend gloo does not support all_to_all_single"):
        assert answer["reason"] == "not supported by gloo"
        assert (answer["seconds"], answer["algorithm_gb_s"], answer["bus_gb_s"]) == (None, None, None)
        assert (answer["operation"], answer["bytes"]) == ("all_to_all", 1024)


def test_another_error_is_not_taken_for_it(workers: WorkerPool) -> None:
    assert workers.run(refused, 2, text="Connection reset by peer") == ["Connection reset by peer"] * 2


def test_sizes() -> None:
    words = ["1", "64KiB", "64k", "1MB", "2 GiB".replace(" ", "")]
    assert parse_sizes(words) == [1, 2**16, 2**16, 2**20, 2**31]
    assert [size_name(size) for size in (1000, 2**16, 3 * 2**20, 2**30)] == [
        "1000 B", "64 KiB", "3 MiB", "1 GiB"
    ]  # fmt: skip


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "size of nothing": (("--sizes", "0"), "sizes must be numbers of bytes of at least 1"),
    "negative size": (("--sizes", "-5"), "not '-5'"),
    "no size": (("--sizes", "big"), "not 'big'"),
    "no iterations": (("--iterations", "0"), "iterations must be at least 1, not 0"),
    "unknown flag": (("--size", "1"), "unknown option --size; did you mean --sizes?"),
    "one process": (("--nproc_per_node", "1"), "one process has nobody to exchange with"),
    "layout": (("--tensor_model_parallel_size", "4"), "2 processes do not hold TP 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = BAD[case]
    start: tuple[Any, ...] = () if "--nproc_per_node" in words else ("--nproc_per_node", "2")
    assert main(["bench", "comm", *words, *start]) == 2
    assert_one_line(capsys.readouterr().err, "bench", named)
