"""`braid doctor` on this machine and on machines that lack something."""

import json
import resource
import shutil
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from launch import doctor as command
from launch.cli import main
from launch.doctor import Finding, doctor, examine


def findings(directory: Path) -> Mapping[str, Finding]:
    return {finding.name: finding for finding in examine(directory)}


def test_this_machine_can_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--output_dir", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    names = {finding["name"] for finding in found}
    assert {"python", "torch", "megatron-core", "disk", "shared memory", "open files", "host name"} <= names
    for finding in found:
        assert finding["state"] in ("ok", "note", "wrong")
        # What is not as it should be says what that costs.
        assert bool(finding["cost"]) == (finding["state"] != "ok")


def test_the_table_ends_with_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "training runs here"
    assert "megatron-core: ok" in out


def test_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.0.1", "megatron-core": "0.25.0"}

    def version(name: str) -> str:
        if name == "safetensors":
            raise PackageNotFoundError(name)
        return versions.get(name, "99")

    monkeypatch.setattr(command, "version", version)
    monkeypatch.setattr(
        command,
        "requires",
        lambda name: [
            "torch>=2.11",
            "megatron-core<0.20,>=0.16.1",
            "safetensors>=0.5",
            "rich>=13",
            'peft>=1; extra == "dev"',
        ],
    )
    found = findings(tmp_path)
    assert found["torch"].state == found["megatron-core"].state == found["safetensors"].state == "wrong"
    assert found["torch"].remedy == "pip install 'torch>=2.11'"
    assert found["safetensors"].found == "not installed"
    assert found["rich"].state == "ok"
    assert "peft" not in found
    assert doctor(["--output_dir", str(tmp_path)]) == 1


@pytest.mark.parametrize(("built_for", "word"), [(None, "build for CPUs"), ("13.0", "cannot open it")])
def test_a_card_that_torch_does_not_use(
    built_for: str | None, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0" or exists(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    gpu = findings(tmp_path)["GPU"]
    assert gpu.state == "wrong"
    assert word in gpu.found
    assert gpu.remedy


def test_a_machine_with_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: card,
        "get_device_capability": lambda: (9, 0),
        "nccl": SimpleNamespace(version=lambda: (2, 28, 9)),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)

    def no_cudnn() -> int:
        raise RuntimeError("version incompatibility")

    monkeypatch.setattr(torch.backends.cudnn, "version", no_cudnn)
    found = findings(tmp_path)
    assert found["GPU 0"].found == "NVIDIA H200, 140 GiB, capability 9.0"
    assert found["NCCL"].found == "2.28.9"
    assert found["cuDNN"].state == found["transformer-engine"].state == found["flash-attn-4"].state == "note"
    assert found["transformer-engine"].remedy == "pip install 'braid[te]'"
    # Missing extras are no reason not to train.
    assert doctor(["--output_dir", str(tmp_path)]) == 0
    card.major = 7
    assert findings(tmp_path)["GPU 0"].state == "note"


def test_limits_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 * 2**20, used=0, free=5 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 256))

    def nameless(*arguments: Any) -> None:
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", nameless)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {"lo": SimpleNamespace(isup=True)})
    found = findings(tmp_path)
    for name in ("disk", "shared memory", "open files", "host name", "network"):
        assert found[name].state == "note", name
    assert found["open files"].remedy == "ulimit -n 65536"


def test_an_interface_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    found = findings(tmp_path)["NCCL_SOCKET_IFNAME"]
    assert found.state == "wrong"
    assert "ib7" in found.found
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert "NCCL_SOCKET_IFNAME" not in findings(tmp_path)


def test_an_output_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert findings(tmp_path / "new")["disk"].state == "wrong"


def test_a_misspelt_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--output_dri", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output_dir" in line
