"""`braid data`: flags, what is worth a look, and the object that `--json` prints."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.options import DataOptions, SftConfig
from engine.config.parse import build, flatten, help_text, options_of, parse
from engine.errors import ConfigError, ModelError, OutputError
from launch.record import options_text

if TYPE_CHECKING:
    from engine.data.survey import Part, Survey

_USAGE = """usage: braid data --model DIR --dataset FILE ... [--config FILE.yaml] [--flag value ...]

Reads, renders and tokenises rows as braid sft does with the same options, and says what they are like. A YAML
file may be that of a run: what it says of the data, the model and the seed is taken. Exit code 0 whatever is
found, 2 if the data cannot be used.
"""
# Shares above which the verdict speaks of them: rows left out or cut, and duplicates.
_LOST, _DUPLICATES = 0.05, 0.01


@dataclass(kw_only=True)
class ReportOptions:
    """What is looked at, and where the report goes."""

    model: str | None = None
    """Hugging Face model directory, of which the tokenizer with its chat template is read."""

    seed: int = 42
    """Seed of the rows that `name#N` and split_dataset_ratio take, and of the samples."""

    samples: int = 1
    """Training rows to print as text."""

    output_dir: str | None = None
    """New directory for the report as JSON, Markdown and PNG; default: print only."""

    json: bool = False
    """Print one JSON object instead of tables."""

    dry_run: bool = False
    """Check options, tokenizer and chat template, print the options and the files, and read no row."""


@dataclass(kw_only=True)
class DataConfig:
    """Everything `braid data` is told."""

    report: ReportOptions = field(default_factory=ReportOptions)
    data: DataOptions = field(default_factory=DataOptions)


def data(argv: Sequence[str]) -> int:
    """The command `braid data`: returns 0. Raises UserError.

    `--json` prints an object with `options`, `training` and `evaluation` (null where there is none): the
    fields of `engine.data.survey.Part`; `samples`, each with `place`, `tokens`, `supervised_tokens` and
    `runs` (`text`, `supervised`); and `findings`, a list of sentences.
    """
    if "--help" in argv or "-h" in argv:
        print(_USAGE + help_text(DataConfig))
        return 0
    config = read_options(argv)
    options = config.report
    _check(config)
    from engine.data.hub import find_model
    from engine.data.survey import survey

    assert options.model is not None
    options.model = find_model(options.model, use_hf=config.data.use_hf)
    if options.dry_run:
        _dry_run(config)
        return 0
    found = survey(config.data, options.model, seed=options.seed, samples=options.samples)
    remarks = list(findings(found, config))
    record = as_record(found, config, remarks)
    try:
        if options.json:
            print(json.dumps(record, indent=1), flush=True)
        else:
            from launch.data_report import show

            show(found, config.data, remarks)
    finally:  # whether or not `| head` has had enough
        if options.output_dir is not None:
            command = shlex.join(["braid", "data", *argv])
            _write(found, config, remarks, record, Path(options.output_dir), command)
    return 0


def _dry_run(config: DataConfig) -> None:
    """Raises UserError for what is wrong with the tokenizer, or a file that is not there."""
    from engine.data.prepare import load_tokenizer
    from engine.data.sources import sizes_of
    from engine.data.template import ChatTemplate
    from launch.inspect import size_text

    ChatTemplate(load_tokenizer(str(config.report.model)))
    found = [(name, sizes_of(name)) for name in (*config.data.dataset, *config.data.val_dataset)]
    print(options_text(flatten(config)), end="")
    for name, sizes in found:
        if sizes is None:
            print(f"data set {name}: an id, not looked up")
            continue
        for path, size in sizes.items():
            print(f"data set {name}: {path}, {size_text(size)}")
    print("no row was read")


def read_options(argv: Sequence[str]) -> DataConfig:
    """Flags, over what a YAML file says, which may be made for `braid sft`. Raises ConfigError.

    Such a file's output_dir is where the run will write, and its dry_run is the run's, so they are not taken.
    """
    words, file = _without_config(argv)
    config, given = parse(DataConfig, words)
    if file is None:
        return config
    training, written = parse(SftConfig, ["--config", file])
    flat, flags = flatten(training), flatten(config)
    taken = (written & set(options_of(DataConfig))) - {"output_dir", "dry_run"} - given
    return build(DataConfig, {name: flat[name] for name in taken} | {name: flags[name] for name in given})


def _without_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without `--config FILE`, and FILE."""
    words, file = list(argv), None
    for index, word in enumerate(argv):
        name, has_value, value = word.partition("=")
        if name == "--config":
            following = argv[index + 1 : index + 2]
            if not has_value and (not following or following[0].startswith("--")):
                raise ConfigError("--config takes one YAML file; pass --config FILE.yaml")
            file = value if has_value else following[0]
            words = [*argv[:index], *argv[index + (1 if has_value else 2) :]]
    return words, file


