"""How a decoder layer's query position is made.

`(queries, content, reference, memory, is_first) -> QueryPosition`: `content` is what enters the
layer, `reference` the current one.

Shapes: B images, Q queries, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..structures import Memory, Queries, QueryPosition
from .heads import MLP
from .position import sine_embedding


class StaticQueryPosition(nn.Module):
    """What the query initialiser says, the same in every layer (DETR, Deformable DETR)."""

    def forward(
        self,
        queries: Queries,
        content: Tensor,
        reference: Tensor | None,
        memory: Memory,
        is_first: bool,
    ) -> QueryPosition:
        """See the head of this file."""
        return QueryPosition(queries.position)


class ConditionalQueryPosition(nn.Module):
    """The reference point's embedding, scaled channel by channel by what the content knows of the
    object's extent (Conditional DETR, Meng et al., 2021, section 3.3, equations 5 and 6)."""

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.channels = hidden_dim // 2
        self.scale = MLP(hidden_dim, hidden_dim, hidden_dim, num_layers=2, xavier=True)

    def forward(
        self,
        queries: Queries,
        content: Tensor,
        reference: Tensor,
        memory: Memory,
        is_first: bool,
    ) -> QueryPosition:
        """See the head of this file; references may be points or boxes."""
        spatial = sine_embedding(_y_first(reference)[..., :2], self.channels).to(content.dtype)
        if not is_first:
            spatial = spatial * self.scale(content)
        return QueryPosition(queries.position, spatial)


class ModulatedQueryPosition(nn.Module):
    """Position from the box, and attention as wide and high as the box
    (DAB-DETR, Liu et al., 2022, sections 4.2 and 4.4, equations 1, 2, 4, 6 and 7)."""

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.channels = hidden_dim // 2
        self.scale = MLP(hidden_dim, hidden_dim, hidden_dim, num_layers=2, xavier=True)
        self.box_mlp = MLP(2 * hidden_dim, hidden_dim, hidden_dim, num_layers=2, xavier=True)
        self.size_mlp = MLP(hidden_dim, hidden_dim, 2, num_layers=2, xavier=True)

    def forward(
        self,
        queries: Queries,
        content: Tensor,
        reference: Tensor,
        memory: Memory,
        is_first: bool,
    ) -> QueryPosition:
        """See the head of this file; references are boxes."""
        waves = sine_embedding(_y_first(reference), self.channels).to(content.dtype)
        embedding = self.box_mlp(waves)
        spatial = waves[..., : 2 * self.channels]
        if not is_first:
            spatial = spatial * self.scale(content)
        width, height = self.size_mlp(content).float().sigmoid().unbind(-1)
        # The larger the box, the less a token's distance from its centre counts. A clamp, for boxes
        # of no size must not end a training, and float16 has no room for more.
        height = height / reference[..., 3].clamp(min=1e-4)
        width = width / reference[..., 2].clamp(min=1e-4)
        modulation = torch.stack((height, width), dim=-1).repeat_interleave(self.channels, dim=-1)
        return QueryPosition(embedding, spatial * modulation.to(spatial.dtype))


class BoxQueryPosition(nn.Module):
    """Position from the box (DAB-Deformable-DETR; DINO, Zhang et al., 2023, section 3.1)."""

    def __init__(self, hidden_dim: int, relative_to_padding: bool = False):
        """
        Args:
            relative_to_padding: measure the box in the padded image, as the published DINO does.
                Then an image's detections depend on what it is batched with.
        """
        super().__init__()
        self.channels = hidden_dim // 2
        self.relative_to_padding = relative_to_padding
        self.box_mlp = MLP(2 * hidden_dim, hidden_dim, hidden_dim, num_layers=2, xavier=True)

    def forward(
        self,
        queries: Queries,
        content: Tensor,
        reference: Tensor,
        memory: Memory,
        is_first: bool,
    ) -> QueryPosition:
        """See the head of this file; references are boxes."""
        if self.relative_to_padding:
            reference = reference * memory.valid_ratios[:, :1].repeat(1, 1, 2)
        waves = sine_embedding(_y_first(reference), self.channels)
        return QueryPosition(self.box_mlp(waves.to(content.dtype)))


def _y_first(reference: Tensor) -> Tensor:
    """(..., 2 or 4) x, y(, w, h) -> y, x(, w, h), the order of the map's position embedding."""
    x, y = reference[..., 0:1], reference[..., 1:2]
    return torch.cat((y, x, reference[..., 2:]), dim=-1)
