"""`braid inspect`: flags, and the report that it prints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config.parse import help_text, parse
from engine.errors import ConfigError
from launch.models import locate

if TYPE_CHECKING:
    from rich.table import Table

    from converters.inspection import Inspection, ModelSummary, StoredTensor

_USAGE = """usage: braid inspect PATH [--flag value ...]

PATH is a Megatron checkpoint (converted, checkpoint-<step> of a run, LoRA adapters, or another program's), a
Hugging Face directory, or the id of one, or a PEFT adapter. Descriptions and sizes are read, no tensor is.
Exit code 0: all of it is there, 1: something is missing or damaged, 2: it cannot be read.
"""
_SWITCHES = ("--json", "--tensors", "--files")
_YES_OR_NO = ("true", "false", "1", "0", "yes", "no")
KINDS = {
    "converted": "Megatron checkpoint (torch_dist), converted by braid",
    "training": "Megatron checkpoint (torch_dist) of a braid run",
    "adapter": "Megatron checkpoint (torch_dist) of LoRA adapters",
    "megatron": "Megatron checkpoint (torch_dist) of another program",
    "huggingface": "Hugging Face directory (safetensors)",
    "peft": "PEFT adapter (safetensors)",
}
_PIPE_WIDTH = 10_000
"""Columns of a page that nobody looks at as it is: no line is folded."""


@dataclass(kw_only=True)
class InspectOptions:
    """Flags of `braid inspect`."""

    checkpoint: str | None = None
    """The same as PATH."""

    json: bool = False
    """Print one JSON object with everything, each tensor by itself, instead of tables."""

    tensors: bool = False
    """List every tensor by itself, those of the optimizer too, and the files of each."""

    files: bool = False
    """List every file by itself."""

    use_hf: bool | None = None
    """Look an id up at Hugging Face, or (false) at ModelScope."""


def inspect(argv: Sequence[str]) -> int:
    """The command `braid inspect`: 0 if all of the checkpoint is there, 1 if not. Raises UserError.

    `--json` prints an object whose keys stay: `path`, `kind` (converted, training, adapter, megatron,
    huggingface, peft), `step`, `step_source`, `total_steps`, `model`, `adapter`, `layout`, `contents` (by
    weights, adapter, optimizer, other: `keys`, `tensors`, `boxes`, `elements`, `bytes`, `dtypes`), `tensors`
    (`name`, `content`, `shape`, `dtype`, `layers`, `experts`, `boxes` as `sizes` and `count`, `bytes`,
    `files`), `manifest`, `files` (`name`, `bytes`), `problems` (`file`, `text`), `notes`, `good`, `bytes` and
    `file_bytes`. What a checkpoint does not have is null; `converters.inspection` says what the values mean.
    """
    if "--help" in argv or "-h" in argv:
        print(_USAGE + help_text(InspectOptions))
        return 0
    options, _ = parse(InspectOptions, _path_as_flag(argv))
    if options.checkpoint is None:
        raise ConfigError("inspect looks at a directory; pass it: braid inspect PATH")
    from converters.inspect import inspect_checkpoint

    found = inspect_checkpoint(locate(options.checkpoint, use_hf=options.use_hf))
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        _print(found, options)
    return 0 if found.good else 1


def _path_as_flag(argv: Sequence[str]) -> list[str]:
    """The words with `PATH` as `--checkpoint PATH`, wherever it stands."""
    words: list[str] = []
    paths: list[str] = []
    for word in argv:
        before = words[-1] if words else ""
        wants_value = before.startswith("--") and "=" not in before
        if before in _SWITCHES and word.lower() not in _YES_OR_NO:
            wants_value = False
        (words if word.startswith("--") or wants_value else paths).append(word)
    if len(paths) > 1:
        raise ConfigError(f"inspect looks at one directory, not {len(paths)}: {' '.join(paths)}")
    if paths and any(word.partition("=")[0] == "--checkpoint" for word in words):
        raise ConfigError(f"{paths[0]} and --checkpoint are the same option; give one of them")
    return [*words, *(["--checkpoint", paths[0]] if paths else [])]


# The report


def _print(found: "Inspection", options: InspectOptions) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console = Console(width=max(100, console.width) if console.is_terminal else _PIPE_WIDTH)
    console.print(_head(found))
    for table in (_contents(found), _tensors(found, each=options.tensors), _files(found, each=options.files)):
        console.print()
        console.print(table)
    for problem in found.problems:
        console.print(Text(f"problem: {problem.text}", style="red"))
    for note in found.notes:
        console.print(Text(f"note: {note}"))
    count = len(found.problems)
    verdict = f"{count} problem{'s' if count > 1 else ''}" if count else "complete"
    console.print(Text(f"{verdict}; sizes were looked at, not what is in the files", style="bold"))


def _head(found: "Inspection") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from converters.descriptions import one_line

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    step = "unknown" if found.step is None else str(found.step)
    if found.total_steps is not None:
        step += f" of {found.total_steps}"
    if found.step_source is not None:
        step += f" ({found.step_source})"
    rows = {
        "path": found.path,
        "kind": KINDS[found.kind],
        "model": _model_words(found),
        "adapter": _adapter_words(found),
        "step": "" if found.kind in ("huggingface", "peft") and found.step is None else step,
        "layout": _layout_words(found),
        **_manifest_words(found),
    }
    for name, text in rows.items():
        if text:
            grid.add_row(Text(name, style="bold"), Text(one_line(text)))
    return grid


def _manifest_words(found: "Inspection") -> dict[str, str]:
    manifest = found.manifest
    if manifest is None:
        return {}
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return {
        "written": f"{manifest.created} by {versions}",
        "command": manifest.command,
        "source": manifest.source_path or "",
        "digest": f"{manifest.source_sha256} (SHA-256 of the source)" if manifest.source_sha256 else "",
    }


def _model_words(found: "Inspection") -> str:
    model = found.model
    if model is None:
        return "unknown" if found.kind != "peft" else ""
    parts = [
        ("", model.num_layers, "layers"),
        ("hidden", model.hidden_size, ""),
        ("ffn", model.ffn_hidden_size if model.layers_with_experts != model.num_layers else None, ""),
        ("", model.num_attention_heads, "heads"),
        ("", model.num_query_groups, "query groups"),
        ("head dimension", model.head_dim, ""),
        ("vocabulary", model.vocab_size, "" if model.described_by == "config.json" else "(padded)"),
    ]
    words = [" ".join(w for w in (a, f"{n}", b) if w) for a, n, b in parts if n is not None]
    words += _expert_words(model)
    if model.tied_embeddings:
        words.append("tied embeddings")
    if model.parameters is not None:
        words.append(f"{model.parameters:,} parameters")
    name = model.architecture or "unknown architecture"
    return f"{name}: {', '.join(words)} (from {model.described_by})"


def _expert_words(model: "ModelSummary") -> list[str]:
    if model.num_experts is None:
        return []
    experts = f"{model.num_experts} experts of ffn {model.expert_ffn_hidden_size}"
    if model.experts_per_token is not None:
        experts += f" ({model.experts_per_token} a token)"
    if model.layers_with_experts not in (None, model.num_layers):
        experts += f" in {model.layers_with_experts} layers"
    shared = model.shared_ffn_hidden_size
    return [experts] if shared is None else [experts, f"shared expert of ffn {shared}"]


def _adapter_words(found: "Inspection") -> str:
    adapter = found.adapter
    if adapter is None:
        return ""
    elements = next((item.elements for item in found.contents if item.content == "adapter"), 0)
    words = [
        f"rank {adapter.rank}" if adapter.rank is not None else "",
        f"alpha {adapter.alpha:g}" if adapter.alpha is not None else "",
        " ".join(adapter.target_modules),
        f"{elements:,} parameters",
        f"base {adapter.base_model}" if adapter.base_model else "",
    ]
    return f"{adapter.method or 'unknown method'}: {', '.join(word for word in words if word)}"


def _layout_words(found: "Inspection") -> str:
    layout = found.layout
    if layout is None:
        return ""
    degrees = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")}
    words = [f"{name} {degree}" for name, degree in degrees.items() if degree is not None]
    if layout.source == "deduced":
        if layout.tp == 1:
            words.append("tensors are whole")
        words = [*words, "deduced"] if words else ["unknown"]
    if layout.writers is not None:
        words.append(f"{layout.writers} ranks wrote")
    suffix = "" if layout.source == "deduced" else f" ({layout.source})"
    return f"{', '.join(words)}{suffix}"


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _add(table: "Table", *cells: object) -> None:
    """A row of texts as they are: names come from files and may look like markup."""
    from rich.text import Text

    table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))


def _contents(found: "Inspection") -> "Table":
    from engine.storage.files import shown

    numbers = ("tensors", "keys", "boxes", "elements", "size")
    table = _table("contents", "content", *numbers, "dtype", right=numbers)
    for item in found.contents:
        size, dtypes = size_text(item.bytes), shown(", ".join(item.dtypes))
        _add(table, item.content, item.tensors, item.keys, item.boxes, f"{item.elements:,}", size, dtypes)
    return table


def _tensors(found: "Inspection", *, each: bool) -> "Table":
    """Every tensor, or all but the optimizer's with the layers and experts of each taken together."""
    from converters.inspection import grouped
    from engine.storage.files import shown

    cut = ["boxes"] if found.layout is not None else []  # a safetensors file cuts nothing
    groups = [group for tensor in found.tensors for group in grouped([tensor])]
    if not each:
        groups = grouped([tensor for tensor in found.tensors if tensor.content != "optimizer"])
    experts = ["experts"] if any(group.experts is not None for group in groups) else []
    columns = ["name", "layers", *experts, "shape", "dtype", *cut, "size", "files"]
    table = _table("tensors", *columns, right=("layers", "experts", "size"))
    for group in groups:
        tensor = group.first
        _add(
            table,
            shown(group.name),
            group.layers,
            *(group.experts for _ in experts),
            list(tensor.shape),
            shown(tensor.dtype),
            *(_boxes_words(tensor) for _ in cut),
            size_text(group.bytes),
            _files_words(group.files, 3 if each else 1),
        )
    return table


def _boxes_words(tensor: "StoredTensor") -> str:
    if [box.sizes for box in tensor.boxes] == [tensor.shape]:
        return "whole"
    words = [f"{box.count} of {list(box.sizes)}" for box in tensor.boxes[:2]]
    return ", ".join(words) + (f", {len(tensor.boxes) - 2} more shapes" if len(tensor.boxes) > 2 else "")


def _files_words(files: Sequence[str], most: int) -> str:
    from engine.storage.files import shown

    return f"{len(files)} files" if len(files) > most else " ".join(shown(name) for name in files)


def _files(found: "Inspection", *, each: bool) -> "Table":
    """Every file, or what belongs together as one: data files, directories."""
    from engine.storage.files import shown

    table = _table("files", "file", "count", "size", right=("count", "size"))
    rows: dict[str, list[int]] = {}
    for file in found.files:
        top, below, _ = file.name.partition("/")
        suffix = top.rpartition(".")[2]
        together = f"{top}/" if below else f"*.{suffix}" if suffix in ("distcp", "safetensors") else top
        rows.setdefault(file.name if each else together, []).append(file.bytes)
    for name, sizes in sorted(rows.items(), key=lambda row: -sum(row[1])):
        _add(table, shown(name), len(sizes), size_text(sum(sizes)))
    _add(table, "all", len(found.files), size_text(sum(file.bytes for file in found.files)))
    return table


def size_text(count: int) -> str:
    """Bytes for a reader: 512 B, 1.5 kB, 3.2 GB, in powers of ten."""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["kB", "MB", "GB", "TB", "PB", "EB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"
