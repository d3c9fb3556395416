"""Megatron's GPTModel as Braid uses it: positions restart in every document, padding takes no probability."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from engine.config.options import MoeOptions
from engine.model.experts import ExpertLayer
from engine.model.head import Embedding, LossHead
from engine.model.layers import DocumentParams, RotaryTable, Routing
from engine.model.lora_spec import LoraSpec
from engine.model.router import Balance, BalanceLoss, Join, Part, Router
from engine.model.spec import ModelSpec


class BraidGPTModel(GPTModel):
    """Megatron's GPTModel with a rotary table by position id, a softmax that leaves out the vocabulary's
    padding, and the load-balancing loss of all its layers together.
    """

    def __init__(self, *, spec: ModelSpec, moe_options: MoeOptions, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.spec = spec
        self.moe_options = moe_options
        self.lora: LoraSpec | None = None
        self.rotary = RotaryTable(
            spec.rope, head_dim=spec.head_dim, max_position_embeddings=spec.max_position_embeddings
        )
        # Only padding that this rank holds must be masked; for Qwen's published vocabularies there is none.
        tp_rank, tp_size = self.pg_collection.tp.rank(), self.pg_collection.tp.size()
        rows = self.vocab_size // tp_size
        self.first_padding_column = min(max(spec.vocab_size - tp_rank * rows, 0), rows)
        # Their construction stays Megatron's; forward pre-hooks, which gather weights, must see their calls.
        if self.pre_process:
            self.embedding.word_embeddings.__class__ = Embedding
        if self.post_process:
            self.output_layer.__class__ = LossHead
        if self.pre_process and self.post_process and spec.tied_embeddings:
            weight = self.shared_embedding_or_output_weight()
            # Megatron would add the embedding's gradient to the buffer itself; both ends do it here.
            weight.zero_out_wgrad, weight.shared_with_embedding = False, True
        self._sums_before: Tensor | None = None
        self._documents: DocumentParams | None = None
        if spec.moe is not None:
            self.decoder.register_forward_hook(self._join)

    def forward(
        self,
        input_ids: Tensor,
        document_params: DocumentParams,
        position_ids: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """input_ids, position_ids and labels int64 [1, T] -> on the last stage loss per token [1, T] float32,
        or with `document_params.targets` their sum, a scalar; hidden states [T, 1, H] on others.
        """
        document_params.cos, document_params.sin = self.rotary(position_ids[0], self.config.params_dtype)
        documents = document_params
        if document_params.routing is not None:
            documents = dataclasses.replace(document_params, balance=self._balance(document_params.routing))
        self._documents = documents
        return super().forward(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            labels=labels,
            packed_seq_params=documents,
        )

    def routers(self) -> Iterator[tuple[int, Router]]:
        """Those of the layers with experts, with the index of the layer in the whole model."""
        for layer in self.decoder.layers:
            if isinstance(layer, ExpertLayer):
                yield layer.layer_number - 1, layer.mlp.router

    def _balance(self, routing: Routing) -> Balance:
        assert self.spec.moe is not None
        real = routing.real
        if self.config.sequence_parallel:
            real = real.chunk(self.pg_collection.tp.size())[self.pg_collection.tp.rank()]
        return Balance.empty(real, self.spec.moe.num_experts)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """What came from the stage before: hidden states, and with experts the sums of its routers."""
        (tensor,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self._sums_before = None
        if tensor is not None and self.spec.moe is not None:
            tensor, self._sums_before = Part.apply(tensor, 2 * self.spec.moe.num_experts + 1)
        super().set_input_tensor([tensor])

    def _join(self, decoder: Any, arguments: Any, hidden: Tensor) -> Tensor:
        """After the decoder: the routers' sums go with the hidden states, or become the loss."""
        documents, before = self._documents, self._sums_before
        assert documents is not None
        if documents.balance is None or documents.routing is None:
            return hidden
        loss = self._loss(documents.routing) if self.post_process else None
        joined: Tensor = Join.apply(hidden, before, documents.balance, loss)
        if loss is not None:
            documents.routing.losses = loss.values
        return joined

    def _loss(self, routing: Routing) -> BalanceLoss:
        moe, options, groups = self.spec.moe, self.moe_options, self.pg_collection
        assert moe is not None
        coefficient = options.router_aux_loss_coef
        scale = self.config.grad_scale_func
        return BalanceLoss(
            coefficient=moe.aux_loss_coef if coefficient is None else coefficient,
            z_coefficient=options.moe_z_loss_coeff,
            rows=routing.tokens * sum(moe.layers),
            weight=routing.supervised,
            groups=(groups.tp, groups.cp),
            scale=None if scale is None else scale(torch.ones((), device=routing.real.device)),
        )

    def _postprocess(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Megatron's, which has all logits at once, where no targets are given."""
        documents = self._documents
        if not self.post_process or documents is None or documents.targets is None:
            output: Tensor = super()._postprocess(hidden_states=hidden_states, **arguments)
            return output
        tied = self.share_embeddings_and_output_weights
        total: Tensor = self.output_layer(
            hidden_states,
            weight=self.shared_embedding_or_output_weight() if tied else None,
            targets=documents.targets,
            columns=self.first_padding_column,
        )
        return total

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy over the real vocabulary. labels [1, T], logits [T, 1, V / tp] -> [1, T]."""
        if self.first_padding_column < logits.shape[-1]:
            logits[..., self.first_padding_column :] = float("-inf")
        return super().compute_language_model_loss(labels, logits)
