"""Encoder and decoder.

Shapes: B images, S memory tokens, Q queries, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from ..structures import LayerOutput, Memory, Queries


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between them."""

    def __init__(self, hidden_dim: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.linear1(x).relu()))


class ResidualLayer(nn.Module):
    """What encoder and decoder layers share: how a sub-layer joins the residual stream."""

    def __init__(self, dropout: float, pre_norm: bool):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
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
    ):
        super().__init__(dropout, pre_norm)
        self.self_attn = self_attn
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.self_attn_norm = nn.LayerNorm(hidden_dim)
        self.ffn_norm = nn.LayerNorm(hidden_dim)

    def forward(self, tokens: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """(B, S, C), (B, S, C), (B, 1, 1, S) True where attention is allowed -> (B, S, C)."""
        tokens = self.residual(
            tokens, self.self_attn_norm, lambda x: self.self_attn(x, positions, allowed)
        )
        return self.residual(tokens, self.ffn_norm, self.ffn)


class Encoder(nn.Module):
    """A stack of layers over the memory; pre-norm stacks end with a norm."""

    def __init__(self, layers: list[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, memory: Memory) -> Memory:
        allowed = ~memory.padding[:, None, None, :]
        tokens = memory.tokens
        for layer in self.layers:
            tokens = layer(tokens, memory.positions, allowed)
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
    ):
        """
        Args:
            cross_attn: (content, query position, memory, reference) -> (B, Q, C).
        """
        super().__init__(dropout, pre_norm)
        self.self_attn = self_attn
        self.cross_attn = cross_attn
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.self_attn_norm = nn.LayerNorm(hidden_dim)
        self.cross_attn_norm = nn.LayerNorm(hidden_dim)
        self.ffn_norm = nn.LayerNorm(hidden_dim)

    def forward(self, content: Tensor, queries: Queries, memory: Memory) -> Tensor:
        """
        Args:
            content: (B, Q, C), output of the previous layer.
            queries: position, reference and attention mask of the queries.

        Returns:
            (B, Q, C)
        """
        allowed = None if queries.attention_mask is None else ~queries.attention_mask
        content = self.residual(
            content, self.self_attn_norm, lambda x: self.self_attn(x, queries.position, allowed)
        )
        content = self.residual(
            content,
            self.cross_attn_norm,
            lambda x: self.cross_attn(x, queries.position, memory, queries.reference),
        )
        return self.residual(content, self.ffn_norm, self.ffn)


class Decoder(nn.Module):
    """Layers over the queries, and the heads that read every layer's output."""

    def __init__(self, layers: list[nn.Module], norm: nn.Module, heads: list[nn.Module]):
        """
        Args:
            norm: applied to each layer's output before the heads; the next layer receives the
                output without it.
            heads: (content, reference) -> LayerOutput; one for all layers, or one per layer.
        """
        super().__init__()
        if len(heads) not in (1, len(layers)):
            raise ValueError(f"{len(layers)} decoder layers need 1 or {len(layers)} heads.")
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.heads = nn.ModuleList(heads)

    def forward(self, queries: Queries, memory: Memory) -> list[LayerOutput]:
        """Returns one output per layer: logits (B, Q, K), boxes (B, Q, 4)."""
        shared = len(self.heads) == 1
        content = queries.content
        outputs = []
        for index, layer in enumerate(self.layers):
            content = layer(content, queries, memory)
            head = self.heads[0 if shared else index]
            outputs.append(head(self.norm(content), queries.reference))
        return outputs


class Transformer(nn.Module):
    """Encoder, query initialiser, decoder (DETR, figure 2)."""

    def __init__(self, encoder: nn.Module, queries: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder

    def forward(self, memory: Memory) -> list[LayerOutput]:
        memory = self.encoder(memory)
        queries, proposals = self.queries(memory)
        outputs = self.decoder(queries, memory)
        return outputs if proposals is None else [proposals, *outputs]
