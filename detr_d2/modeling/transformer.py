"""Encoder and decoder.

Shapes: B images, S memory tokens, Q queries, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..structures import LayerOutput, Memory, Predictions, Queries, QueryPosition, Target
from .deformable import token_centres
from .dropout import Dropout
from .recompute import run as run_recomputed


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout between them."""

    def __init__(
        self,
        hidden_dim: int,
        dim_feedforward: int,
        dropout: float,
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.activation = activation()
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class ResidualLayer(nn.Module):
    """What encoder and decoder layers share: how a sub-layer joins the residual stream."""

    def __init__(self, dropout: float, pre_norm: bool):
        super().__init__()
        self.dropout = Dropout(dropout)
        self.pre_norm = pre_norm

    def residual(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))


class EncoderLayer(ResidualLayer):
    """Self-attention, feed-forward (DETR, appendix A.3)."""

    def __init__(
        self,
        hidden_dim: int,
        self_attn: nn.Module,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
        activation: type[nn.Module] = nn.ReLU,
    ):
        """
        Args:
            self_attn: attention over the memory whose queries are the tokens, see attention.py.
        """
        super().__init__(dropout, pre_norm)
        self.self_attn = self_attn
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout, activation)
        self.self_attn_norm = nn.LayerNorm(hidden_dim)
        self.ffn_norm = nn.LayerNorm(hidden_dim)

    def forward(self, memory: Memory, centres: Tensor) -> Tensor:
        """The memory and the (B, S, 2) centres of its cells -> tokens (B, S, C)."""
        position = QueryPosition(memory.positions)
        tokens = self.residual(
            memory.tokens,
            self.self_attn_norm,
            lambda x: self.self_attn(x, position, replace(memory, tokens=x), centres),
        )
        return self.residual(tokens, self.ffn_norm, self.ffn)


