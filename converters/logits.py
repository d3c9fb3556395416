"""Do two checkpoints compute the same? Prompts go through transformers and through the engine, in fp32 on the
CPU, and are compared after every layer, so that the first one that differs has a name.

The engine gets the prompts as in training, packed one behind the other; transformers gets them one by one.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.table import Table
from torch import Tensor

from converters.mcore.companions import COMPANIONS_DIR
from converters.model import open_model
from converters.verify import json_number, larger, max_abs_diff
from engine.config.options import ParallelOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.errors import CheckpointError, ConfigError, ModelError
from engine.model.spec import ModelSpec, load_model_spec
from engine.storage.files import shown
from engine.storage.reader import is_dist_checkpoint

if TYPE_CHECKING:
    from engine.model.gpt import BraidGPTModel

BOUND = 1e-4
"""Largest difference that counts as rounding, relative to the largest |value| of the tensor. Two orders of
fp32 summation differ by about 1e-6; one rounding to bf16 is 4e-3.
"""

_BATCH_TOKENS = 2048
"""Tokens that the engine gets at once; a longer prompt is alone."""
_LOGIT_ROWS = 64
"""Tokens whose probabilities are compared at once: 80 MB for a vocabulary of 150 000."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text and its token ids, at least one."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StageDifference:
    """How far apart the two are at one point of the computation: "embedding", "layer 0" and so on (the output
    of the decoder layer that Hugging Face's names give this index), "final norm" or "logits".
    """

    stage: str
    max_abs_diff: float
    """Largest of all tokens of all prompts; nan where only one side is."""
    relative_diff: float
    """The same, each prompt's relative to its largest |value| in transformers."""

    @property
    def same(self) -> bool:
        """Whether it is within the bound; nan is not."""
        return self.relative_diff <= BOUND

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are strings."""
        return {
            "stage": self.stage,
            "max_abs_diff": json_number(self.max_abs_diff),
            "relative_diff": json_number(self.relative_diff),
        }


@dataclass(frozen=True, kw_only=True)
class LogitsReport:
    """The outcome of `compare_logits`."""

    prompts: int
    tokens: int
    stages: tuple[StageDifference, ...]
    """In the order in which they are computed, the logits last."""
    mean_kl: float
    """Kullback-Leibler divergence of the engine's next-token distribution from transformers', in nats, mean
    over the tokens.
    """
    argmax_agreement: float
    """Share of the tokens behind which both find the same token most probable."""

    @property
    def first_difference(self) -> str | None:
        """The first stage beyond the bound."""
        return next((stage.stage for stage in self.stages if not stage.same), None)

    @property
    def same(self) -> bool:
        """Every stage is within the bound."""
        return self.first_difference is None

    def summary(self) -> str:
        """One line."""
        measured = (
            f"mean KL {self.mean_kl:.2e}, argmax agrees on {round(self.argmax_agreement * self.tokens)} "
            f"of {self.tokens} tokens of {self.prompts} prompts"
        )
        if self.same:
            worst = max(stage.relative_diff for stage in self.stages)
            return f"same logits: largest relative difference {worst:.1e} at any layer, {measured}"
        return f"NOT the same logits: first different at {self.first_difference}, {measured}"

    def table(self) -> Table:
        """Every stage, one row each."""
        table = Table()
        table.add_column("computed up to")
        for column in ("max abs diff", "relative", f"within {BOUND:.0e}"):
            table.add_column(column, justify="right")
        for stage in self.stages:
            numbers = f"{stage.max_abs_diff:.2e}", f"{stage.relative_diff:.2e}"
            table.add_row(stage.stage, *numbers, "yes" if stage.same else "NO")
        return table

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are strings."""
        return {
            "same": self.same,
            "first_difference": self.first_difference,
            "bound": BOUND,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "mean_kl": json_number(self.mean_kl),
            "argmax_agreement": self.argmax_agreement,
            "stages": [stage.as_dict() for stage in self.stages],
        }


def check_prompts(model_dir: str | Path, checkpoint_dir: str | Path, prompts: Sequence[Prompt]) -> None:
    """Find out in time what would stop `compare_logits` later; nothing is loaded.

    Raises ModelError for tokens that the model does not have and for a directory that transformers would not
    load as it is, CheckpointError for a checkpoint without configuration, ConfigError for too little memory.
    """
    model, checkpoint = Path(model_dir), Path(checkpoint_dir)
    spec = load_model_spec(model)
    if (model / "adapter_config.json").exists():
        raise ModelError(f"{model} has an adapter_config.json, which transformers would apply; remove it")
    if is_dist_checkpoint(checkpoint) and not (checkpoint / COMPANIONS_DIR).is_dir():
        raise CheckpointError(
            f"checkpoint {checkpoint} has no {COMPANIONS_DIR}, without which the engine cannot load it; "
            f"copy that of the checkpoint it was trained from"
        )
    assert prompts, "no prompts"
    assert all(prompt.ids for prompt in prompts), "a prompt without tokens"
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= spec.vocab_size:
        raise ModelError(
            f"the tokenizer of {model} gives token {largest}, but config.json has a vocab_size of "
            f"{spec.vocab_size}; they do not belong together"
        )
    _check_memory(spec, prompts)


