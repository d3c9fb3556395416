"""What the estimate says a layer keeps, against what a forward pass on the CPU leaves behind.

Compared is what every further token adds in every further layer. Plain torch keeps more than GPU kernels do,
and the tests say what; all the rest must be the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from engine.config.options import OptimizerOptions, ParallelOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.model.lora_spec import LoraSpec, read_lora_config
from engine.model.memory import Workload, estimate
from engine.model.spec import ModelSpec, load_model_spec
from tests.support.layouts import degrees
from tests.support.models import save_adapter, save_tiny_model
from tests.support.training import open_run, release
from tests.support.workers import WorkerPool
from tests.training.test_recompute_memory import kept_bytes

LAYERS, TOKENS = (2, 4), (256, 512)


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str = "qwen2_untied"
    tp: int = 1
    cp: int = 1
    """By exchange of tokens for heads: gathered keys and values take another way on a CPU."""
    recompute: Mapping[str, Any] = field(default_factory=dict)
    dropout: float | None = None
    """Of an adapter; None: full training."""
    adapted: str | Sequence[str] = "all-linear"
    """Its target modules."""
    mlp: bool = True
    """silu(gate) * up is computed in the forward pass, and not again."""
    layers: bool = True
    """Layers are not computed again."""

    @property
    def parallel(self) -> ParallelOptions:
        """The layout of all ranks."""
        exchange = "a2a" if self.cp > 1 else None
        return replace(degrees(tp=self.tp, cp=self.cp), cp_comm_type=exchange)

    @property
    def ranks(self) -> int:
        """Which share a micro-batch."""
        return self.tp * self.cp

    def also_kept(self, spec: ModelSpec) -> float:
        """Numbers that plain torch keeps of a token in a layer beside those of the GPU kernels."""
        if not self.layers:
            return 0.0
        hidden, dim = spec.hidden_size, spec.head_dim
        queries, keys = spec.num_attention_heads, spec.num_query_groups
        # silu(gate), for the product with up.
        more = float(spec.ffn_hidden_size if self.mlp else 0)
        if self.dropout is None:  # what norms have before their weight, for its gradient
            more += 2 * hidden
        if self.cp == 1:  # values are a view of all that the fused linear returns
            more += (queries + keys) * dim
        if spec.qk_norm:  # which is in the estimate then; and scales of heads, and these without their weight
            normed = dim if self.dropout is None else 0
            more += (queries + keys) * (normed + 1) - (queries + 2 * keys) * dim
        if self.dropout:  # masks are numbers, not bytes
            inputs = 3 * hidden + queries * dim + 2 * hidden + spec.ffn_hidden_size
            more += 0.75 * inputs
        return more


CASES = {
    "plain": Case(),
    "qk norm": Case(model="qwen3_head_dim"),
    "tp2": Case(tp=2),
    "cp2": Case(cp=2),
    "mlp_act": Case(recompute=selective("mlp_act"), mlp=False),
    "mlp": Case(recompute=selective("mlp"), mlp=False),
    "core_attn": Case(recompute=selective("core_attn")),
    "layers": Case(recompute={"gradient_checkpointing": True}, layers=False),
    "pairs of layers": Case(
        recompute={"gradient_checkpointing": True, "recompute_num_layers": 2}, layers=False
    ),
    "lora": Case(dropout=0.0),
    "lora with dropout": Case(dropout=0.1),
}


def growth(found: Mapping[tuple[int, int], float]) -> float:
    """What a token adds in a layer, from what is there by number of layers and of tokens."""
    (few, many), (short, long) = LAYERS, TOKENS
    added = found[many, long] - found[few, long] - found[many, short] + found[few, short]
    return added / ((many - few) * (long - short))


def estimated(spec: ModelSpec, case: Case, lora: LoraSpec | None, tokens: int) -> float:
    layout = ParallelLayout.resolve(case.parallel, num_layers=spec.num_layers, world_size=case.ranks)
    work = Workload(
        spec=spec,
        layout=layout,
        recompute=RecomputeOptions(**case.recompute),
        optimizer=OptimizerOptions(),
        lora=lora,
        dtype="float32",
        use_te=False,
        fp8=False,
        tokens=tokens,
        micro_batches=1,
    )
    return estimate(work)[0].activations


def both_growths(case: Case, workers: WorkerPool, root: Path, **shape: int) -> tuple[float, float, ModelSpec]:
    """Measured and estimated bytes of a token in a layer."""
    measured, expected = {}, {}
    for layers in LAYERS:
        directory = save_tiny_model(case.model, root / f"model-{layers}", num_hidden_layers=layers, **shape)
        adapter, lora = None, None
        if case.dropout is not None:
            adapter = save_adapter(
                directory,
                root / f"adapter-{layers}",
                lora_dropout=case.dropout,
                target_modules=case.adapted,
            )
            lora = read_lora_config(adapter)
        spec = load_model_spec(directory)
        for tokens in TOKENS:
            found = workers.run(
                kept_bytes,
                case.ranks,
                model_dir=str(directory),
                recompute=dict(case.recompute),
                adapter=str(adapter) if adapter else None,
                tokens=tokens,
                parallel=case.parallel,
            )
            measured[layers, tokens] = found[0][0]
            expected[layers, tokens] = estimated(spec, case, lora, tokens)
    return growth(measured), growth(expected), spec


@pytest.mark.parametrize("name", CASES)
def test_a_layer_keeps_what_the_estimate_says(name: str, workers: WorkerPool, tmp_path: Path) -> None:
    case = CASES[name]
    measured, expected, spec = both_growths(case, workers, tmp_path, hidden_size=32, intermediate_size=640)
    # A single tensor more or less, a few bytes, is no activation.
    assert measured == pytest.approx(expected + 4 * case.also_kept(spec) / case.ranks, abs=1)


@pytest.mark.parametrize("dropout", [None, 0.0], ids=["full", "lora"])
@pytest.mark.parametrize("model", ["qwen2_moe", "qwen3_moe"])
def test_experts_keep_about_what_the_estimate_says(
    model: str, dropout: float | None, workers: WorkerPool, tmp_path: Path
) -> None:
    """Adapters are in the attention alone: frozen experts keep no inputs."""
    case = Case(model=model, mlp=False, dropout=dropout, adapted=["q_proj", "o_proj"])
    measured, expected, spec = both_growths(case, workers, tmp_path)
    moe = spec.moe
    assert moe is not None
    silu = moe.shared_ffn_hidden_size or 0
    assert measured == pytest.approx(expected + 4 * (case.also_kept(spec) + silu), rel=0.05)


def held_elements(
    rank: int, world_size: int, *, model_dir: str, parallel: ParallelOptions, adapter: str | None
) -> tuple[int, int]:
    """Elements of this rank's parameters, and of those that are trained."""
    *_, models, _ = open_run(rank, world_size, model_dir, parallel, OptimizerOptions(), adapter=adapter)
    parameters = [parameter for model in models for parameter in model.parameters()]
    counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    release(models)
    return counts


