"""Ids of models and data sets are looked up where the user says, and what fails is one line."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.data import hub
from engine.data.hub import find_model, read_table
from engine.errors import ConfigError, DataError


class Site:
    """Stands for a client's module, and notes what it is asked."""

    def __init__(self, answer: Any) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer = answer
        self.MsDataset = SimpleNamespace(load=self.snapshot_download)

    def snapshot_download(self, name: str, **more: Any) -> Any:
        self.asked.append((name, more))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Site]:
    found = {name: Site(str(tmp_path / name)) for name in ("huggingface_hub", "modelscope")}
    for name, site in found.items():
        monkeypatch.setitem(sys.modules, name, site)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("use_hf", "name"), [(True, "huggingface_hub"), (False, "modelscope")])
def test_a_model_comes_from_the_site_that_is_asked_for(
    sites: dict[str, Site], tmp_path: Path, use_hf: bool, name: str
) -> None:
    assert find_model("Qwen/Qwen2.5-0.5B", use_hf=use_hf) == str(tmp_path / name)
    ((asked, more),) = sites[name].asked
    assert asked == "Qwen/Qwen2.5-0.5B"
    assert "*.safetensors" in more["allow_patterns"]
    assert "*.bin" not in more["allow_patterns"]
    assert sum(len(site.asked) for site in sites.values()) == 1


def test_without_a_word_it_is_modelscope_where_its_package_is(
    sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = [SimpleNamespace(), None]
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: installed[0])
    find_model("org/a", use_hf=None)
    installed.reverse()
    find_model("org/b", use_hf=None)
    assert [name for name, _ in sites["modelscope"].asked] == ["org/a"]
    assert [name for name, _ in sites["huggingface_hub"].asked] == ["org/b"]


@pytest.mark.parametrize("name", ["models/Qwen2.5/0.5B", "/models/x", "./a/b", "model", "../a", "~/a", ""])
def test_what_can_be_no_id_is_looked_up_nowhere(sites: dict[str, Site], name: str) -> None:
    assert find_model(name, use_hf=True) == name
    assert not sites["huggingface_hub"].asked


def test_a_directory_that_looks_like_an_id_is_one(
    sites: dict[str, Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/model", use_hf=True) == "org/model"
    assert not sites["huggingface_hub"].asked


def test_a_site_out_of_reach_is_one_line(sites: dict[str, Site]) -> None:
    sites["huggingface_hub"].answer = OSError("\nno route\nto host")
    with pytest.raises(
        ConfigError, match=r"model org/m is no directory here, and Hugging Face .*no route\)"
    ) as e:
        find_model("org/m", use_hf=True)
    assert "\n" not in str(e.value)
    assert "pass its directory" in str(e.value)


def test_offline_the_real_client_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process of its own, as the client reads the environment when it is imported."""
    import os
    import subprocess

    code = "from engine.data.hub import find_model; find_model('org/no-such-model', use_hf=True)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "Hugging Face could not be reached or has no such model" in done.stderr.splitlines()[-1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match=r"pip install modelscope`; or pass --use_hf true; or pass a local"):
        find_model("org/m", use_hf=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hub data set org/d; this needs `pip install datasets`"):
        read_table("org/d", use_hf=True, streaming=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_modelscope(
    sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    rows = [{"query": "1"}]
    sites["modelscope"].answer = rows if streaming else SimpleNamespace(to_hf_dataset=lambda: rows)
    assert list(read_table("org/d", use_hf=False, streaming=streaming)) == rows
    assert sites["modelscope"].asked == [("org/d", {"split": "train", "use_streaming": streaming})]
    sites["modelscope"].answer = KeyError("split")
    with pytest.raises(DataError, match=r"ModelScope could not be reached or has no such data set"):
        read_table("org/d", use_hf=False, streaming=streaming)
