"""`braid eval`: benchmarks of a trained model by lm-evaluation-harness, where it is installed."""

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.config.parse import help_text, parse
from engine.errors import ConfigError
from launch.chat import places

_USAGE = "usage: braid eval --model DIR [--adapter DIR] --tasks gsm8k ifeval ...\n"


@dataclass(kw_only=True)
class EvalOptions:
    """Flags of `braid eval`; what else lm_eval can do is a matter of the command that is printed."""

    model: str | None = None
    """Hugging Face directory or id, or the directory of an adapter that names its base."""

    adapter: str | None = None
    """Directory of a PEFT adapter."""

    tasks: list[str] = field(default_factory=list)
    """Tasks of lm_eval, such as gsm8k ifeval mmlu; `lm_eval ls tasks` lists them."""

    limit: float | None = None
    """Take only so many examples of each task, or below 1 this share."""

    num_fewshot: int | None = None
    """Examples in front of each question; default: the task's own."""

    batch_size: str = "auto"
    """Questions at a time."""

    apply_chat_template: bool = True
    """Ask through the tokenizer's chat template."""

    torch_dtype: str = "auto"
    """Arithmetic."""

    device: str | None = None
    """Such as cuda:0 or cpu; default: lm_eval's choice."""

    include_path: str | None = None
    """Directory with tasks of one's own."""

    output_dir: str | None = None
    """Where lm_eval leaves its results."""

    use_hf: bool | None = None
    """Look an id up at Hugging Face, or (false) at ModelScope."""

    dry_run: bool = False
    """Print the command of lm_eval, and stop."""


def evaluate(argv: Sequence[str]) -> int:
    """The command: the exit code of lm_eval. Raises UserError."""
    if "--help" in argv or "-h" in argv:
        print(_USAGE + help_text(EvalOptions))
        return 0
    options, _ = parse(EvalOptions, argv)
    if options.model is None:
        raise ConfigError("no model given; pass --model DIR")
    if not options.tasks:
        raise ConfigError("no tasks given; pass --tasks gsm8k")
    command = lm_eval_command(options)
    print("$ " + shlex.join(["lm_eval", *command]), flush=True)
    if options.dry_run:
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("braid eval needs lm-evaluation-harness: `pip install 'lm-eval[hf]'`")
    return subprocess.run([sys.executable, "-m", "lm_eval", *command], check=False).returncode


def lm_eval_command(options: EvalOptions) -> list[str]:
    """The words behind `lm_eval`. Raises ConfigError or ModelError."""
    model, adapter = places(options.model or "", options.adapter, use_hf=options.use_hf)
    settings = {"pretrained": model, "dtype": options.torch_dtype} | ({"peft": adapter} if adapter else {})
    for name, value in settings.items():
        if "," in value:
            raise ConfigError(f"{name} {value} has a comma, which lm_eval cannot be told; link it elsewhere")
    command = ["--model", "hf", "--model_args", ",".join(f"{k}={v}" for k, v in settings.items())]
    command += ["--tasks", ",".join(options.tasks), "--batch_size", options.batch_size]
    if options.apply_chat_template:
        command.append("--apply_chat_template")
    given = {
        "--limit": options.limit,
        "--num_fewshot": options.num_fewshot,
        "--device": options.device,
        "--include_path": options.include_path,
        "--output_path": options.output_dir,
    }
    for flag, wanted in given.items():
        command += [] if wanted is None else [flag, str(wanted)]
    return command
