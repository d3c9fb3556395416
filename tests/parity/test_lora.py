"""LoRA inside Megatron's fused linears is PEFT's LoRA: loss, gradients of A and B, adapter after three AdamW
steps.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.adapter import open_adapter
from engine.config.options import ParallelOptions, RecomputeOptions
from engine.model.spec import load_model_spec
from tests.parity.test_transformers import LAYOUTS, assert_parity, train_on, train_plainly
from tests.support.models import FEW_KV_HEADS, save_adapter, save_tiny_model
from tests.support.reference import Reference
from tests.support.training import LayoutResult
from tests.support.workers import WorkerPool

NAMES = ("TP2", "TP4", "PP2", "PP2xVPP2", "TP2xDP2")
MODELS = ("qwen2_tied", "qwen3_head_dim")
Layout = tuple[int, ParallelOptions, int]
ADAPTERS: Mapping[str, dict[str, Any]] = {
    "all-linear": {},
    "subset": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}
# Settings whose meaning does not depend on the layout: once, under TP2 x PP2.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.\w+": 2},
        "alpha_pattern": {"down_proj": 24},
    },
    "regular expression": {"target_modules": r".*\.(k_proj|o_proj|up_proj)"},
    "some layers": {"target_modules": ["gate_proj", "o_proj"], "layers_to_transform": [1, 2]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
}


class Bases:
    """Models, adapters and PEFT's results, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(
            lambda name, layers: save_tiny_model(name, root / f"{name}-{layers}", num_hidden_layers=layers)
        )
        self.adapter = cache(self._make)
        self.reference = cache(self._train)

    def _make(self, model: str, layers: int, adapter: str) -> Path:
        settings = (ADAPTERS | SETTINGS)[adapter]
        return save_adapter(self.model(model, layers), self.root / f"{model}-{layers}-{adapter}", **settings)

    def _train(self, model: str, layers: int, adapter: str) -> Reference:
        adapter_dir = str(self.adapter(model, layers, adapter))
        return train_plainly(self.model(model, layers), adapter_dir=adapter_dir)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("lora"))


def check(
    workers: WorkerPool, bases: Bases, model: str, adapter: str, layout: str | Layout, **changes: Any
) -> None:
    world_size, parallel, layers = LAYOUTS[layout] if isinstance(layout, str) else layout
    layers = 4 if adapter in SETTINGS else layers
    model_dir, adapter_dir = bases.model(model, layers), bases.adapter(model, layers, adapter)
    results = train_on(workers, world_size, model_dir, parallel, adapter=str(adapter_dir), **changes)
    weights = open_adapter(adapter_dir, load_model_spec(model_dir)).weights
    assert_parity(results, bases.reference(model, layers, adapter), model_dir, weights)


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model", MODELS)
def test_layout_equals_peft(workers: WorkerPool, bases: Bases, model: str, adapter: str, layout: str) -> None:
    check(workers, bases, model, adapter, layout)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_more_ranks_than_key_value_heads_equals_peft(workers: WorkerPool, bases: Bases, adapter: str) -> None:
    check(workers, bases, FEW_KV_HEADS, adapter, "TP4")


def test_context_parallel_lora_equals_peft(workers: WorkerPool, bases: Bases) -> None:
    parallel = ParallelOptions(context_parallel_size=2, tensor_model_parallel_size=2)
    check(workers, bases, "qwen2_tied", "all-linear", (4, parallel, 2))


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_equals_peft(workers: WorkerPool, bases: Bases, setting: str) -> None:
    check(workers, bases, "qwen3_head_dim", setting, "TP2xPP2")


@pytest.mark.parametrize(
    ("adapter", "recompute"),
    [
        ("subset", RecomputeOptions(recompute_granularity="full")),
        ("subset", RecomputeOptions(recompute_granularity="selective")),
        # The activation is the input of the frozen linear and of its adapter's A.
        ("all-linear", RecomputeOptions(recompute_granularity="selective", recompute_modules=["mlp_act"])),
    ],
    ids=["layers", "attention", "activations"],
)
def test_recomputation_equals_peft(
    workers: WorkerPool, bases: Bases, adapter: str, recompute: RecomputeOptions
) -> None:
    """Frozen embeddings ask for no gradient, at which recomputation would lose the first stage's."""
    check(workers, bases, "qwen3_head_dim", adapter, "TP2xPP2", recompute=recompute)


@pytest.mark.parametrize("optimizer", [{"use_distributed_optimizer": False}, {"overlap_param_gather": False}])
def test_optimizer_equals_peft(workers: WorkerPool, bases: Bases, optimizer: dict[str, Any]) -> None:
    check(workers, bases, "qwen2_tied", "all-linear", "TP2xDP2", optimizer=optimizer)


def test_recomputation_drops_the_same_inputs_again(workers: WorkerPool, bases: Bases, tmp_path: Path) -> None:
    """Dropout cannot equal PEFT's, but a recomputed layer must drop what it dropped before."""
    model_dir = bases.model("qwen3_head_dim", 2)
    adapter = str(save_adapter(model_dir, tmp_path / "adapter", lora_dropout=0.3))
    world_size, parallel, _ = LAYOUTS["TP2xDP2"]

    def train(**changes: Any) -> list[LayoutResult]:
        return train_on(workers, world_size, model_dir, parallel, adapter=adapter, **changes)

    plain, again = train(), train(recompute=RecomputeOptions(gradient_checkpointing=True))
    assert plain[0].losses == again[0].losses
    assert plain[0].losses[0] != plain[0].eval_loss, "nothing was dropped"
    for name, gradient in plain[0].gradients.items():
        torch.testing.assert_close(again[0].gradients[name], gradient, rtol=1e-5, atol=1e-7)
