"""LoRA in models with experts is PEFT's LoRA, in attention, shared and routed experts: loss, gradients of A
and B, adapter after three AdamW steps.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from converters.adapter import open_adapter
from converters.merge import merge
from engine.config.options import MoeOptions, RecomputeOptions
from engine.model.lora_spec import LoraSpec
from engine.model.spec import load_model_spec
from tests.parity.test_experts import AUX_LOSS_COEF, LAYOUTS
from tests.parity.test_transformers import assert_parity, train_on, train_plainly
from tests.support.models import MOE_MODELS, save_adapter, save_tiny_model
from tests.support.reference import Reference
from tests.support.workers import WorkerPool

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATE_AND_UP = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# By model: in a Qwen3-MoE gate_proj and others mean experts to PEFT.
LINEARS: Mapping[str, list[str]] = {
    "qwen2_moe": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
    "qwen3_moe": ATTENTION,
}
SETTINGS: Mapping[str, dict[str, Any]] = {
    "one of two": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "the other": {"target_modules": [], "target_parameters": ["gate_up_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["o_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"gate_up_proj": 6, "o_proj": 2},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 24},
    },
}


class Bases:
    """Models, adapters and PEFT's results, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(lambda name: save_tiny_model(name, root / name, num_hidden_layers=2))
        self.adapter = cache(self._make)
        self.reference = cache(self._train)

    def _make(self, model: str, adapter: str) -> Path:
        everything = {"target_modules": LINEARS[model], "target_parameters": EXPERTS}
        settings = {"attention": {"target_modules": ATTENTION}, "everything": everything, **SETTINGS}
        return save_adapter(self.model(model), self.root / f"{model}-{adapter}", **settings[adapter])

    def _train(self, model: str, adapter: str) -> Reference:
        adapter_dir = str(self.adapter(model, adapter))
        return train_plainly(self.model(model), adapter_dir=adapter_dir, aux_loss_coef=AUX_LOSS_COEF)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("lora"))


def check(workers: WorkerPool, bases: Bases, model: str, adapter: str, layout: str, **changes: Any) -> None:
    world_size, parallel, _ = LAYOUTS[layout]
    model_dir, adapter_dir = bases.model(model), bases.adapter(model, adapter)
    moe = changes.pop("moe", MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF))
    results = train_on(workers, world_size, model_dir, parallel, adapter=str(adapter_dir), moe=moe, **changes)
    weights = open_adapter(adapter_dir, load_model_spec(model_dir)).weights
    assert_parity(results, bases.reference(model, adapter), model_dir, weights)


@pytest.mark.parametrize(
    "layout", ["one process", "EP2", "EP4", "EP2xTP2", "EP2xTP2xDP2", "EP2xPP2", "EP2xDP2", "EP2xCP2"]
)
@pytest.mark.parametrize("model", MOE_MODELS)
def test_every_linear_equals_peft(workers: WorkerPool, bases: Bases, model: str, layout: str) -> None:
    check(workers, bases, model, "everything", layout)


@pytest.mark.parametrize("layout", ["EP2xTP2", "EP2xETP2", "EP2xPP2"])
@pytest.mark.parametrize("model", MOE_MODELS)
def test_attention_equals_peft(workers: WorkerPool, bases: Bases, model: str, layout: str) -> None:
    check(workers, bases, model, "attention", layout)


def mixed(root: Path) -> tuple[Path, Path]:
    """A Qwen3-MoE with a dense layer first, and an adapter of every linear, whose names Braid writes."""
    model = save_tiny_model("qwen3_moe", root / "mixed", num_hidden_layers=2, mlp_only_layers=[0])
    config = LoraSpec(r=4, lora_alpha=8).to_config("", load_model_spec(model))
    names = {name: config[name] for name in ("target_modules", "target_parameters")}
    assert names["target_parameters"] == ["mlp.down_proj.weight", *EXPERTS[::-1], *GATE_AND_UP]
    return model, save_adapter(model, root / "adapter", **names)


@pytest.mark.parametrize("layout", ["one process", "EP2xTP2", "EP2xPP2"])
def test_dense_layers_beside_experts_equal_peft(workers: WorkerPool, tmp_path: Path, layout: str) -> None:
    model, adapter = mixed(tmp_path)
    world_size, parallel, _ = LAYOUTS[layout]
    reference = train_plainly(model, adapter_dir=str(adapter), aux_loss_coef=AUX_LOSS_COEF)
    moe = MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF)
    results = train_on(workers, world_size, model, parallel, adapter=str(adapter), moe=moe)
    assert_parity(results, reference, model, open_adapter(adapter, load_model_spec(model)).weights)


def test_a_merge_of_dense_layers_beside_experts_is_that_of_peft(tmp_path: Path) -> None:
    model, adapter = mixed(tmp_path)
    merge(model, adapter, tmp_path / "merged")
    load = AutoModelForCausalLM.from_pretrained
    expected = PeftModel.from_pretrained(load(model), str(adapter)).merge_and_unload().state_dict()
    found, before = load(tmp_path / "merged").state_dict(), load(model).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    changed = {name.split(".mlp.")[-1] for name in found if not torch.equal(found[name], before[name])}
    assert changed >= {"gate_proj.weight", "up_proj.weight", "down_proj.weight", "experts.down_proj"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_equals_peft(workers: WorkerPool, bases: Bases, setting: str) -> None:
    check(workers, bases, "qwen3_moe", setting, "EP2xTP2")


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": RecomputeOptions(gradient_checkpointing=True)},
        {"optimizer": {"use_distributed_optimizer": False}},
        {"moe": MoeOptions(router_aux_loss_coef=AUX_LOSS_COEF, moe_token_dispatcher_type="allgather")},
    ],
    ids=["recomputed layers", "unsharded", "allgather"],
)
def test_variant_equals_peft(workers: WorkerPool, bases: Bases, changes: dict[str, Any]) -> None:
    check(workers, bases, "qwen2_moe", "everything", "EP2xTP2xDP2", **changes)
