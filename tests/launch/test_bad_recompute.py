"""Recomputation and fp8 that the layers of this machine do not have: one line, exit code 2, and not one file
changed.
"""

from pathlib import Path

import pytest
import torch

from engine.config.device import check_layers
from engine.config.options import ParallelOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.config.recompute import RECOMPUTE_MODULES
from engine.errors import ConfigError
from engine.model.provider import transformer_config
from engine.model.spec import load_model_spec
from engine.runtime.platform import Platform, open_platform
from launch.cli import main
from tests.launch.runs import Place, have_cards

MODULES = ", ".join(RECOMPUTE_MODULES)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--recompute_modules mlp_act", "recompute_modules needs recompute_granularity selective"),
        (
            "--recompute_granularity full --recompute_modules mlp_act",
            "recompute_modules needs recompute_granularity selective",
        ),
        (
            "--recompute_granularity selective --recompute_modules mlp_act attention",
            f"recompute_modules 'attention' is not known; choose from {MODULES}",
        ),
        (
            "--recompute_granularity selective --recompute_modules layernorm mlp_act",
            "recompute_modules 'layernorm' needs Transformer Engine; leave it out",
        ),
        (
            "--recompute_granularity selective --recompute_num_layers 2",
            "recompute_method and recompute_num_layers need recompute_granularity full",
        ),
        (
            "--train_type lora --recompute_granularity selective --recompute_modules mlp_act",
            "recompute_modules 'mlp_act' does nothing with lora_dropout 0.05",
        ),
        ("--fp8_recipe fp4", "fp8_recipe must be one of delayed, tensorwise, blockwise"),
    ],
)
def test_refused_before_anything_starts(place: Place, words: str, named: str) -> None:
    place.refused(place.sft(*words.split()), named)
    place.refused(place.sft("--dry_run", *words.split()), named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--fp8_recipe delayed", "fp8_recipe delayed needs Transformer Engine on a GPU"),
        ("--fp8_recipe delayed --device auto --transformer_impl torch", "needs Transformer Engine on a GPU"),
        ("--transformer_impl te", "transformer_impl te: Transformer Engine needs CUDA"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(place: Place, words: str, named: str) -> None:
    said = [place.refused(place.sft(*dry, *words.split()), named) for dry in ([], ["--dry_run"])]
    assert said[0] == said[1]


def test_a_rank_refuses_it_in_the_same_words() -> None:
    for impl, recipe in (("te", None), ("auto", "delayed"), ("torch", "delayed")):
        on_paper = {"transformer_impl": impl, "fp8_recipe": recipe}
        with pytest.raises(ConfigError) as of_paper:
            check_layers(**on_paper, on_cuda=False, te_installed=True)
        with pytest.raises(ConfigError) as of_rank:
            open_platform(**on_paper, device="cpu", dtype=None, local_rank=0)
        assert str(of_rank.value) == str(of_paper.value)


FOR_A_GPU = (
    "--fp8_recipe delayed",
    "--transformer_impl te",
    "--recompute_granularity selective --recompute_modules layernorm",
)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("words", FOR_A_GPU)
def test_a_dry_run_away_from_gpus_is_for_another_machine(
    place: Place, monkeypatch: pytest.MonkeyPatch, words: str, device: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(place.sft("--dry_run", *words.split(), "--device", device)) == 0
    assert "memory of a rank on a GPU, an estimate in GiB: bfloat16" in place.capsys.readouterr().out


def test_what_no_gpu_does_is_refused_away_from_them(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = "--device auto --fp8_recipe delayed --recompute_granularity selective --recompute_modules mlp_act"
    named = "recompute_modules 'mlp_act' does nothing with fp8_recipe delayed in full training"
    place.refused(place.sft("--dry_run", *words.split()), named)


@pytest.mark.parametrize("words", FOR_A_GPU)
def test_a_dry_run_beside_a_gpu_is_for_this_machine(
    place: Place, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    have_cards(monkeypatch, place.root, "81559, NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("launch.gpu.find_spec", lambda name: None)
    place.refused(place.sft("--dry_run", *words.split(), "--device", "auto"), "Transformer Engine")


def platform(*, use_te: bool, fp8_recipe: str | None = None) -> Platform:
    return Platform(
        device=torch.device("cuda", 0),
        backend="nccl",
        dtype=torch.bfloat16,
        use_te=use_te,
        fp8_recipe=fp8_recipe,
    )


def test_norms_are_computed_again_only_where_megatron_can(tiny_model: Path) -> None:
    """Its code for them calls Transformer Engine, and does not know delayed scaling."""
    spec = load_model_spec(tiny_model)
    layout = ParallelLayout.resolve(ParallelOptions(), num_layers=spec.num_layers, world_size=1)
    options = RecomputeOptions(recompute_granularity="selective", recompute_modules=["layernorm", "mlp_act"])
    config = transformer_config(spec, layout, platform(use_te=True), options)
    assert config.recompute_granularity == "selective"
    assert config.recompute_modules == ["layernorm"], "Braid's own mlp_act is unknown to Megatron"
    with pytest.raises(ConfigError, match="'layernorm' needs Transformer Engine"):
        transformer_config(spec, layout, platform(use_te=False), options)
    delayed = platform(use_te=True, fp8_recipe="delayed")
    options = RecomputeOptions(recompute_granularity="selective", recompute_modules=["layernorm"])
    with pytest.raises(ConfigError, match="'layernorm' does not go with fp8_recipe delayed"):
        transformer_config(spec, layout, delayed, options)


def test_an_activation_is_computed_again_only_where_nobody_keeps_it(tiny_model: Path) -> None:
    """A linear that is trained in fp8 has a copy of its own; adapters have the activation itself."""
    spec = load_model_spec(tiny_model)
    layout = ParallelLayout.resolve(ParallelOptions(), num_layers=spec.num_layers, world_size=1)
    options = RecomputeOptions(recompute_granularity="selective", recompute_modules=["mlp_act"])
    fp8 = platform(use_te=True, fp8_recipe="tensorwise")
    with pytest.raises(ConfigError, match="'mlp_act' does nothing with fp8_recipe tensorwise in full"):
        transformer_config(spec, layout, fp8, options)
    assert transformer_config(spec, layout, fp8, options, lora=True).fp8 == "hybrid"
    assert transformer_config(spec, layout, platform(use_te=True), options).fp8 is None