class Encoder(nn.Module):
    """A stack of layers over the memory; pre-norm stacks end with a norm."""

    def __init__(
        self,
        layers: list[nn.Module],
        norm: nn.Module | None = None,
        position_scale: nn.Module | None = None,
        recompute: bool = False,
    ):
        """
        Args:
            recompute: activation checkpointing, layer by layer.
            position_scale: what each layer's input multiplies the positions with, channel by
                channel (DAB-DETR's code; not in the paper).
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.position_scale = position_scale
        self.recompute = recompute

    def forward(self, memory: Memory) -> Memory:
        centres = token_centres(memory.level_shapes, memory.valid_ratios)
        tokens, positions = memory.tokens, memory.positions
        for layer in self.layers:
            if self.position_scale is not None:
                positions = memory.positions * self.position_scale(tokens)
            entering = replace(memory, tokens=tokens, positions=positions)
            if self.recompute:
                tokens = run_recomputed(layer, layer, entering, centres)
            else:
                tokens = layer(entering, centres)
        if self.norm is not None:
            tokens = self.norm(tokens)
        return replace(memory, tokens=tokens)


class DecoderLayer(ResidualLayer):
    """Self-attention, cross-attention, feed-forward (DETR, appendix A.3)."""

    def __init__(
        self,
        hidden_dim: int,
        self_attn: nn.Module,
        cross_attn: nn.Module,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
        activation: type[nn.Module] = nn.ReLU,
    ):
        """
        Args:
            self_attn: (content, position embedding, allowed) -> (B, Q, C).
            cross_attn: attention over the memory, see attention.py.
        """
        super().__init__(dropout, pre_norm)
        self.self_attn = self_attn
        self.cross_attn = cross_attn
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout, activation)
        self.self_attn_norm = nn.LayerNorm(hidden_dim)
        self.cross_attn_norm = nn.LayerNorm(hidden_dim)
        self.ffn_norm = nn.LayerNorm(hidden_dim)

    def forward(
        self,
        content: Tensor,
        position: QueryPosition,
        reference: Tensor | None,
        attention_mask: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        """
        Args:
            content: (B, Q, C), output of the previous layer.
            reference: (B, Q, 2 or 4) in [0, 1].
            attention_mask: (B or 1, Q, Q) bool, True where the row may not attend to the column.

        Returns:
            (B, Q, C)
        """
        allowed = None if attention_mask is None else ~attention_mask[:, None]
        content = self.residual(
            content, self.self_attn_norm, lambda x: self.self_attn(x, position.embedding, allowed)
        )
        content = self.residual(
            content,
            self.cross_attn_norm,
            lambda x: self.cross_attn(x, position, memory, reference),
        )
        return self.residual(content, self.ffn_norm, self.ffn)


class Decoder(nn.Module):
    """Layers over the queries, the heads that read every layer's output, and how a layer's boxes
    become the next one's references."""

    def __init__(
        self,
        layers: list[nn.Module],
        norm: nn.Module,
        heads: list[nn.Module],
        query_position: nn.Module,
        refinement: str = "none",
    ):
        """
        Args:
            norm: applied to each layer's output before the heads; the next layer receives the
                output without it.
            heads: PredictionHead or the like; one for all layers, or one per layer.
            query_position: (queries, content, reference, memory, is_first) -> QueryPosition.
            refinement: "none": all layers have the initial references; "detached": a layer's boxes
                are the next one's references, a constant to the gradient (Deformable DETR, section
                4.2); "look_forward_twice": but a prediction's gradient reaches the layer that made
                its reference (DAB-DETR's code; DINO, section 3.5).

        Raises:
            UserError: there are no layers.
            ValueError: the number of heads is neither 1 nor that of the layers.
        """
        super().__init__()
        if not layers:
            raise UserError("MODEL.DETR.DEC_LAYERS must be 1 or more: a layer's output is read.")
        if len(heads) not in (1, len(layers)):
            raise ValueError(f"{len(layers)} decoder layers need 1 or {len(layers)} heads.")
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.heads = nn.ModuleList(heads)
        self.query_position = query_position
        self.refinement = refinement
        scale = getattr(query_position, "scale", None)
        if scale is not None and len(layers) == 1:
            # It is for layers after the first, and processes would wait for its gradient.
            scale.requires_grad_(False)

    def forward(
        self, queries: Queries, memory: Memory, last_only: bool = False
    ) -> tuple[list[LayerOutput], Tensor]:
        """
        Args:
            last_only: leave out what nobody looks at without auxiliary losses.

        Returns:
            One output per layer, or that of the last: logits (B, Q, K), boxes (B, Q, 4); and the
            content (B, Q, C) that the last layer's are read from.
        """
        content = queries.content
        # A layer looks about `reference`; its predictions are offsets from `start`, the same
        # place, through which a gradient may flow.
        reference = start = queries.reference
        outputs = []
        for index, layer in enumerate(self.layers):
            position = self.query_position(queries, content, reference, memory, index == 0)
            content = layer(content, position, reference, queries.attention_mask, memory)
            head = self.heads[index % len(self.heads)]
            is_last = index == len(self.layers) - 1
            if is_last or not last_only:
                normed = self.norm(content)
                outputs.append(head(normed, start))
            if self.refinement != "none" and not is_last:
                start = self._refine(head, content, reference)
                reference = start.detach()
        return outputs, normed

    def _refine(self, head: nn.Module, content: Tensor, reference: Tensor) -> Tensor:
        """(B, Q, 4): where the next layer's predictions start."""
        # The published models refine with the layer's output as it is; that of a pre-norm layer
        # is of no particular size.
        source = self.norm(content) if self.layers[0].pre_norm else content
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and self.refinement == "look_forward_twice"
        ):
            return head.boxes(source, reference)


class Transformer(nn.Module):
    """Encoder, query initialiser, denoising, decoder (DETR, figure 2; DN-DETR, figure 4)."""

    def __init__(
        self,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: nn.Module,
        denoising: nn.Module | None = None,
    ):
        """
        Args:
            queries: (memory) -> (Queries, Proposals or None).
            denoising: (queries, targets or None) -> Queries, with noised ground truth in front.
        """
        super().__init__()
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder
        self.denoising = denoising

    def forward(
        self,
        memory: Memory,
        targets: Sequence[Target] | None = None,
        last_only: bool = False,
    ) -> Predictions:
        """
        Args:
            memory: tokens of the images, before the encoder.
            targets: ground truth of each image, where there is some: in training.
            last_only: predict with the last decoder layer only.
        """
        memory = self.encoder(memory)
        queries, proposals = self.queries(memory)
        if self.denoising is not None:
            queries = self.denoising(queries, targets)
        outputs, content = self.decoder(queries, memory, last_only)
        noised = queries.denoising
        if noised is None:
            return Predictions(outputs, proposals, content=content, memory=memory)
        first = noised.valid.shape[1]
        return Predictions(
            layers=[LayerOutput(o.logits[:, first:], o.boxes[:, first:]) for o in outputs],
            proposals=proposals,
            denoising=[LayerOutput(o.logits[:, :first], o.boxes[:, :first]) for o in outputs],
            noised=noised,
            content=content[:, first:],
            memory=memory,
        )
