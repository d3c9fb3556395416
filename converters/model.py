"""Opening a model, whichever of the two formats it lies in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.hf.reader import HfReader, check_weights
from converters.mapping import Weight, weight_map
from converters.mcore.companions import COMPANIONS_DIR
from converters.mcore.reader import DistReader, checked_source
from converters.source import Source
from engine.model.spec import ModelSpec, load_model_spec
from engine.storage.reader import is_dist_checkpoint


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model whose tensors are exactly those that its configuration asks for."""

    spec: ModelSpec
    weights: Mapping[str, Weight]
    source: Source
    config_dir: Path
    """Where its config.json and tokenizer are."""


def config_dir_of(directory: str | Path) -> Path:
    """The directory of a model's config.json: itself, or the companions of a Megatron checkpoint."""
    return Path(directory) / COMPANIONS_DIR if is_dist_checkpoint(directory) else Path(directory)


def open_model(directory: str | Path) -> OpenModel:
    """A Hugging Face directory or a Megatron checkpoint; no data is read.

    Raises ModelError or CheckpointError for anything missing, surplus, mis-shaped or cut off.
    """
    config_dir = config_dir_of(directory)
    spec = load_model_spec(config_dir)
    weights, source = weight_map(spec), _source(directory, weight_map(spec))
    return OpenModel(spec=spec, weights=weights, source=source, config_dir=config_dir)


def _source(directory: str | Path, weights: Mapping[str, Weight]) -> Source:
    if not is_dist_checkpoint(directory):
        hf = HfReader(directory)
        check_weights(hf, weights)
        return hf
    return checked_source(DistReader(directory), weights)
