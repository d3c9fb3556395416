"""What `make bench-gpu` measures: Braid's cases, and the peers at the same shapes."""

import fnmatch
import importlib.util
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LENGTH, LONG = 4096, 32768
ROWS_MULTIPLE = 8
"""Of a global batch: whole micro-batches, and whole rows of LONG tokens."""

_EXPERTS = "qwen3-30b-a3b-8-layers"
_MICRO_BATCH: Mapping[str, int] = {"qwen2.5-1.5b": 2, "qwen2.5-3b": 4, "qwen2.5-7b": 2, _EXPERTS: 4}
_BF16_MOMENTS = ("--exp_avg_dtype", "bfloat16", "--exp_avg_sq_dtype", "bfloat16")
_MLP_ACT = ("--recompute_granularity", "selective", "--recompute_modules", "mlp_act")
"""Of what a layer keeps this is the largest part that costs no matrix product to compute again."""
_LORA = ("--train_type", "lora", "--lora_rank", "16", "--lora_dropout", "0")
_MODULES: Mapping[str, tuple[str, ...]] = {"te": ("transformer_engine",), "torch": ()}
PEERS: Mapping[str, tuple[str, ...]] = {
    "transformers": (),
    "liger": ("--liger",),
    "liger-mixed": ("--liger", "--arithmetic", "mixed"),
}
"""Flags of tests.bench.gpu_peers."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all cases of a run have in common."""

    steps: int = 5
    """Measured steps, after one of warm-up."""
    global_batch_size: int = 64
    """Rows, or packs, of LENGTH tokens in a step; a case with longer ones has as many tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table, measured in a process of its own."""

    name: str
    """Fit for a directory."""
    shape: str
    flags: tuple[str, ...]
    """Of `braid bench train`, or of tests.bench.gpu_peers."""
    micro_batch: int
    max_length: int = LENGTH
    peer: bool = False
    """Not Braid."""
    modules: tuple[str, ...] = ()
    """Packages without which it cannot run."""
    baselines: Mapping[str, str] = field(default_factory=dict)
    """Cases that its tokens/s are divided by, under the names that the table gives them."""
    target: str = ""
    """What it is to be read against; printed, and judged by no program."""
    asked_only: bool = False
    """Runs only where it, or its shape for peers, is named."""

    def command(self, settings: Settings, directory: Path) -> list[str]:
        """The command line; a peer prints its results, Braid writes them into `directory`."""
        rows = settings.global_batch_size * LENGTH // self.max_length
        common = [
            "--shape", self.shape, *self.flags, "--max_length", str(self.max_length),
            "--global_batch_size", str(rows), "--per_device_train_batch_size", str(self.micro_batch),
            "--warmup_steps", "1", "--steps", str(settings.steps),
        ]  # fmt: skip
        if self.peer:
            return [sys.executable, "-m", "tests.bench.gpu_peers", *common]
        braid = [sys.executable, "-m", "launch.cli", "bench", "train"]
        return [*braid, *common, "--breakdown", "false", "--output_dir", str(directory)]

    def shown_command(self, settings: Settings, directory: Path) -> str:
        """The same for readers."""
        words = self.command(settings, directory)[1:]
        start = ["python", *words] if self.peer else ["braid", *words[2:]]
        return shlex.join(start)

    def missing(self) -> str | None:
        """The first package that it needs and that is not installed."""
        return next((name for name in self.modules if importlib.util.find_spec(name) is None), None)


def all_cases() -> list[Case]:
    """In the order in which they run and are printed."""
    small = "qwen2.5-1.5b"
    return [
        *_full(small, peers=_peer_names(small, "packed-")),
        *_peers(small, packed=True),
        *_even(small),
        *_peers(small),
        *_full("qwen2.5-3b"),
        *_even("qwen2.5-3b", asked_only=True),
        *_peers("qwen2.5-3b", asked_only=True),
        *_full("qwen2.5-7b", *_BF16_MOMENTS, *_MLP_ACT),
        *_fp8(),
        *_even("qwen2.5-7b", *_BF16_MOMENTS, *_MLP_ACT, asked_only=True),
        *_peers("qwen2.5-7b", asked_only=True),
        _long(),
        *_lora("qwen2.5-7b", target="NeMo AutoModel, H100: 14,110"),
        *_lora("qwen3-8b", target="Unsloth, H200: 9,100"),
        *_full(_EXPERTS, *_BF16_MOMENTS),
    ]


