"""The same prompts through transformers and through the engine: equal models agree, and of others the first
layer that differs is named.
"""

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import converters.logits as module
from converters.convert import to_mcore
from converters.logits import BOUND, LogitsReport, Prompt, check_prompts, compare_logits, why_incomparable
from engine.errors import CheckpointError, ConfigError, ModelError
from tests.support.models import MOE_MODELS, save_tiny_model

from .conftest import change, edit_json, tensors_of

KINDS = ("qwen2_tied", "qwen2_untied", "qwen3_head_dim", "qwen3_odd_vocabulary")
LAYERS = 3
STAGES = ["embedding", "layer 0", "layer 1", "layer 2", "final norm", "logits"]
EMBEDDING = "model.embed_tokens.weight"

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(kind): a model in fp32 that is shared by all tests."""
    root = tmp_path_factory.mktemp("logits")

    @cache
    def model(kind: str) -> Path:
        return save_tiny_model(kind, root / kind, num_hidden_layers=LAYERS)

    return model


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    assert not dist.is_initialized()
    yield
    assert not dist.is_initialized()


def prompts(*lengths: int, vocabulary: int = 509) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    return [
        Prompt(text="", ids=tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()))
        for n in lengths
    ]


def changed(source: Path, target: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model with one other tensor."""
    shutil.copytree(source, target)
    change(target, lambda tensors: tensors.update({name: edit(tensors[name])}))
    return target


def stage_of(report: LogitsReport, stage: str) -> module.StageDifference:
    return next(item for item in report.stages if item.stage == stage)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_checkpoint_computes_the_same(make: Make, tmp_path: Path, kind: str) -> None:
    """509 words are padded to 512, whose logits must not count."""
    to_mcore(make(kind), tmp_path / "mcore")
    given = prompts(1, 7, 30, 2)
    check_prompts(make(kind), tmp_path / "mcore", given)
    assert why_incomparable(make(kind), tmp_path / "mcore") is None
    report = compare_logits(make(kind), tmp_path / "mcore", given)
    assert [stage.stage for stage in report.stages] == STAGES
    assert report.same
    assert max(stage.relative_diff for stage in report.stages) < 1e-5
    assert stage_of(report, "embedding").max_abs_diff == 0.0
    assert (report.prompts, report.tokens, report.argmax_agreement) == (4, 40, 1.0)
    assert abs(report.mean_kl) < 1e-9
    assert report.summary().startswith("same logits: largest relative difference")
    assert "argmax agrees on 40 of 40 tokens of 4 prompts" in report.summary()


