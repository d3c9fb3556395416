"""Tiny bases and PEFT adapters of them, for the tests of adapters and of merging."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.adapter import ADAPTER_FILE
from launch.cli import main
from tests.launch.runs import everything_in
from tests.support.models import save_adapter, save_tiny_model

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")
ADAPTERS: Mapping[str, dict[str, Any]] = {
    "all-linear": {},
    "subset": {"target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"], "rank_pattern": {"o_proj": 3}},
    "rslora": {"use_rslora": True, "r": 3, "target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "patterns": {
        "rank_pattern": {r"layers\.1\.mlp\.\w+": 2, "q_proj": 6},
        "alpha_pattern": {"down_proj": 5, "k_proj": 3},
        "exclude_modules": ["v_proj"],
    },
    "both": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "layers_to_transform": [0, 3],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {r"layers\.3\..*": 3},
    },
    "alpha 6": {"lora_alpha": 6},
    "experts": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"gate_up_proj": 3},
    },
    "shared experts": {
        "target_modules": ["v_proj", "gate_proj", "down_proj"],
        "target_parameters": ["experts.down_proj"],
        "use_rslora": True,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Bases:
    """Models and adapters, each made once; not to be changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.model = cache(self._model)
        self.adapter = cache(self._adapter)

    def _model(self, name: str, dtype: str = "fp32") -> Path:
        directory = save_tiny_model(name, self._root / f"{name}-{dtype}", dtype=DTYPES[dtype])
        for companion in COMPANIONS:
            (directory / companion).write_bytes(b"\xef\xbb\xbf " + companion.encode() + b"\r\n")
        (directory / "modeling_evil.py").write_text("raise SystemExit")
        return directory

    def _adapter(self, model: str, setting: str, dtype: str = "fp32") -> Path:
        directory = self._root / f"{model}-{setting}-{dtype}"
        save_adapter(self.model(model), directory, **ADAPTERS[setting])
        if dtype != "fp32":
            tensors = load_file(directory / ADAPTER_FILE)
            narrow = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
            save_file(narrow, directory / ADAPTER_FILE, metadata={"format": "pt"})
        return directory


def refused(words: list[str], root: Path, capsys: pytest.CaptureFixture[str], *named: str) -> None:
    """Exit code 2, one line that holds all of `named`, nothing changed below `root`."""
    before = everything_in(root)
    capsys.readouterr()
    code = main(words)
    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert printed.err.startswith(f"braid {words[0]}: error: ")
    assert printed.err.count("\n") == 1, printed.err
    assert printed.out == ""
    for part in named:
        assert part in printed.err
    assert everything_in(root) == before
