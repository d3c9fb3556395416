"""`make bench`: the data side against `datasets.Dataset.map` with the same tokenizer, one process, CPU.

Braid turns conversations into a token store: it checks them, renders them, tokenises them and finds the
targets. The maps beside it render and tokenise only, in the ways in which people write that, and the fastest
of them counts. Neither side has a cache. The sides take turns, so that a busy machine slows all alike, and
their medians are compared. Bound: the token store takes at most 1.1 times as long; medians differ by that
much on a busy machine.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BOUND = 1.1
ROWS, ROUNDS = 5000, 9
PACKED_ROWS, CAPACITY = 50_000, 4096


def main() -> int:
    """Print two tables; 1 if the token store is beyond the bound."""
    from rich.console import Console
    from rich.table import Table

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with tempfile.TemporaryDirectory() as folder:
        sides, num_tokens = _sides(Path(folder))
        seconds = _alternate(sides)
    table = Table(title=f"{ROWS:,} conversations of {num_tokens:,} tokens in all, {os.cpu_count()} threads")
    for column in ("who", "s", "rows/s", "tokens/s"):
        table.add_column(column)
    for name, median in seconds.items():
        table.add_row(name, f"{median:.3f}", f"{ROWS / median:,.0f}", f"{num_tokens / median:,.0f}")
    Console().print(table)
    _report_packing()
    braid, *others = seconds.values()
    if not others:
        print("nothing to compare with: pip install datasets")
        return 0
    ratio = braid / min(others)
    print(f"token store {ratio:.2f} times as long as the fastest map, bound {BOUND}")
    return 0 if ratio <= BOUND else 1


def _sides(folder: Path) -> tuple[Mapping[str, Callable[[], Any]], int]:
    """What is timed, Braid first, and the tokens that each of them makes."""
    from engine.data.prepare import load_tokenizer
    from engine.data.sources import Row
    from engine.data.store import TokenStore, build_store
    from engine.data.template import ChatTemplate
    from launch.tiny import DATA_DIR, build_tokenizer, read_messages

    conversations = read_messages(DATA_DIR / "qa.jsonl")
    build_tokenizer((message["content"] for messages in conversations for message in messages), folder)
    tokenizer = load_tokenizer(folder)
    values = [{"messages": conversations[index % len(conversations)]} for index in range(ROWS)]
    rows = [Row(source="qa.jsonl", number=number, value=value) for number, value in enumerate(values, 1)]

    def braid() -> TokenStore:
        return build_store(
            rows,
            ChatTemplate(tokenizer),
            system=None,
            max_length=4096,
            truncation_strategy="delete",
            cache_dir=None,
        )

    store = braid()
    sides = {"Braid: token store with targets": braid, **_maps(tokenizer, values)}
    for name, other in list(sides.items())[1:]:
        made = other()["input_ids"]
        assert [list(ids) for ids in made] == [row.input_ids.tolist() for row in store], f"{name} differs"
    return sides, store.report.tokens


def _maps(tokenizer: Any, values: list[dict[str, Any]]) -> dict[str, Callable[[], Any]]:
    """The same with datasets; empty where it is not installed."""
    try:
        import datasets
    except ImportError:
        return {}
    datasets.disable_progress_bars()
    datasets.disable_caching()
    data = datasets.Dataset.from_list(values)

    def text(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False)

    def by_row(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]}

    def by_row_and_batch() -> Any:
        texts = data.map(lambda row: {"text": text(row["messages"])}, remove_columns=["messages"])
        return texts.map(
            lambda batch: tokenizer(batch["text"], add_special_tokens=False),
            batched=True,
            remove_columns=["text"],
        )

    def by_batch(batch: dict[str, list[Any]]) -> Any:
        return tokenizer(list(map(text, batch["messages"])), add_special_tokens=False)

    def whole_batch(batch: dict[str, list[Any]]) -> Any:
        return tokenizer.apply_chat_template(batch["messages"], tokenize=True)

    return {
        "map: template and tokens row by row": lambda: data.map(by_row, remove_columns=["messages"]),
        "map: template row by row, then tokens in batches": by_row_and_batch,
        "map: batches, template row by row": lambda: data.map(
            by_batch, batched=True, remove_columns=["messages"]
        ),
        "map: batches, template too": lambda: data.map(
            whole_batch, batched=True, remove_columns=["messages"]
        ),
    }


def _alternate(sides: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of every side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _report_packing() -> None:
    """Print how fast and how full rows of chat length are packed, and how even their work then is."""
    from dataclasses import replace

    from engine.data.batches import BatchPlan, imbalance
    from engine.data.packing import pack
    from tests.data.tiny import chat_lengths

    lengths = chat_lengths(PACKED_ROWS, longest=CAPACITY)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        packs = pack(lengths, CAPACITY)
        times.append(time.perf_counter() - began)
    median, work = statistics.median(times), packs.work(lengths)
    plan = BatchPlan(
        num_rows=len(packs),
        global_batch_size=32,
        micro_batch_size=1,
        data_parallel_size=8,
        accumulation=4,
        num_train_epochs=1.0,
        max_steps=None,
        seed=42,
        work=work,
    )
    print(
        f"packing {PACKED_ROWS:,} rows into {len(packs):,} packs of {CAPACITY:,}: {median:.3f} s, "
        f"{PACKED_ROWS / median:,.0f} rows/s, {lengths.sum() / median:,.0f} tokens/s, "
        f"{100 * packs.efficiency(lengths):.2f} % full"
    )
    print(
        f"heaviest micro-batch at data-parallel 8 x accumulation 4: {imbalance(plan, work):.3f} x the mean, "
        f"{imbalance(replace(plan, work=None), work):.3f} x without balancing"
    )


if __name__ == "__main__":
    sys.exit(main())
