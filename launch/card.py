"""The model card of a run: what was trained, from what, how, and how to load it."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.training.curve import Curve, draw_curve, read_curve
from launch.record import git_revision, versions

_SETTINGS = (
    "train_type", "torch_dtype", "max_length", "packing", "learning_rate", "lr_scheduler_type",
    "warmup_ratio", "weight_decay", "max_grad_norm", "global_batch_size", "per_device_train_batch_size",
    "seed",
)  # fmt: skip
_LORA_SETTINGS = ("adapter", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")


def write_card(
    output_dir: Path, options: Mapping[str, Any], *, layout: str, data: str, global_batch_size: int
) -> None:
    """Write `loss.png` and `README.md` into `output_dir` from its metrics.jsonl and the resolved options."""
    curve = read_curve(output_dir / "metrics.jsonl")
    draw_curve(curve, output_dir / "loss.png", title=output_dir.name)
    values = dict(options) | {"global_batch_size": global_batch_size}
    adapter = values["train_type"] == "lora"
    settings = _SETTINGS + (_LORA_SETTINGS if adapter else ())
    text = _CARD.format(
        front_matter=_front_matter(values),
        name=output_dir.resolve().name,
        base=values["model"],
        data="\n".join(f"- {line}" for line in data.splitlines()),
        what="The LoRA adapter in `adapter/`, trained on" if adapter else "Fine-tuned from",
        load=_LOAD_ADAPTER.format(base=values["model"]) if adapter else _LOAD_MODEL,
        results=_results(curve),
        layout=layout,
        settings="\n".join(f"| {name} | {values[name]} |" for name in settings),
        command=shlex.join(["braid", *sys.argv[1:]]),
        versions=", ".join(f"{name} {number}" for name, number in versions().items() if number),
        revision=git_revision() or "unknown",
    )
    (output_dir / "README.md").write_text(text, encoding="utf-8")


def _front_matter(values: Mapping[str, Any]) -> str:
    import yaml

    facts = {
        "base_model": str(values["model"]),
        "datasets": _names(values["dataset"]),
        "library_name": "peft" if values["train_type"] == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["braid", "sft", "megatron-core", *(["lora"] if values["train_type"] == "lora" else [])],
    }
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)


def _names(datasets: Sequence[str]) -> list[str]:
    return [Path(name.partition("#")[0]).name for name in datasets]


def _results(curve: Curve) -> str:
    lines = []
    if curve.losses:
        lines.append(
            f"Training loss {curve.losses[0]:.4f} at step {curve.steps[0]}, {curve.losses[-1]:.4f} at step "
            f"{curve.steps[-1]}."
        )
    if curve.eval_losses:
        best = min(range(len(curve.eval_losses)), key=curve.eval_losses.__getitem__)
        lines.append(
            f"Evaluation loss {curve.eval_losses[-1]:.4f} at the end, best {curve.eval_losses[best]:.4f} "
            f"at step {curve.eval_steps[best]}."
        )
    return " ".join(lines)


_CARD = """---
{front_matter}---

# {name}

{what} `{base}` by Braid on Megatron-Core.

{results}

![loss](loss.png)

## Load

{load}

## Data

{data}

## Training

{layout}

| option | value |
|---|---|
{settings}

    {command}

Versions: {versions}. Revision: {revision}. Every option is in `args.yaml`, every logged step in
`metrics.jsonl`.
"""

_LOAD_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("hf")
model = AutoModelForCausalLM.from_pretrained("hf", dtype="auto")
```

or `vllm serve hf`, `python -m sglang.launch_server --model-path hf`, `braid chat --model hf`."""

_LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "adapter")
```

or `vllm serve {base} --enable-lora --lora-modules tuned=adapter`,
`python -m sglang.launch_server --model-path {base} --lora-paths tuned=adapter`, `braid chat --model adapter`,
or as one checkpoint: `braid merge --model {base} --adapter adapter --output_dir merged`."""
