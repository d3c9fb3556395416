"""What the JSON files of a checkpoint say of it, read as files that may have come from anywhere.

A file that is damaged is a problem of the checkpoint, and so is one that does not fit the others; what is not
for Braid (another architecture, DoRA) is a note.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.hf.reader import MAX_JSON_BYTES
from converters.inspection import (
    AdapterSummary,
    FileOnDisk,
    ManifestSummary,
    ModelSummary,
    Problem,
    StoredTensor,
    layer_of,
)
from engine.errors import CheckpointError, MalformedConfigError, ModelError, UserError
from engine.model.lora_spec import CONFIG_FILE as ADAPTER_CONFIG
from engine.model.lora_spec import read_lora_config
from engine.model.spec import ModelSpec, load_model_spec
from engine.storage.files import and_more, shown
from engine.storage.manifest import MANIFEST_FILE, STATE_FILE, check_manifest, read_manifest

LARGEST = 2**63
"""Sizes from here on are nobody's: a description may claim any number, and Python refuses to print some."""

_MAX_RANKS = 2**20
"""Of a run."""
_DEGREES = ("tp", "pp", "vpp", "cp", "dp")
_EXPERT_DEGREES = ("ep", "etp")


class Findings:
    """Problems and notes, as they come up; each becomes one printable line."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def problem(self, file: str, text: object) -> None:
        """`file` is wrong, as `text` says."""
        self.problems.append(Problem(file=file, text=one_line(text)))

    def note(self, text: object) -> None:
        """Something worth knowing."""
        self.notes.append(one_line(text))

    def try_to(self, file: str, check: Callable[[], object]) -> None:
        """Run a check; the UserError that it raises is a problem of `file`."""
        try:
            check()
        except UserError as error:
            self.problem(file, error)


def one_line(text: object) -> str:
    """A text from a file as one printable line, however long."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def read_json(path: Path, found: Findings) -> dict[str, Any] | None:
    """A JSON object; None and a problem if it is damaged."""
    try:
        if not path.is_file():  # a named pipe would block for ever
            raise ValueError("it is no regular file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        found.problem(path.name, f"{path} is not readable JSON ({shown(error)})")
        return None
    return value


def _whole(value: Any) -> int | None:
    """A size from a file, if it is one."""
    return value if type(value) is int and 0 <= value < LARGEST else None


def num_layers(tensors: Sequence[StoredTensor]) -> int:
    """Layers that the weights among the tensors are of."""
    counts = [0]
    for tensor in tensors:
        if tensor.content == "weights":
            numbered = layer_of(tensor.name)
            counts.append(tensor.layers or (0 if numbered is None else numbered[1] + 1))
    return max(counts)


def _elements(tensors: Sequence[StoredTensor]) -> int | None:
    return sum(math.prod(tensor.shape) for tensor in tensors if tensor.content == "weights") or None


def read_model(
    config_dir: Path, tensors: Sequence[StoredTensor], found: Findings
) -> tuple[ModelSummary | None, ModelSpec | None]:
    """What `config.json` says, or the tensors where there is none; and the model, if Braid knows it."""
    path = config_dir / "config.json"
    config = read_json(path, found) if path.exists() else None
    if config is None:
        return _model_of_tensors(tensors), None
    try:
        spec = load_model_spec(config_dir)
    except MalformedConfigError as error:
        found.problem("config.json", error)
        return _model_of_config(config, tensors), None
    except ModelError as error:
        found.note(error)
        return _model_of_config(config, tensors), None
    return ModelSummary(
        described_by="config.json",
        architecture=spec.architecture,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        tied_embeddings=spec.tied_embeddings,
        parameters=spec.num_parameters(),
        **_experts_of(spec),
    ), spec


def _experts_of(spec: ModelSpec) -> dict[str, int | None]:
    moe = spec.moe
    if moe is None:
        return {}
    return {
        "num_experts": moe.num_experts,
        "layers_with_experts": sum(moe.layers),
        "experts_per_token": moe.top_k,
        "expert_ffn_hidden_size": moe.ffn_hidden_size,
        "shared_ffn_hidden_size": moe.shared_ffn_hidden_size,
    }


def _model_of_config(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> ModelSummary:
    """Of a model that Braid does not know, by the names that most configurations have."""
    names, tied = config.get("architectures"), config.get("tie_word_embeddings")
    return ModelSummary(
        described_by="config.json",
        architecture=str(names[0]) if isinstance(names, list) and names else None,
        num_layers=_whole(config.get("num_hidden_layers")),
        hidden_size=_whole(config.get("hidden_size")),
        ffn_hidden_size=_whole(config.get("intermediate_size")),
        num_attention_heads=_whole(config.get("num_attention_heads")),
        num_query_groups=_whole(config.get("num_key_value_heads")),
        head_dim=_whole(config.get("head_dim")),
        vocab_size=_whole(config.get("vocab_size")),
        tied_embeddings=tied if isinstance(tied, bool) else None,
        parameters=_elements(tensors),
    )


def _model_of_tensors(tensors: Sequence[StoredTensor]) -> ModelSummary | None:
    """By Megatron's names; heads cannot be told from shapes."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for tensor in tensors:
        if tensor.content == "weights":
            # Without what is stacked: the shapes of one layer and expert.
            shape = tensor.shape[sum(size is not None for size in (tensor.layers, tensor.experts)) :]
            name = (layer_of(tensor.name) or (tensor.name,))[0].replace(".layers.*.", ".layers.")
            shapes.setdefault(name, []).append(shape)
    embedding, down, expert, shared = (
        next(iter(shapes.get(name, ())), ())
        for name in (
            "embedding.word_embeddings.weight",
            "decoder.layers.mlp.linear_fc2.weight",
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            "decoder.layers.mlp.shared_experts.linear_fc2.weight",
        )
    )
    if len(embedding) != 2 or (len(down) != 2 and len(expert) != 2):
        return None
    return ModelSummary(
        described_by="tensors",
        num_layers=num_layers(tensors),
        hidden_size=embedding[1],
        ffn_hidden_size=down[-1] if down else None,
        vocab_size=embedding[0],
        tied_embeddings="output_layer.weight" not in shapes,
        parameters=_elements(tensors),
        num_experts=max((t.experts for t in tensors if t.content == "weights" and t.experts), default=None),
        expert_ffn_hidden_size=expert[-1] if expert else None,
        shared_ffn_hidden_size=shared[-1] if shared else None,
    )


def read_adapter(config_dir: Path, found: Findings) -> AdapterSummary | None:
    """What `adapter_config.json` says, if there is one."""
    path = config_dir / ADAPTER_CONFIG
    config = read_json(path, found) if path.exists() else None
    if config is None:
        return None
    try:
        read_lora_config(config_dir)
    except ModelError as error:
        found.note(error)
    method, base, alpha = (
        config.get(name) for name in ("peft_type", "base_model_name_or_path", "lora_alpha")
    )
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else [] if targets is None else [targets]
    return AdapterSummary(
        method=method if isinstance(method, str) else None,
        rank=_whole(config.get("r")),
        alpha=alpha if isinstance(alpha, float) and math.isfinite(alpha) else _whole(alpha),
        target_modules=tuple(sorted(str(name) for name in names)),
        base_model=base if isinstance(base, str) else None,
    )


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stood when it saved, and the degrees of its layout by `tp`, `pp`, `vpp`, `cp`, `dp` and,
    where experts are shared, `ep` and `etp`.
    """

    step: int
    total_steps: int | None
    layout: dict[str, int]

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return math.prod(self.layout[name] for name in ("tp", "pp", "cp", "dp"))


def read_state(directory: Path, found: Findings) -> RunState | None:
    """What `trainer_state.json` says, if there is one; None and a problem if it is not a run's."""
    path = directory / STATE_FILE
    value = read_json(path, found) if path.exists() else None
    if value is None:
        return None
    step, degrees = _whole(value.get("step")), value.get("layout")
    layout = degrees if isinstance(degrees, dict) else {}
    known = {name: _whole(layout.get(name)) or 0 for name in (*_DEGREES, *_EXPERT_DEGREES)}
    known = {name: degree for name, degree in known.items() if 0 < degree <= _MAX_RANKS}
    if step is None or not known.keys() >= set(_DEGREES):
        found.problem(STATE_FILE, f"{path} has no step or no layout of {', '.join(_DEGREES)}; it is damaged")
        return None
    state = RunState(step=step, total_steps=_whole(value.get("total_steps")), layout=known)
    if state.ranks > _MAX_RANKS:
        found.problem(STATE_FILE, f"{path} speaks of {state.ranks} ranks; it is damaged")
        return None
    return state


def check_listed(directory: Path, files: Sequence[FileOnDisk], found: Findings) -> ManifestSummary | None:
    """What `braid-manifest.json` says, and whether every file of it is there and as long as it says."""
    if not (directory / MANIFEST_FILE).exists():
        return None
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        found.problem(MANIFEST_FILE, error)
        return None
    known, names = {problem.file for problem in found.problems}, {file.name for file in files}
    new: list[str] = []
    for item in check_manifest(directory, manifest, hashed=lambda name: False):
        place = directory / item.name
        if item.problem == "surplus":
            new += [item.name] if item.name in names else []
        elif item.name in known:
            continue
        elif item.problem == "missing":
            found.problem(item.name, f"{place} is missing; {MANIFEST_FILE} lists it")
        else:
            found.problem(item.name, f"{place} has {item.found} bytes, {MANIFEST_FILE} says {item.expected}")
    if new:
        found.note(f"{new[0]}{and_more(new)} is not in {MANIFEST_FILE}")
    source = manifest.source
    return ManifestSummary(
        kind=manifest.kind,
        created=manifest.created,
        command=manifest.command,
        versions=dict(manifest.versions),
        source_path=None if source is None else source.path,
        source_sha256=None if source is None else source.sha256,
        tensors=len(manifest.tensors),
        files=len(manifest.files),
    )
