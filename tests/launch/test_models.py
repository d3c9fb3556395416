"""A model by its id: any command that reads one looks it up, once, and says in a line that it cannot."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.cli import main
from tests.launch.runs import ROOT, Place, assert_one_line, braid, question_rows, write_rows
from tests.support.models import save_adapter

ID = "org/tiny"


def site(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """Let Hugging Face answer with `answer`; the ids that it is asked for."""
    asked: list[str] = []

    def download(name: str, **more: Any) -> Any:
        asked.append(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))  # type: ignore[arg-type]
    return asked


COMMANDS = {
    "convert": "--to mcore --model ID --output_dir OUT --use_hf true",
    "merge": "--model ID --adapter ADAPTER --output_dir OUT --use_hf true",
    "verify": "--model ID --checkpoint MODEL --use_hf true",
    "inspect": "ID --use_hf true",
    "eval": "--model ID --tasks gsm8k --dry_run --use_hf true",
    "chat": "--model ID --use_hf true",
    "data": "--model ID --dataset DATA --use_hf true",
    "sft": "--model ID --dataset DATA --output_dir OUT --device cpu --dry_run --use_hf true",
}


def words(place: Place, command: str) -> list[str]:
    names = {"ID": ID, "OUT": str(place.out), "MODEL": str(place.model), "DATA": str(place.data)}
    names["ADAPTER"] = str(place.root / "adapter")
    return [command, *(names.get(word, word) for word in COMMANDS[command].split())]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "chat"])
def test_a_command_reads_the_model_of_an_id(
    place: Place, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    if command == "merge":
        save_adapter(place.model, place.root / "adapter")
    asked = site(monkeypatch, str(place.model))
    assert main(words(place, command)) == 0
    assert set(asked) == {ID}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_site_out_of_reach_is_one_line(place: Place, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    site(monkeypatch, OSError("no route to host"))
    said = f"model {ID} is no directory here, and Hugging Face could not be reached"
    assert main(words(place, command)) == 2
    assert_one_line(place.capsys.readouterr().err, command, said)
    assert not place.out.exists()


@pytest.mark.parametrize("launcher", ["braid", "torchrun"])
def test_ranks_look_an_id_up_once(tiny_model: Path, cache: Path, tmp_path: Path, launcher: str) -> None:
    log = tmp_path / "asked"
    (tmp_path / "sitecustomize.py").write_text(
        "from engine.data import hub\n"
        "def find(name, *, use_hf):\n"
        f"    open({str(log)!r}, 'a').write(name + '\\n')\n"
        f"    return {str(tiny_model)!r}\n"
        "hub.find_model = find\n"
    )
    data = write_rows(tmp_path / "data.jsonl", question_rows())
    asked = ["sft", "--model", ID, "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    asked += ["--device", "cpu", "--max_steps", "1", "--global_batch_size", "2", "--report_to", "none"]
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    if launcher == "braid":
        run = braid(*asked, cache=cache, NPROC_PER_NODE="2", **paths)
        assert run.code == 0, run.stderr
    else:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "launch.cli"]
        environment = os.environ | {"BRAID_CACHE": str(cache)} | paths
        done = subprocess.run([sys.executable, *command, *asked], cwd=ROOT, env=environment)
        assert done.returncode == 0
    assert log.read_text().splitlines() == [ID]
    assert (tmp_path / "out" / "hf" / "config.json").is_file()
