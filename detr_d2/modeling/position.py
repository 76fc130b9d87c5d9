"""Position embeddings of feature maps.

Shapes: B images, C channels, H and W of the feature map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import UserError


class SinePositionEmbedding(nn.Module):
    """Sine and cosine of normalised coordinates (DETR, appendix A.4; Parmar et al., 2018).

    The first half of the channels encodes y, the second x. Coordinates count only unpadded
    pixels, so an image has the same embedding whatever it is batched with.
    """

    def __init__(self, hidden_dim: int, temperature: float = 10000.0):
        super().__init__()
        if hidden_dim % 4:
            raise UserError(f"MODEL.DETR.HIDDEN_DIM must be divisible by 4, got {hidden_dim}.")
        self.channels = hidden_dim // 2
        self.temperature = temperature

    def forward(self, padding: Tensor) -> Tensor:
        """(B, H, W) bool, True on padding -> (B, C, H, W) float32."""
        valid = ~padding
        y = valid.cumsum(1, dtype=torch.float32)
        x = valid.cumsum(2, dtype=torch.float32)
        y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
        x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        return torch.cat((self._waves(y), self._waves(x)), dim=3).permute(0, 3, 1, 2)

    def _waves(self, coordinate: Tensor) -> Tensor:
        """(B, H, W) -> (B, H, W, C/2): sine on even channels, cosine on odd ones."""
        exponent = torch.arange(self.channels // 2, device=coordinate.device) * 2 / self.channels
        angles = coordinate[..., None] / self.temperature**exponent
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class LearnedPositionEmbedding(nn.Module):
    """One learned vector per row and per column, up to 50 of each, as the original has it."""

    def __init__(self, hidden_dim: int, max_size: int = 50):
        super().__init__()
        self.row_embedding = nn.Embedding(max_size, hidden_dim // 2)
        self.column_embedding = nn.Embedding(max_size, hidden_dim // 2)
        nn.init.uniform_(self.row_embedding.weight)
        nn.init.uniform_(self.column_embedding.weight)

    def forward(self, padding: Tensor) -> Tensor:
        """(B, H, W) -> (B, C, H, W).

        Raises:
            UserError: the map is larger than the embedding.
        """
        batch, height, width = padding.shape
        max_size = self.row_embedding.num_embeddings
        if max(height, width) > max_size:
            raise UserError(
                f"A feature map of {height}x{width} is larger than the learned position embedding "
                f"({max_size}x{max_size}): lower INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST, or "
                'set MODEL.DETR.POSITION_EMBEDDING to "sine".'
            )
        columns = self.column_embedding.weight[:width].expand(height, -1, -1)
        rows = self.row_embedding.weight[:height, None].expand(-1, width, -1)
        # The original puts x before y here, unlike in its sine embedding.
        embedding = torch.cat((columns, rows), dim=-1).permute(2, 0, 1)
        return embedding.expand(batch, -1, -1, -1)
