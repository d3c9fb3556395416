"""Rows of random tokens whose lengths are like those of instruction data, or all the same."""

from typing import TYPE_CHECKING

import numpy as np

from engine.config.bench import BenchOptions

if TYPE_CHECKING:
    from engine.data.store import TokenStore

# Of the logarithm of a row's length: with it the mean is about a quarter of max_length.
_SIGMA = 1.0
_MEDIAN_SHARE = 1 / 6


def random_store(options: BenchOptions, *, sequences: int, vocab_size: int) -> "TokenStore":
    """Rows for at least `sequences` packs, or exactly as many rows of max_length tokens.

    Ids are uniform in [0, vocab_size). The same seed gives the same rows, on every rank.
    """
    from engine.data.store import StoreReport, TokenStore

    random = np.random.default_rng(options.seed)
    if options.lengths == "even":
        lengths = np.full(sequences, options.max_length, dtype=np.int64)
    else:
        lengths = packable_lengths(random, options.max_length, sequences)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    total = int(offsets[-1])
    targets = np.clip(np.rint(lengths * options.supervised_share).astype(np.int64), 1, lengths - 1)
    place = np.arange(total) - np.repeat(offsets[:-1], lengths)
    supervised = place >= np.repeat(lengths - targets, lengths)
    return TokenStore(
        input_ids=random.integers(0, vocab_size, size=total, dtype=np.int32),
        supervised=supervised,
        offsets=offsets,
        fingerprint="",
        report=StoreReport(
            rows=len(lengths),
            kept=len(lengths),
            deleted=0,
            truncated=0,
            tokens=total,
            supervised_tokens=int(supervised.sum()),
            longest=int(lengths.max()),
        ),
    )


def packable_lengths(random: np.random.Generator, max_length: int, packs: int) -> np.ndarray:
    """Log-normal lengths, int64, each in [2, max_length]; no packing of them needs less than `packs`."""
    wanted, parts, total = packs * max_length, [], 0
    while total < wanted:
        drawn = random.lognormal(np.log(max_length * _MEDIAN_SHARE), _SIGMA, size=4 * packs)
        parts.append(np.clip(np.rint(drawn), 2, max_length).astype(np.int64))
        total += int(parts[-1].sum())
    lengths = np.concatenate(parts)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), wanted)) + 1]
