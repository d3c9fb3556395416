"""The peers of `make bench-gpu`: a training step of transformers, with or without Liger's kernels.

One process measures one setting and prints one line of JSON, with the fields that the bench.json of
`braid bench train` has. The step is that of a plain training loop: the tokens of a step by accumulation over
micro-batches; gradients clipped at 1; torch's fused AdamW. Rows are full, so that no place is padding and no
mask is passed, or packs of such documents as Braid's, told apart by position ids, from which transformers
makes a mask. Tokens are made on the device, so that no step waits for data. MFU counts FLOPs as Braid does.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engine.data.packing import pack
from launch.bench.data import packable_lengths
from launch.bench.shapes import SHAPES, spec_of_shape

if TYPE_CHECKING:
    import torch

    from engine.runtime.platform import Platform

Arithmetic = Literal["bfloat16", "mixed", "float32"]
ARITHMETIC: dict[str, str] = {
    "bfloat16": "weights, gradients and AdamW's states in bf16, no fp32 master weights",
    "mixed": "weights, gradients and AdamW's states in fp32, products in bf16 under autocast",
    "float32": "fp32",
}
_MODEL_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_WEIGHT_DECAY, _BETAS, _EPSILON, _MAX_NORM = 0.1, (0.9, 0.95), 1e-8, 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a peer is measured at; names are the flags."""

    shape: str = "qwen2.5-1.5b"
    """A dense model of launch.bench.shapes, with random weights."""
    liger: bool = False
    """Liger's kernels for norms, rotary embedding, SwiGLU, and linear with cross-entropy."""
    arithmetic: Arithmetic = "bfloat16"
    max_length: int = 4096
    """Tokens of every row."""
    lengths: Literal["even", "packed"] = "even"
    """Of documents: a row each, or drawn as `braid bench train` draws them, several in a row."""
    global_batch_size: int = 64
    """Rows of a step."""
    per_device_train_batch_size: int = 4
    """Rows of a micro-batch."""
    gradient_checkpointing: bool = False
    steps: int = 5
    warmup_steps: int = 1
    learning_rate: float = 1e-5
    seed: int = 42
    device: str = "cuda"

    @property
    def implementation(self) -> str:
        return "transformers + Liger" if self.liger else "transformers"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which documents stand in the rows of all steps, [steps, rows of a step, max_length], on the device."""

    position_ids: "torch.Tensor"
    """int64; count from 0 in every document."""
    is_target: "torch.Tensor"
    """bool: not the first token of its document, and no padding."""
    lengths: list[np.ndarray]
    """Of a step's documents."""

    @classmethod
    def draw(cls, setting: Setting) -> "Rows":
        """The lengths that `braid bench train` draws, in the same packs, in an order of their own."""
        import torch

        steps, capacity = setting.warmup_steps + setting.steps, setting.max_length
        rows = steps * setting.global_batch_size
        random = np.random.default_rng(setting.seed)
        lengths = packable_lengths(random, capacity, rows)
        packs = pack(lengths, capacity)
        positions = np.zeros((rows, capacity), dtype=np.int64)
        real = np.zeros((rows, capacity), dtype=bool)
        members = [lengths[packs[number]] for number in random.permutation(len(packs))[:rows]]
        for row, documents in enumerate(members):
            used = documents.sum()
            ends = np.cumsum(documents)
            positions[row] = np.arange(capacity)
            positions[row, :used] -= np.repeat(ends - documents, documents)
            positions[row, used:] -= used
            real[row, :used] = True
        shape = (steps, setting.global_batch_size, capacity)
        per_step = [np.concatenate(part) for part in _split(members, steps)]
        return cls(
            position_ids=torch.from_numpy(positions).view(shape).to(setting.device),
            is_target=torch.from_numpy(real & (positions > 0)).view(shape).to(setting.device),
            lengths=per_step,
        )


