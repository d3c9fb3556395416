"""The report of `braid data` on a terminal, as Markdown and as a picture."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from engine.config.options import DataOptions
from engine.data.survey import Bin, Lengths, Part, Sample, Survey
from engine.training.curve import new_figure
from launch.bench.output import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table as RichTable
    from rich.text import Text

_WIDTH = 110
_BAR = 40
_OPEN, _CLOSE = "⟦", "⟧"
"""Around supervised text where there are no colours."""
_MARKED = f"supervised text is between {_OPEN} and {_CLOSE}"
_MOST_FILES = 30
_MOST_CHARACTERS = 4000
"""Of a stretch of text on a terminal; the files have all of it."""


def show(survey: Survey, options: DataOptions, remarks: Sequence[str]) -> None:
    """Print all of it with rich. Nothing of a row or a name is taken for markup."""
    from rich.console import Console
    from rich.text import Text

    from launch.data import verdict

    if hasattr(sys.stdout, "reconfigure"):  # rows hold characters that the terminal may not have
        sys.stdout.reconfigure(errors="replace")
    console = Console()
    console = Console(width=max(_WIDTH, console.width) if console.is_terminal else _WIDTH)
    for table in tables(survey, options, most_files=_MOST_FILES):
        table.show()
    for name, part in _parts(survey):
        console.print(Text(f"\n{name}: rows by length, as they were read", style="italic"))
        console.print(_bars(part.histogram, options.max_length))
    colours = console.color_system is not None
    for sample in survey.samples:
        how = "supervised in green" if colours else _MARKED
        console.print(Text(f"\n{sample_title(sample)}; {how}", style="italic"), soft_wrap=True)
        text = _coloured(sample) if colours else Text(marked(sample, short=True))
        console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")
    style = "bold yellow" if remarks else "bold green"
    console.print(Text(f"\n{verdict(remarks)}", style=style), soft_wrap=True)


def _parts(survey: Survey) -> Iterator[tuple[str, Part]]:
    yield "training", survey.training
    if survey.evaluation is not None:
        yield "evaluation", survey.evaluation


def tables(survey: Survey, options: DataOptions, *, most_files: int | None = None) -> Iterator[Table]:
    """The numbers, the same on the terminal and in Markdown; of files the first `most_files` of each part."""
    parts = list(_parts(survey))
    yield Table(
        title="rows",
        columns=("", "read", "kept", "too long", "no target", "cut", "duplicates", "answers a row"),
        rows=[[name, *_row_cells(part)] for name, part in parts],
    )
    yield Table(
        title="tokens",
        columns=("", "tokens", "supervised", "share"),
        rows=[
            [name, f"{part.tokens:,}", f"{part.supervised_tokens:,}", _percent(part.supervised_share)]
            for name, part in parts
        ],
    )
    lengths = []
    for name, part in parts:
        lengths.append([name, *_length_cells(part.lengths)])
        if part.lengths_as_read != part.lengths:
            lengths.append([f"{name}, as read", *_length_cells(part.lengths_as_read)])
    yield Table(
        title=f"tokens a row (max_length {options.max_length:,}, {options.truncation_strategy})",
        columns=("", "shortest", "median", "mean", "90 %", "99 %", "longest"),
        rows=lengths,
    )
    if options.packing:
        yield Table(
            title="packing",
            columns=("", "sequences", "packs", "tokens a pack", "full", "rows a pack"),
            rows=[[name, *_pack_cells(part)] for name, part in parts],
        )
    for name, part in parts:
        if len(part.files) > 1:
            yield _files(name, part, most_files)


def _row_cells(part: Part) -> list[str]:
    counts = (part.rows, part.kept, part.too_long, part.without_target, part.truncated, part.duplicates)
    answers = _spread(part.fewest_answers, part.mean_answers, part.most_answers)
    return [*(f"{count:,}" for count in counts), answers]


def _length_cells(lengths: Lengths) -> list[str]:
    whole = (lengths.p90, lengths.p99, lengths.longest)
    middle = [f"{lengths.median:,.1f}", f"{lengths.mean:,.1f}"]
    return [f"{lengths.shortest:,}", *middle, *(f"{number:,}" for number in whole)]


def _pack_cells(part: Part) -> list[str]:
    packs = part.packing
    assert packs is not None
    rows = _spread(packs.fewest_rows, packs.mean_rows, packs.most_rows)
    return [f"{part.kept:,}", f"{packs.packs:,}", f"{packs.capacity:,}", _percent(packs.full), rows]


def _spread(least: int, mean: float, most: int) -> str:
    """ "1" where all are the same, else "1 to 5, mean 2.5"."""
    return f"{least}" if least == most else f"{least} to {most}, mean {mean:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _files(name: str, part: Part, most: int | None) -> Table:
    shown = part.files[:most]
    left = len(part.files) - len(shown)
    return Table(
        title=f"{name} by file" + (f" ({left} more in the JSON)" if left else ""),
        columns=("file", "read", "kept", "tokens", "share of tokens", "supervised"),
        rows=[
            [
                visible(file.source),
                f"{file.rows:,}",
                f"{file.kept:,}",
                f"{file.tokens:,}",
                _percent(file.share),
                _percent(file.supervised_tokens / file.tokens) if file.tokens else "-",
            ]
            for file in shown
        ],
    )


# The histogram


def _bin_name(item: Bin) -> str:
    return f"{item.first:,}" if item.first == item.last else f"{item.first:,}-{item.last:,}"


def _bars(bins: Sequence[Bin], max_length: int) -> "RichTable":
    """A bar for each bin, and a line where max_length stands."""
    from rich.bar import Bar
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable.grid(padding=(0, 2))
    for justify in ("right", "right", "left", "right"):
        grid.add_column(justify=justify, no_wrap=True)
    grid.add_row(Text("tokens"), Text("rows"), Text(""), Text("supervised"))
    most, drawn = max(item.rows for item in bins), False
    for item in bins:
        beyond = item.first > max_length
        if beyond and not drawn:
            grid.add_row(*_limit(max_length))
            drawn = True
        bar = Bar(most, 0, item.rows, width=_BAR, color="red" if beyond else "blue")
        share = f"{100 * item.supervised_share:.1f} %" if item.rows else ""
        grid.add_row(Text(_bin_name(item)), Text(f"{item.rows:,}"), bar, Text(share))
    if not drawn:
        grid.add_row(*_limit(max_length))
    return grid


def _limit(max_length: int) -> list["Text"]:
    from rich.text import Text

    return [
        Text(f"{max_length:,}", style="bold"),
        Text(""),
        Text("── max_length ".ljust(_BAR, "─")),
        Text(""),
    ]


def draw(survey: Survey, options: DataOptions) -> "Figure":
    """Rows and supervised share over the length, a column for training and one for evaluation."""
    parts = list(_parts(survey))
    figure = new_figure(width=7 * len(parts), height=6)
    grid = figure.subplots(2, len(parts), squeeze=False, sharex="col")
    for (name, part), rows, shares in zip(parts, grid[0], grid[1], strict=True):
        _draw_part(part, rows, shares, options.max_length)
        rows.set_title(f"{name}: {part.rows:,} rows as read")
    return figure


def _draw_part(part: Part, rows: "Axes", shares: "Axes", max_length: int) -> None:
    bins = part.histogram
    width = bins[1].last - bins[0].last if len(bins) > 1 else bins[0].last - bins[0].first + 1
    for item in bins:
        size = min(item.last - item.first + 1, width)
        much_longer = item.last - item.first + 1 > width
        color = "#c8552b" if item.first > max_length else "#1f5fa8"
        rows.bar(
            item.first,
            item.rows,
            width=size,
            align="edge",
            color=color,
            edgecolor="white",
            hatch="//" if much_longer else None,
            label=f"longer, up to {item.last:,}" if much_longer else None,
        )
        shares.bar(
            item.first, 100 * item.supervised_share, width=size, align="edge", color="#3c8f5a", edgecolor="w"
        )
    label = "tokens a row"
    if max_length <= bins[-1].last:
        for axes in (rows, shares):
            axes.axvline(max_length + 1, color="black", linestyle="--", label=f"max_length {max_length:,}")
        rows.legend()
    else:
        label += f" (none longer than max_length {max_length:,})"
    rows.set_ylabel("rows")
    shares.set_ylabel("supervised tokens, %")
    shares.set_ylim(0, 100)
    shares.set_xlabel(label)
    for axes in (rows, shares):
        axes.grid(alpha=0.3, axis="y")


# Samples


def visible(text: str, *, breaks: bool = False) -> str:
    """The text with what would steer a terminal shown as a symbol; line breaks and tabs stay if `breaks`."""
    kept = "\n\t" if breaks else ""
    return "".join(char if char in kept or char.isprintable() else _symbol(char) for char in text)


def _symbol(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    # Not printable in Python's eyes, but harmless: white space such as U+3000, and what joins emoji.
    harmless = (char.isspace() and code > 0x9F and code not in (0x2028, 0x2029)) or code in (0x200C, 0x200D)
    return char if harmless else f"\\u{code:04x}"


def sample_title(sample: Sample) -> str:
    """Where a sample is from, and how long it is."""
    place = "sample" if sample.place is None else f"sample {visible(sample.place)}"
    return f"{place}: {sample.tokens:,} tokens, {sample.supervised_tokens:,} of them supervised"


def marked(sample: Sample, *, short: bool = False) -> str:
    """The text with marks around what is supervised; the middle of long stretches left out if `short`."""
    runs = ((_shortened(text) if short else visible(text, breaks=True), on) for text, on in sample.runs)
    return "".join(f"{_OPEN}{text}{_CLOSE}" if on else text for text, on in runs)


def _coloured(sample: Sample) -> "Text":
    from rich.text import Text

    text = Text()
    for run, supervised in sample.runs:
        text.append(_shortened(run), "green" if supervised else None)
    return text


def _shortened(text: str) -> str:
    left = len(text) - _MOST_CHARACTERS
    if left > 0:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} … {left:,} characters … {text[-half:]}"
    return visible(text, breaks=True)


def markdown(survey: Survey, options: DataOptions, remarks: Sequence[str], command: str) -> str:
    """The report as Markdown, with data.png beside it; `command` made it."""
    from launch.data import verdict

    blocks = ["# Training data", _fenced(visible(command)), f"**{verdict(remarks)}**"]
    for table in tables(survey, options):
        blocks += [f"## {table.title}", table.markdown()]
    blocks += ["## rows by length", "![rows by length](data.png)"]
    for name, part in _parts(survey):
        blocks += [f"{name}, as read:", _bins(part.histogram, options.max_length).markdown()]
    if survey.samples:
        blocks += ["## samples", f"Between {_OPEN} and {_CLOSE}: supervised."]
    for sample in survey.samples:
        blocks += [sample_title(sample).replace("`", "'"), _fenced(marked(sample))]
    return "\n\n".join(blocks) + "\n"


def _bins(bins: Sequence[Bin], max_length: int) -> Table:
    rows = []
    for item in bins:
        name = _bin_name(item) + (" (beyond max_length)" if item.first > max_length else "")
        rows.append([name, f"{item.rows:,}", f"{100 * item.supervised_share:.1f} %" if item.rows else "-"])
    return Table(title="rows by length", columns=("tokens", "rows", "supervised"), rows=rows)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
