"""Attention on (B, tokens, C) tensors.

Shapes: B images, Q queries, S memory tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..structures import Memory


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017, section 3.2.2).

    The attention matrix is never kept: everything goes through `scaled_dot_product_attention`.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if hidden_dim % num_heads:
            raise UserError(
                f"MODEL.DETR.HIDDEN_DIM ({hidden_dim}) must be divisible by "
                f"MODEL.DETR.NHEADS ({num_heads})."
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_dim, hidden_dim)
        self.k_proj = nn.Linear(hidden_dim, hidden_dim)
        self.v_proj = nn.Linear(hidden_dim, hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # The original draws the three input projections as one (3C, C) matrix: Xavier's bound
        # for that shape is smaller by sqrt(2) than for three (C, C) matrices.
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
            nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            query: (B, Q, C), position embedding already added.
            key: (B, S, C), position embedding already added.
            value: (B, S, C).
            allowed: bool, broadcasts to (B, heads, Q, S): True where attention is allowed.

        Returns:
            (B, Q, C)
        """
        attended = scaled_dot_product(
            self._split_heads(self.q_proj(query)),
            self._split_heads(self.k_proj(key)),
            self._split_heads(self.v_proj(value)),
            allowed,
            self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, tokens, C) -> (B, heads, tokens, C / heads)"""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float
) -> Tensor:
    """The one place that calls PyTorch's attention; (B, heads, tokens, C / heads) everywhere."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and query.device.type == "cpu" and torch.is_grad_enabled():
        # On CPUs the backward pass in bfloat16 is several times slower than in float32.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=allowed, dropout_p=dropout
            )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)


class SelfAttention(MultiHeadAttention):
    """Tokens attend to each other; positions enter queries and keys, never values."""

    def forward(
        self, content: Tensor, position: Tensor | None, allowed: Tensor | None = None
    ) -> Tensor:
        """(B, Q, C), (B, Q, C) or None, mask broadcasting to (B, heads, Q, Q) -> (B, Q, C)."""
        located = content if position is None else content + position
        return self.attend(located, located, content, allowed)


class PlainCrossAttention(MultiHeadAttention):
    """Queries attend to all unpadded memory tokens (DETR, appendix A.3, figure 10)."""

    def forward(
        self,
        content: Tensor,
        query_position: Tensor,
        memory: Memory,
        reference: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            content, query_position: (B, Q, C).
            memory: S encoded tokens.
            reference: (B, Q, 2 or 4), for attention that looks at a place; not used here.

        Returns:
            (B, Q, C)
        """
        allowed = ~memory.padding[:, None, None, :]
        key = memory.tokens + memory.positions
        return self.attend(content + query_position, key, memory.tokens, allowed)