def _check_memory(spec: ModelSpec, prompts: Sequence[Prompt]) -> None:
    needed, available = _copy_bytes(spec), psutil.virtual_memory().available
    needed += min(needed, _state_bytes(spec, prompts))
    if needed > available:
        raise ConfigError(
            f"--level logits needs {needed / 1e9:.1f} GB of memory for the model in fp32, "
            f"{available / 1e9:.1f} GB are available; use a larger machine, or --level weights"
        )


def _copy_bytes(spec: ModelSpec) -> int:
    return 4 * spec.num_parameters()


def _state_bytes(spec: ModelSpec, prompts: Iterable[Prompt]) -> int:
    """Bytes of everything that is compared."""
    tokens = sum(len(prompt.ids) for prompt in prompts)
    return 4 * tokens * (spec.hidden_size * (spec.num_layers + 2) + spec.vocab_size)


def why_incomparable(model_dir: str | Path, checkpoint_dir: str | Path) -> str | None:
    """Why the engine's results cannot be laid beside those of transformers: the checkpoint does not load, or
    is of another size. None where they can.
    """
    spec = load_model_spec(model_dir)
    try:
        other = open_model(checkpoint_dir).spec
    except (ModelError, CheckpointError) as error:
        return str(error)
    for size in ("num_layers", "hidden_size", "vocab_size"):
        mine, theirs = getattr(spec, size), getattr(other, size)
        if mine != theirs:
            return f"{size} is {mine} in {model_dir} and {theirs} in {checkpoint_dir}"
    return None


States = Mapping[str, Tensor]
"""By stage what was computed for T tokens, float32 [T, H], the logits [T, V]."""


def compare_logits(
    model_dir: str | Path, checkpoint_dir: str | Path, prompts: Sequence[Prompt]
) -> LogitsReport:
    """Run `prompts` through the model by transformers and through the checkpoint, of either format, by the
    engine on one rank.

    `check_prompts` and `why_incomparable` must have found nothing. Raises ModelError or CheckpointError for
    what cannot be loaded. No process group may be open; none is left open.
    """
    spec, batches = load_model_spec(model_dir), _batches(prompts)
    # Before the engine's model: transformers cannot be imported once torch takes the CPU for a CUDA device.
    expected: Iterable[States] = map(_reference(Path(model_dir), spec), batches)
    if _state_bytes(spec, prompts) <= _copy_bytes(spec):
        # One model after the other needs half of the memory, as long as the results need less than a model.
        expected = list(expected)
        gc.collect()
    tally = _Tally(_stages(spec))
    with _engine(checkpoint_dir) as run:
        for batch, states in zip(batches, expected, strict=True):
            tally.add(states, run(batch), [len(prompt.ids) for prompt in batch])
    return tally.report()


