"""Bad input of models with experts, and of experts where there are none: one line, exit code 2, and not one
file changed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch.runs import Place
from tests.support.models import save_tiny_model_with_words

EP, ETP = "--expert_model_parallel_size", "--expert_tensor_parallel_size"
TP, PP = "--tensor_model_parallel_size", "--pipeline_model_parallel_size"
FACTOR, POLICY = "--moe_expert_capacity_factor", "--moe_token_drop_policy"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of eight experts, 32 wide, three to a token; not to be changed."""
    directory = tmp_path_factory.mktemp("tiny") / "qwen3_moe"
    return save_tiny_model_with_words("qwen3_moe", directory, num_hidden_layers=2)


@pytest.fixture
def experts(tiny_experts: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    """A place whose model, a copy to be damaged at will, has experts."""
    model = Path(shutil.copytree(tiny_experts, tmp_path / "experts"))
    capsys.readouterr()
    return Place(root=tmp_path, model=model, data=data, capsys=capsys)


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_the_model_is_good_as_it_is(experts: Place) -> None:
    """So that what is refused below is refused for what is named."""
    from launch.cli import main

    flags = [EP, "2", "--router_aux_loss_coef", "0.01", "--moe_token_dispatcher_type", "allgather"]
    drops = [FACTOR, "1.25", POLICY, "position", "--moe_z_loss_coeff", "0.001"]
    assert main(experts.sft("--dry_run", *flags, *drops)) == 0
    assert not experts.out.exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            f"{EP} 3 --nproc_per_node 3 {TP} 1",
            "expert_model_parallel_size 3 does not divide the model's num_experts 8; choose a divisor of 8",
        ),
        (
            f"{EP} 16 --nproc_per_node 16 {TP} 1",
            "expert_model_parallel_size 16 does not divide the model's num_experts 8",
        ),
        (
            f"{ETP} 3 --nproc_per_node 3 {TP} 1",
            "expert_tensor_parallel_size 3 does not divide the model's moe_intermediate_size 32; choose a",
        ),
        (
            f"{EP} 2 {ETP} 2",
            "the 2 ranks of a pipeline stage cannot be dealt to expert_model_parallel_size 2 x "
            "expert_tensor_parallel_size 2",
        ),
        (
            f"{EP} 4 {PP} 2 --nproc_per_node 4",
            "the 2 ranks of a pipeline stage cannot be dealt to expert_model_parallel_size 4 x",
        ),
        (f"{EP} 4 {PP} 2 --nproc_per_node 6", "6 processes do not hold TP 2 x PP 2 x CP 1 = 4 ranks"),
        (f"{EP} 0", "expert_model_parallel_size must be at least 1, not 0"),
        (f"{ETP} -2", "expert_tensor_parallel_size must be at least 1, not -2"),
        (f"{EP} two", "expert_model_parallel_size must be a whole number, not 'two'"),
        (
            f"{FACTOR} 1",
            "moe_expert_capacity_factor 1.0 drops tokens; say which by moe_token_drop_policy, or leave it",
        ),
        (f"{POLICY} probs", "moe_token_drop_policy needs moe_expert_capacity_factor"),
        (f"{FACTOR} 0 {POLICY} probs", "moe_expert_capacity_factor must be positive, not 0.0"),
        (f"{FACTOR} 0", "moe_expert_capacity_factor must be positive, not 0.0"),
        (f"{FACTOR} -1 {POLICY} position", "moe_expert_capacity_factor must be positive, not -1.0"),
        (f"{FACTOR} nan {POLICY} probs", "moe_expert_capacity_factor must be a number, not 'nan'"),
        (f"{FACTOR} inf {POLICY} probs", "moe_expert_capacity_factor must be a number, not 'inf'"),
        (f"{FACTOR} 1 {POLICY} prob", "moe_token_drop_policy must be one of probs, position, not 'prob'"),
        (
            "--moe_token_dispatcher_type all2all",
            "moe_token_dispatcher_type must be one of alltoall, allgather, not 'all2all'",
        ),
        ("--moe_token_dispatcher alltoall", "did you mean --moe_token_dispatcher_type?"),
        ("--router_aux_loss_coef -0.1", "router_aux_loss_coef must not be negative, not -0.1"),
        ("--router_aux_loss_coef nan", "router_aux_loss_coef must be a number, not 'nan'"),
        ("--moe_z_loss_coeff -1e-3", "moe_z_loss_coeff must not be negative, not -0.001"),
        ("--moe_z_loss_coeff nan", "moe_z_loss_coeff must be a number, not 'nan'"),
        ("--moe_z_loss_coeff none", "moe_z_loss_coeff must be a number, not 'none'"),
        ("--train_type lora --lora_dropout 0.1", "adapters of experts know no dropout"),
        ("--train_type lora --target_modules gate", "target_modules: 'gate' is none of the linears"),
        ("--train_type lora --target_parameters gate.weight", "'gate.weight' is no parameter of experts"),
        (
            "--train_type lora --nproc_per_node 2 --expert_tensor_parallel_size 2",
            "LoRA in routed experts is not proven with expert_tensor_parallel_size above 1",
        ),
    ],
)
def test_settings_that_cannot_be(experts: Place, words: str, named: str) -> None:
    experts.refused(experts.sft(*words.split()), named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (f"{EP} 2", "leave expert_model_parallel_size and expert_tensor_parallel_size at 1"),
        (f"{ETP} 2", "leave expert_model_parallel_size and expert_tensor_parallel_size at 1"),
        ("--router_aux_loss_coef 0.1", "router_aux_loss_coef"),
        ("--moe_z_loss_coeff 0.1", "moe_z_loss_coeff"),
        ("--moe_token_dispatcher_type allgather", "moe_token_dispatcher_type"),
        (f"{FACTOR} 1", "moe_expert_capacity_factor"),
        (f"{POLICY} probs", "moe_token_drop_policy"),
    ],
)
def test_a_model_without_experts(place: Place, words: str, named: str) -> None:
    place.refused(place.sft(*words.split()), "Qwen3ForCausalLM has no experts; leave", named)


BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "more to a token than there are": (
        lambda m: edit_config(m, num_experts_per_tok=9),
        ("config.json: num_experts_per_tok 9 is more than num_", "experts 8"),
    ),
    "a number that is none": (
        lambda m: edit_config(m, router_aux_loss_coef="a"),
        ("config.json: router_aux_loss_coef must be a number that is not negative, not 'a'",),
    ),
    "a layer that is not there": (
        lambda m: edit_config(m, mlp_only_layers=[2]),
        ("config.json: mlp_only_layers must be numbers of layers, 0 to 1, not 2",),
    ),
    "an expert's tensor is missing": (lambda m: edit_weights(m, lambda t: t.pop(UP)), (UP, "is missing")),
    "an expert's tensor is of another shape": (
        lambda m: edit_weights(m, lambda t: t.update({UP: torch.zeros(31, 64)})),
        (UP, "shape [31, 64]", "[32, 64]"),
    ),
    "an expert too many": (
        lambda m: edit_weights(m, lambda t: t.update({UP.replace("s.3", "s.8"): t[UP].clone()})),
        (UP.replace("s.3", "s.8"), "has no place in the model"),
    ),
    "a layer said to be dense": (
        lambda m: edit_config(m, mlp_only_layers=[0]),
        ("model.layers.0.mlp.", "is missing"),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models(experts: Place, case: str) -> None:
    damage, named = BROKEN[case]
    damage(experts.model)
    model, out = str(experts.model), str(experts.out)
    experts.refused(experts.sft(EP, "2"), *named)
    experts.refused(experts.sft("--dry_run"), *named)
    experts.refused(["convert", "--to", "mcore", "--model", model, "--output_dir", out], *named)
    experts.refused(["verify", "--model", model, "--checkpoint", model], *named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (f"{EP} 3", "expert_model_parallel_size 3 does not divide the model's num_experts 8"),
        (f"{EP} 5 {TP} 2 {PP} 2", "expert_model_parallel_size 5 does not divide the model's num_experts 8"),
        (f"{ETP} 5", "expert_tensor_parallel_size 5 does not divide the model's moe_intermediate_size 32"),
        (f"{EP} 0", "expert_model_parallel_size must be at least 1, not 0"),
        (f"{ETP} -1", "expert_tensor_parallel_size must be at least 1, not -1"),
        (f"{EP} -2 {ETP} -2 {TP} 3", "expert_model_parallel_size must be at least 1, not -2"),
    ],
)
def test_convert(experts: Place, words: str, named: str) -> None:
    paths = ["--model", str(experts.model), "--output_dir", str(experts.out)]
    experts.refused(["convert", "--to", "mcore", *paths, *words.split()], named)


@pytest.mark.parametrize("flag", [EP, ETP])
def test_convert_without_experts(place: Place, flag: str) -> None:
    words = ["convert", "--to", "mcore", "--model", str(place.model), "--output_dir", str(place.out)]
    place.refused([*words, flag, "2"], "Qwen3ForCausalLM has no experts; leave expert_model_parallel_size")


def test_layouts_that_can_be_are_no_hindrance(experts: Place) -> None:
    from launch.cli import main

    paths = ["--model", str(experts.model), "--output_dir", str(experts.out)]
    layout = [EP, "4", ETP, "4", TP, "4", PP, "2"]
    assert main(["convert", "--to", "mcore", *paths, *layout, "--dry_run"]) == 0
