"""Position embeddings of feature maps, points and boxes.

Shapes: B images, Q queries, C channels, H and W of the feature map.
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

    def __init__(self, hidden_dim: int, temperature: float = 10000.0, offset: float = 0.0):
        """
        Args:
            hidden_dim: C.
            temperature: ratio of the longest to the shortest wave.
            offset: added to the pixel count; -0.5 puts coordinates into the middle of a pixel.

        Raises:
            UserError: `hidden_dim` is not divisible by 4.
        """
        super().__init__()
        if hidden_dim % 4:
            raise UserError(f"MODEL.DETR.HIDDEN_DIM must be divisible by 4, got {hidden_dim}.")
        self.channels = hidden_dim // 2
        self.temperature = temperature
        self.offset = offset

    def forward(self, padding: Tensor) -> Tensor:
        """(B, H, W) bool, True on padding -> (B, C, H, W) float32."""
        valid = ~padding
        y = valid.cumsum(1, dtype=torch.float32)
        x = valid.cumsum(2, dtype=torch.float32)
        y = (y + self.offset) / (y[:, -1:, :] + 1e-6)
        x = (x + self.offset) / (x[:, :, -1:] + 1e-6)
        waves = sine_embedding(torch.stack((y, x), dim=-1), self.channels, self.temperature)
        return waves.permute(0, 3, 1, 2)


def sine_embedding(coordinates: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Sine (even channels) and cosine (odd channels) of each coordinate, one after the other.

    Args:
        coordinates: (..., N), 1 for the whole image; float32, for bfloat16 knows only 256 places.
        channels: of each coordinate.

    Returns:
        (..., N * channels)
    """
    exponent = torch.arange(channels // 2, device=coordinates.device) * 2 / channels
    angles = 2 * math.pi * coordinates[..., None] / temperature**exponent
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)


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
