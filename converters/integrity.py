"""Is a directory what its manifest says: every file as it was written, and made from a given model?"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from converters.mapping import hf_tensors
from converters.model import open_model
from converters.verify import stored_tensor
from engine.errors import CheckpointError, ConfigError
from engine.storage.files import and_more, shown
from engine.storage.manifest import FileProblem, Manifest, check_manifest, model_digest, read_manifest

_DIGITS = 16

# Kinds whose recorded source is no model in a directory of its own.
_MADE_OTHERWISE = {
    "peft": "from a LoRA adapter",
    "mcore-adapter": "from a LoRA adapter",
    "merged": "from a base and an adapter together",
    "training": "by a training run",
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model, and whether the directory was made from it."""

    model: Path
    sha256: str
    """`model_digest` of the model as it is now."""
    recorded: str
    """`model_digest` of what the directory was made from."""
    differing: tuple[str, ...]
    """Tensors whose digest is not the recorded one, in the order of the model."""

    @property
    def same(self) -> bool:
        """Whether the model is what the directory was made from, wherever that lay."""
        return self.sha256 == self.recorded

    def line(self) -> str:
        """For the terminal."""
        if self.same:
            return f"was made from this model: digest {self.sha256}"
        names = f"; {shown(self.differing[0])} differs{and_more(self.differing)}" if self.differing else ""
        return (
            f"was made from another model: digest {shown(self.recorded)}, that of {self.model} is "
            f"{self.sha256}{names}"
        )


@dataclass(frozen=True, kw_only=True)
class ManifestReport:
    """The outcome of `verify_manifest`."""

    directory: Path
    manifest: Manifest
    problems: tuple[FileProblem, ...]
    origin: Origin | None
    """None unless a model was given."""

    @property
    def good(self) -> bool:
        """Every file is as it was written, no file is too many, and the model, if given, is the source."""
        return not self.problems and (self.origin is None or self.origin.same)

    def summary(self) -> str:
        """One line about the files."""
        count = len(self.manifest.files)
        if self.problems:
            return f"NOT intact: {len(self.problems)} problems with {count} files"
        size = sum(entry.bytes for entry in self.manifest.files.values())
        when = shown(self.manifest.created)
        return f"every file is intact: {count} files, {size / 1e9:.3f} GB, written {when}"

    def table(self) -> Table:
        """The problems, one row each, and the summary as caption; digests by their first digits."""
        table = Table(caption=self.summary())
        for column in ("file", "problem", "expected", "found"):
            table.add_column(column, overflow="fold")
        for item in self.problems:
            states = (shown(state)[:_DIGITS] for state in (item.expected, item.found))
            cells = (shown(item.name), item.problem, *states)
            table.add_row(*map(Text, cells))  # a name from a file may look like markup
        return table

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        origin = self.origin
        return {
            "good": self.good,
            "directory": str(self.directory),
            "files": len(self.manifest.files),
            "problems": [asdict(item) for item in self.problems],
            "made_by": self.manifest.command,
            "made_from": self.manifest.source and asdict(self.manifest.source),
            "model": None
            if origin is None
            else {
                "path": str(origin.model),
                "sha256": origin.sha256,
                "is_source": origin.same,
                "differing": list(origin.differing),
            },
        }


def verify_manifest(
    directory: str | Path, *, model_dir: str | Path | None = None, workers: int = 1
) -> ManifestReport:
    """Read every file of a directory that Braid wrote, `workers` at a time, and compare it with the manifest.

    With `model_dir`, a Hugging Face directory or a Megatron checkpoint, the digest of that model is compared
    with the recorded one of the source; where either lies or lay does not matter. Raises CheckpointError if
    there is no readable manifest or a file cannot be read, ModelError for what is wrong with the model, and
    ConfigError for a model where the directory has none as its source.
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {directory} does not exist")
    manifest = read_manifest(path)
    how = _MADE_OTHERWISE.get(manifest.kind)
    if model_dir is not None and how is not None:
        raise ConfigError(f"{directory} was made {how}, not from a model as it is; leave --model out")
    try:
        problems = tuple(check_manifest(path, manifest, workers=workers))
    except OSError as error:
        place = shown(error.filename or path)
        raise CheckpointError(f"{place} cannot be read ({error.strerror or error})") from error
    origin = None if model_dir is None else _origin(Path(model_dir), manifest, workers)
    return ManifestReport(directory=path, manifest=manifest, problems=problems, origin=origin)


def _origin(model_dir: Path, manifest: Manifest, workers: int) -> Origin:
    model = open_model(model_dir)
    names = list(hf_tensors(model.weights))
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        found = dict(zip(names, pool.map(partial(stored_tensor, model.source), names), strict=True))
    differing = [name for name in names if found[name].sha256 != manifest.tensors.get(name)]
    digest = model_digest({name: (t.dtype, t.shape, str(t.sha256)) for name, t in found.items()})
    recorded_digest = manifest.source.sha256 if manifest.source is not None else ""
    return Origin(model=model_dir, sha256=digest, recorded=recorded_digest, differing=tuple(differing))