def _split(members: Sequence[np.ndarray], steps: int) -> list[Sequence[np.ndarray]]:
    size = len(members) // steps
    return [members[step * size : (step + 1) * size] for step in range(steps)]


class Peer:
    """A model with its optimizer, ready to take steps."""

    def __init__(self, setting: Setting) -> None:
        import torch

        self.setting, self.device = setting, torch.device(setting.device)
        torch.manual_seed(setting.seed)
        self.model = build_model(setting)
        decayed = [weight for weight in self.model.parameters() if weight.dim() > 1]
        others = [weight for weight in self.model.parameters() if weight.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=setting.learning_rate,
            betas=_BETAS,
            eps=_EPSILON,
            fused=True,
        )
        self.generator = torch.Generator(self.device).manual_seed(setting.seed)
        self.packs = Rows.draw(setting) if setting.lengths == "packed" else None
        self.steps_taken = 0

    def rows(self, count: int) -> "torch.Tensor":
        """The next `count` rows of random ids, int64 [count, max_length]."""
        import torch

        size = (count, self.setting.max_length)
        vocabulary = self.model.config.vocab_size
        return torch.randint(0, vocabulary, size, generator=self.generator, device=self.device)

    def inputs(self, rows: slice) -> "dict[str, torch.Tensor]":
        """Of the model, for these rows of the coming step."""
        ids = self.rows(rows.stop - rows.start)
        if self.packs is None:
            return {"input_ids": ids, "labels": ids}
        labels = ids.masked_fill(~self.packs.is_target[self.steps_taken, rows], -100)
        positions = self.packs.position_ids[self.steps_taken, rows]
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def documents(self, step: int) -> np.ndarray:
        """Tokens of each document of a step, int64."""
        if self.packs is not None:
            return self.packs.lengths[step]
        return np.full(self.setting.global_batch_size, self.setting.max_length)

    def tokens(self, step: int) -> int:
        """Of a step, without padding."""
        return int(self.documents(step).sum())

    def step(self) -> float:
        """Train on the next global batch; the loss before the update, in nats a token."""
        import torch

        setting, size = self.setting, self.setting.per_device_train_batch_size
        # The first token of a document follows nothing.
        targets = self.tokens(self.steps_taken) - len(self.documents(self.steps_taken))
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, setting.global_batch_size, size):
            inputs = self.inputs(slice(first, first + size))
            with self._autocast():
                loss = self.model(**inputs, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.detach().float()
        self.steps_taken += 1
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_NORM)
        self.optimizer.step()
        return float(total)

    def _autocast(self) -> Any:
        import torch

        if self.setting.arithmetic != "mixed":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def build_model(setting: Setting) -> Any:
    """The shape as a model of transformers on the device, ready for training. Raises ConfigError for an
    unknown shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    spec_of_shape(setting.shape)
    values = SHAPES[setting.shape.lower()].config()
    model_type = _MODEL_TYPES[values.pop("architectures")[0]]
    if setting.liger:
        _apply_liger(model_type)
    config = AutoConfig.for_model(model_type, **values, use_cache=False)
    dtype = torch.bfloat16 if setting.arithmetic == "bfloat16" else torch.float32
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _apply_liger(model_type: str) -> None:
    """Put Liger's kernels into the classes of transformers, for models that are made from now on."""
    import liger_kernel.transformers as liger

    apply = getattr(liger, f"apply_liger_kernel_to_{model_type}")
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True)


def measure(setting: Setting) -> dict[str, Any]:
    """Warm up and time the steps; what bench.json holds. Memory that is not enough is a result too."""
    check(setting)
    import torch

    platform, phase = _platform(setting), "while the model was built"
    try:
        peer = Peer(setting)
        phase = "in the warm-up"
        for _ in range(setting.warmup_steps):
            peer.step()
        if not platform.is_cpu:
            torch.cuda.reset_peak_memory_stats()
        phase, seconds, loss = "in a measured step", [], math.nan
        for _ in range(setting.steps):
            took, loss = _timed(peer, platform)
            seconds.append(took)
    except torch.OutOfMemoryError:
        return _header(setting, platform) | {"oom": True, "error": f"out of memory on the device {phase}"}
    return _header(setting, platform) | _results(peer, platform, seconds, loss)


