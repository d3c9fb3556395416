"""The plain way to do the same training: transformers and torch.optim.AdamW, one row at a time, no Braid."""

from collections.abc import Sequence
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
) -> Reference:
    """Train on the given global batches in fp32, with `adapter_dir` that adapter by PEFT. Loss is the mean
    over the supervised tokens of a global batch.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    if adapter_dir is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_dir, is_trainable=True)
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    decayed = [p for p in trained.values() if p.dim() > 1]
    plain = [p for p in trained.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)
    losses, grad_norms, gradients = [], [], {}
    for rows, learning_rate in zip(steps, learning_rates, strict=True):
        optimizer.zero_grad()
        losses.append(_accumulate(model, rows))
        if not gradients:
            gradients = {name: p.grad.clone() for name, p in trained.items()}
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in trained.items()}
    return Reference(losses=losses, grad_norms=grad_norms, gradients=gradients, weights=weights, start=start)


def _accumulate(model: torch.nn.Module, rows: Sequence[EncodedRow]) -> float:
    supervised = sum(int(row.supervised[1:].sum()) for row in rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.long)
        keep = torch.tensor(row.supervised[1:])
        logits = model(ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[keep], ids[1:][keep], reduction="sum") / supervised
        loss.backward()
        total += float(loss.detach())
    return total