def test_in_a_process_whose_platform_is_open(make: Make) -> None:
    """There torch's functions are others than those that transformers knows."""
    model = str(make("qwen3_head_dim"))
    code = f"""
import transformers.models.qwen3.modeling_qwen3
from engine.runtime.platform import open_platform
open_platform(device="cpu", dtype="float32", transformer_impl="torch", local_rank=0)
from converters.logits import Prompt, compare_logits
report = compare_logits({model!r}, {model!r}, [Prompt(text="", ids=(5, 6, 7, 8, 9))])
assert report.same, report
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_head_dim"])
def test_a_hugging_face_directory_computes_the_same(make: Make, kind: str) -> None:
    assert compare_logits(make(kind), make(kind), prompts(5, 9)).same


def nudge(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        (EMBEDDING, "embedding"),
        ("model.layers.0.input_layernorm.weight", "layer 0"),
        ("model.layers.1.self_attn.q_proj.weight", "layer 1"),
        ("model.layers.1.self_attn.o_proj.weight", "layer 1"),
        ("model.layers.1.mlp.gate_proj.weight", "layer 1"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2"),
        ("model.norm.weight", "final norm"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_head_dim"])
def test_the_first_layer_that_differs_is_named(
    make: Make, tmp_path: Path, kind: str, name: str, stage: str
) -> None:
    other = changed(make(kind), tmp_path / "other", name, nudge)
    to_mcore(other, tmp_path / "mcore")
    report = compare_logits(make(kind), tmp_path / "mcore", prompts(12, 5))
    assert report.first_difference == stage
    assert not report.same
    before = STAGES[: STAGES.index(stage)]
    assert all(stage_of(report, earlier).relative_diff < 1e-5 for earlier in before)
    assert stage_of(report, "logits").relative_diff > BOUND
    assert f"NOT the same logits: first different at {stage}," in report.summary()
    assert report.as_dict()["first_difference"] == stage


@pytest.mark.parametrize("form", ["hf", "mcore"])
@pytest.mark.parametrize("kind", MOE_MODELS)
def test_experts_compute_the_same(make: Make, tmp_path: Path, kind: str, form: str) -> None:
    other = make(kind)
    if form == "mcore":
        other = tmp_path / "mcore"
        to_mcore(make(kind), other)
    report = compare_logits(make(kind), other, prompts(20, 1, 7))
    assert report.same
    assert max(stage.relative_diff for stage in report.stages) < 1e-5
    assert [stage.stage for stage in report.stages] == STAGES


@pytest.mark.parametrize(
    ("kind", "name", "stage"),
    [
        ("qwen2_moe", "model.layers.0.mlp.down_proj.weight", "layer 0"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert.up_proj.weight", "layer 1"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight", "layer 1"),
        ("qwen2_moe", "model.layers.1.mlp.gate.weight", "layer 1"),
        ("qwen2_moe", "model.layers.2.mlp.experts.5.gate_proj.weight", "layer 2"),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.up_proj.weight", "layer 0"),
        ("qwen3_moe", "model.layers.2.mlp.experts.7.down_proj.weight", "layer 2"),
        ("qwen2_untied", "lm_head.weight", "logits"),
        ("qwen2_untied", "model.layers.1.self_attn.v_proj.bias", "layer 1"),
        ("qwen3_head_dim", "model.layers.2.self_attn.k_norm.weight", "layer 2"),
    ],
)
def test_what_only_some_models_have(make: Make, tmp_path: Path, kind: str, name: str, stage: str) -> None:
    other = changed(make(kind), tmp_path / "other", name, nudge)
    assert compare_logits(make(kind), other, prompts(40)).first_difference == stage


def test_a_checkpoint_in_bf16_differs_from_the_start(make: Make, tmp_path: Path) -> None:
    to_mcore(make("qwen3_head_dim"), tmp_path / "mcore", dtype=torch.bfloat16)
    report = compare_logits(make("qwen3_head_dim"), tmp_path / "mcore", prompts(20))
    assert report.first_difference == "embedding"
    assert BOUND < stage_of(report, "logits").relative_diff < 0.1


def test_a_configuration_that_differs_shows_in_the_first_layer(make: Make, tmp_path: Path) -> None:
    shutil.copytree(make("qwen2_tied"), tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", lambda c: c.update(rms_norm_eps=1e-2))
    report = compare_logits(make("qwen2_tied"), tmp_path / "other", prompts(8))
    assert report.first_difference == "layer 0"


def test_the_numbers_are_those_of_the_logits(make: Make, tmp_path: Path) -> None:
    """Against transformers on both sides, computed here."""
    source = make("qwen2_untied")
    other = changed(source, tmp_path / "other", "lm_head.weight", nudge)
    given = prompts(40, 3)
    report = compare_logits(source, other, given)
    expected, found = [], []
    for directory, logits in ((source, expected), (other, found)):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for prompt in given:
            with torch.no_grad():
                logits.append(model(torch.tensor([prompt.ids])).logits[0].double())
    p, q = torch.cat(expected), torch.cat(found)
    stage = stage_of(report, "logits")
    assert stage.max_abs_diff == pytest.approx(float((p - q).abs().max()), rel=1e-4)
    relative = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True)]
    assert stage.relative_diff == pytest.approx(max(relative), rel=1e-4)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert report.mean_kl == pytest.approx(float(kl), rel=1e-4)
    agreeing = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert 0 < agreeing < 1
    assert report.argmax_agreement == pytest.approx(float(agreeing))


@pytest.mark.parametrize("beside", [False, True])
def test_batches_and_the_order_of_the_models_change_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """One model after the other where what is compared takes less memory than a model, else both at once."""
    source = make("qwen3_head_dim")
    other = changed(source, tmp_path / "other", "model.layers.1.mlp.up_proj.weight", nudge)
    models, there = [], []
    load, run = module._load_reference, module._run_packed

    def watch_load(*args: Any) -> Any:
        model = load(*args)
        models.append(weakref.ref(model))
        return model

    def watch_run(*args: Any) -> Any:
        there.append(models[-1]() is not None)
        return run(*args)

    monkeypatch.setattr(module, "_load_reference", watch_load)
    monkeypatch.setattr(module, "_run_packed", watch_run)
    monkeypatch.setattr(module, "_copy_bytes", lambda spec: 0 if beside else 10**9)
    given = prompts(4, 9, 30, 1, 6)
    together = compare_logits(source, other, given)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 10)
    assert [[len(p.ids) for p in batch] for batch in module._batches(given)] == [[4], [9], [30], [1, 6]]
    apart = compare_logits(source, other, given)
    assert there == [beside] * (1 + 4)
    assert (apart.tokens, apart.prompts) == (together.tokens, together.prompts) == (50, 5)
    assert apart.first_difference == together.first_difference == "layer 1"
    for mine, theirs in zip(apart.stages, together.stages, strict=True):
        assert mine.relative_diff == pytest.approx(theirs.relative_diff, abs=1e-6, rel=1e-3)
    assert apart.mean_kl == pytest.approx(together.mean_kl, rel=1e-3)


def test_nan_in_both_is_the_same_and_in_one_is_not(make: Make, tmp_path: Path) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_fill(0, torch.tensor([7]), float("nan"))

    name = "model.layers.1.mlp.down_proj.weight"
    other = changed(make("qwen2_tied"), tmp_path / "other", name, spoil)
    one = compare_logits(make("qwen2_tied"), other, prompts(6))
    assert one.first_difference == "layer 1"
    content = json.loads(json.dumps(one.as_dict(), allow_nan=False))
    assert content["stages"][2] == {"stage": "layer 1", "max_abs_diff": "nan", "relative_diff": "nan"}
    assert content["mean_kl"] == "nan"
    both = compare_logits(other, other, prompts(6))
    assert both.same
    assert stage_of(both, "layer 1").relative_diff < 1e-5


def test_the_table_has_a_row_for_every_stage(make: Make) -> None:
    report = compare_logits(make("qwen2_tied"), make("qwen2_tied"), prompts(3))
    assert report.table().row_count == len(STAGES)
    assert report.as_dict()["bound"] == BOUND


# What is refused


def test_a_tokenizer_of_another_model(make: Make) -> None:
    model = make("qwen3_odd_vocabulary")
    with pytest.raises(ModelError, match=r"gives token 509, but config\.json has a vocab_size of 509"):
        check_prompts(model, model, [Prompt(text="", ids=(3, 509, 4))])


def test_too_little_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of the weights, and what the prompts leave in memory, or a second copy if that is less."""
    model, weights = make("qwen2_tied"), tensors_of(make("qwen2_tied"))
    copy = 4 * sum(tensor.numel() for tensor in weights.values())
    few, many = prompts(2), prompts(*[500] * 2000)
    state = 4 * 2 * (64 * (LAYERS + 2) + 512)

    def check(available: int, given: list[Prompt]) -> None:
        monkeypatch.setattr(
            module.psutil, "virtual_memory", lambda: SimpleNamespace(available=available), raising=True
        )
        check_prompts(model, model, given)

    check(copy + state, few)
    check(2 * copy, many)
    for available, given in ((copy + state - 1, few), (2 * copy - 1, many)):
        with pytest.raises(ConfigError, match=r"--level logits needs 0\.0 GB of memory") as caught:
            check(available, given)
        assert "\n" not in str(caught.value)


