"""`braid verify`: flags, prompts, and the verdict that it prints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.config.parse import help_text, parse
from engine.errors import CheckpointError, ConfigError, DataError, ModelError, OutputError
from engine.storage.durable import write_whole
from launch.convert import worker_count
from launch.models import locate

if TYPE_CHECKING:
    from rich.table import Table

    from converters.logits import LogitsReport, Prompt
    from converters.verify import VerifyReport

PROMPTS = (
    "The quick brown fox jumps over the lazy dog. The capital of France is",
    "床前明月光，疑是地上霜。请用一句话解释为什么天空是蓝色的：",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 = 6, 4 + 4 =",
)
QUESTION = "Name three prime numbers, and say why 1 is none."
"""Asked through the tokenizer's chat template, if it has one."""


@dataclass(kw_only=True)
class VerifyOptions:
    """Flags of `braid verify`."""

    model: str | None = None
    """Hugging Face directory, or the id of a model, that is right by definition. With --manifest: the model,
    in either format, that --checkpoint should have been made from.
    """

    checkpoint: str | None = None
    """What is compared with it: a Megatron checkpoint or a Hugging Face directory."""

    level: Literal["weights", "logits"] = "weights"
    """weights: every tensor, byte by byte. logits: after that, prompts go through transformers and through
    the engine, in fp32 on the CPU, and the first layer is named that differs by more than 1e-4 of its largest
    value.
    """

    prompts: str | None = None
    """Text file with a prompt on each line, for --level logits; default: a handful of built-in ones."""

    manifest: bool = False
    """Check instead that every file of --checkpoint is as braid wrote it; --model is optional then."""

    workers: int | None = None
    """Tensors or files that are read at the same time; default: one a CPU, four at most."""

    report: str | None = None
    """File for a JSON report."""

    use_hf: bool | None = None
    """Look an id up at Hugging Face, or (false) at ModelScope."""

    dry_run: bool = False
    """Say what would be read and compared, and what is wrong already without a weight, and stop. Exit code 1
    if something is.
    """


def verify(argv: Sequence[str]) -> int:
    """The command `braid verify`: 0 if both hold the same model, 1 if not. Raises UserError."""
    if "--help" in argv or "-h" in argv:
        print(
            "usage: braid verify --model DIR --checkpoint DIR [--level logits]\n"
            "       braid verify --checkpoint DIR --manifest [--model DIR]\n" + help_text(VerifyOptions)
        )
        return 0
    options, given = parse(VerifyOptions, argv)
    _check(options, given)
    checkpoint, workers = options.checkpoint or "", worker_count(options.workers)
    if options.model is not None:
        options.model = locate(options.model, use_hf=options.use_hf)
    if options.dry_run:
        return _dry_run(options, workers)
    if options.manifest:
        good, content = _manifest(checkpoint, options.model, workers)
    elif options.level == "weights":
        good, content = _weights(options.model or "", checkpoint, workers)
    else:
        good, content = _logits(options.model or "", checkpoint, options.prompts, workers)
    if options.report is not None:
        _write_report(Path(options.report), content)
    return 0 if good else 1


def _check(options: VerifyOptions, given: set[str]) -> None:
    """Raise ConfigError for flags that are missing or contradict each other."""
    if options.manifest:
        if options.checkpoint is None:
            raise ConfigError("--manifest checks the files of --checkpoint DIR; pass it")
        for name in ("level", "prompts"):
            if name in given:
                raise ConfigError(
                    f"--{name} does not go with --manifest, which looks at files and runs no model"
                )
    elif options.model is None or options.checkpoint is None:
        raise ConfigError("verify compares --model DIR with --checkpoint DIR; pass both")
    elif options.prompts is not None and options.level != "logits":
        raise ConfigError("--prompts is for --level logits; pass that too, or leave --prompts out")


def _dry_run(options: VerifyOptions, workers: int) -> int:
    """Descriptions and sizes of both sides; no tensor is read."""
    from converters.inspect import inspect_checkpoint
    from engine.storage.manifest import read_manifest
    from launch.inspect import KINDS, size_text

    checkpoint, wrong = options.checkpoint or "", []
    for name, path in (("model", options.model), ("checkpoint", checkpoint)):
        if path is not None:
            found = inspect_checkpoint(path)
            tensors = sum(item.tensors for item in found.contents)
            size = size_text(sum(item.bytes for item in found.contents))
            print(f"{name}: {path} ({KINDS[found.kind]}, {tensors} tensors, {size})")
            wrong += [f"{name}: {problem.text}" for problem in found.problems]
    if options.manifest:
        files = read_manifest(Path(checkpoint)).files.values()
        size = size_text(sum(file.bytes for file in files))
        print(f"{len(files)} files, {size}, to hash by {workers} threads")
    else:
        wrong += [f"config.json: {line}" for line in _differing_values(options.model or "", checkpoint)]
        print(f"every tensor to compare byte by byte, by {workers} threads")
    if options.level == "logits":
        prompts = _checked_prompts(options.model or "", checkpoint, options.prompts)
        tokens = sum(len(prompt.ids) for prompt in prompts)
        print(f"then {len(prompts)} prompts, {tokens} tokens, through transformers and the engine on the CPU")
    for line in wrong:
        print(line)
    print("nothing was compared")
    return 1 if wrong else 0


