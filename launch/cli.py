"""The `braid` command. Imports of torch and Megatron wait until a command needs them: `--help` answers at
once.
"""

import os
import sys
from collections.abc import Callable, Sequence

from engine.errors import ConfigError, UserError
from launch.pipe import CLOSED, let_go, reader_has_gone

USAGE = """usage: braid COMMAND [--config FILE.yaml] [--flag value ...]

commands:
  sft       train a Hugging Face Qwen checkpoint under tensor, pipeline and data parallelism
  convert   Hugging Face checkpoint <-> Megatron checkpoint
  merge     a base and a LoRA adapter -> one Hugging Face checkpoint; the base is not changed
  verify    prove that two checkpoints hold the same model (exit code 0: the same, 1: not)
  inspect   say what a checkpoint is, and whether all of it is there (exit code 0: it is, 1: not)
  data      say what training data is like as tokens, before anything is trained on it
  bench     measure training, communication, or every layout on random weights: bench train | comm | sweep
  validate  compare every layout that this machine allows with one GPU, and measure their speed, in one report
  doctor    say what this machine has for training, and what is missing (exit code 0: nothing, 1: mend it)
  chat      talk to a trained model, or to a base with its adapter
  eval      benchmarks of a trained model, by lm-evaluation-harness where it is installed

braid COMMAND --help lists a command's flags. NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT
start several processes; under torchrun or Slurm the same command is the worker."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 good, 1 failed, 2 the user can mend it (one line says how),
    141 nobody reads what it prints.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except (BrokenPipeError, SystemExit) as error:
        if not reader_has_gone(error):
            raise
        let_go()
        return CLOSED


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if words else 2
    name, rest = words[0], words[1:]
    try:
        command = _command(name)
        return command(rest)
    except UserError as error:
        print(f"braid {name}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"braid {name}: interrupted", file=sys.stderr)
        return 130


def _command(name: str) -> Callable[[Sequence[str]], int]:
    # Each command imports its own module, so that one does not pay for the imports of another.
    if name == "sft":
        from launch.sft import sft

        return sft
    if name == "convert":
        from launch.convert import convert

        return convert
    if name == "merge":
        from launch.convert import merge

        return merge
    if name == "verify":
        from launch.verify import verify

        return verify
    if name == "inspect":
        from launch.inspect import inspect

        return inspect
    if name == "data":
        from launch.data import data

        return data
    if name == "bench":
        from launch.bench.command import bench

        return bench
    if name == "validate":
        from launch.validate.command import validate

        return validate
    if name == "doctor":
        from launch.doctor import doctor

        return doctor
    if name == "chat":
        from launch.chat import chat

        return chat
    if name == "eval":
        from launch.evaluate import evaluate

        return evaluate
    raise ConfigError(
        f"unknown command {name!r}; commands are sft, convert, merge, verify, inspect, data, bench, "
        f"validate, doctor, chat, eval"
    )


def run() -> None:
    """Entry point of the console script and of `python -m launch.cli`."""
    code = main()
    sys.stderr.flush()
    if os.environ.get("RANK"):
        # A worker has nothing left to do; daemon threads of gloo or NCCL can hold up an ordinary exit.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
