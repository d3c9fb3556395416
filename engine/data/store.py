"""All encoded rows of a data set in three flat arrays, cached on disk by what they were made from."""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from engine.data.formats import to_messages
from engine.data.sources import Row
from engine.data.template import ChatTemplate, EncodedRow, RenderedRow
from engine.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
TruncationStrategy = Literal["delete", "left", "right"]
_STRATEGIES = ("delete", "left", "right")
# Large enough to keep the tokenizer's threads busy, small enough that the offsets of a batch stay a few
# megabytes.
_ROWS_PER_BATCH = 256
_META = "meta.json"


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """What became of the rows."""

    rows: int
    """Rows that came in."""

    kept: int
    """Rows in the store."""

    deleted: int
    """Rows left out: too long (strategy `delete`), or without a target in what truncation left."""

    truncated: int
    """Kept rows that were cut to max_length."""

    tokens: int
    """Tokens of the kept rows."""

    supervised_tokens: int
    """Targets of the kept rows."""

    longest: int
    """Tokens of the longest kept row."""

    @classmethod
    def empty(cls) -> "StoreReport":
        """Of no rows."""
        return cls(**{item.name: 0 for item in fields(cls)})

    def plus(self, other: "StoreReport") -> "StoreReport":
        """Of the rows of both."""
        sums = {item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)}
        return StoreReport(**(sums | {"longest": max(self.longest, other.longest)}))

    def line(self, name: str) -> str:
        """How the rows of the data set `name` became sequences."""
        return (
            f"{name}: {self.rows} rows -> {self.kept} sequences ({self.deleted} left out, "
            f"{self.truncated} cut), {self.tokens:,} tokens, {self.supervised_tokens:,} supervised, "
            f"longest {self.longest}"
        )


class TokenStore:
    """Encoded rows, `store[i]` in the order they came in.

    `fingerprint` is the sha256 hex string of what the store was made from; it names the cache and does not
    depend on whether there is one. `report` counts what became of the rows.
    """

    def __init__(
        self,
        *,
        input_ids: np.ndarray,
        supervised: np.ndarray,
        offsets: np.ndarray,
        fingerprint: str,
        report: StoreReport,
    ) -> None:
        """Take int32 [tokens], bool [tokens] and int64 [rows + 1]: row i is [offsets[i], offsets[i + 1])."""
        assert (input_ids.dtype, supervised.dtype, offsets.dtype) == (np.int32, np.bool_, np.int64)
        assert len(input_ids) == len(supervised) == offsets[-1]
        assert offsets[0] == 0
        self._input_ids = input_ids
        self._supervised = supervised
        self._offsets = offsets
        self.fingerprint = fingerprint
        self.report = report

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> EncodedRow:
        """Row `index` as views into the store. IndexError: below 0 or beyond the last row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a store of {len(self)}")
        part = slice(self._offsets[index], self._offsets[index + 1])
        return EncodedRow(input_ids=self._input_ids[part], supervised=self._supervised[part])

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 [N]."""
        return np.diff(self._offsets)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of the store."""
        return int(self._input_ids.max())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if the tokenizer makes ids that the model's embedding does not have."""
        if self.largest_id >= vocab_size:
            raise DataError(
                f"the tokenizer makes token id {self.largest_id}, but the model's vocab_size is "
                f"{vocab_size}; tokenizer and weights belong to different models"
            )

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """Targets of every row, int64 [N]."""
        return np.add.reduceat(self._supervised, self._offsets[:-1], dtype=np.int64)


