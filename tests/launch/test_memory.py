"""The estimate of memory that a dry run prints, and what sweeps make of it, with a card that is made up."""

from pathlib import Path

import pytest

from engine.config.bench import SweepBenchConfig
from engine.config.options import ModelOptions
from engine.config.parse import parse
from launch.bench.sweep import draw_sweep
from launch.cli import main
from launch.gpu import Card, visible_card
from launch.processes import World
from tests.launch.runs import Place, have_cards

DRY = ("--device", "auto", "--dry_run")


def test_a_dry_run_prints_the_parts_of_every_stage(place: Place) -> None:
    words = place.sft("--pipeline_model_parallel_size", "2", "--nproc_per_node", "4", "--dry_run")
    assert main(words) == 0
    printed = place.capsys.readouterr().out
    lines = printed[printed.index("memory of a rank") :].splitlines()
    assert "float32, 2,048 tokens a micro-batch" in lines[0]
    assert lines[1].split() == [
        "stage", "weights", "gradients", "optimizer", "activations", "layer", "head", "sum"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[2:4]] == ["pp0", "pp1"]
    assert [len(line.split()) for line in lines[2:4]] == [8, 8]
    assert "4 GiB for the CUDA context" in printed
    assert "here" not in printed[printed.index("memory of a rank") :]
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("mib", "said"),
    [
        (81920, "H100 here, 80.0 GiB: fits, "),
        (3072, "H100 here, 3.0 GiB: may not fit, only 3.0 GiB are left"),
        (1, "H100 here, 0.0 GiB: does not fit, "),
    ],
)
def test_a_dry_run_says_whether_the_card_has_room(
    mib: int, said: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_cards(monkeypatch, place.root, "97871, H200", f"{mib}, H100")
    assert main(place.sft(*DRY)) == 0
    printed = place.capsys.readouterr().out
    assert said in printed
    assert "bfloat16, 2,048 tokens" in printed


def test_cards_that_are_not_seen_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have_cards(monkeypatch, tmp_path, "81559, NVIDIA H100 80GB HBM3")
    assert visible_card(ModelOptions()) == Card(name="NVIDIA H100 80GB HBM3", gib=81559 / 1024)
    assert visible_card(ModelOptions(device="cpu")) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_card(ModelOptions()) is None


@pytest.mark.parametrize(("answer", "code"), [("No devices were found", 0), ("NVIDIA-SMI has failed", 9)])
def test_a_driver_without_cards_is_none(
    answer: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_cards(monkeypatch, tmp_path, answer, code=code)
    assert visible_card(ModelOptions()) is None


def test_a_sweep_leaves_out_what_the_card_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_cards(monkeypatch, tmp_path, *["81559, H100"] * 8)
    config, _ = parse(
        SweepBenchConfig,
        ["--shape", "qwen2.5-32b", "--micro_batch_sizes", "1", "--pipeline_model_parallel_sizes", "1"],
    )
    world = World(rank=0, size=8, local_rank=0, local_size=8, started=False)
    fitting, refused = draw_sweep(config, world)
    # 32.8 B parameters: 18 bytes of 1/8 of them, 69 GiB; 12 of 1/4, 92 GiB.
    assert [candidate.name for candidate in fitting] == ["tp8-pp1-mb1"]
    assert refused["tp4-pp1-mb1"] == (
        "weights, gradients and optimizer take 92 GiB of a rank, H100 has 80 GiB"
    )
