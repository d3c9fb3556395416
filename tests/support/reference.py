"""The plain way to do the same training: transformers and torch.optim.AdamW, one row at a time, no Braid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.data.template import EncodedRow


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Losses before each step, gradients of the first global batch, weights after all steps; by Hugging Face
    name.
    """

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    start: dict[str, Tensor]
    """Weights before the first step."""
    aux_losses: list[float]
    """Of a mixture of experts, before each step."""


def train_reference(
    model_dir: str,
    steps: Sequence[Sequence[EncodedRow]],
    learning_rates: Sequence[float],
    *,
    weight_decay: float = 0.1,
    max_grad_norm: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    adapter_dir: str | None = None,
    aux_loss_coef: float | None = None,
    z_loss_coef: float = 0.0,
) -> Reference:
    """Train on the given global batches in fp32, with `adapter_dir` that adapter by PEFT. Loss is the mean
    over the supervised tokens of a global batch; with `aux_loss_coef` the load-balancing loss of each row
    joins it, and with `z_loss_coef` the mean squared log-partition function of its router, both counting by
    the row's supervised tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    if adapter_dir is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_dir, is_trainable=True)
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    start = _hub_form({name: p.detach() for name, p in trained.items()})
    decayed = [p for p in trained.values() if p.dim() > 1]
    plain = [p for p in trained.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)
    losses, aux_losses, grad_norms, gradients = [], [], [], {}
    for rows, learning_rate in zip(steps, learning_rates, strict=True):
        optimizer.zero_grad()
        loss, aux_loss = _accumulate(model, rows, aux_loss_coef, z_loss_coef)
        losses.append(loss)
        aux_losses.append(aux_loss)
        if not gradients:
            gradients = _hub_form({name: p.grad for name, p in trained.items()})
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    weights = _hub_form({name: p.detach() for name, p in trained.items()})
    return Reference(
        losses=losses,
        aux_losses=aux_losses,
        grad_norms=grad_norms,
        gradients=gradients,
        weights=weights,
        start=start,
    )


def _hub_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, experts one by one: transformers has those of a layer in one tensor, its checkpoints do not."""
    found = {}
    for name, tensor in tensors.items():
        prefix, fused, kind = name.partition(".experts.")
        if not fused or kind not in ("gate_up_proj", "down_proj"):
            found[name] = tensor.clone()
            continue
        for index, expert in enumerate(tensor.unbind()):
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part, matrix in zip(names, expert.chunk(len(names)), strict=True):
                found[f"{prefix}.experts.{index}.{part}.weight"] = matrix.clone()
    return found


def _accumulate(
    model: torch.nn.Module, rows: Sequence[EncodedRow], aux_loss_coef: float | None, z_loss_coef: float
) -> tuple[float, float]:
    supervised = sum(int(row.supervised[1:].sum()) for row in rows)
    total = total_aux = 0.0
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.long)
        keep = torch.tensor(row.supervised[1:])
        share = int(row.supervised[1:].sum()) / supervised
        options = {} if aux_loss_coef is None else {"output_router_logits": True}
        output = model(ids[None], **options)
        logits = output.logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[keep], ids[1:][keep], reduction="sum") / supervised
        total += float(loss.detach())
        if aux_loss_coef is not None:
            total_aux += share * float(output.aux_loss.detach())
            z_loss = torch.stack(output.router_logits).logsumexp(dim=-1).square().mean()
            loss = loss + share * (aux_loss_coef * output.aux_loss + z_loss_coef * z_loss)
        loss.backward()
    return total, total_aux
