"""Attention on (B, tokens, C) tensors.

Attention over the memory has one signature, `(content, position, memory, reference) -> (B, Q, C)`,
for the encoder, whose queries are the tokens themselves, and for the decoder's cross-attention.

Shapes: B images, Q queries, S memory tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..structures import Memory, QueryPosition
from .dropout import drop_out


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017, section 3.2.2).

    The attention matrix is not kept, but for dropout on CPUs.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float = 0.0):
        """
        Raises:
            UserError: `hidden_dim` is not divisible by `num_heads`.
        """
        super().__init__()
        self.num_heads = check_heads(hidden_dim, num_heads)
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
        heads = (split_heads(x, self.num_heads) for x in self.project(query, key, value))
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(merge_heads(scaled_dot_product(*heads, allowed, dropout)))

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `attend` -> (B, Q, C), (B, S, C), (B, S, C)"""
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float
) -> Tensor:
    """Attention by whichever way is fastest; (B, heads, tokens, C / heads) everywhere."""
    if query.device.type == "cpu":
        if dropout:
            return attention_with_dropout(query, key, value, allowed, dropout)
        # PyTorch's bfloat16 kernel for CPUs is slower than float32's backward, and than plain
        # products forward.
        half = query.dtype in (torch.bfloat16, torch.float16)
        if half and torch.is_grad_enabled():
            with torch.autocast("cpu", enabled=False):
                return attention_of_pytorch(query.float(), key.float(), value.float(), allowed)
        if half and not torch.compiler.is_compiling():
            return attention_in_parts(query, key, value, allowed)
    return attention_of_pytorch(query, key, value, allowed, dropout)


