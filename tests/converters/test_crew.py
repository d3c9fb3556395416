"""Several processes of one job convert together, on one disk: what they write is what one process writes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters import conversion
from converters.conversion import Conversion, carry_out
from converters.convert import plan_to_hf, to_hf, to_mcore
from converters.mcore import layout
from converters.source import Source
from converters.transfer import RECORDS_DIR, Crew, OutputFile, TransferOptions, deal
from engine.errors import ModelError, OutputError
from engine.storage.manifest import read_manifest
from launch.cli import main

from .conftest import MakeModel, edit_json
from .convert_worker import finished, stages
from .test_stage import SIZE, Interrupt, contents, identities

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(models: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("crew") / "checkpoint"
    to_mcore(models("qwen3"), directory)
    return directory


# Processes, as torchrun starts them


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A rank that has ended."""

    code: int
    stdout: str
    stderr: str


def ranks(*commands: Sequence[str]) -> list[Ended]:
    """Run a command on each rank, all at the same time."""
    size = str(len(commands))
    env = os.environ | {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        ended = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        Ended(code=process.returncode, stdout=out, stderr=err)
        for process, (out, err) in zip(running, ended, strict=True)
    ]


def hf_words(checkpoint: Path, out: Path) -> list[str]:
    words = ["--checkpoint", str(checkpoint), "--output_dir", str(out), "--max_shard_size", str(SIZE)]
    return ["convert", "--to", "hf", *words]


def worker(words: Sequence[str], **settings: Any) -> list[str]:
    return ["tests.converters.convert_worker", json.dumps(settings), *words]


def test_the_command_itself(checkpoint: Path, tmp_path: Path) -> None:
    """It goes on with what a single process had finished, and tidies up behind one that was killed."""
    out = tmp_path / "out"
    to_hf(checkpoint, tmp_path / "expected", max_shard_size=SIZE)
    with pytest.raises(KeyboardInterrupt):
        carry_out(
            plan_to_hf(checkpoint, max_shard_size=SIZE), out, options=TransferOptions(progress=Interrupt(out))
        )
    (stage,), done = stages(out), finished(out)
    before = identities(stage, done)
    (stage / "model-00004-of-00004.safetensors.host-7").write_bytes(b"half")

    first, second = ranks(*[["launch.cli", *hf_words(checkpoint, out)]] * 2)
    assert (first.code, second.code) == (0, 0), (first.stderr, second.stderr)
    assert first.stdout.startswith(f"{out}: {len(read_manifest(out).tensors)} tensors, ")
    assert (second.stdout, first.stderr, second.stderr) == ("", "", "")
    assert identities(out, done) == before
    assert contents(out) == contents(tmp_path / "expected")
    assert not stages(out)


@pytest.mark.parametrize(("to", "size"), [("hf", 3), ("mcore", 2)])
def test_each_rank_writes_its_own_files(
    models: MakeModel, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, size: int
) -> None:
    monkeypatch.setitem(layout.plan_checkpoint.__kwdefaults__, "file_size", SIZE)
    out, expected = tmp_path / "out", tmp_path / "expected"
    if to == "hf":
        words = hf_words(checkpoint, out)
        to_hf(checkpoint, expected, max_shard_size=SIZE)
    else:
        words = ["convert", "--to", "mcore", "--model", str(models("qwen3")), "--output_dir", str(out)]
        to_mcore(models("qwen3"), expected)
    ended = ranks(*[worker(words, file_size=SIZE)] * size)
    assert [rank.code for rank in ended] == [0] * size, [rank.stderr for rank in ended]
    assert contents(out) == contents(expected)
    assert not stages(out)

    written = [[line for line in rank.stdout.splitlines() if ": " not in line] for rank in ended]
    weights = [name for name in read_manifest(out).files if name.endswith((".distcp", ".safetensors"))]
    frame = {"__1_0.distcp", "model.safetensors.index.json"}  # beside the data; the index is a file of a rank
    assert all(written), written
    together = sorted(name for names in written for name in names)
    assert len(together) == len(set(together)), written
    assert set(together) - frame == set(weights) - frame
    assert len(set(weights) - frame) >= 3


def test_a_rank_that_fails(checkpoint: Path, tmp_path: Path) -> None:
    words = hf_words(checkpoint, tmp_path / "out")
    first, second = ranks(worker(words), worker(words, fail="shard 7 is gone"))
    assert (first.code, second.code) == (2, 2)
    assert first.stderr == "braid convert: error: rank 1 failed: shard 7 is gone\n"
    assert second.stderr == "braid convert: error: shard 7 is gone\n"
    assert not list(tmp_path.iterdir())


def test_a_rank_that_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    """Rank 0 does not wait for it, and what is finished is there for the next attempt."""
    words, out = hf_words(checkpoint, tmp_path / "out"), tmp_path / "out"
    began = time.monotonic()
    first, second = ranks(worker(words), worker(words, die=True))
    assert time.monotonic() - began < 30
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    assert first.stderr.startswith("braid convert: error: rank 1 ended without a word; see what ended it")
    assert first.stderr.count("\n") == 1
    assert finished(out)
    to_hf(checkpoint, tmp_path / "expected", max_shard_size=SIZE)
    assert main(words) == 0
    assert contents(out) == contents(tmp_path / "expected")


# Processes, as the command itself starts them


