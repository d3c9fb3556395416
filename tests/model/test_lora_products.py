"""The adapters' products: gradients of A and B in fp32, one product for all projections of a fused linear,
and nothing kept that need not be.

The reference are the formulas in fp64 on the numbers as the products see them, rounded to the model's dtype.
"""

import gc
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from engine.model.lora import LoraColumnLinear, LoraRowLinear, TensorParallel, _AddMultiply, _Multiply
from engine.model.lora_spec import LowRank

TOKENS, HIDDEN, OUT = 33, 48, 40
ALONE = TensorParallel(rank=0, size=1, group=None, sequence_parallel=False)
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run takes the CPU for a CUDA device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found: Tensor | None, wanted: Tensor) -> float:
    assert found is not None
    return float((found.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", HALF)
def test_gradient_of_a_is_rounded_nowhere(dtype: torch.dtype) -> None:
    x, grad = numbers(TOKENS, 1, HIDDEN, dtype=dtype), numbers(TOKENS, 1, 4, dtype=dtype, seed=1)
    weight = numbers(4, HIDDEN, seed=2).requires_grad_()
    x.requires_grad_()
    _, low = _Multiply.apply(x, weight)
    low.backward(grad)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    wanted = grad.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1)
    assert relative(weight.grad, wanted) < 1e-6
    # The same, rounded once to the model's dtype, would be off by a thousand times as much.
    assert relative(wanted.to(dtype), wanted) > 1e-4
    # What goes on to other layers is of the model's dtype.
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert relative(x.grad, grad.double() @ weight.detach().to(dtype).double()) < 4e-3


@pytest.mark.parametrize("dtype", HALF)
def test_gradient_of_b_is_rounded_nowhere(dtype: torch.dtype) -> None:
    low, grad = numbers(TOKENS, 1, 4, dtype=dtype), numbers(TOKENS, 1, OUT, dtype=dtype, seed=1)
    out, weight = numbers(TOKENS, 1, OUT, dtype=dtype, seed=2), numbers(OUT, 4, seed=3).requires_grad_()
    out.requires_grad_()
    low.requires_grad_()
    start = out.detach().double()
    result = _AddMultiply.apply(out, low, weight)
    cast = weight.detach().to(dtype).double()
    assert relative(result, start + low.detach().double() @ cast.T) < 4e-3
    result.backward(grad)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert relative(weight.grad, grad.double().flatten(0, 1).T @ low.detach().double().flatten(0, 1)) < 1e-6
    assert torch.equal(out.grad, grad)
    assert relative(low.grad, grad.double() @ cast) < 4e-3


def test_a_frozen_input_asks_for_no_product() -> None:
    """The first layer's input is an embedding's output under a frozen model."""
    x, weight = numbers(TOKENS, HIDDEN), numbers(4, HIDDEN).requires_grad_()
    _, low = _Multiply.apply(x, weight)
    low.sum().backward()
    assert x.grad is None
    assert relative(weight.grad, x.double().sum(0).expand(4, -1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", ["both", "the linear", "the adapters"])
def test_the_inputs_gradient_has_both_parts_once(dtype: torch.dtype, used: str) -> None:
    """The linear's part and the adapters', also where only one of them took part in the loss."""
    x, weight = numbers(TOKENS, 1, HIDDEN, dtype=dtype), numbers(4, HIDDEN, seed=2).requires_grad_()
    base = numbers(OUT, HIDDEN, dtype=dtype, seed=1)
    grads = numbers(TOKENS, 1, OUT, dtype=dtype, seed=3), numbers(TOKENS, 1, 4, dtype=dtype, seed=4)
    leaf = x.clone().requires_grad_()
    kept, low = _Multiply.apply(leaf * 1, weight)
    assert torch.equal(kept, x)
    parts, wanted = [], torch.zeros(TOKENS, 1, HIDDEN, dtype=torch.float64)
    if used != "the adapters":
        parts.append((kept @ base.T, grads[0]))
        wanted += grads[0].double() @ base.double()
    if used != "the linear":
        parts.append((low, grads[1]))
        wanted += grads[1].double() @ weight.detach().to(dtype).double()
    outputs, upstream = zip(*parts, strict=True)
    before = [grad.clone() for grad in upstream]
    torch.autograd.backward(outputs, upstream)
    assert relative(leaf.grad, wanted) < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
    assert all(torch.equal(a, b) for a, b in zip(before, upstream, strict=True))
    assert (weight.grad is None) == (used == "the linear")


def test_the_linears_output_is_overwritten_and_not_kept() -> None:
    """One tensor of [tokens, out] serves both, and none is saved for the backward pass."""
    saved: list[int] = []

    def watch(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    x, base = numbers(TOKENS, 1, HIDDEN).requires_grad_(), numbers(OUT, HIDDEN, seed=1)
    low, weight = numbers(TOKENS, 1, 4).requires_grad_(), numbers(OUT, 4, seed=3).requires_grad_()
    given = x @ base.T
    address, died = given.data_ptr(), weakref.ref(given)
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        result = _AddMultiply.apply(given, low, weight)
    assert result.data_ptr() == address
    assert torch.equal(given, result)
    assert address not in saved
    # The tensor object that the linear returned can go; its memory is the result's.
    del given
    gc.collect()
    assert died() is None
    # And the result's memory goes with the result, though its backward pass is still to come.
    storage = weakref.ref(result.untyped_storage())
    total = result.sum()
    del result
    gc.collect()
    assert storage() is None
    total.backward()
    assert weight.grad is not None


class Linear(torch.nn.Module):
    """Stands for Megatron's frozen linear: output and bias."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(numbers(rows, columns, dtype=dtype, seed=11), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.T, None


GROUPS, SHARE, DIM = 2, 3, 4
SIZES = {
    "q_proj": (GROUPS * SHARE * DIM, HIDDEN),
    "k_proj": (GROUPS * DIM, HIDDEN),
    "v_proj": (GROUPS * DIM, HIDDEN),
}
RANKS = {"q_proj": 3, "k_proj": 5, "v_proj": 2}
GATES = {"gate_proj": (12, HIDDEN), "up_proj": (12, HIDDEN)}


def fill(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(module.named_parameters()):
            if "lora" in name:
                parameter.copy_(numbers(*parameter.shape, seed=20 + seed))


def adapters(names: tuple[str, ...]) -> Mapping[str, LowRank]:
    return {name: LowRank(rank=RANKS.get(name, 4), scaling=0.5 * len(name)) for name in names}


def separate(
    layer: LoraColumnLinear, x: Tensor, sizes: Mapping[str, tuple[int, int]], groups: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every adapter by itself in fp64, its output put where the fused linear has the projection's rows:
    [x, A and B] -> output, and leaves by parameter name.
    """
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters(recurse=False)}
    parts = []
    for name, (rows, _) in sizes.items():
        shape = layer.adapters.get(name)
        part = x.new_zeros(*x.shape[:-1], rows)
        if shape is not None:
            low = x @ leaves[f"{name}_lora_A"].T
            part = shape.scaling * (low @ leaves[f"{name}_lora_B"].T)
        parts.append(part.unflatten(-1, (groups, -1)))
    return torch.cat(parts, dim=-1).flatten(-2), leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "groups", "names"),
    [
        (SIZES, GROUPS, ("q_proj", "k_proj", "v_proj")),
        (SIZES, GROUPS, ("q_proj", "v_proj")),
        (SIZES, GROUPS, ("k_proj",)),
        (GATES, None, ("gate_proj", "up_proj")),
        (GATES, None, ("up_proj",)),
    ],
    ids=["qkv", "q and v", "k", "gate and up", "up"],
)
def test_one_product_is_the_separate_ones(
    dtype: torch.dtype, sizes: Mapping[str, tuple[int, int]], groups: int | None, names: tuple[str, ...]
) -> None:
    """Output, and gradients of every A and B; the frozen weight gets none."""
    base = Linear(sum(rows for rows, _ in sizes.values()), HIDDEN, dtype)
    layer = LoraColumnLinear(base, adapters(names), ALONE, 0.0, sizes, groups)
    fill(layer)
    x = numbers(TOKENS, 1, HIDDEN, dtype=dtype, seed=5).requires_grad_()
    out, bias = layer(x)
    assert bias is None
    wide = x.detach().double().requires_grad_()
    own, leaves = separate(layer, wide, sizes, groups or 1)
    wanted = wide @ base.weight.double().T + own
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert relative(out, wanted.detach()) < bound
    upstream = numbers(*out.shape, dtype=dtype, seed=6)
    out.backward(upstream)
    wanted.backward(upstream.double())
    assert wide.grad is not None
    assert relative(x.grad, wide.grad) < bound
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative(getattr(layer, name).grad, leaf.grad) < bound, name
    assert base.weight.grad is None


def test_rows_of_other_projections_stay_as_they_are() -> None:
    """The zeros of the joined matrix add exactly nothing."""
    base = Linear(sum(rows for rows, _ in SIZES.values()), HIDDEN, torch.float32)
    layer = LoraColumnLinear(base, adapters(("k_proj",)), ALONE, 0.0, SIZES, GROUPS)
    fill(layer)
    x = numbers(TOKENS, 1, HIDDEN)
    plain, (out, _) = base(x)[0].unflatten(-1, (GROUPS, -1)), layer(x)
    changed = out.unflatten(-1, (GROUPS, -1)) != plain
    keys = slice(SHARE * DIM, (SHARE + 1) * DIM)
    assert changed[..., keys].all()
    changed[..., keys] = False
    assert not changed.any()


@pytest.mark.parametrize("size", [2, 4], ids=lambda size: f"TP {size}")
def test_ranks_hold_the_rows_of_the_whole_matrix(size: int) -> None:
    """Also of TP 4 over two groups, whose ranks cut q, k and v anywhere."""
    whole = LoraColumnLinear(torch.nn.Identity(), adapters(tuple(SIZES)), ALONE, 0.0, SIZES, GROUPS)
    fill(whole)
    parts = []
    for rank in range(size):
        place = TensorParallel(rank=rank, size=size, group=None, sequence_parallel=False)
        part = LoraColumnLinear(torch.nn.Identity(), adapters(tuple(SIZES)), place, 0.0, SIZES, GROUPS)
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                source = whole.get_parameter(name)
                cut = source.shape != parameter.shape
                parameter.copy_(source.chunk(size)[rank] if cut else source)
        parts.append(part._up())
    assert torch.equal(torch.cat(parts), whole._up())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_parallel_linear_equals_its_formula(dtype: torch.dtype) -> None:
    base = Linear(OUT, HIDDEN, dtype)
    layer = LoraRowLinear(base, adapters(("o_proj",)), ALONE, 0.0, {"o_proj": (OUT, HIDDEN)})
    fill(layer)
    x = numbers(TOKENS, 1, HIDDEN, dtype=dtype, seed=5)
    out, _ = layer(x)
    own, _ = separate(layer, x.double(), {"o_proj": (OUT, HIDDEN)}, 1)  # type: ignore[arg-type]
    wanted = x.double() @ base.weight.double().T + own
    assert relative(out, wanted.detach()) < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
