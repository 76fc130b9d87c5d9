"""What travels between the parts of the detector.

Shapes: B images, S memory tokens (all levels of all maps, row by row), L levels, Q queries,
C channels, K logits per query. Boxes are cxcywh, normalised to the unpadded image.
Masks are True where something is to be ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass
class Memory:
    """Feature tokens of a batch of images, before or after the encoder."""

    tokens: Tensor
    """(B, S, C)"""
    positions: Tensor
    """(B, S, C) position embedding, added to queries and keys of attention, never to values"""
    padding: Tensor
    """(B, S) bool, True where a token lies on padding"""
    level_shapes: Tensor
    """(L, 2) int64 on the CPU: height and width of each level"""
    valid_ratios: Tensor
    """(B, L, 2) unpadded share of each level's width and height"""


@dataclass
class Queries:
    """What the decoder starts from."""

    content: Tensor
    """(B, Q, C)"""
    position: Tensor | None = None
    """(B, Q, C) position embedding of the queries"""
    reference: Tensor | None = None
    """(B, Q, 2 or 4) reference points or boxes"""
    attention_mask: Tensor | None = None
    """(Q, Q) bool, True where the row may not attend to the column"""


class LayerOutput(NamedTuple):
    """Predictions of one decoder layer."""

    logits: Tensor
    """(B, Q, K)"""
    boxes: Tensor
    """(B, Q, 4)"""


class Target(NamedTuple):
    """Ground truth of one image."""

    classes: Tensor
    """(T,) int64"""
    boxes: Tensor
    """(T, 4)"""


class Assignment(NamedTuple):
    """Pairs of one decoder layer for a whole batch: entry p says that query `queries[p]` of image
    `images[p]` is responsible for object `objects[p]` of that image."""

    images: Tensor
    """(P,) int64"""
    queries: Tensor
    """(P,) int64"""
    objects: Tensor
    """(P,) int64"""