def test_the_command_starts_its_ranks(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = start(hf_words(checkpoint, out), NPROC_PER_NODE="2")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: ")
    to_hf(checkpoint, tmp_path / "expected", max_shard_size=SIZE)
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os.kill(os.getpid(), 9)", "signal 9 (Killed) and left no message"),
        ("os._exit(3)", "exit code 3 and left no message"),
    ],
)
def test_a_rank_that_ends_without_a_word(checkpoint: Path, tmp_path: Path, end: str, how: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == '1': {end}\n")
    began = time.monotonic()
    done = start(hf_words(checkpoint, tmp_path / "out"), NPROC_PER_NODE="2", PYTHONPATH=str(tmp_path))
    assert time.monotonic() - began < 60
    assert (done.code, done.stderr) == (1, f"braid convert: failed: rank 1 ended with {how}\n")


def start(words: Sequence[str], **environment: str) -> Ended:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "launch.cli", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=200
    )
    return Ended(code=done.returncode, stdout=done.stdout, stderr=done.stderr)


# The protocol, with threads for ranks


class Guarded(Source):
    """Another source, with something to do before each read."""

    def __init__(self, source: Source, before: Callable[[], None]) -> None:
        self._source, self._before, self.directory = source, before, source.directory

    def files(self) -> list[Path]:
        return self._source.files()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        self._before()
        return self._source.read_rows(name, start, stop, out)


def gone() -> None:
    raise ModelError("shard is gone")


def guarded(plan: Conversion, before: Callable[[], None]) -> Conversion:
    """The same plan, with a source that is guarded."""
    return replace(plan, source=Guarded(plan.source, before))


def together(
    plans: Sequence[Conversion], out: Path, *, run: str = "run", late: dict[int, float] | None = None
) -> list[BaseException | None]:
    """Carry out a plan on each rank; what each of them raised. `late` is in seconds, by rank."""
    raised: list[BaseException | None] = [None] * len(plans)

    def work(rank: int) -> None:
        time.sleep((late or {}).get(rank, 0.0))
        crew = Crew(rank=rank, size=len(plans), run=run)
        try:
            carry_out(plans[rank], out, options=TransferOptions(crew=crew))
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank waits for ever"
    return raised


def plans_for(checkpoint: Path, count: int) -> list[Conversion]:
    return [plan_to_hf(checkpoint, max_shard_size=SIZE) for _ in range(count)]


def test_more_ranks_than_files(checkpoint: Path, tmp_path: Path) -> None:
    """Those without files are waited for: whoever comes late must not find the directory gone."""
    plans = [plan_to_hf(checkpoint) for _ in range(4)]
    assert len(plans[0].files) == 1
    raised = together(plans, tmp_path / "out", late={1: 0.5, 3: 1.0})
    assert raised == [None] * 4
    to_hf(checkpoint, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not stages(tmp_path / "out")


def test_a_rank_between_planning_and_writing_is_waited_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = conversion.staged_directory

    def late(*args: Any, crew: Crew, **options: Any) -> Any:
        time.sleep(crew.rank)
        return staged(*args, crew=crew, **options)

    monkeypatch.setattr(conversion, "staged_directory", late)
    plans = [plan_to_hf(checkpoint) for _ in range(2)]
    assert together(plans, tmp_path / "out") == [None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("run", "days_ago", "late"), [("earlier", 0, 1), ("run", 0, 0), ("run", 1, 1)])
def test_a_failure_of_an_earlier_start_does_not_count(
    checkpoint: Path, tmp_path: Path, run: str, days_ago: int, late: int
) -> None:
    """It has another name, or rank 1 has taken its word back before rank 0 listens, or it is old."""
    plans, out = plans_for(checkpoint, 2), tmp_path / "out"
    failed(plans[0], out, run=run)
    (note,) = stages(out)[0].glob(f"{RECORDS_DIR}/rank-1")
    edit_json(note, lambda content: content.update(time=content["time"] - 86_400 * days_ago))
    slow = guarded(plans[1], lambda: time.sleep(0.05))
    assert together([plans[0], slow], out, run="run", late={late: 0.3}) == [None, None]


def failed(plan: Conversion, out: Path, *, run: str) -> None:
    """Leave behind what rank 1 leaves that has failed, while rank 0 was killed."""
    with pytest.raises(ModelError):
        carry_out(guarded(plan, gone), out, options=TransferOptions(crew=Crew(rank=1, size=2, run=run)))
    assert len(stages(out)) == 1


def test_any_rank_that_fails_is_named(checkpoint: Path, tmp_path: Path) -> None:
    good, other = plans_for(checkpoint, 2)
    first, second, third = together([good, good, guarded(other, gone)], tmp_path / "out")
    assert isinstance(first, OutputError)
    assert str(first) == "rank 2 failed: shard is gone"
    assert second is None or isinstance(second, OutputError)  # rank 0 gave up while it wrote
    assert isinstance(third, ModelError)
    assert not (tmp_path / "out").exists()


def test_rank_0_fails(checkpoint: Path, tmp_path: Path) -> None:
    good, other = plans_for(checkpoint, 2)
    first, _ = together([guarded(other, gone), good], tmp_path / "out")
    assert isinstance(first, ModelError)
    assert not (tmp_path / "out").exists()


# Shares


def test_files_are_dealt_evenly_and_all_of_them() -> None:
    sizes = [7, 1, 9, 3, 3, 8, 2, 5, 5]
    files = [OutputFile(name=f"{number}", parts=(bytes(size),)) for number, size in enumerate(sizes)]
    shares = deal(files, 3)
    assert sorted(file.name for share in shares for file in share) == sorted(file.name for file in files)
    loads = [sum(file.nbytes for file in share) for share in shares]
    assert max(loads) - min(loads) <= 2
    assert deal(list(files), 3) == shares
    assert [len(share) for share in deal(files[:2], 4)] == [1, 1, 0, 0]
