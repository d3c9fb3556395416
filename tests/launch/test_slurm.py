"""launch/slurm.sbatch with a made-up scheduler: what srun is told, and which jobs are requeued."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.runs import ROOT

# Writes its words down, and ends as the step of the test ends.
_SRUN = """#!/usr/bin/env bash
trap 'echo asked >>"$NOTES/srun"; sleep 0.2; exit ${ASKED_CODE}' USR1
echo "$MASTER_ADDR $NNODES $*" >"$NOTES/srun.partial"
mv "$NOTES/srun.partial" "$NOTES/srun"
for _ in $(seq "$STEP_TENTHS"); do sleep 0.1; done
exit "$STEP_CODE"
"""
_SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '%s\\n' node0 node1 ;;
    requeue) echo "$2" >"$NOTES/requeued" ;;
esac
"""


class Job:
    """The batch script as Slurm runs it: a copy, elsewhere."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.notes = root / "notes"
        for folder in ("bin", "notes", "spool"):
            (root / folder).mkdir()
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        script = root / "spool" / "slurm_script"
        script.write_bytes((ROOT / "launch" / "slurm.sbatch").read_bytes())
        values = {
            "PATH": f"{root / 'bin'}:/usr/bin:/bin",
            "NOTES": str(self.notes),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_JOB_ID": "15007",
            "STEP_TENTHS": "0",
            "STEP_CODE": "0",
            "ASKED_CODE": "75",
        }
        words = ["bash", str(script), "configs/a.yaml", "--seed", "1"]
        self.process = subprocess.Popen(words, env=values | environment, stderr=subprocess.PIPE, text=True)

    def step(self) -> str:
        """What srun was told, once it is there."""
        path = self.notes / "srun"
        for _ in range(300):
            if path.exists():
                return path.read_text()
            time.sleep(0.1)
        raise AssertionError("srun was not started")

    def ended(self) -> tuple[int, bool]:
        """Exit code, and whether the job was put in the queue again."""
        self.process.communicate(timeout=60)
        requeued = self.notes / "requeued"
        assert not requeued.exists() or requeued.read_text().strip() == "15007"
        return self.process.returncode, requeued.exists()


def test_a_launcher_starts_on_every_node(tmp_path: Path) -> None:
    job = Job(tmp_path)
    assert job.ended() == (0, False)
    told = job.step()
    assert told.startswith("node0 2 --nodes=2 --ntasks=2 --ntasks-per-node=1 ")
    assert told.rstrip().endswith("launch/multinode.sh configs/a.yaml --seed 1")


@pytest.mark.parametrize(
    ("asked_code", "ended"), [("75", (0, True)), ("0", (0, False)), ("138", (138, False))]
)
def test_a_job_at_its_time_limit_is_requeued_once_it_has_saved(
    asked_code: str, ended: tuple[int, bool], tmp_path: Path
) -> None:
    job = Job(tmp_path, STEP_TENTHS="300", ASKED_CODE=asked_code)
    job.step()
    job.process.send_signal(signal.SIGUSR1)
    assert job.ended() == ended
    assert job.step().endswith("asked\n")


@pytest.mark.parametrize("code", ["1", "2", "75"])
def test_a_job_that_ends_of_itself_is_not_requeued(code: str, tmp_path: Path) -> None:
    """75 without the scheduler's signal: somebody else has asked the run to stop."""
    assert Job(tmp_path, STEP_CODE=code).ended() == (int(code), False)


def test_a_requeued_job_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path, SLURM_RESTART_COUNT="1")
    assert job.ended() == (0, False)
    assert job.step().rstrip().endswith("--seed 1 --resume_from_checkpoint auto")
