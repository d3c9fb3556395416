"""What the rows of a run are like as tokens: counts, lengths, duplicates, packs and a few rows to read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config.options import DataOptions
from engine.data.formats import to_messages
from engine.data.packing import Packs, pack
from engine.data.prepare import check_options, load_tokenizer, read_rows, tokenise
from engine.data.sources import Row
from engine.data.store import TokenStore
from engine.data.template import ChatTemplate

# No row is longer: a store made with it holds every row as it was rendered.
_UNCUT = 2**31 - 1
# Of a histogram: up to max_length, and beyond it. The last one beyond is open.
_BINS, _BINS_BEYOND = 20, 4


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of rows, in tokens."""

    shortest: int
    median: float
    mean: float
    p90: int
    """At least 90 % of the rows are no longer than this."""
    p99: int
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Lengths":
        """Of int64 [N], N > 0."""
        p90, p99 = np.quantile(lengths, [0.9, 0.99], method="inverted_cdf")
        return cls(
            shortest=int(lengths.min()),
            median=float(np.median(lengths)),
            mean=float(lengths.mean()),
            p90=int(p90),
            p99=int(p99),
            longest=int(lengths.max()),
        )


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Rows of `first` to `last` tokens, both included."""

    first: int
    last: int
    rows: int
    tokens: int
    supervised_tokens: int

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over tokens, 0 where there are none."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class FileCounts:
    """The part of one file or hub data set in a part of the data."""

    source: str
    rows: int
    kept: int
    tokens: int
    """Of the kept rows."""
    share: float
    """Tokens over those of all files."""
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True)
class PackCounts:
    """How rows share sequences."""

    packs: int
    capacity: int
    full: float
    """Share of the packs' places that tokens fill."""
    fewest_rows: int
    mean_rows: float
    most_rows: int

    @classmethod
    def of(cls, packs: Packs, lengths: np.ndarray) -> "PackCounts":
        """Of packs of rows of `lengths`, int64 [rows]."""
        rows = np.diff(packs.offsets)
        return cls(
            packs=len(packs),
            capacity=packs.capacity,
            full=packs.efficiency(lengths),
            fewest_rows=int(rows.min()),
            mean_rows=float(rows.mean()),
            most_rows=int(rows.max()),
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row as it is trained on, in words."""

    place: str | None
    """Source and row number; None where they are not known any more."""

    tokens: int
    supervised_tokens: int

    runs: tuple[tuple[str, bool], ...]
    """The decoded text in stretches of tokens that are all supervised (True) or all not."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows to train on, or those to evaluate on."""

    rows: int
    """Rows read."""
    kept: int
    too_long: int
    """Left out, longer than max_length."""
    without_target: int
    """Left out, without a supervised token: truncation cut off every answer."""
    truncated: int
    """Kept and cut to max_length."""
    tokens: int
    """Of the kept rows, as are all counts below unless they say otherwise."""
    supervised_tokens: int
    lengths: Lengths
    lengths_as_read: Lengths
    """Of all rows, before any is left out or cut."""
    fewest_answers: int
    """Assistant messages of a row, of all rows."""
    mean_answers: float
    most_answers: int
    duplicates: int
    """Rows with the token ids of an earlier row."""
    seen_in_training: int
    """Evaluation rows with the token ids of a training row; 0 of the training rows themselves."""
    largest_id: int
    histogram: tuple[Bin, ...]
    """Of all rows as they were read; a bin ends at max_length."""
    files: tuple[FileCounts, ...]
    """In the order of the rows; empty where it is not known which row came from where."""
    packing: PackCounts | None

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over tokens."""
        return self.supervised_tokens / self.tokens


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The data of a run."""

    training: Part
    evaluation: Part | None
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """Rows, what training makes of them, and what they are before anything is left out or cut."""

    rows: Sequence[Row]
    store: TokenStore
    whole: TokenStore

    def kept(self, options: DataOptions) -> np.ndarray | None:
        """Which rows are in the store, bool [rows]; None where that is not known."""
        if len(self.whole) != len(self.rows):
            return None
        long = self.whole.lengths > options.max_length
        kept = np.ones(len(self.rows), dtype=np.bool_)
        for index in np.flatnonzero(long):
            supervised, limit = self.whole[int(index)].supervised, options.max_length
            left = supervised[:limit] if options.truncation_strategy == "right" else supervised[-limit:]
            kept[index] = options.truncation_strategy != "delete" and left[1:].any()
        assert kept.sum() == len(self.store)
        return kept


def survey(options: DataOptions, model_dir: str, *, seed: int, samples: int) -> Survey:
    """Prepare the data as a run does and look at it; `samples` training rows, chosen by `seed`, come in
    words. Rows that are streamed cannot be surveyed. Raises DataError or ConfigError as `prepare` does.
    """
    assert not options.streaming
    check_options(options)
    rows = read_rows(options, seed=seed)
    tokenizer = load_tokenizer(model_dir)
    template = ChatTemplate(tokenizer)
    data = whole = tokenise(rows, options, template)
    assert data.train is not None
    if any(store is not None and _changed(store) for store in (data.train, data.evaluation)):
        uncut = replace(options, max_length=_UNCUT, truncation_strategy="delete")
        whole = tokenise(rows, uncut, template)
    assert whole.train is not None
    train = _Encoded(rows=rows.train, store=data.train, whole=whole.train)
    known: set[bytes] = set()
    training = _part(train, options, known)
    evaluation = None
    if data.evaluation is not None and whole.evaluation is not None:
        encoded = _Encoded(rows=rows.val, store=data.evaluation, whole=whole.evaluation)
        evaluation = _part(encoded, options, known)
    return Survey(
        training=training,
        evaluation=evaluation,
        samples=_samples(train, options, tokenizer, seed=seed, count=samples),
    )


def _changed(store: TokenStore) -> bool:
    return store.report.deleted > 0 or store.report.truncated > 0


def _part(encoded: _Encoded, options: DataOptions, known: set[bytes]) -> Part:
    """`known` are digests of the training rows, empty for these themselves, and takes up those of the
    part.
    """
    store, whole, report = encoded.store, encoded.whole, encoded.store.report
    too_long = 0
    if options.truncation_strategy == "delete":
        too_long = int(np.count_nonzero(whole.lengths > options.max_length))
    digests = [hashlib.blake2b(row.input_ids.tobytes(), digest_size=16).digest() for row in store]
    seen = sum(digest in known for digest in digests)
    distinct = set(digests)
    known |= distinct
    answers = [
        sum(message.role == "assistant" for message in to_messages(row, system=None)) for row in encoded.rows
    ]
    packs = pack(store.lengths, options.max_length) if options.packing else None
    return Part(
        rows=report.rows,
        kept=report.kept,
        too_long=too_long,
        without_target=report.deleted - too_long,
        truncated=report.truncated,
        tokens=report.tokens,
        supervised_tokens=report.supervised_tokens,
        lengths=Lengths.of(store.lengths),
        lengths_as_read=Lengths.of(whole.lengths),
        fewest_answers=min(answers),
        mean_answers=sum(answers) / len(answers),
        most_answers=max(answers),
        duplicates=len(digests) - len(distinct),
        seen_in_training=seen,
        largest_id=store.largest_id,
        histogram=histogram(whole.lengths, whole.supervised_counts, max_length=options.max_length),
        files=_files(encoded, options),
        packing=None if packs is None else PackCounts.of(packs, store.lengths),
    )


def histogram(lengths: np.ndarray, supervised: np.ndarray, *, max_length: int) -> tuple[Bin, ...]:
    """Rows by length; both arrays are int64 [N], N > 0: tokens and supervised tokens of every row.

    Bins are equally wide, a power of two, and max_length ends one of them. Where some rows are longer, the
    last bin holds all that are much longer.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    top = min(longest, max_length) if shortest <= max_length else longest
    width = 1
    while (top - shortest) // width >= _BINS:
        width *= 2
    # Bin j holds lengths in (max_length + (j - 1) * width, max_length + j * width].
    places = -((max_length - lengths) // width)
    if shortest <= max_length:
        places = np.minimum(places, _BINS_BEYOND)
    low = int(places.min())
    sums = [
        np.bincount(places - low, weights=weights).astype(np.int64) for weights in (None, lengths, supervised)
    ]
    last = [max_length + (low + index) * width for index in range(len(sums[0]))]
    bins = [
        Bin(
            first=max(1, end - width + 1),
            last=max(end, longest) if index == len(last) - 1 else end,
            rows=int(rows),
            tokens=int(tokens),
            supervised_tokens=int(targets),
        )
        for index, (end, rows, tokens, targets) in enumerate(zip(last, *sums, strict=True))
    ]
    return tuple(bins)


def _files(encoded: _Encoded, options: DataOptions) -> tuple[FileCounts, ...]:
    kept, store = encoded.kept(options), encoded.store
    if kept is None:
        return ()
    names = list(dict.fromkeys(row.source for row in encoded.rows))
    number = {name: index for index, name in enumerate(names)}
    file_of = np.array([number[row.source] for row in encoded.rows], dtype=np.int64)

    def count(files: np.ndarray, weights: np.ndarray | None = None) -> list[int]:
        return np.bincount(files, weights=weights, minlength=len(names)).astype(np.int64).tolist()

    tokens = count(file_of[kept], store.lengths)
    columns = (count(file_of), count(file_of[kept]), tokens, count(file_of[kept], store.supervised_counts))
    return tuple(
        FileCounts(
            source=name,
            rows=rows,
            kept=left,
            tokens=mine,
            share=mine / store.report.tokens,
            supervised_tokens=targets,
        )
        for name, rows, left, mine, targets in zip(names, *columns, strict=True)
    )


def _samples(
    encoded: _Encoded, options: DataOptions, tokenizer: Any, *, seed: int, count: int
) -> tuple[Sample, ...]:
    """Up to `count` rows of the store, in its order."""
    store, kept = encoded.store, encoded.kept(options)
    places = None if kept is None else np.flatnonzero(kept)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(store))[:count])
    samples = []
    for index in map(int, chosen):
        row = store[index]
        borders = np.flatnonzero(np.diff(row.supervised)) + 1
        parts = zip(np.split(row.input_ids, borders), np.split(row.supervised, borders), strict=True)
        runs = [
            (_decode(tokenizer, ids.tolist()), bool(supervised[0])) for ids, supervised in parts if len(ids)
        ]
        samples.append(
            Sample(
                place=None if places is None else encoded.rows[places[index]].place,
                tokens=len(row),
                supervised_tokens=int(np.count_nonzero(row.supervised)),
                runs=tuple(runs),
            )
        )
    return tuple(samples)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens as it is, control tokens included."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
