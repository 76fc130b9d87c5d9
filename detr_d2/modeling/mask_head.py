"""Instance and panoptic masks from attention over the encoded image (DETR, section 4.4, figure 8).

Shapes: B images, Q queries, P pairs of an image and one of its queries, C channels, M heads, h and
w of the memory's map, H and W of the finest map (the backbone's, of stride 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structures import Memory
from .deformable import token_centres


@dataclass
class MaskSource:
    """What masks are made from, for all queries of a batch."""

    memory: Memory
    """from the encoder"""
    projected: Tensor
    """(B, h*w, C) the neck's tokens, before the encoder"""
    features: dict[str, Tensor]
    """backbone maps by name"""
    pixels: Tensor
    """(B, 3, H_image, W_image) what the backbone was given"""
    content: Tensor
    """(B, Q, C) of the last decoder layer, as the prediction heads see it"""
    boxes: Tensor
    """(B, Q, 4) of that layer, cxcywh, normalised to the image without padding"""
    autocast: torch.dtype | None = None
    """of the rest of the model; losses, which ask for masks, are outside of it"""
    shared: SharedMaps | None = None
    """made when the first masks are asked for"""


class SharedMaps(NamedTuple):
    """What the masks of all queries of an image have in common."""

    keys: Tensor
    """(B, h*w, C) of the attention maps"""
    coarse: Tensor
    """(B, width, h, w) the first convolution of the neck's tokens"""
    finer: list[Tensor]
    """(B, width, ...) from coarse to fine"""


