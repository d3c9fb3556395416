"""Fixtures for the tests of parity."""

from functools import cache
from pathlib import Path

import pytest

from tests.support.models import save_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """model_dir(name, layers), made once."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def model_dir(name: str, layers: int) -> Path:
        return save_tiny_model(name, root / f"{name}-{layers}", num_hidden_layers=layers)

    return model_dir