def _check(config: DataConfig) -> None:
    """Raise ConfigError or OutputError for what is wrong without reading a row."""
    from engine.data.prepare import check_options
    from launch.bench.paper import check_outputs

    if config.report.model is None:
        raise ConfigError("no model given; pass --model DIR")
    if config.report.samples < 0:
        raise ConfigError(f"samples must not be negative, not {config.report.samples}")
    if config.report.seed < 0:
        raise ConfigError(f"seed must not be negative, not {config.report.seed}")
    if config.data.streaming:
        raise ConfigError("the report needs all rows, and streaming reads them during training; leave it out")
    check_options(config.data)
    check_outputs(config.report.output_dir)


# The verdict


def findings(found: "Survey", config: DataConfig) -> Iterator[str]:
    """What a user should look at before training, a sentence each."""
    yield from _part_findings("training", found.training, config.data)
    if found.evaluation is not None:
        yield from _part_findings("evaluation", found.evaluation, config.data)
        if found.evaluation.seen_in_training:
            seen = _of(found.evaluation.seen_in_training, found.evaluation.kept, "evaluation")
            yield f"{seen} are training rows too"
    largest = max(part.largest_id for part in (found.training, found.evaluation) if part is not None)
    vocab_size = _vocab_size(str(config.report.model))
    if vocab_size is not None and largest >= vocab_size:
        yield (
            f"the tokenizer makes token id {largest}, but the model's vocab_size is {vocab_size}; training "
            f"refuses it"
        )


def _part_findings(name: str, part: "Part", options: DataOptions) -> Iterator[str]:
    limit = f"max_length {options.max_length}"
    if part.without_target:
        count = _of(part.without_target, part.rows, name)
        yield f"{count} are left out, without a supervised token within {limit}"
    if part.too_long > _LOST * part.rows:
        yield (
            f"{_of(part.too_long, part.rows, name)} are left out, longer than {limit}: raise it, or cut them "
            f"with truncation_strategy"
        )
    if part.truncated > _LOST * part.rows:
        yield f"{_of(part.truncated, part.rows, name)} are cut to {limit}"
    if part.duplicates > _DUPLICATES * part.kept:
        yield f"{_of(part.duplicates, part.kept, name)} repeat another row"


def _of(count: int, total: int, name: str) -> str:
    return f"{count:,} of {total:,} {name} rows ({100 * count / total:.1f} %)"


def verdict(remarks: Sequence[str]) -> str:
    """The findings as one line."""
    return f"look at this: {'; '.join(remarks)}" if remarks else "nothing to look at"


def _vocab_size(model_dir: str) -> int | None:
    """Of the model; None where its directory has the tokenizer only, or another kind of model."""
    from engine.model.spec import load_model_spec

    try:
        return load_model_spec(model_dir).vocab_size
    except ModelError:
        return None


# The files


def as_record(found: "Survey", config: DataConfig, remarks: Sequence[str]) -> dict[str, Any]:
    """The report as plain values."""
    samples = [
        asdict(sample) | {"runs": [{"text": text, "supervised": on} for text, on in sample.runs]}
        for sample in found.samples
    ]
    return {
        "options": flatten(config),
        "training": _part_record(found.training),
        "evaluation": None if found.evaluation is None else _part_record(found.evaluation),
        "samples": samples,
        "findings": list(remarks),
    }


def _part_record(part: "Part") -> Mapping[str, Any]:
    bins = [asdict(item) | {"supervised_share": item.supervised_share} for item in part.histogram]
    return asdict(part) | {"supervised_share": part.supervised_share, "histogram": bins}


def _write(
    found: "Survey",
    config: DataConfig,
    remarks: Sequence[str],
    record: dict[str, Any],
    directory: Path,
    command: str,
) -> None:
    """Write data.json, data.md and data.png into `directory`, which is made. OutputError: it cannot be."""
    from launch.bench.output import write_json
    from launch.data_report import draw, markdown

    try:
        directory.mkdir(parents=True, exist_ok=True)
        draw(found, config.data).savefig(directory / "data.png")
        text = markdown(found, config.data, remarks, command)
        (directory / "data.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        write_json(directory / "data.json", record)
    except OSError as error:
        raise OutputError(f"output_dir {directory} cannot be written: {error.strerror or error}") from error
    where = sys.stderr if config.report.json else sys.stdout
    print(f"wrote data.json, data.md and data.png to {directory}", file=where, flush=True)