def _batches(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    batches: list[list[Prompt]] = []
    tokens = 0
    for prompt in prompts:
        if not batches or tokens + len(prompt.ids) > _BATCH_TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(prompt)
        tokens += len(prompt.ids)
    return batches


def _stages(spec: ModelSpec) -> list[str]:
    return ["embedding", *(f"layer {index}" for index in range(spec.num_layers)), "final norm", "logits"]


class _Recorder:
    """Keeps what modules return, by stage, until it is taken."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], vocab_size: int) -> None:
        self._states: dict[str, Tensor] = {}
        for stage, module in modules.items():
            columns = vocab_size if stage == "logits" else None  # the engine pads the vocabulary
            module.register_forward_hook(partial(self._keep, stage, columns))

    def _keep(self, stage: str, columns: int | None, module: torch.nn.Module, args: Any, output: Any) -> None:
        """[1, T, H], [T, 1, H], or a tuple that begins with one."""
        tensor = output[0] if isinstance(output, tuple) else output
        # A copy, for the engine changes its logits where they are.
        self._states[stage] = tensor.flatten(0, 1)[:, :columns].clone()

    def take(self) -> States:
        states, self._states = self._states, {}
        return states


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and warnings, which would stand between the lines of a report."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _reference(model_dir: Path, spec: ModelSpec) -> Callable[[Sequence[Prompt]], States]:
    """A function that runs a batch through transformers' model."""
    model = _load_reference(model_dir, spec)
    modules = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    recorder = _Recorder(dict(zip(_stages(spec), modules, strict=True)), spec.vocab_size)

    @torch.no_grad()
    def run(batch: Sequence[Prompt]) -> States:
        parts = []
        for prompt in batch:
            model(input_ids=torch.tensor([prompt.ids]), use_cache=False)
            parts.append(recorder.take())
        return {stage: torch.cat([part[stage] for part in parts]) for stage in parts[0]}

    return run


def _load_reference(model_dir: Path, spec: ModelSpec) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(model_dir),
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"transformers cannot load {model_dir}: {shown(reason)}") from error
    if type(model).__name__ != spec.architecture:
        raise ModelError(
            f"{model_dir}/config.json: transformers makes a {type(model).__name__} of it, not a "
            f"{spec.architecture}; correct model_type or architectures"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{model_dir}: transformers does not find {shown(missing[0])} in the weights")
    return model.eval()


@contextmanager
def _engine(checkpoint_dir: str | Path) -> Iterator[Callable[[Sequence[Prompt]], States]]:
    """A function that runs a batch through the engine's model, on one rank, with the checkpoint's weights."""
    from engine.runtime.platform import open_platform

    # Before Megatron is imported: it takes the CPU for a CUDA device.
    platform = open_platform(device="cpu", dtype="float32", transformer_impl="torch", local_rank=0)
    import torch.distributed as dist

    from converters.load import load_model_weights
    from engine.model.provider import build_chunks
    from engine.runtime import mcore

    spec = open_model(checkpoint_dir).spec
    layout = ParallelLayout.resolve(ParallelOptions(), num_layers=spec.num_layers, world_size=1)
    dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = mcore.initialize(layout, platform, seed=0)
        chunks = build_chunks(spec, layout, platform, RecomputeOptions(), groups)
        load_model_weights(chunks, checkpoint_dir, spec, groups)
        (model,) = chunks
        model.eval()
        modules = [model.embedding, *model.decoder.layers, model.decoder.final_layernorm, model.output_layer]
        recorder = _Recorder(dict(zip(_stages(spec), modules, strict=True)), spec.vocab_size)
        yield lambda batch: _run_packed(model, batch, recorder)
    finally:
        dist.destroy_process_group()
        mcore.destroy()


@torch.no_grad()
def _run_packed(model: "BraidGPTModel", batch: Sequence[Prompt], recorder: _Recorder) -> States:
    """The prompts of a batch as the documents of one micro-batch."""
    from engine.model.attention import Segments
    from engine.model.layers import DocumentParams

    lengths = [len(prompt.ids) for prompt in batch]
    tokens = torch.tensor([[token for prompt in batch for token in prompt.ids]])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    documents = DocumentParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        segments=Segments.documents(lengths, torch.device("cpu")),
    )
    # The model returns losses; its logits are seen on the way, and any labels will do.
    model(tokens, document_params=documents, position_ids=positions, labels=tokens)
    return recorder.take()


class _Tally:
    """Adds up the differences of batches."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._worst = dict.fromkeys(stages, (0.0, 0.0))
        self._prompts = self._tokens = self._agreeing = 0
        self._kl = 0.0

    def add(self, expected: States, found: States, lengths: list[int]) -> None:
        """`lengths` are the tokens of each prompt."""
        for stage, (absolute, relative) in self._worst.items():
            for a, b in zip(expected[stage].split(lengths), found[stage].split(lengths), strict=True):
                difference = max_abs_diff(a, b)
                absolute = larger(absolute, difference)
                relative = larger(relative, _relative(difference, a))
            self._worst[stage] = absolute, relative
        for a, b in zip(*(s["logits"].split(_LOGIT_ROWS) for s in (expected, found)), strict=True):
            self._agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())
            p, q = (logits.double().log_softmax(-1) for logits in (a, b))
            self._kl += float((p.exp() * (p - q)).sum())
        self._prompts += len(lengths)
        self._tokens += sum(lengths)

    def report(self) -> LogitsReport:
        return LogitsReport(
            prompts=self._prompts,
            tokens=self._tokens,
            stages=tuple(
                StageDifference(stage=stage, max_abs_diff=absolute, relative_diff=relative)
                for stage, (absolute, relative) in self._worst.items()
            ),
            mean_kl=self._kl / self._tokens,
            argmax_agreement=self._agreeing / self._tokens,
        )


def _relative(difference: float, expected: Tensor) -> float:
    if difference == 0.0:
        return 0.0
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return difference / scale if scale else float("inf")
