"""A base and a LoRA adapter -> one Hugging Face checkpoint. Both are read, neither is touched."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from converters.adapter import PeftAdapter, open_adapter, saved_tensors
from converters.companion_files import copy_companions
from converters.conversion import Conversion, ConvertReport, carry_out
from converters.convert import hf_layout, output_files, set_config_dtype
from converters.hf.layout import PlannedTensor, source_layout
from converters.hf.reader import EMBEDDING, LM_HEAD, HfReader, check_weights, model_tensors
from converters.mapping import weight_map
from converters.source import Source, new_or_given, row_blocks
from converters.transfer import TransferOptions
from engine.errors import ModelError
from engine.model.lora_spec import CONFIG_FILE, adapter_name
from engine.model.projections import Projection
from engine.model.spec import ModelSpec, load_model_spec


@dataclass(frozen=True, kw_only=True)
class _Delta:
    """scaling * B A, of the base's tensor `W`; of experts, one matrix of one of them."""

    a: str
    b: str
    scaling: float
    expert: int | None = None
    experts: int = 1
    first_row: int = 0
    """Of B, at which W's begin: experts have gate and up in one."""

    def added_to(self, rows: Tensor, start: int, reader: HfReader) -> Tensor:
        """W + scaling * B A for rows of W from `start` on, in fp32 or wider."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        begin = self.first_row + start
        b = reader.read_rows(self.b, begin, begin + rows.shape[0])
        if self.expert is None:
            a = reader.read(self.a)
        else:
            rank = reader.shape(self.a)[0] // self.experts
            a = reader.read_rows(self.a, self.expert * rank, (self.expert + 1) * rank)
            b = b[:, self.expert :: self.experts]  # PEFT has the experts innermost there
        return rows.to(wide) + b.to(wide) @ a.to(wide) * self.scaling


class MergedSource(Source):
    """A base with an adapter added and the adapter's whole modules in place of its own, rounded once to the
    dtypes that are asked for.
    """

    def __init__(
        self,
        base: HfReader,
        adapter: PeftAdapter,
        deltas: Mapping[str, _Delta],
        saved: Mapping[str, str],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """`saved` gives the adapter's name of a tensor that it stores whole by the base's."""
        self.directory, self._base, self._adapter = base.directory, base, adapter
        self._deltas, self._saved, self._dtypes = deltas, saved, dtypes

    def files(self) -> list[Path]:
        # The adapter's configuration is part of what the tensors are: it has the scales.
        config = self._adapter.directory / CONFIG_FILE
        return [*self._base.files(), *self._adapter.reader.files(), config]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        result = new_or_given((stop - start, *self.shape(name)[1:]), self._dtypes[name], out)
        if name in self._saved:
            return result.copy_(self._adapter.reader.read_rows(self._saved[name], start, stop))
        rows = self._base.read_rows(name, start, stop)
        if name in self._deltas:
            rows = self._deltas[name].added_to(rows, start, self._adapter.reader)
        return result.copy_(rows)


def merge(
    model_dir: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    options: TransferOptions | None = None,
) -> ConvertReport:
    """`plan_merge`, carried out."""
    plan = plan_merge(model_dir, adapter_dir, dtype=dtype, max_shard_size=max_shard_size)
    return carry_out(plan, output_dir, options=options)


def plan_merge(
    model_dir: str | Path,
    adapter_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> Conversion:
    """The base with the adapter added to its weights, and with the modules that the adapter stores whole.

    Weights keep the base's dtype unless `dtype` is given, and the base's files unless `max_shard_size`, in
    bytes, is. Raises ModelError for what is wrong with base or adapter, and for an adapter whose embedding
    and LM head are no longer one where the base ties them.
    """
    spec, base = load_model_spec(model_dir), HfReader(model_dir)
    check_weights(base, weight_map(spec))
    adapter = open_adapter(adapter_dir, spec)
    plan = {
        name: PlannedTensor(name=name, dtype=dtype or base.dtype(name), shape=base.shape(name))
        for name in model_tensors(base)
    }
    dtypes = {name: tensor.dtype for name, tensor in plan.items()}
    saved = {name: tensor.name for name, tensor in saved_tensors(spec, adapter.lora).items()}
    source = MergedSource(base, adapter, _deltas(spec, adapter), saved, dtypes)
    if spec.tied_embeddings:
        _check_tied(base, adapter, saved, dtypes[EMBEDDING])
    layout = hf_layout(source_layout(base), plan, max_shard_size)

    def finish(stage: Path) -> None:
        copy_companions(model_dir, stage, error=ModelError)
        set_config_dtype(stage / "config.json", set(dtypes.values()))

    files = output_files(layout, source)
    return Conversion(kind="merged", source=source, files=files, tensors=len(plan), finish=finish)


def _check_tied(base: HfReader, adapter: PeftAdapter, saved: Mapping[str, str], dtype: torch.dtype) -> None:
    """Raise ModelError unless the merged embedding is the merged LM head, too, as tied embeddings have to be.
    PEFT would leave the model untied in memory, which no checkpoint of a tied model can say.
    """
    if EMBEDDING not in saved and LM_HEAD not in saved:
        return
    for first, last in row_blocks(base, EMBEDDING):
        # What is not saved is the base's embedding, be it for the LM head.
        embedding, head = (
            adapter.reader.read_rows(saved[name], first, last)
            if name in saved
            else base.read_rows(EMBEDDING, first, last)
            for name in (EMBEDDING, LM_HEAD)
        )
        if not torch.equal(embedding.to(dtype), head.to(dtype)):
            raise ModelError(
                f"{adapter.directory}: modules_to_save makes {EMBEDDING} and {LM_HEAD} different, which "
                f"{base.directory / 'config.json'} ties (tie_word_embeddings); merge into a base that has an "
                f"{LM_HEAD} of its own and tie_word_embeddings false"
            )


def _deltas(spec: ModelSpec, adapter: PeftAdapter) -> Mapping[str, _Delta]:
    """What is added to which tensor of the base."""
    deltas: dict[str, _Delta] = {}
    for place, shape in adapter.lora.targets(spec):
        names = (adapter_name(place.layer, f"{place.linear}.{place.name}_{k}") for k in ("lora_A", "lora_B"))
        a, b = (adapter.weights[name].hf[0].name for name in names)
        delta = _Delta(a=a, b=b, scaling=shape.scaling)
        own = {f"{place.linear_module}.weight": delta}
        deltas |= own if place.experts is None else _of_experts(place, delta)
    return deltas


def _of_experts(place: Projection, delta: _Delta) -> dict[str, _Delta]:
    """The tensors that a hub checkpoint has of one parameter of experts."""
    assert place.experts is not None
    block, _, name = place.module.rpartition(".")
    parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    return {
        f"{block}.{expert}.{part}.weight": replace(
            delta,
            expert=expert,
            experts=place.experts,
            first_row=index * place.out_features // len(parts),
        )
        for expert in range(place.experts)
        for index, part in enumerate(parts)
    }
