"""Fixtures: a tiny Qwen3 with tokenizer and chat template, a data set, and a place for tokenised rows."""

import shutil
from pathlib import Path

import pytest

from launch.tiny import build_tiny_qwen3
from tests.launch.runs import Place, forget_launch_variables, question_rows, write_rows


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, four heads in two groups; shared by all tests, not to be changed."""
    directory = tmp_path_factory.mktemp("tiny") / "qwen3"
    return build_tiny_qwen3(directory, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to be damaged at will."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", question_rows())


@pytest.fixture
def place(tmp_path: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    capsys.readouterr()  # what saving the tiny model printed
    return Place(root=tmp_path, model=model, data=data, capsys=capsys)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    forget_launch_variables(monkeypatch)
    monkeypatch.setenv("BRAID_CACHE", str(cache))
