"""Megatron's GPTModel as Braid uses it: positions restart in every document, padding takes no probability."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from engine.model.layers import DocumentParams, RotaryTable
from engine.model.lora_spec import LoraSpec
from engine.model.spec import ModelSpec


class BraidGPTModel(GPTModel):
    """Megatron's GPTModel with a rotary table by position id and a softmax that leaves out the vocabulary's
    padding.
    """

    def __init__(self, *, spec: ModelSpec, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.spec = spec
        self.lora: LoraSpec | None = None
        self.rotary = RotaryTable(
            spec.rope, head_dim=spec.head_dim, max_position_embeddings=spec.max_position_embeddings
        )
        # Only padding that this rank holds must be masked; for Qwen's published vocabularies there is none.
        tp_rank, tp_size = self.pg_collection.tp.rank(), self.pg_collection.tp.size()
        rows = self.vocab_size // tp_size
        self.first_padding_column = min(max(spec.vocab_size - tp_rank * rows, 0), rows)

    def forward(
        self, input_ids: Tensor, document_params: DocumentParams, position_ids: Tensor, labels: Tensor
    ) -> Tensor:
        """input_ids, position_ids and labels int64 [1, T] -> loss per token [1, T] float32 on the last stage,
        hidden states [T, 1, H] on others.
        """
        document_params.cos, document_params.sin = self.rotary(position_ids[0], self.config.params_dtype)
        return super().forward(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            labels=labels,
            packed_seq_params=document_params,
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy over the real vocabulary. labels [1, T], logits [T, 1, V / tp] -> [1, T]."""
        if self.first_padding_column < logits.shape[-1]:
            logits[..., self.first_padding_column :] = float("-inf")
        return super().compute_language_model_loss(labels, logits)
