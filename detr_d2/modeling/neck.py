"""From backbone maps to memory tokens.

Shapes: B images, C channels, S tokens, L levels, H and W of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..structures import Memory


class SingleScaleNeck(nn.Module):
    """Projects one backbone map to the transformer's width with a 1x1 convolution
    (DETR, section 3.2) and flattens it into tokens."""

    num_levels = 1

    def __init__(
        self, in_features: Sequence[str], in_channels: int, hidden_dim: int, position: nn.Module
    ):
        """
        Args:
            in_features: name of the backbone map, as a sequence of one.
            in_channels: its channels.
            hidden_dim: C.
            position: (B, H, W) padding -> (B, C, H, W) embedding.
        """
        super().__init__()
        (self.in_feature,) = in_features
        self.projections = nn.ModuleList([nn.Conv2d(in_channels, hidden_dim, kernel_size=1)])
        self.position = position

    def forward(self, features: dict[str, Tensor], padding: Tensor) -> Memory:
        """
        Args:
            features: backbone maps by name.
            padding: (B, H_image, W_image) bool, True on padding, of the padded images.
        """
        projected = self.projections[0](features[self.in_feature])
        return _flatten([projected], padding, self.position)


class MultiScaleNeck(nn.Module):
    """Projects several backbone maps, adds coarser ones, and flattens all into tokens
    (Deformable DETR, appendix A.2, figure 4).

    The published models' group norms average over padding, too: what an image is batched with
    changes its features a little.
    """

    num_groups = 32

    def __init__(
        self,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        hidden_dim: int,
        num_levels: int,
        position: nn.Module,
    ):
        """
        Args:
            in_features: names of the backbone maps, from fine to coarse.
            in_channels: of each.
            hidden_dim: C.
            num_levels: L, at least as many as maps; each further level halves the one before, the
                first of them the backbone's last map.
            position: (B, H, W) padding -> (B, C, H, W) embedding.

        Raises:
            UserError: C cannot be split into groups.
        """
        super().__init__()
        if hidden_dim % self.num_groups:
            raise UserError(
                f"MODEL.DETR.HIDDEN_DIM must be divisible by {self.num_groups}, the groups of the "
                f"multi-scale neck's norms, got {hidden_dim}."
            )
        self.in_features = list(in_features)
        self.num_levels = num_levels
        coarser = [in_channels[-1]] + [hidden_dim] * (num_levels - len(in_features) - 1)
        convolutions = [nn.Conv2d(channels, hidden_dim, kernel_size=1) for channels in in_channels]
        convolutions += [
            nn.Conv2d(channels, hidden_dim, kernel_size=3, stride=2, padding=1)
            for channels in coarser[: num_levels - len(in_features)]
        ]
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        self.projections = nn.ModuleList(
            nn.Sequential(convolution, nn.GroupNorm(self.num_groups, hidden_dim))
            for convolution in convolutions
        )
        self.level_embedding = nn.Parameter(torch.randn(num_levels, hidden_dim))
        self.position = position

    def forward(self, features: dict[str, Tensor], padding: Tensor) -> Memory:
        """See `SingleScaleNeck.forward`."""
        maps = [features[name] for name in self.in_features]
        projected = []
        for index, projection in enumerate(self.projections):
            if index < len(maps):
                source = maps[index]
            else:
                source = maps[-1] if index == len(maps) else projected[-1]
            projected.append(projection(source))
        return _flatten(projected, padding, self.position, self.level_embedding)


def _flatten(
    maps: Sequence[Tensor],
    padding: Tensor,
    position: nn.Module,
    level_embedding: Tensor | None = None,
) -> Memory:
    """Maps (B, C, H, W) from fine to coarse -> S tokens, row by row.

    Args:
        padding: (B, H_image, W_image).
        position: (B, H, W) padding -> (B, C, H, W) embedding.
        level_embedding: (L, C), added to the positions.
    """
    shapes = [tuple(level.shape[-2:]) for level in maps]
    masks = [resize_padding(padding, shape) for shape in shapes]
    positions = [position(mask).flatten(2).transpose(1, 2) for mask in masks]
    if level_embedding is not None:
        positions = [p + e for p, e in zip(positions, level_embedding, strict=True)]
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
    return Memory(
        tokens=tokens,
        positions=torch.cat(positions, dim=1).to(tokens.dtype),
        padding=torch.cat([mask.flatten(1) for mask in masks], dim=1),
        level_shapes=tuple(shapes),
        valid_ratios=torch.stack([valid_ratio(mask) for mask in masks], dim=1),
    )


def padding_mask(sizes: Tensor, padded_size: Sequence[int]) -> Tensor:
    """(B, 2) height and width of each image, and those of the padded batch -> (B, H, W) bool, True
    on padding."""
    rows, columns = (torch.arange(side, device=sizes.device) for side in padded_size)
    below = rows[None, :, None] >= sizes[:, :1, None]
    right = columns[None, None, :] >= sizes[:, 1:, None]
    return below | right


def resize_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of the (B, H, W) mask to `size`.

    Published weights were trained and evaluated with this rule; rounding image sizes up by the
    stride, as others do, marks other cells.
    """
    return nn.functional.interpolate(padding[:, None].float(), size=size)[:, 0].bool()


def valid_ratio(padding: Tensor) -> Tensor:
    """(B, H, W) -> (B, 2): the share of the width, and of the height, that is not padding."""
    valid = (~padding).float()
    return torch.stack((valid[:, 0, :].mean(1), valid[:, :, 0].mean(1)), dim=-1)