def chosen(cases: Sequence[Case], patterns: Sequence[str], peer_shapes: Sequence[str]) -> list[Case]:
    """The cases that some pattern names, as `qwen2.5-7b-*`; without patterns all but those that must be
    asked for, and of these the ones of `peer_shapes`. Raises ValueError for a pattern that names none.
    """
    if not patterns:
        return [case for case in cases if not case.asked_only or case.shape in peer_shapes]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            names = ", ".join(case.name for case in cases)
            raise ValueError(f"no case is called {pattern!r}; cases are {names}")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]


def _pair(
    stem: str,
    shape: str,
    flags: Sequence[str],
    micro_batch: int,
    *,
    asked_only: bool = False,
    target: str = "",
    peers: Mapping[str, str] | None = None,
) -> list[Case]:
    """A case with Transformer Engine's layers and with those of plain torch."""
    return [
        Case(
            name=f"{stem}-{implementation}",
            shape=shape,
            flags=("--transformer_impl", implementation, *flags),
            micro_batch=micro_batch,
            modules=_MODULES[implementation],
            baselines=({"torch": f"{stem}-torch"} if implementation == "te" else {}) | dict(peers or {}),
            target=target,
            asked_only=asked_only,
        )
        for implementation in ("te", "torch")
    ]


def _full(shape: str, *flags: str, peers: Mapping[str, str] | None = None) -> list[Case]:
    return _pair(f"{shape}-full", shape, flags, _MICRO_BATCH[shape], peers=peers)


def _even(shape: str, *flags: str, asked_only: bool = False) -> list[Case]:
    """Full rows: every document fills one, and peers need no mask."""
    words, peers = ("--lengths", "even", *flags), _peer_names(shape)
    return _pair(f"{shape}-even", shape, words, _MICRO_BATCH[shape], asked_only=asked_only, peers=peers)


def _peer_names(shape: str, kind: str = "") -> dict[str, str]:
    return {name: f"{shape}-{kind}{name}" for name in PEERS}


def _lora(shape: str, *, target: str) -> list[Case]:
    return _pair(f"{shape}-lora", shape, _LORA, 4, target=target)


def _fp8() -> list[Case]:
    shape = "qwen2.5-7b"
    return [
        Case(
            name=f"{shape}-full-fp8-{recipe}",
            shape=shape,
            flags=("--transformer_impl", "te", *_BF16_MOMENTS, "--fp8_recipe", recipe),
            micro_batch=1,  # copies of the weights in fp8 take the place of the second pack
            modules=_MODULES["te"],
            baselines={"bf16": f"{shape}-full-te"},
        )
        for recipe in ("delayed", "tensorwise")
    ]


def _long() -> Case:
    shape = "qwen2.5-7b"
    return Case(
        name=f"{shape}-full-32k-te",
        shape=shape,
        flags=("--transformer_impl", "te", *_BF16_MOMENTS, "--gradient_checkpointing"),
        micro_batch=1,
        max_length=LONG,
        modules=_MODULES["te"],
    )


def _peers(shape: str, *, packed: bool = False, asked_only: bool = False) -> list[Case]:
    """transformers, the same with Liger's kernels, and that again with fp32 weights as Braid has them."""
    # Without recomputation 7 B of plain transformers keep more than a card has.
    largest = shape == "qwen2.5-7b"
    lengths = ("--lengths", "packed") if packed else ()
    return [
        Case(
            name=f"{shape}-{'packed-' if packed else ''}{name}",
            shape=shape,
            flags=(*flags, *lengths, *(("--gradient_checkpointing",) if largest else ())),
            micro_batch=2 if largest else 4,
            peer=True,
            modules=("transformers", *(("liger_kernel",) if "--liger" in flags else ())),
            asked_only=asked_only,
        )
        for name, flags in PEERS.items()
    ]
