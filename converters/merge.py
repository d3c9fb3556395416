"""A base and a LoRA adapter -> one Hugging Face checkpoint. Both are read, neither is touched."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters.adapter import PeftAdapter, open_adapter
from converters.conversion import Conversion, ConvertReport, carry_out
from converters.convert import hf_layout, output_files, set_config_dtype
from converters.files import copy_companions
from converters.hf.layout import PlannedTensor, source_layout
from converters.hf.reader import HfReader, check_weights, model_tensors
from converters.mapping import weight_map
from converters.source import Source, new_or_given
from converters.transfer import TransferOptions
from engine.errors import ModelError
from engine.model.lora_spec import adapter_name, hf_module
from engine.model.spec import ModelSpec, load_model_spec


@dataclass(frozen=True, kw_only=True)
class _Delta:
    """scaling * B A, of the base's tensor `W`."""

    a: str
    b: str
    scaling: float

    def added_to(self, rows: Tensor, start: int, reader: HfReader) -> Tensor:
        """W + scaling * B A for rows of W from `start` on, in fp32 or wider."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        b = reader.read_rows(self.b, start, start + rows.shape[0])
        return rows.to(wide) + b.to(wide) @ reader.read(self.a).to(wide) * self.scaling


class MergedSource(Source):
    """A base with an adapter added, rounded once to the dtypes that are asked for."""

    def __init__(
        self,
        base: HfReader,
        adapter: PeftAdapter,
        deltas: Mapping[str, _Delta],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self.directory, self._base, self._adapter, self._deltas, self._dtypes = (
            base.directory,
            base,
            adapter,
            deltas,
            dtypes,
        )

    def files(self) -> list[Path]:
        return [*self._base.files(), *self._adapter.reader.files()]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        result = new_or_given((stop - start, *self.shape(name)[1:]), self._dtypes[name], out)
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
    """The base with the adapter added to its weights.

    Weights keep the base's dtype unless `dtype` is given, and the base's files unless `max_shard_size`, in
    bytes, is. Raises ModelError for what is wrong with base or adapter.
    """
    spec, base = load_model_spec(model_dir), HfReader(model_dir)
    check_weights(base, weight_map(spec))
    adapter = open_adapter(adapter_dir, spec)
    plan = {
        name: PlannedTensor(name=name, dtype=dtype or base.dtype(name), shape=base.shape(name))
        for name in model_tensors(base)
    }
    dtypes = {name: tensor.dtype for name, tensor in plan.items()}
    source = MergedSource(base, adapter, _deltas(spec, adapter), dtypes)
    layout = hf_layout(source_layout(base), plan, max_shard_size)

    def finish(stage: Path) -> None:
        copy_companions(model_dir, stage, error=ModelError)
        set_config_dtype(stage / "config.json", set(dtypes.values()))

    files = output_files(layout, source)
    return Conversion(kind="hf", source=source, files=files, tensors=len(plan), finish=finish)


def _deltas(spec: ModelSpec, adapter: PeftAdapter) -> Mapping[str, _Delta]:
    """What is added to which tensor of the base."""
    deltas = {}
    for layer, linear, projection, shape in adapter.lora.targets(spec.num_layers):
        names = (adapter_name(layer, f"{linear}.{projection}_{kind}") for kind in ("lora_A", "lora_B"))
        a, b = (adapter.weights[name].hf[0].name for name in names)
        deltas[f"{hf_module(layer, projection)}.weight"] = _Delta(a=a, b=b, scaling=shape.scaling)
    return deltas
