"""Tiny random Qwen checkpoints, made once a session by transformers itself; sources and files to compare."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch.runs import forget_launch_variables

if TYPE_CHECKING:
    from tests.converters.hostile import Place
from torch import Tensor

from converters.convert import output_files
from converters.hf.layout import PlannedTensor, plan_layout
from converters.source import Source, new_or_given
from converters.transfer import FileRecord, OutputFile, TransferOptions, write_files

if TYPE_CHECKING:
    from .adapters import Bases

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 1003,  # divides by nothing
}
KINDS = ("qwen2-tied", "qwen2", "qwen3")

MakeModel = Callable[..., Path]


def _build(kind: str, directory: Path, dtype: torch.dtype, shard_size: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    if kind.startswith("qwen3"):
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=kind == "qwen3-tied"))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=kind == "qwen2-tied"))
    for (
        parameter
    ) in model.parameters():  # norms are ones and biases zeros otherwise, which hides a permutation
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (directory / name).write_bytes(b"\xef\xbb\xbf " + name.encode() + b"\r\n")
    (directory / "modeling_evil.py").write_text("raise SystemExit")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """`models(kind, dtype, shard_size)`: a directory shared by all tests, not to be changed."""
    made: dict[tuple[str, torch.dtype, str], Path] = {}

    def make(kind: str = "qwen3", dtype: torch.dtype = torch.bfloat16, shard_size: str = "5GB") -> Path:
        key = (kind, dtype, shard_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hf")
            _build(kind, made[key], dtype, shard_size)
        return made[key]

    return make


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "Place":
    """A directory that hostile files are tried in."""
    from tests.converters.hostile import watched

    forget_launch_variables(monkeypatch)
    return watched(tmp_path, capsys)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16 from which fp8 ones are made, not to be changed."""
    from tests.converters.fp8 import make_plain

    directory = tmp_path_factory.mktemp("plain")
    make_plain(directory)
    return directory


@pytest.fixture
def fp8(plain: Path, tmp_path: Path) -> Path:
    """An fp8 directory as Qwen publishes them, to be damaged at will."""
    from tests.converters.fp8 import Way, make_fp8

    make_fp8(plain, tmp_path / "fp8", Way())
    return tmp_path / "fp8"


@pytest.fixture(scope="module")
def converted(models: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tied Qwen2; not to be changed."""
    from tests.converters.inspecting import convert

    return convert(models("qwen2-tied"), tmp_path_factory.mktemp("inspect") / "mcore")


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """A copy to be damaged at will."""
    return Path(shutil.copytree(converted, tmp_path / "mcore"))


@pytest.fixture
def model(models: MakeModel, tmp_path: Path) -> Path:
    """A copy of the tied Qwen2 in one file, to be damaged at will."""
    return Path(shutil.copytree(models("qwen2-tied"), tmp_path / "model"))


@pytest.fixture
def sharded(models: MakeModel, tmp_path: Path) -> Path:
    """A copy of the Qwen3 in several files, to be damaged at will."""
    return Path(shutil.copytree(models("qwen3", torch.bfloat16, "40KB"), tmp_path / "sharded"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> "Bases":
    """Bases and adapters, shared by all tests."""
    from .adapters import Bases  # transformers and peft, which the other tests do without

    return Bases(tmp_path_factory.mktemp("bases"))


class MemorySource(Source):
    """Tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], directory: Path = Path()) -> None:
        self.tensors, self.directory = tensors, directory

    def files(self) -> list[Path]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        part = self.tensors[name][start:stop]
        return new_or_given(tuple(part.shape), part.dtype, out).copy_(part)


def hf_files(tensors: Mapping[str, Tensor], source: Source | None = None, **layout: Any) -> list[OutputFile]:
    """The safetensors files of these tensors, as `plan_layout` lays them out, filled from `source`."""
    plan = [PlannedTensor(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items()]
    return list(output_files(plan_layout(plan, **layout), source or MemorySource(tensors)))


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], **layout: Any) -> dict[str, FileRecord]:
    """Write `hf_files` and remove the records, as a conversion does."""
    files = hf_files(tensors, **layout)
    records = write_files(files, directory, MemorySource(tensors), TransferOptions())
    shutil.rmtree(directory / ".records")
    return records


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, by the safetensors library."""
    result: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        part = load_file(file)
        assert not result.keys() & part.keys()
        result |= part
    return result


def change(model_dir: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the tensors of a one-file model."""
    tensors = load_file(model_dir / "model.safetensors")
    edit(tensors)
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name
