"""From the data options of a run to its token stores."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.options import DataOptions
from engine.data.sources import (
    Reading,
    Row,
    Split,
    check_probabilities,
    interleave,
    load_rows,
    split_rows,
    stream_rows,
)
from engine.data.store import TokenStore, build_store, encode_rows, open_store
from engine.data.template import ChatTemplate
from engine.errors import ConfigError, DataError, first_line

# Padding is masked everywhere, so any id that every vocabulary has will do.
PAD_ID = 0


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The rows of a run as tokens."""

    train: TokenStore | None
    """None where the training rows are streamed."""

    evaluation: TokenStore | None

    def fingerprints(self) -> tuple[str | None, str | None]:
        """What another process needs to open the same stores from the cache."""
        train, evaluation = (None if s is None else s.fingerprint for s in (self.train, self.evaluation))
        return train, evaluation

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if the tokenizer makes ids that the model's embedding does not have."""
        for store in (self.train, self.evaluation):
            if store is not None:
                store.check_vocabulary(vocab_size)

    def summary(self) -> str:
        """How rows became sequences, a line for each store."""
        stores = {"train": self.train, "eval": self.evaluation}
        return "\n".join(store.report.line(name) for name, store in stores.items() if store is not None)


def cache_root() -> Path:
    """Where tokenised data is kept: $BRAID_CACHE, or braid/ in the user's cache directory."""
    base = os.environ.get("BRAID_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "braid"


def check_options(options: DataOptions) -> None:
    """Raise ConfigError for what is wrong without looking at any row."""
    if not options.dataset:
        raise ConfigError("no data set given; pass --dataset FILE.jsonl")
    ratio = options.split_dataset_ratio or 0.0
    if not 0 <= ratio < 1:
        raise ConfigError(f"split_dataset_ratio must be in [0, 1), not {ratio}")
    if options.max_length < 2:
        raise ConfigError(f"max_length must be at least 2, not {options.max_length}")
    if options.shuffle_buffer_size < 1:
        raise ConfigError(f"shuffle_buffer_size must be at least 1, not {options.shuffle_buffer_size}")
    if options.streaming and ratio > 0:
        raise ConfigError("split_dataset_ratio needs all rows at once; with streaming give val_dataset")
    if options.interleave_prob:
        check_probabilities(options.interleave_prob, len(options.dataset))
        if options.streaming:
            raise ConfigError("interleave_prob needs all rows at once; leave streaming out")
    elif options.stopping_strategy != "first_exhausted":
        raise ConfigError("stopping_strategy goes with interleave_prob")
    if options.dataloader_num_workers < 0:
        raise ConfigError(
            f"dataloader_num_workers must not be negative, not {options.dataloader_num_workers}"
        )


def prepare(options: DataOptions, model_dir: str | Path, *, seed: int) -> PreparedData:
    """Read, split, render and tokenise. Raises DataError or ConfigError naming the file and row at fault."""
    check_options(options)
    rows = read_rows(options, seed=seed)
    template = ChatTemplate(load_tokenizer(model_dir))
    if options.streaming:
        _try_stream(options, template)
    return tokenise(rows, options, template)


def read_rows(options: DataOptions, *, seed: int) -> Split:
    """The rows to train on, none where they are streamed, and those to evaluate on. Raises DataError."""
    rows = [] if options.streaming else _mixed(options, seed=seed)
    if options.val_dataset:
        held_out = load_rows(options.val_dataset, seed=seed, how=reading(options))
        return Split(train=rows, val=list(itertools.chain(*held_out)))
    return split_rows(rows, options.split_dataset_ratio or 0.0, seed)


def _mixed(options: DataOptions, *, seed: int) -> list[Row]:
    """The rows of all data sets, one after another or drawn by `interleave_prob`."""
    parts = load_rows(options.dataset, seed=seed, how=reading(options))
    if not options.interleave_prob:
        return list(itertools.chain(*parts))
    until_all = options.stopping_strategy == "all_exhausted"
    return interleave(parts, options.interleave_prob, until_all=until_all, seed=seed)


def reading(options: DataOptions) -> Reading:
    """How data sets are read, by the options."""
    return Reading(use_hf=options.use_hf, columns=options.columns)


def tokenise(rows: Split, options: DataOptions, template: ChatTemplate) -> PreparedData:
    """Render and tokenise what `read_rows` gave, or map what the cache has of it. Raises DataError or
    ConfigError.
    """

    def store(part: Sequence[Row]) -> TokenStore:
        return build_store(
            part,
            template,
            system=options.system,
            max_length=options.max_length,
            truncation_strategy=options.truncation_strategy,
            cache_dir=cache_root() / "tokens",
        )

    return PreparedData(
        train=None if options.streaming else store(rows.train),
        evaluation=store(rows.val) if rows.val else None,
    )


def _try_stream(options: DataOptions, template: ChatTemplate) -> None:
    """Encode the first buffer of a stream: what is wrong there is said before anything is written."""
    rows = list(itertools.islice(stream_rows(options.dataset, reading(options)), options.shuffle_buffer_size))
    if not rows:
        raise DataError(f"{', '.join(options.dataset)} holds no rows; give a data set with at least one")
    store, report = encode_rows(
        rows,
        template,
        system=options.system,
        max_length=options.max_length,
        truncation_strategy=options.truncation_strategy,
    )
    if store is None and report.rows < options.shuffle_buffer_size:
        raise DataError(
            f"none of the {report.rows} rows is left: all are longer than max_length={options.max_length} or "
            f"have no answer; raise max_length"
        )


def open_prepared(fingerprints: tuple[str | None, str | None]) -> PreparedData | None:
    """What another process of this machine prepared, or None where the cache does not hold it."""
    stores = [
        open_store(cache_root() / "tokens", name) if name is not None else None for name in fingerprints
    ]
    if any(name is not None and store is None for name, store in zip(fingerprints, stores, strict=True)):
        return None
    return PreparedData(train=stores[0], evaluation=stores[1])


def load_tokenizer(model_dir: str | Path) -> Any:
    """The tokenizer of a model directory; nothing in the directory is executed. Raises DataError."""
    if not any(
        (Path(model_dir) / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")
    ):
        raise DataError(
            f"{model_dir} has no tokenizer (tokenizer.json); copy the tokenizer files of the model there"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a broken tokenizer
        reason = first_line(error)
        raise DataError(f"the tokenizer of {model_dir} cannot be loaded: {reason}") from error
