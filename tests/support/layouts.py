"""Layouts by the short names of their degrees."""

from typing import Any

from engine.config.options import ParallelOptions

NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "split": "decoder_layers_per_stage",
    "sp": "sequence_parallel",
}


def degrees(**short: Any) -> ParallelOptions:
    """As `degrees(tp=2, ep=4)`."""
    return ParallelOptions(**{NAMES[name]: value for name, value in short.items()})