def test_a_directory_with_an_adapter_in_it(make: Make, tmp_path: Path) -> None:
    shutil.copytree(make("qwen2_tied"), tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has an adapter_config\.json, which transformers would apply"):
        check_prompts(tmp_path / "model", tmp_path / "model", prompts(2))


def test_a_checkpoint_without_configuration(make: Make, tmp_path: Path) -> None:
    to_mcore(make("qwen2_tied"), tmp_path / "mcore")
    shutil.rmtree(tmp_path / "mcore" / "hf_companions")
    with pytest.raises(CheckpointError, match="has no hf_companions"):
        check_prompts(make("qwen2_tied"), tmp_path / "mcore", prompts(2))


def test_models_that_cannot_be_laid_side_by_side(make: Make, tmp_path: Path) -> None:
    source = make("qwen2_tied")
    small = save_tiny_model("qwen2_tied", tmp_path / "small", num_hidden_layers=2)
    assert why_incomparable(source, small) == f"num_layers is 3 in {source} and 2 in {small}"
    shutil.copytree(source, tmp_path / "lacking")
    change(tmp_path / "lacking", lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight [64] is missing" in str(why_incomparable(source, tmp_path / "lacking"))


def test_what_transformers_makes_something_else_of(make: Make, tmp_path: Path) -> None:
    shutil.copytree(make("qwen2_untied"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    edit_json(config, lambda c: c.update(model_type="llama"))
    with pytest.raises(ModelError, match="transformers makes a LlamaForCausalLM of it") as caught:
        compare_logits(tmp_path / "model", make("qwen2_untied"), prompts(2))
    assert "\n" not in str(caught.value)
    edit_json(config, lambda c: c.update(model_type="no such model"))
    with pytest.raises(ModelError, match="transformers cannot load") as caught:
        compare_logits(tmp_path / "model", make("qwen2_untied"), prompts(2))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_fails_while_it_is_loaded(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the process group was opened, which is closed again."""
    to_mcore(make("qwen2_tied"), tmp_path / "mcore")

    def fail(*args: Any) -> None:
        assert dist.is_initialized()
        raise CheckpointError("it is gone")

    monkeypatch.setattr("converters.load.load_model_weights", fail)
    with pytest.raises(CheckpointError, match="it is gone"):
        compare_logits(make("qwen2_tied"), tmp_path / "mcore", prompts(2))


def test_no_code_of_the_directory_is_run(make: Make, tmp_path: Path) -> None:
    shutil.copytree(make("qwen2_tied"), tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_json(
        tmp_path / "model" / "config.json",
        lambda c: c.update(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
    )
    assert compare_logits(tmp_path / "model", make("qwen2_tied"), prompts(2)).same
    assert not (tmp_path / "ran").exists()