def attention_of_pytorch(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """As `scaled_dot_product`, by PyTorch's kernel."""
    if allowed is not None and torch.compiler.is_compiling():
        # Boolean masks become checks for NaN in ONNX, which keep runtimes from fusing attention.
        allowed = additive(allowed, query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float
) -> Tensor:
    """As `scaled_dot_product` on CPUs: PyTorch, too, keeps the whole matrix where there is dropout,
    and draws for it what `Dropout` avoids. In bfloat16, values and gradients are within 1 % of
    double precision's (0.5 % if the matrix were in float32, at more than half as much time again).
    """
    with torch.autocast("cpu", enabled=False):  # which would have the softmax in float32
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if allowed is not None:
            scores = scores + additive(allowed, query.dtype)
        return drop_out(scores.softmax(-1), dropout) @ value


def attention_in_parts(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, queries: int = 256
) -> Tensor:
    """As `scaled_dot_product`, for some queries at a time: the whole matrix is never there."""
    key = (key * query.shape[-1] ** -0.5).transpose(-1, -2)
    bias = None if allowed is None else additive(allowed, query.dtype)
    # Parts kept in a list, small ones between large ones, would keep C libraries from using the
    # memory of the large ones again.
    result = query.new_empty(*query.shape[:3], value.shape[-1])
    for first in range(0, query.shape[2], queries):
        chosen = slice(first, first + queries)
        scores = query[:, :, chosen] @ key
        if bias is not None:
            scores += bias if bias.shape[-2] == 1 else bias[..., chosen, :]
        result[:, :, chosen] = scores.softmax(-1) @ value
    return result


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores; finite, so that a query that may look nowhere is no NaN."""
    zeros = torch.zeros_like(allowed, dtype=dtype)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min / 2)


class SelfAttention(MultiHeadAttention):
    """Tokens attend to each other; positions enter queries and keys, never values."""

    def forward(
        self, content: Tensor, position: Tensor | None, allowed: Tensor | None = None
    ) -> Tensor:
        """(B, Q, C), (B, Q, C) or None, mask broadcasting to (B, heads, Q, Q) -> (B, Q, C)."""
        query = with_position(content, position)
        return self.attend(query, query, content, allowed)


class PlainAttention(MultiHeadAttention):
    """Queries attend to all unpadded memory tokens (DETR, appendix A.3, figure 10)."""

    def forward(
        self,
        content: Tensor,
        position: QueryPosition,
        memory: Memory,
        reference: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            content: (B, Q, C).
            position: its embedding is added to the content.
            memory: S tokens.
            reference: (B, Q, 2 or 4), for attention that looks at a place; not used here.

        Returns:
            (B, Q, C)
        """
        allowed = allowed_tokens(memory)
        key = memory.tokens + memory.positions
        query = with_position(content, position.embedding)
        return self.attend(query, key, memory.tokens, allowed)


class SeparateSelfAttention(nn.Module):
    """Self-attention with projections of their own for content and position
    (Conditional DETR, Meng et al., 2021, section 3.3)."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float = 0.0):
        """
        Raises:
            UserError: `hidden_dim` is not divisible by `num_heads`.
        """
        super().__init__()
        self.num_heads = check_heads(hidden_dim, num_heads)
        self.dropout = dropout
        self.content_q_proj = _linear(hidden_dim)
        self.position_q_proj = _linear(hidden_dim)
        self.content_k_proj = _linear(hidden_dim)
        self.position_k_proj = _linear(hidden_dim)
        self.v_proj = _linear(hidden_dim)
        self.out_proj = _linear(hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, content: Tensor, position: Tensor, allowed: Tensor | None = None) -> Tensor:
        """(B, Q, C), (B, Q, C), mask broadcasting to (B, heads, Q, Q) -> (B, Q, C)."""
        attended = scaled_dot_product(
            split_heads(
                self.content_q_proj(content) + self.position_q_proj(position), self.num_heads
            ),
            split_heads(
                self.content_k_proj(content) + self.position_k_proj(position), self.num_heads
            ),
            split_heads(self.v_proj(content), self.num_heads),
            allowed,
            self.dropout if self.training else 0.0,
        )
        return self.out_proj(merge_heads(attended))


class ConditionalAttention(nn.Module):
    """Content and place are compared apart (Conditional DETR, section 3.3, equation 3).

    In every head the content's channels and the place's stand side by side, so their products
    add up. The place of a query is `position.spatial`.
    """

    def __init__(
        self, hidden_dim: int, num_heads: int, dropout: float = 0.0, is_first: bool = False
    ):
        """
        Args:
            is_first: in the first decoder layer, whose content knows nothing yet, the position
                embeddings of queries and tokens enter the content, too.

        Raises:
            UserError: `hidden_dim` is not divisible by `num_heads`.
        """
        super().__init__()
        self.num_heads = check_heads(hidden_dim, num_heads)
        self.dropout = dropout
        self.content_q_proj = _linear(hidden_dim)
        self.position_q_proj = _linear(hidden_dim) if is_first else None
        self.content_k_proj = _linear(hidden_dim)
        self.position_k_proj = _linear(hidden_dim)
        self.spatial_q_proj = _linear(hidden_dim)
        self.v_proj = _linear(hidden_dim)
        self.out_proj = _linear(hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        content: Tensor,
        position: QueryPosition,
        memory: Memory,
        reference: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            content: (B, Q, C).
            position: with its spatial part.
            memory: S tokens.
            reference: not used; the spatial part is made from it.

        Returns:
            (B, Q, C)

        Raises:
            ValueError: the position has no spatial part.
        """
        if position.spatial is None:
            raise ValueError("Conditional attention needs query positions with a spatial part.")
        query = self.content_q_proj(content)
        key = self.content_k_proj(memory.tokens)
        key_position = self.position_k_proj(memory.positions)
        if self.position_q_proj is not None:
            query = query + self.position_q_proj(position.embedding)
            key = key + key_position
        spatial = self.spatial_q_proj(position.spatial)
        attended = scaled_dot_product(
            torch.cat(
                (split_heads(query, self.num_heads), split_heads(spatial, self.num_heads)), dim=-1
            ),
            torch.cat(
                (split_heads(key, self.num_heads), split_heads(key_position, self.num_heads)),
                dim=-1,
            ),
            split_heads(self.v_proj(memory.tokens), self.num_heads),
            allowed_tokens(memory),
            self.dropout if self.training else 0.0,
        )
        return self.out_proj(merge_heads(attended))


def allowed_tokens(memory: Memory) -> Tensor | None:
    """(B, 1, 1, S), False on padding; None if nothing is padded and that can be looked up without
    waiting for a device: attention without a mask is faster."""
    padding = memory.padding
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if padding.device.type == "cpu" and not is_traced and not padding.any():
        return None
    return ~padding[:, None, None, :]


def with_position(content: Tensor, embedding: Tensor | None) -> Tensor:
    """Content with its position embedding, where there is one."""
    return content if embedding is None else content + embedding


def check_heads(hidden_dim: int, num_heads: int) -> int:
    """
    Raises:
        UserError: the channels cannot be split over the heads.
    """
    if hidden_dim % num_heads:
        raise UserError(
            f"MODEL.DETR.HIDDEN_DIM ({hidden_dim}) must be divisible by "
            f"MODEL.DETR.NHEADS ({num_heads})."
        )
    return num_heads


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, tokens, C) -> (B, heads, tokens, C / heads)"""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, tokens, C / heads) -> (B, tokens, C)"""
    return x.transpose(1, 2).flatten(2)


def _linear(hidden_dim: int) -> nn.Linear:
    linear = nn.Linear(hidden_dim, hidden_dim)
    nn.init.xavier_uniform_(linear.weight)
    return linear
