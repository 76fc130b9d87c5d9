"""Query initialisers: memory -> what the decoder starts from.

Shapes: B images, Q queries, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..structures import LayerOutput, Memory, Queries


class LearnedQueries(nn.Module):
    """One learned position vector per query; the content starts at zero (DETR, section 3.2)."""

    def __init__(self, num_queries: int, hidden_dim: int):
        super().__init__()
        self.num_queries = num_queries
        self.position = nn.Embedding(num_queries, hidden_dim)

    def forward(self, memory: Memory) -> tuple[Queries, LayerOutput | None]:
        """
        Returns:
            The queries, and proposals to supervise: none, for learned queries know nothing of
            the image.
        """
        position: Tensor = self.position.weight.to(memory.tokens.dtype)
        position = position.expand(len(memory.tokens), -1, -1)
        return Queries(content=position.new_zeros(position.shape), position=position), None