def check(setting: Setting) -> None:
    """Raise ValueError for numbers that make no step."""
    accumulation, rest = divmod(setting.global_batch_size, setting.per_device_train_batch_size)
    if rest or accumulation < 1:
        raise ValueError("per_device_train_batch_size must divide global_batch_size")
    if setting.steps < 1 or setting.max_length < 2:
        raise ValueError("steps must be at least 1, max_length at least 2")


def _timed(peer: Peer, platform: "Platform") -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    import torch

    if not platform.is_cpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    loss = peer.step()
    if not platform.is_cpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, loss


def _platform(setting: Setting) -> "Platform":
    """For the card's peak, the memory and the versions; the device is left as torch has it."""
    import torch

    from engine.runtime.platform import Platform

    device = torch.device(setting.device)
    return Platform(
        device=device,
        backend="gloo" if device.type == "cpu" else "nccl",
        dtype=torch.float32 if setting.arithmetic == "float32" else torch.bfloat16,
        use_te=False,
    )


def _header(setting: Setting, platform: "Platform") -> dict[str, Any]:
    from launch.bench.ranks import Environment

    here = Environment.here(platform)
    command = shlex.join(["python", "-m", "tests.bench.gpu_peers", *sys.argv[1:]])
    try:
        liger = version("liger-kernel")
    except PackageNotFoundError:
        liger = None
    environment = replace(here, command=command, versions=here.versions | {"liger-kernel": liger})
    return {
        "kind": "peer",
        "oom": False,
        "model": setting.shape,
        "implementation": setting.implementation,
        "arithmetic": ARITHMETIC[setting.arithmetic],
        "options": asdict(setting),
        "environment": asdict(environment),
    }


def _results(peer: Peer, platform: "Platform", seconds: Sequence[float], loss: float) -> dict[str, Any]:
    setting, flops_per_token = peer.setting, spec_of_shape(peer.setting.shape).train_flops_per_token
    steps = range(setting.warmup_steps, setting.warmup_steps + setting.steps)
    median, tokens = statistics.median(seconds), statistics.mean(map(peer.tokens, steps))
    flops = [sum(n * flops_per_token(n) for n in peer.documents(step).tolist()) for step in steps]
    rate = statistics.mean(flops) / median
    peak = platform.peak_flops()
    return {
        "parameters": sum(weight.numel() for weight in peer.model.parameters()),
        "global_batch_size": setting.global_batch_size,
        "micro_batch_size": setting.per_device_train_batch_size,
        "accumulation": setting.global_batch_size // setting.per_device_train_batch_size,
        "step_seconds": list(seconds),
        "median_step_s": median,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / median,
        "tflops_per_device": rate / 1e12,
        "mfu": rate / peak if peak else None,
        "peak_memory_gib": platform.memory_gib(),
        "loss": loss if math.isfinite(loss) else None,
    }


def parse(argv: Sequence[str]) -> Setting:
    """The setting that the flags name."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_peers")
    for item in fields(Setting):
        if isinstance(item.default, bool):
            parser.add_argument(f"--{item.name}", action="store_true")
        else:
            choices = {"arithmetic": list(ARITHMETIC), "lengths": ["even", "packed"]}.get(item.name)
            parser.add_argument(
                f"--{item.name}", type=type(item.default), default=item.default, choices=choices
            )
    return Setting(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str]) -> int:
    """Measure, and print the line; 1 where memory was not enough."""
    # As Braid has it: without segments that grow, memory falls to pieces.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    record = measure(parse(argv))
    print(json.dumps(record), flush=True)
    return int(record["oom"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
