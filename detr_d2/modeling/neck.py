"""From backbone maps to memory tokens.

Shapes: B images, C channels, S tokens, H and W of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..structures import Memory


class SingleScaleNeck(nn.Module):
    """Projects one backbone map to the transformer's width with a 1x1 convolution
    (DETR, section 3.2) and flattens it into tokens."""

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
        height, width = projected.shape[-2:]
        padding = resize_padding(padding, (height, width))
        return Memory(
            tokens=projected.flatten(2).transpose(1, 2),
            positions=self.position(padding).flatten(2).transpose(1, 2).to(projected.dtype),
            padding=padding.flatten(1),
            level_shapes=torch.tensor([[height, width]]),
            valid_ratios=valid_ratio(padding)[:, None],
        )


def padding_mask(
    image_sizes: Sequence[tuple[int, int]], padded_size: Sequence[int], device: torch.device
) -> Tensor:
    """(height, width) of each image and of the padded batch -> (B, H, W) bool, True on padding."""
    heights, widths = torch.tensor(image_sizes).to(device, non_blocking=True).unbind(1)
    height, width = padded_size
    below = torch.arange(height, device=device) >= heights[:, None]
    right = torch.arange(width, device=device) >= widths[:, None]
    return below[:, :, None] | right[:, None, :]


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
