"""`make bench-gpu` without a GPU: its table, what is run again, and the step of its peers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.bench import TrainBenchConfig
from engine.config.parse import parse
from launch.bench.paper import draw_bench
from launch.bench.report import _arithmetic
from launch.bench.shapes import spec_of_shape
from launch.processes import World
from tests.bench import gpu, gpu_peers
from tests.bench.gpu_cases import Case, Settings, all_cases, chosen
from tests.bench.gpu_table import read_rows, table, write

SETTINGS = Settings()
TE = Case(name="x-te", shape="tiny", flags=(), micro_batch=1, baselines={"torch": "x-torch"}, target="a: 9")
TORCH = Case(name="x-torch", shape="tiny", flags=(), micro_batch=1)
EVEN = Case(
    name="x-even", shape="tiny", flags=(), micro_batch=1, baselines={"Liger": "x-liger", "torch": "x-torch"}
)
LIGER = Case(name="x-liger", shape="tiny", flags=("--liger",), micro_batch=1, peer=True)
ABSENT = Case(name="x-absent", shape="tiny", flags=(), micro_batch=1, modules=("no_such_package",))
CASES = (TE, TORCH, EVEN, LIGER, ABSENT)
PEER = gpu_peers.Setting(
    shape="tiny",
    arithmetic="float32",
    max_length=16,
    global_batch_size=4,
    per_device_train_batch_size=2,
    steps=2,
    device="cpu",
)


def record(tokens_per_s: float, *, device: str = "NVIDIA H200", **more: Any) -> dict[str, Any]:
    """A bench.json, as far as the table reads it."""
    environment = {
        "command": "braid bench train --made-up",
        "date": "2026-01-02T03:04:05+00:00",
        "revision": "abc",
        "versions": {"torch": "2.0", "liger-kernel": None},
        "cuda": "13.0",
        "device": device,
    }
    values = {"oom": False, "tokens_per_s": tokens_per_s, "mfu": 0.5, "peak_memory_gib": 41.25}
    return {**values, "median_step_s": 6.0, "step_seconds": [6.0], "environment": environment, **more}


def leave(root: Path, case: Case, content: Mapping[str, Any], name: str = "bench.json") -> None:
    (root / case.name).mkdir(exist_ok=True)
    (root / case.name / name).write_text(json.dumps(content), encoding="utf-8")


def lines(root: Path, asked: Sequence[Case] = CASES) -> dict[str, tuple[str, ...]]:
    rows = table(read_rows(CASES, asked, SETTINGS, root)).rows
    return {row[0]: tuple(row[1:]) for row in rows}


def test_the_table_has_numbers_and_ratios(tmp_path: Path) -> None:
    for case, speed in ((TE, 1100.0), (TORCH, 1000.0), (EVEN, 1200.0), (LIGER, 800.0)):
        leave(tmp_path, case, record(speed))
    found = lines(tmp_path)
    assert found["x-te"] == ("1,100", "50.0 %", "41.2", "6.00", "1.10 x torch", "a: 9", "")
    assert found["x-even"][4] == "1.50 x Liger, 1.20 x torch"
    assert found["x-torch"][4] == ""
    write(read_rows(CASES, CASES, SETTINGS, tmp_path), SETTINGS, tmp_path)
    kept = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert kept["settings"] == {"steps": 5, "global_batch_size": 64}
    assert kept["rows"][2]["ratios"] == {"Liger": 1.5, "torch": 1.2}
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert (
        "# One GPU: NVIDIA H200\n\n2026-01-02 on NVIDIA H200; git revision abc; torch 2.0, CUDA 13.0." in text
    )
    assert "| x-te | 1,100 | 50.0 % | 41.2 | 6.00 | 1.10 x torch | a: 9 |  |" in text
    assert "- x-te: `braid bench train --made-up`" in text
    assert "- x-absent: `braid bench train --shape tiny " in text


def test_nothing_is_dropped(tmp_path: Path) -> None:
    leave(tmp_path, TE, {**record(1.0), "oom": True, "error": "out of memory on the device in the warm-up"})
    leave(tmp_path, EVEN, {"reason": "ValueError: bad"}, "failure.json")
    leave(tmp_path, LIGER, record(800.0, mfu=None, peak_memory_gib=None))
    found = lines(tmp_path)
    assert found["x-te"] == ("", "", "", "", "", "a: 9", "out of memory on the device in the warm-up")
    assert found["x-torch"][-1] == "not run yet"
    assert found["x-even"][-1] == "failed: ValueError: bad"
    assert found["x-liger"][:4] == ("800", "unknown", "unknown", "6.00")
    assert found["x-absent"][-1] == "not run: no_such_package is not installed"
    # What was not asked for is there where it has results from before.
    assert list(lines(tmp_path, asked=[TORCH])) == ["x-te", "x-torch", "x-even", "x-liger"]


def test_cards_are_not_compared_with_each_other(tmp_path: Path) -> None:
    leave(tmp_path, TE, record(1100.0))
    leave(tmp_path, TORCH, record(1000.0, device="NVIDIA H100"))
    assert lines(tmp_path)["x-te"][4] == ""
    write(read_rows(CASES, CASES, SETTINGS, tmp_path), SETTINGS, tmp_path)
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "# One GPU: NVIDIA H100, NVIDIA H200" in text
    assert "on NVIDIA H100; git revision abc; torch 2.0, CUDA 13.0 (x-torch)." in text


def test_what_has_results_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_case(case: Case, settings: Settings, directory: Path, timeout: float) -> None:
        ran.append(case.name)
        leave(tmp_path, case, record(500.0))
        assert "| x-te | 1,100 |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")

    monkeypatch.setattr(gpu, "run_case", run_case)
    leave(tmp_path, TE, record(1100.0))
    leave(tmp_path, TORCH, {"reason": "cut off"}, "failure.json")
    assert gpu.run(CASES, (TE, TORCH, ABSENT), SETTINGS, tmp_path, timeout=1.0) == 0
    assert ran == ["x-torch"]
    assert "2.20 x torch" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_directory_is_gone_on_in_with_the_same_settings_only(tmp_path: Path) -> None:
    assert gpu.refuse(tmp_path / "new", SETTINGS, resume=False) is None
    assert gpu.refuse(tmp_path, SETTINGS, resume=True) is None
    leave(tmp_path, TE, record(1.0))
    assert "no gpu.json" in str(gpu.refuse(tmp_path, SETTINGS, resume=True))
    write([], SETTINGS, tmp_path)
    assert gpu.refuse(tmp_path, SETTINGS, resume=True) is None
    assert "pass --resume" in str(gpu.refuse(tmp_path, SETTINGS, resume=False))
    other = gpu.refuse(tmp_path, replace(SETTINGS, steps=3), resume=True)
    assert "has results with --steps 5 --global_batch_size 64" in str(other)


def test_a_peer_runs_in_a_process_and_leaves_its_record(tmp_path: Path) -> None:
    settings = Settings(steps=1, global_batch_size=1)
    flags = ("--device", "cpu", "--arithmetic", "float32")
    short = Case(name="peer", shape="tiny", flags=flags, micro_batch=128, max_length=16, peer=True)
    gpu.run_case(short, settings, tmp_path / "peer", 120.0)
    (row,) = read_rows([short], [short], settings, tmp_path)
    assert row.record is not None, row.reason
    assert row.record["tokens_per_step"] == 4096
    assert row.command.startswith("python -m tests.bench.gpu_peers --shape tiny --device cpu")
    # A micro-batch that no step is made of.
    broken = replace(short, name="broken", micro_batch=3)
    gpu.run_case(broken, settings, tmp_path / "broken", 120.0)
    (row,) = read_rows([broken], [broken], settings, tmp_path)
    assert row.reason == "failed: ValueError: per_device_train_batch_size must divide global_batch_size"


def test_a_case_that_braid_refuses_has_its_reason(tmp_path: Path) -> None:
    flags = ("--transformer_impl", "te", "--device", "cpu")
    case = Case(name="refused", shape="tiny", flags=flags, micro_batch=1, max_length=64)
    gpu.run_case(case, SETTINGS, tmp_path / "refused", 120.0)
    (row,) = read_rows([case], [case], SETTINGS, tmp_path)
    assert str(row.reason).startswith("failed: transformer_impl te: Transformer Engine needs CUDA")


def test_results_in_fp8_name_their_recipe() -> None:
    report: Any = SimpleNamespace(dtype="bfloat16", transformer_impl="te", options={"fp8_recipe": "delayed"})
    assert _arithmetic(report) == (
        "bfloat16, layers of te, their linears in fp8 (delayed); MFU is against the bf16 peak"
    )
    report.options = {"fp8_recipe": None}
    assert _arithmetic(report) == "bfloat16, layers of te"


def test_without_cuda_nothing_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_has_cuda", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr().err
    assert said == "make bench-gpu: torch sees no CUDA device; nothing was run\n"


@pytest.mark.parametrize("words", [("--cases", "no-such"), ("--steps", "0"), ("--global_batch_size", "12")])
def test_bad_options(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(words)


def test_cases_are_chosen_by_name() -> None:
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {name for case in cases for name in case.baselines.values()} <= {case.name for case in cases}
    fp8 = [case.name for case in chosen(cases, ["*-fp8-*"], [])]
    assert fp8 == ["qwen2.5-7b-full-fp8-delayed", "qwen2.5-7b-full-fp8-tensorwise"]
    peers = [case.name for case in chosen(cases, [], ["qwen2.5-1.5b"]) if case.peer]
    names = ("transformers", "liger", "liger-mixed")
    assert peers == [f"qwen2.5-1.5b-{kind}{name}" for kind in ("packed-", "") for name in names]
    assert any(case.name == "qwen2.5-7b-liger" for case in chosen(cases, [], ["qwen2.5-7b"]))


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_every_case_is_a_command_that_fits_its_shape(case: Case, tmp_path: Path) -> None:
    words = case.command(SETTINGS, tmp_path)
    if case.peer:
        setting = gpu_peers.parse(words[3:])
        gpu_peers.check(setting)
        rows, length = setting.global_batch_size, setting.max_length
    else:
        # The machine that tests need not have what a case asks for.
        config, _ = parse(TrainBenchConfig, [*words[5:], "--dry_run"])
        world = World(rank=0, size=1, local_rank=0, local_size=1, started=False)
        rows, length = draw_bench(config, world).shape.global_batch_size, config.bench.max_length
    assert rows * length == 64 * 4096


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_peers_step_is_that_of_the_whole_batch(micro_batch: int) -> None:
    peer = gpu_peers.Peer(replace(PEER, per_device_train_batch_size=micro_batch))
    state = peer.generator.get_state()
    ids = torch.cat([peer.rows(micro_batch) for _ in range(4 // micro_batch)])
    peer.generator.set_state(state)
    logits = peer.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    gradients = torch.autograd.grad(expected, list(peer.model.parameters()))
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in gradients]))
    before = [weight.detach().clone() for weight in peer.model.parameters()]
    assert peer.step() == pytest.approx(expected.item(), rel=1e-5)
    assert norm > 1.0
    for weight, gradient, old in zip(peer.model.parameters(), gradients, before, strict=True):
        torch.testing.assert_close(weight.grad, gradient / norm, rtol=1e-3, atol=1e-5)
        assert not torch.equal(weight, old)


def test_documents_of_a_peers_packs_do_not_see_each_other() -> None:
    setting = replace(PEER, lengths="packed", max_length=64, global_batch_size=4)
    peer = gpu_peers.Peer(setting)
    assert peer.packs is not None
    inputs = peer.inputs(slice(0, 2))
    starts = (inputs["position_ids"] == 0).nonzero().tolist()
    assert len(starts) > 4, "several documents in a row"
    ends = [
        end if row == other else 64
        for (row, _), (other, end) in zip(starts, [*starts[1:], (-1, 0)], strict=True)
    ]
    losses = []
    for (row, start), end in zip(starts, ends, strict=True):
        ids = inputs["input_ids"][None, row, start:end]
        if (inputs["labels"][row, start:end] == -100).all():
            continue  # padding
        assert (inputs["labels"][row, start + 1 : end] != -100).all()
        logits = peer.model(input_ids=ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    found = peer.model(**inputs, num_items_in_batch=100).loss
    assert found.item() == pytest.approx(sum(losses).item() / 100, rel=1e-5)


def test_a_packed_peer_counts_real_tokens() -> None:
    setting = replace(PEER, lengths="packed", max_length=64, global_batch_size=4, steps=1)
    peer = gpu_peers.Peer(setting)
    assert peer.packs is not None
    for step in range(2):
        targets = int(peer.packs.is_target[step].sum())
        assert targets == peer.tokens(step) - len(peer.documents(step))
        assert peer.tokens(step) <= 4 * 64
        assert peer.tokens(step) > 0.6 * 4 * 64  # of few packs one is hardly filled
    assert gpu_peers.measure(setting)["tokens_per_step"] == peer.tokens(1)


def test_a_peer_counts_flops_as_braid_does() -> None:
    found = gpu_peers.measure(PEER)
    spec = spec_of_shape("tiny")
    flops = 4 * 16 * spec.train_flops_per_token(16)
    assert found["tflops_per_device"] == pytest.approx(flops / found["median_step_s"] / 1e12)
    assert (found["parameters"], found["mfu"], found["accumulation"]) == (spec.num_parameters(), None, 2)
    assert len(found["step_seconds"]) == 2


@pytest.mark.parametrize("shape", ["qwen2.5-1.5b", "qwen3-8b"])
def test_a_peer_has_the_weights_of_its_shape(shape: str) -> None:
    model = gpu_peers.build_model(gpu_peers.Setting(shape=shape, device="meta"))
    weights = list(model.parameters())
    assert sum(weight.numel() for weight in weights) == spec_of_shape(shape).num_parameters()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