def _differing_values(model: str, checkpoint: str) -> tuple[str, ...]:
    from converters.verify import config_differences
    from engine.model.spec import load_model_spec

    return config_differences(load_model_spec(model), Path(checkpoint))


def _checked_prompts(model: str, checkpoint: str, file: str | None) -> "list[Prompt]":
    """Raises UserError for what would stop the comparison of logits."""
    from converters.logits import check_prompts
    from engine.model.spec import load_model_spec

    load_model_spec(model)  # what is wrong with the directory comes before what is wrong with its tokenizer
    prompts = _tokenize(model, None if file is None else _read_prompts(Path(file)))
    check_prompts(model, checkpoint, prompts)
    return prompts


def _manifest(checkpoint: str, model: str | None, workers: int) -> tuple[bool, dict[str, Any]]:
    from converters.integrity import verify_manifest

    report = verify_manifest(checkpoint, model_dir=model, workers=workers)
    if report.problems:
        _print_table(report.table())
    else:
        print(report.summary())
    if report.origin is not None:
        print(report.origin.line())
    return report.good, report.as_dict()


def _weights(model: str, checkpoint: str, workers: int) -> tuple[bool, dict[str, Any]]:
    from converters.verify import verify as compare

    report = compare(model, checkpoint, workers=workers)
    _print_weights(report)
    return report.same, report.as_dict()


def _print_weights(report: "VerifyReport") -> None:
    if report.same:
        print(report.summary())
    else:
        _print_table(report.table())
    for line in report.not_finite():
        print(line)


def _logits(
    model: str, checkpoint: str, prompts_file: str | None, workers: int
) -> tuple[bool, dict[str, Any]]:
    from converters.logits import compare_logits, why_incomparable
    from converters.verify import verify as compare

    prompts = _checked_prompts(model, checkpoint, prompts_file)
    weights = compare(model, checkpoint, workers=workers)
    _print_weights(weights)
    reason = why_incomparable(model, checkpoint)
    if reason is not None and weights.same:  # a part that is no weight cannot be read
        raise CheckpointError(reason)
    logits: LogitsReport | None = None
    if reason is None:
        logits = compare_logits(model, checkpoint, prompts)
        _print_table(logits.table())
        print(logits.summary())
    else:
        print(f"logits were not compared: {reason}")
    same = weights.same and logits is not None and logits.same
    found = {"same": False, "not_compared": reason} if logits is None else logits.as_dict()
    return same, weights.as_dict() | {"same": same, "logits": found}


def _tokenize(model: str, texts: Sequence[str] | None) -> "list[Prompt]":
    """The texts, or the built-in ones, by the tokenizer of the model."""
    from converters.logits import Prompt, quiet_transformers
    from engine.data.prepare import load_tokenizer

    with quiet_transformers():
        try:
            tokenizer = load_tokenizer(model)
        except DataError as error:
            raise ModelError(f"--level logits needs a tokenizer for its prompts: {error}") from error
        encoded = [(text, tokenizer(text)["input_ids"]) for text in (texts or PROMPTS)]
        if texts is None and tokenizer.chat_template:
            text = _rendered(model, tokenizer)
            encoded.append((text, tokenizer(text, add_special_tokens=False)["input_ids"]))
    for text, ids in encoded:
        if not ids:
            raise ModelError(f"the tokenizer of {model} makes no token of {text[:40]!r}; take other prompts")
    return [Prompt(text=text, ids=tuple(ids)) for text, ids in encoded]


def _rendered(model: str, tokenizer: Any) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"the chat template of {model} cannot be rendered: {reason}") from error


def _read_prompts(path: Path) -> list[str]:
    """The lines that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts {path} is not UTF-8 text; save it as such") from None
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path} holds no prompt; write one on each line")
    return prompts


def _print_table(table: "Table") -> None:
    from rich.console import Console

    Console(width=max(100, Console().width)).print(table)


def _write_report(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise OutputError(f"--report {path} cannot be written: {error.strerror}") from None
