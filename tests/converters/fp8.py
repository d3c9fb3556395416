"""A tiny Qwen3 in bf16, and the same quantised to fp8 by plain loops over its blocks."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .conftest import edit_json, tensors_of

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UP = "model.layers.1.mlp.up_proj.weight"  # [300, 160]
NORM = "model.norm.weight"


def make_plain(directory: Path) -> None:
    """A Qwen3 in bf16 whose matrices are larger than a block of 128 and divide by no power of two above 4."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=2,
        hidden_size=160,
        intermediate_size=300,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        vocab_size=257,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of quantising."""

    block: tuple[int, int] | None = (128, 128)
    """None: one scale a tensor or, with `by_row`, a row."""
    by_row: bool = False
    scalar: tuple[int, ...] = ()
    """Shape of the scale of a whole tensor."""
    suffix: str = "_scale_inv"
    scale_dtype: torch.dtype = torch.float32

    def blocks(self, shape: torch.Size) -> tuple[int, int]:
        return self.block or ((1, shape[1]) if self.by_row else (shape[0], shape[1]))


def places(shape: torch.Size, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of the block that every element is in."""
    return torch.arange(shape[0])[:, None] // block[0], torch.arange(shape[1])[None, :] // block[1]


def quantise(weight: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """(fp8 weight, scales): each block fills the range of fp8."""
    height, width = way.blocks(weight.shape)
    rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
    scale = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = weight[row * height : (row + 1) * height, column * width : (column + 1) * width]
            scale[row, column] = part.abs().max().float() / 448
    scale = scale.to(way.scale_dtype)
    scaled = weight.float() / scale.float()[places(weight.shape, (height, width))]
    if way.block is None and not way.by_row:
        scale = scale.reshape(way.scalar)
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def dequantise_one(weight: Tensor, scale: Tensor, way: Way) -> Tensor:
    """Every element times its scale, in fp32."""
    block = way.blocks(weight.shape)
    grid = scale.float().reshape(1, 1) if scale.ndim < 2 else scale.float()
    return weight.float() * grid[places(weight.shape, block)]


def make_fp8(plain: Path, target: Path, way: Way) -> dict[str, Tensor]:
    """Write the fp8 checkpoint. Returns its weights: dequantised ones in fp32, the others as stored."""
    shutil.copytree(plain, target)
    tensors, expected = {}, {}
    for name, tensor in tensors_of(plain).items():
        if name.split(".")[-2] in LINEARS:
            tensors[name], tensors[name + way.suffix] = quantise(tensor, way)
            expected[name] = dequantise_one(tensors[name], tensors[name + way.suffix], way)
        else:
            tensors[name] = expected[name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})

    def describe(config: dict[str, Any]) -> None:
        config["torch_dtype"] = config.pop("dtype")  # as published
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": way.block and list(way.block),
            "modules_to_not_convert": ["lm_head", "model.norm"],
        }

    edit_json(target / "config.json", describe)
    return expected
