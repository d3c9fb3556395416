"""Full disks: refused before a run starts, or one line and no half checkpoint where they fill up under it."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.runs import Place, assert_one_line, braid


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(bytes)` mounts a file system of that size; only root may."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system to fill")
    directory = tmp_path / "disk"

    def mount(size: int) -> Path:
        directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
        return directory

    yield mount
    if os.path.ismount(directory):
        subprocess.run(["umount", str(directory)], check=True)


def test_convert_onto_a_full_disk(place: Place, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(300_000)
    place.refused(
        ["convert", "--to", "mcore", "--model", str(place.model), "--output_dir", str(disk / "mcore")],
        "disk full",
        str(disk),
    )


def test_a_run_that_cannot_fit_on_the_disk_does_not_start(
    place: Place, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(300_000)
    place.refused(
        place.sft("--output_dir", str(disk / "run")), "disk full", str(disk), "choose another output_dir"
    )


def test_a_disk_that_fills_up_while_training(
    place: Place, cache: Path, small_disk: Callable[[int], Path]
) -> None:
    """One checkpoint of 2.6 MB fits, the second does not."""
    out = small_disk(4_000_000) / "run"
    words = place.sft(
        "--output_dir", str(out), "--max_steps", "2", "--save_steps", "1", "--nproc_per_node", "1"
    )
    run = braid(*words, "--tensor_model_parallel_size", "1", cache=cache)
    assert run.code == 2, run.stderr
    assert_one_line(run.stderr, "sft", f"disk full while writing {out}", "save_total_limit")
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-1"]
    assert not (out / "hf").exists()
    assert "step 2/2" in run.stdout