class MaskHead(nn.Module):
    """Attention maps of each query over the memory, enlarged step by step beside finer and finer
    backbone maps. What queries of an image share is computed once for all of them."""

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        pixel_strides: Sequence[int] = (),
        around_boxes: bool = False,
        width: int = 0,
    ):
        """
        Args:
            hidden_dim: C.
            num_heads: M, attention maps per query.
            in_features: names of the backbone maps finer than the memory's, from coarse to fine.
            in_channels: of each of them.
            pixel_strides: of further steps, beside the image itself; not in the original, for
                objects with finer outlines than the backbone's maps.
            around_boxes: attention falls off around a query's box, each head's at a rate of its own
                (SMCA, Gao et al., 2021, section 3.2), one more map says where the box is, and the
                query's content is added to all places: stuff and things differ from the start.
                For queries whose content need not know where they are, as their boxes are offsets
                from references.
            width: channels that the coarsest map has beside the attention maps, halved at each
                step; 0: C, as in the original. The time that masks take grows with its square.
        """
        super().__init__()
        self.num_heads = num_heads
        self.in_features = list(in_features)
        self.pixel_strides = list(pixel_strides)
        self.q_proj = nn.Linear(hidden_dim, hidden_dim)
        self.k_proj = nn.Linear(hidden_dim, hidden_dim)
        width = width or hidden_dim
        widths = [width + num_heads]
        steps = len(self.in_features) + len(self.pixel_strides)
        widths += [max(width // 2 ** (i + 1), 16) for i in range(steps + 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, next_channels, kernel_size=3, padding=1)
            for channels, next_channels in zip(
                [hidden_dim + num_heads + around_boxes, *widths[:-1]], widths, strict=True
            )
        )
        self.norms = nn.ModuleList(nn.GroupNorm(gcd(8, channels), channels) for channels in widths)
        of_maps, of_pixels = widths[1 : len(in_channels) + 1], widths[len(in_channels) + 1 : -1]
        self.adapters = nn.ModuleList(
            nn.Conv2d(channels, finer, kernel_size=1)
            for channels, finer in zip(in_channels, of_maps, strict=True)
        )
        self.adapters += [
            pixel_adapter(stride, finer)
            for stride, finer in zip(self.pixel_strides, of_pixels, strict=True)
        ]
        rates = torch.linspace(-2, 2, num_heads)  # softplus: 0.13 to 2.13
        self.fall_off = nn.Parameter(rates) if around_boxes else None
        self.content_proj = nn.Linear(hidden_dim, widths[0]) if around_boxes else None
        self.out = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)
        # An attention map is some thousandths at every place: it has to be heard beside the image.
        with torch.no_grad():
            self.convs[0].weight[:, hidden_dim : hidden_dim + num_heads] *= 100
        for projection in (self.q_proj, self.k_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, source: MaskSource, images: Tensor, queries: Tensor) -> Tensor:
        """
        Args:
            source: of the whole batch.
            images, queries: (P,) int64, the pairs that a mask is wanted of.

        Returns:
            (P, H, W) logits.
        """
        if images.shape[0] == 0:  # of a query that does not matter: every parameter has a gradient
            none = images.new_zeros(1)
            return self(source, none, none)[:0]
        if source.autocast is None:
            return self._logits(source, images, queries)
        with torch.autocast(images.device.type, source.autocast):
            return self._logits(source, images, queries)

    def _logits(self, source: MaskSource, images: Tensor, queries: Tensor) -> Tensor:
        shared = self.shared(source)
        maps = self.attention_maps(source, images, queries)
        if self.content_proj is not None:
            inside = torch.exp(-self._squared_distance(source, images, queries))
            maps = torch.cat((maps, inside[:, None]), dim=1)
        maps = maps.unflatten(-1, tuple(source.memory.level_shapes[0]))
        # The first convolution of [projected; maps], whose first part is the same for all queries.
        x = shared.coarse.index_select(0, images)
        own = self.convs[0].weight[:, -maps.shape[1] :]
        x = x + F.conv2d(maps.to(x.dtype), own.to(x.dtype), padding=1)
        if self.content_proj is not None:
            x = x + self.content_proj(source.content[images, queries])[..., None, None]
        x = self.norms[0](x).relu()
        x = self.norms[1](self.convs[1](x)).relu()
        for finer, convolution, norm in zip(
            shared.finer, self.convs[2:], self.norms[2:], strict=True
        ):
            x = finer.index_select(0, images) + F.interpolate(
                x, size=finer.shape[-2:], mode="nearest"
            )
            x = norm(convolution(x)).relu()
        return self.out(x).squeeze(1)

    def shared(self, source: MaskSource) -> SharedMaps:
        """Made once, however many times masks are asked for."""
        if source.shared is None:
            source.shared = self._make_shared(source)
        return source.shared

    def _make_shared(self, source: MaskSource) -> SharedMaps:
        height, width = source.memory.level_shapes[0]
        projected = source.projected.transpose(1, 2).unflatten(-1, (height, width))
        weight = self.convs[0].weight[:, : projected.shape[1]]
        finer_maps = [source.features[name] for name in self.in_features]
        finer_maps += [source.pixels] * len(self.pixel_strides)
        return SharedMaps(
            self.k_proj(source.memory.tokens),
            F.conv2d(projected, weight, self.convs[0].bias, padding=1),
            [adapter(x) for adapter, x in zip(self.adapters, finer_maps, strict=True)],
        )

    def attention_maps(self, source: MaskSource, images: Tensor, queries: Tensor) -> Tensor:
        """(P, M, h*w): softmax over heads and places together, nothing on padding."""
        content = source.content[images, queries]
        query = self.q_proj(content).unflatten(-1, (self.num_heads, -1))  # (P, M, C / M)
        key = self.shared(source).keys.unflatten(-1, (self.num_heads, -1))
        scale = query.shape[-1] ** -0.5
        scores = torch.einsum("pmc,psmc->pms", query * scale, key[images]).float()
        if self.fall_off is not None:
            squared = self._squared_distance(source, images, queries)
            scores = scores - F.softplus(self.fall_off.float())[:, None] * squared[:, None]
        padding = source.memory.padding[images][:, None]
        scores = scores.masked_fill(padding, float("-inf"))
        return scores.flatten(1).softmax(-1).view_as(scores)

    @staticmethod
    def _squared_distance(source: MaskSource, images: Tensor, queries: Tensor) -> Tensor:
        """(P, h*w): squared, from the box's centre; 1 where an ellipse in the box ends."""
        memory = source.memory
        places = token_centres(memory.level_shapes, memory.valid_ratios)[images]
        boxes = source.boxes[images, queries].detach().float()[:, None]
        return ((places - boxes[..., :2]) / (boxes[..., 2:] / 2).clamp(min=1e-3)).square().sum(-1)


def pixel_adapter(stride: int, channels: int) -> nn.Sequential:
    """(B, 3, H, W) -> (B, channels, H / stride, W / stride), rounded up. What pixels belong to an
    outline is found once per image here, not once per query."""
    inner = 64
    return nn.Sequential(
        nn.Conv2d(3, inner, kernel_size=2 * stride + 1, stride=stride, padding=stride),
        nn.GroupNorm(8, inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, kernel_size=3, padding=1),
        nn.GroupNorm(8, inner),
        nn.ReLU(),
        nn.Conv2d(inner, channels, kernel_size=3, padding=1),
    )


def resize_masks(
    logits: Tensor,
    padded_size: Sequence[int],
    image_size: Sequence[int],
    size: Sequence[int],
    threshold: float = 0.5,
) -> Tensor:
    """Logits of one image to masks at the size that is asked for. The original decides at the
    model's size and enlarges the decision; here what is enlarged is the logits: smoother outlines.

    Args:
        logits: (D, H, W).
        padded_size: height and width of the padded batch.
        image_size: of the image in it.
        size: of the result.
        threshold: a pixel of greater probability belongs to the mask.

    Returns:
        (D, *size) bool.
    """
    full = F.interpolate(logits[:, None].float(), size=tuple(padded_size), mode="bilinear")
    image = full[:, :, : image_size[0], : image_size[1]]
    return F.interpolate(image, size=tuple(size), mode="bilinear")[:, 0].sigmoid() > threshold