def build_store(
    rows: Sequence[Row],
    template: ChatTemplate,
    *,
    system: str | None,
    max_length: int,
    truncation_strategy: TruncationStrategy,
    cache_dir: Path | None,
    fingerprint_of: Sequence[str] = (),
) -> TokenStore:
    """Encode `rows`, or map what an earlier run made of the same rows, template, tokenizer and options.

    Rows longer than `max_length` tokens are dropped (`delete`) or cut to it: `right` keeps their start,
    `left` their end. Position 0 is never a target, since nothing predicts it; a row without any target is
    dropped. `fingerprint_of` are further strings that must match for a cache to be taken.

    DataError: a row cannot be used (named by source and number), or none is left. ConfigError: bad options.
    """
    if max_length < 2:
        raise ConfigError(
            f"max_length is {max_length}; a sequence needs at least 2 tokens, one to predict the other"
        )
    if truncation_strategy not in _STRATEGIES:
        raise ConfigError(
            f"truncation_strategy is {truncation_strategy!r}; use one of {', '.join(_STRATEGIES)}"
        )
    options = {"system": system, "max_length": max_length, "truncation_strategy": truncation_strategy}
    fingerprint = _fingerprint(rows, template, options, fingerprint_of)
    directory = None if cache_dir is None else cache_dir / fingerprint
    if directory is not None and (cached := _load(directory, fingerprint)) is not None:
        return cached
    builder = _Builder(max_length=max_length, strategy=truncation_strategy)
    builder.add_rows(rows, template, system)
    store = builder.finish(fingerprint)
    return store if directory is None else _save(store, directory)


def encode_rows(
    rows: Sequence[Row],
    template: ChatTemplate,
    *,
    system: str | None,
    max_length: int,
    truncation_strategy: TruncationStrategy,
) -> tuple[TokenStore | None, StoreReport]:
    """Encode a part of a stream as build_store does, without a cache; None where no row of it is left, and
    what became of the rows. DataError: a row cannot be used.
    """
    builder = _Builder(max_length=max_length, strategy=truncation_strategy)
    builder.add_rows(rows, template, system)
    store = builder.finish("") if builder.kept else None
    return store, builder.report()


def open_store(cache_dir: Path, fingerprint: str) -> TokenStore | None:
    """The cached store of that fingerprint, memory-mapped; None where it is absent or damaged."""
    return _load(cache_dir / fingerprint, fingerprint)


class _Builder:
    """Collects encoded rows, cuts them, and counts what it did."""

    def __init__(self, *, max_length: int, strategy: TruncationStrategy) -> None:
        self._max_length = max_length
        self._strategy = strategy
        self.kept: list[EncodedRow] = []
        self._rows = self._too_long = self._without_target = self._truncated = 0

    def add(self, row: EncodedRow) -> None:
        self._rows += 1
        too_long = len(row) > self._max_length
        if too_long and self._strategy == "delete":
            self._too_long += 1
            return
        if too_long:
            part = slice(self._max_length) if self._strategy == "right" else slice(-self._max_length, None)
            # Copies, or the views would keep the cut part of every long row in memory.
            row = EncodedRow(input_ids=row.input_ids[part].copy(), supervised=row.supervised[part].copy())
        row.supervised[:1] = False
        if not row.supervised.any():
            self._without_target += 1
            return
        self._truncated += too_long
        self.kept.append(row)

    def add_rows(self, rows: Sequence[Row], template: ChatTemplate, system: str | None) -> None:
        """Encode rows and add them."""
        for encoded in _encode(rows, template, system):
            self.add(encoded)

    def report(self) -> StoreReport:
        """What became of the rows so far."""
        lengths = [len(row) for row in self.kept]
        return StoreReport(
            rows=self._rows,
            kept=len(self.kept),
            deleted=self._too_long + self._without_target,
            truncated=self._truncated,
            tokens=sum(lengths),
            supervised_tokens=sum(int(np.count_nonzero(row.supervised)) for row in self.kept),
            longest=max(lengths, default=0),
        )

    def finish(self, fingerprint: str) -> TokenStore:
        if not self.kept:
            raise DataError(
                f"none of the {self._rows} rows is left: {self._too_long} are longer than "
                f"max_length={self._max_length}, {self._without_target} have no answer; raise max_length"
            )
        lengths = np.array([len(row) for row in self.kept], dtype=np.int64)
        return TokenStore(
            input_ids=np.concatenate([row.input_ids for row in self.kept]),
            supervised=np.concatenate([row.supervised for row in self.kept]),
            offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
            fingerprint=fingerprint,
            report=self.report(),
        )


