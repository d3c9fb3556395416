"""`make demo`: the main job on a CPU, end to end, with nothing downloaded.

A tiny random Qwen3 checkpoint -> Megatron shards and a verdict -> full SFT at TP2 x PP2 on four processes
with the distributed optimizer -> `hf/`; and from the same base LoRA at TP2 x DP2 -> `adapter/`. Then greedy
answers by transformers and PEFT, before and after.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import cli
from launch.chat import load, prompts
from launch.tiny import DATA_DIR, build_tiny_qwen3, read_messages

OUTPUT = Path("out/demo")
CONFIGS = DATA_DIR.parent
WANTED_SHARE = 0.8


def main() -> int:
    """Run all parts; 0 if at least 80 % of the answers are exact after each training and none before."""
    started = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    model, full, lora = OUTPUT / "qwen3-tiny", OUTPUT / "full", OUTPUT / "lora"
    _say("a tiny random Qwen3 checkpoint and a tokenizer with a ChatML template, from the shipped data")
    build_tiny_qwen3(model)
    _say("convert it to a Megatron checkpoint, and prove that it is the same model")
    _braid("convert", "--to", "mcore", "--model", str(model), "--output_dir", str(OUTPUT / "mcore"))
    _braid("verify", "--model", str(model), "--checkpoint", str(OUTPUT / "mcore"))
    _say("full SFT at TP2 x PP2 on four processes, distributed optimizer, real Megatron-Core over gloo")
    config = str(CONFIGS / "qwen3_tiny_cpu.yaml")
    _braid("sft", "--config", config, "--model", str(model), "--output_dir", str(full))
    _say("LoRA at TP2 x DP2 from the same base")
    config = str(CONFIGS / "qwen3_tiny_lora_cpu.yaml")
    _braid("sft", "--config", config, "--model", str(model), "--output_dir", str(lora))
    _say("greedy answers by transformers and PEFT")
    questions = [(row[0]["content"], row[1]["content"]) for row in read_messages(DATA_DIR / "demo.jsonl")]
    asked = [question for question, _ in questions]
    answers = [answer(model, asked), answer(full / "hf", asked), answer(model, asked, lora / "adapter")]
    exact = print_table(questions, answers)
    print(f"demo took {time.monotonic() - started:.0f} s")
    good = exact[0] == 0 and min(exact[1:]) >= WANTED_SHARE * len(questions)
    if not good:
        print(
            f"demo failed: expected no exact answer before training and {WANTED_SHARE:.0%} after",
            file=sys.stderr,
        )
    return 0 if good else 1


def answer(
    model_dir: Path, questions: Sequence[str], adapter: Path | None = None, *, max_new_tokens: int = 48
) -> list[str]:
    """Greedy answers of a checkpoint by transformers alone; of a base with `adapter`, by PEFT."""
    import torch

    model, tokenizer = load(str(model_dir), None if adapter is None else str(adapter), device="cpu")
    inputs = prompts(tokenizer, [[{"role": "user", "content": question}] for question in questions])
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    return [
        text.strip()
        for text in tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    ]


def print_table(questions: Sequence[tuple[str, str]], answers: Sequence[Sequence[str]]) -> list[int]:
    """Print question and answers before training, after full SFT and after LoRA; returns how many of each are
    exact.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Greedy answers from the exported files")
    table.add_column("question", overflow="fold", max_width=38)
    table.add_column("before training", overflow="ellipsis", no_wrap=True, max_width=20)
    table.add_column("full SFT (transformers)", overflow="fold", max_width=36)
    table.add_column("LoRA (PEFT)", overflow="fold", max_width=36)
    exact = [0] * len(answers)
    for row, (question, wanted) in enumerate(questions):
        cells = []
        for column, given in enumerate(answers):
            right = given[row] == wanted
            exact[column] += right
            cells.append(f"{given[row]} ✓" if right else f"{given[row]!r} ✗")
        table.add_row(question, *cells)
    count = len(questions)
    table.add_section()
    table.add_row("exact answers", *(f"{number} of {count} ({number / count:.0%})" for number in exact))
    Console(width=140).print(table)
    return exact


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _braid(*words: str) -> None:
    print("$ braid " + " ".join(words), flush=True)
    code = cli.main(words)
    if code != 0:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
