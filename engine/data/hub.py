"""Models and data sets that are named by an id, org/name, and come from Hugging Face or from ModelScope."""

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, DataError, UserError, first_line

# Hugging Face has no other names; ModelScope's are as plain.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
# What a training run reads of a repository; weights in other formats stay where they are.
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def may_be_id(name: str) -> bool:
    """Whether a model's name is that of nothing here, and could be one of a site."""
    return _ID.match(name) is not None and not Path(name).expanduser().exists()


def find_model(name: str, *, use_hf: bool | None) -> str:
    """The directory of a model that is named by its path or by an id; an id's files are downloaded unless
    they are in the cache of the site. A name that can be no id comes back as it is.

    ConfigError: the site cannot be reached, has no such model, or its package is missing.
    """
    if not may_be_id(name):
        return name
    site, what = _site(use_hf), f"model {name} is no directory here"
    if site == "ModelScope":
        download = _imported("modelscope", what, ConfigError).snapshot_download
    else:
        download = _imported("huggingface_hub", what, ConfigError).snapshot_download
    try:
        return str(download(name, allow_patterns=_MODEL_FILES))
    except Exception as error:  # clients raise many types, and none is a bug of this program
        raise ConfigError(
            f"{what}, and {site} could not be reached or has no such model "
            f"({type(error).__name__}: {first_line(error)}); download it where there is a "
            f"network, and pass its directory"
        ) from error


def read_table(name: str, *, use_hf: bool | None, streaming: bool) -> Iterable[Any]:
    """The rows of the train split of a data set. DataError: as `find_model` has it."""
    site, what = _site(use_hf), f"hub data set {name}"
    datasets = _imported("datasets", what, DataError)
    try:
        if site == "Hugging Face":
            rows: Iterable[Any] = datasets.load_dataset(name, split="train", streaming=streaming)
            return rows
        client = _imported("modelscope", what, DataError)
        found = client.MsDataset.load(name, split="train", use_streaming=streaming)
        return found.to_hf_dataset() if hasattr(found, "to_hf_dataset") else found
    except UserError:
        raise
    except Exception as error:
        raise DataError(
            f"{what}: {site} could not be reached or has no such data set with a train split "
            f"({type(error).__name__}: {first_line(error)}); pass a local file"
        ) from error


def _site(use_hf: bool | None) -> str:
    if use_hf is None:
        use_hf = importlib.util.find_spec("modelscope") is None
    return "Hugging Face" if use_hf else "ModelScope"


def _imported(package: str, what: str, error: type[UserError]) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as missing:
        other = "; or pass --use_hf true" if package == "modelscope" else ""
        raise error(f"{what}; this needs `pip install {package}`{other}; or pass a local path") from missing