def _encode(rows: Sequence[Row], template: ChatTemplate, system: str | None) -> Iterator[EncodedRow]:
    """The rows in order. While a batch is tokenised, which needs no interpreter, the next one is rendered."""
    with ThreadPoolExecutor(1, thread_name_prefix="braid-tokens") as pool:
        ahead: deque[Future[list[EncodedRow]]] = deque()
        for start in range(0, len(rows), _ROWS_PER_BATCH):
            rendered = _render(rows[start : start + _ROWS_PER_BATCH], template, system)
            ahead.append(pool.submit(template.tokenize, rendered))
            if len(ahead) > 1:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _render(rows: Sequence[Row], template: ChatTemplate, system: str | None) -> list[RenderedRow]:
    conversations = [to_messages(row, system=system) for row in rows]
    try:
        return template.render_many(conversations)
    except DataError:
        # One of them: the rows one by one tell which.
        rendered = []
        for row, messages in zip(rows, conversations, strict=True):
            try:
                rendered.append(template.render(messages))
            except DataError as error:
                raise DataError(f"{row.place}: {error}") from error
        return rendered


def _fingerprint(
    rows: Sequence[Row], template: ChatTemplate, options: dict[str, str | int | None], extra: Sequence[str]
) -> str:
    digest = hashlib.sha256()
    head = {
        "version": FORMAT_VERSION,
        "template": template.identity,
        "options": options,
        "extra": list(extra),
    }
    digest.update(json.dumps(head, sort_keys=True).encode())
    encode = json.JSONEncoder(default=repr).encode
    for row in rows:
        # Keys are not sorted: their order shows in rendered tool calls. One value a line keeps rows apart.
        digest.update(b"\n" + encode(row.value).encode())
    return digest.hexdigest()


def _load(directory: Path, fingerprint: str) -> TokenStore | None:
    """The store in `directory`, memory-mapped; None where it is absent or its parts do not fit together."""
    if not directory.is_dir():
        return None
    try:
        meta = json.loads((directory / _META).read_text())
        report = StoreReport(**meta["report"])
        input_ids, supervised, offsets = (
            np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("input_ids", "supervised", "offsets")
        )
        fits = (
            meta["fingerprint"] == fingerprint
            and (input_ids.dtype, supervised.dtype, offsets.dtype) == (np.int32, np.bool_, np.int64)
            and input_ids.shape == supervised.shape == (report.tokens,)
            and offsets.shape == (report.kept + 1,)
            and offsets[0] == 0
            and offsets[-1] == report.tokens
            and bool((np.diff(offsets) > 0).all())
            and int(np.count_nonzero(supervised)) == report.supervised_tokens
        )
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        logger.warning("token cache %s is damaged (%s); it is built again", directory, error)
        return None
    if not fits:
        logger.warning("token cache %s is damaged (sizes do not fit); it is built again", directory)
        return None
    return TokenStore(
        input_ids=input_ids, supervised=supervised, offsets=offsets, fingerprint=fingerprint, report=report
    )


def _save(store: TokenStore, directory: Path) -> TokenStore:
    """Write `store` and return it memory-mapped; without a writable cache, return it as it is."""
    # Ranks build the same cache side by side: each writes under a name of its own, and one rename wins.
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        np.save(temporary / "input_ids.npy", store._input_ids)
        np.save(temporary / "supervised.npy", store._supervised)
        np.save(temporary / "offsets.npy", store._offsets)
        meta = {"fingerprint": store.fingerprint, "report": asdict(store.report)}
        (temporary / _META).write_text(json.dumps(meta))
        winner = _load(directory, store.fingerprint)
        if winner is not None:
            return winner
        if directory.exists():
            shutil.rmtree(directory)
        os.rename(temporary, directory)
        return _load(directory, store.fingerprint) or store
    except OSError as error:
        logger.warning("token cache %s cannot be written (%s); going on without it", directory, error)
        return store
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
