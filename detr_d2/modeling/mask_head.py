"""Instance and panoptic masks from attention over the encoded image (DETR, section 4.4, figure 8).

Shapes: B images, Q queries, P pairs of an image and one of its queries, C channels, M heads, E
channels of an embedding, h and w of the memory's map, H and W of masks (stride 4, the backbone's
finest map, or less).
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
    pixels: Tensor | None
    """(B, E, H, W)"""


class MaskHead(nn.Module):
    """Attention maps of each query over the memory, enlarged step by step beside finer and finer
    backbone maps. What queries of an image share is computed once for all of them."""

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        pixel_stride: int = 0,
        around_boxes: bool = False,
        width: int = 0,
        image_channels: int = 3,
        attention_gain: float = 1.0,
    ):
        """
        Args:
            hidden_dim: C.
            num_heads: M, attention maps per query.
            in_features: names of the backbone maps finer than the memory's, from coarse to fine.
            in_channels: number of channels of each of them.
            pixel_stride: of masks finer than the backbone's maps, for objects with finer outlines;
                not in the original. A mask is then the product of an embedding of each pixel and
                one that the query has there (as in MaskFormer, Cheng et al., 2021, section 3.3,
                where a query has one for the whole image). 0: masks of the finest map.
            around_boxes: attention falls off around a query's box, each head's at a rate of its own
                (SMCA, Gao et al., 2021, section 3.2), one more map says where the box is, and the
                query's content is added to all places: stuff and things differ from the start.
                For queries whose content need not know where they are, as their boxes are offsets
                from references.
            width: channels that the coarsest map has beside the attention maps, halved at each
                step, at least 16; 0: C, as in the original. The time that masks take grows with its
                square.
            image_channels: of the image itself.
            attention_gain: factor of the first convolution's initial weights of attention maps; 1:
                the original's. The maps are about 0.001 everywhere: it hardly depends on them at
                first, and all queries start with the same mask, which a short training does not
                leave behind.
        """
        super().__init__()
        self.num_heads = num_heads
        self.in_features = list(in_features)
        self.q_proj = nn.Linear(hidden_dim, hidden_dim)
        self.k_proj = nn.Linear(hidden_dim, hidden_dim)
        width = width or hidden_dim
        widths = [width + num_heads]
        widths += [max(width // 2 ** (i + 1), 16) for i in range(len(self.in_features) + 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, next_channels, kernel_size=3, padding=1)
            for channels, next_channels in zip(
                [hidden_dim + num_heads + around_boxes, *widths[:-1]], widths, strict=True
            )
        )
        self.norms = nn.ModuleList(nn.GroupNorm(gcd(8, channels), channels) for channels in widths)
        self.adapters = nn.ModuleList(
            nn.Conv2d(channels, finer, kernel_size=1)
            for channels, finer in zip(in_channels, widths[1:-1], strict=True)
        )
        self.pixels = None
        if pixel_stride:
            self.pixels = PixelEmbedding(pixel_stride, in_channels[-1], image_channels)
        channels = 1 if self.pixels is None else 1 + self.pixels.dim
        self.out = nn.Conv2d(widths[-1], channels, kernel_size=3, padding=1)
        rates = torch.linspace(-2, 2, num_heads)  # softplus: 0.13 to 2.13
        self.fall_off = nn.Parameter(rates) if around_boxes else None
        self.content_proj = nn.Linear(hidden_dim, widths[0]) if around_boxes else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.convs[0].weight[:, hidden_dim : hidden_dim + num_heads] *= attention_gain
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
        squared = None if self.fall_off is None else squared_distance(source, images, queries)
        maps = self.attention_maps(source, images, queries, squared)
        if squared is not None:
            maps = torch.cat((maps, torch.exp(-squared)[:, None]), dim=1)
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
        x = self.out(x)
        if shared.pixels is None:
            return x.squeeze(1)
        pixels = shared.pixels.index_select(0, images)
        x = F.interpolate(x, size=pixels.shape[-2:], mode="bilinear")
        return x[:, 0] + (x[:, 1:] * pixels).sum(1)

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
        pixels = None if self.pixels is None else self.pixels(source.pixels, finer_maps[-1])
        return SharedMaps(
            self.k_proj(source.memory.tokens),
            F.conv2d(projected, weight, self.convs[0].bias, padding=1),
            [adapter(x) for adapter, x in zip(self.adapters, finer_maps, strict=True)],
            pixels,
        )

    def attention_maps(
        self, source: MaskSource, images: Tensor, queries: Tensor, squared: Tensor | None = None
    ) -> Tensor:
        """(P, M, h*w): softmax over heads and places together, nothing on padding; `squared` as
        `squared_distance` gives it, for a head that works around boxes."""
        content = source.content[images, queries]
        query = self.q_proj(content).unflatten(-1, (self.num_heads, -1))  # (P, M, C / M)
        key = self.shared(source).keys.unflatten(-1, (self.num_heads, -1))
        scale = query.shape[-1] ** -0.5
        scores = torch.einsum("pmc,psmc->pms", query * scale, key[images]).float()
        if squared is not None:
            scores = scores - F.softplus(self.fall_off.float())[:, None] * squared[:, None]
        padding = source.memory.padding[images][:, None]
        scores = scores.masked_fill(padding, float("-inf"))
        return scores.flatten(1).softmax(-1).view_as(scores)


def squared_distance(source: MaskSource, images: Tensor, queries: Tensor) -> Tensor:
    """(P, h*w): squared, from the box's centre; 1 where an ellipse in the box ends."""
    memory = source.memory
    places = token_centres(memory.level_shapes, memory.valid_ratios)[images]
    boxes = source.boxes[images, queries].detach().float()[:, None]
    return ((places - boxes[..., :2]) / (boxes[..., 2:] / 2).clamp(min=1e-3)).square().sum(-1)


class PixelEmbedding(nn.Module):
    """What a pixel and its neighbours look like, beside the backbone's finest map. Outlines are
    found here once per image, not once per query."""

    def __init__(
        self,
        stride: int,
        in_channels: int,
        image_channels: int = 3,
        width: int = 48,
        dim: int = 32,
    ):
        """
        Args:
            stride: of the result.
            in_channels: of the backbone's finest map.
            image_channels: of the image.
            width: channels on the way.
            dim: E.
        """
        super().__init__()
        self.dim = dim
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, width, 2 * stride + 1, stride=stride, padding=stride),
            nn.GroupNorm(8, width),
            nn.ReLU(),
        )
        self.adapter = nn.Conv2d(in_channels, width, kernel_size=1)
        self.refine = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, dim, kernel_size=3, padding=1),
        )

    def forward(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Images (B, 3, H_image, W_image), (B, in_channels, ...) -> (B, E, H, W), rounded up."""
        x = self.stem(pixels)
        features = self.adapter(features)
        return self.refine(x + F.interpolate(features, size=x.shape[-2:], mode="bilinear"))


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