@pytest.mark.parametrize(
    ("model", "short", "lora"),
    [
        ("qwen3_odd_vocabulary", {"tp": 2, "pp": 2}, False),
        ("qwen2_untied", {"pp": 2, "vpp": 2}, False),
        ("qwen3_few_kv_heads", {"tp": 4}, True),
        ("qwen2_moe", {"tp": 2, "ep": 2}, False),
        ("qwen3_moe", {"ep": 2}, True),
        ("qwen3_moe", {"ep": 2, "etp": 2}, False),
    ],
    ids=str,
)
def test_ranks_hold_what_the_estimate_says(
    model: str, short: dict[str, int], lora: bool, workers: WorkerPool, tmp_path: Path
) -> None:
    directory = save_tiny_model(model, tmp_path / "model")
    experts = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    settings = experts if "moe" in model else {}
    adapter = str(save_adapter(directory, tmp_path / "adapter", **settings)) if lora else None
    found = workers.run(
        held_elements, 4, model_dir=str(directory), parallel=degrees(**short), adapter=adapter
    )
    spec = load_model_spec(directory)
    layout = ParallelLayout.resolve(degrees(**short), num_layers=spec.num_layers, world_size=4)
    work = Workload(
        spec=spec,
        layout=layout,
        recompute=RecomputeOptions(),
        optimizer=OptimizerOptions(),
        lora=read_lora_config(Path(adapter)) if adapter else None,
        dtype="float32",
        use_te=False,
        fp8=False,
        tokens=64,
        micro_batches=2,
    )
    stages = estimate(work)
    for rank, (held, trained) in enumerate(found):
        stage = stages[layout.place(rank).pp]
        assert (held, trained) == (stage.weights / 4, stage.gradients / 4)
