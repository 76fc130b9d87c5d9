"""What travels between the parts of the detector.

Shapes: B images, S memory tokens (all levels, from fine to coarse, row by row), L levels,
Q queries, C channels, K logits per query, T objects of an image, P matched pairs, D denoising
queries in G groups, H and W in pixels. Boxes are cxcywh, normalised to the
unpadded image. `padding` and `attention_mask` are True where something is to be ignored; `valid`
and the masks of objects are True where there is something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Memory:
    """Feature tokens of a batch of images, before or after the encoder."""

    tokens: Tensor
    """(B, S, C)"""
    positions: Tensor
    """(B, S, C) position embedding, added to queries and keys of attention, never to values"""
    padding: Tensor
    """(B, S) bool, True where a token lies on padding"""
    level_shapes: tuple[tuple[int, int], ...]
    """height and width of each of the L levels, known on the host"""
    valid_ratios: Tensor
    """(B, L, 2) unpadded share of each level's width and height"""


class QueryPosition(NamedTuple):
    """What a layer is told about the places its queries stand for."""

    embedding: Tensor | None
    """(B, Q, C) added to the content, or projected and added; None: nothing is"""
    spatial: Tensor | None = None
    """(B, Q, C) in the space of the memory's positions, for attention that compares the two apart
    from the content"""


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
    masks: Tensor | None = None
    """(T, H, W) bool, of the image's unpadded pixels; on the host"""


def pad_targets(targets: Sequence[Target], fill: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (B, T), boxes (B, T, 4) float32 and (B, T) bool, True where there is an object;
    padded to the T of the fullest image.

    Args:
        fill: what boxes are padded with.
    """
    classes = pad_sequence([t.classes for t in targets], batch_first=True)
    boxes = pad_sequence([t.boxes.float() for t in targets], True, fill)
    valid = pad_sequence([torch.ones_like(t.classes).bool() for t in targets], batch_first=True)
    return classes, boxes, valid


class Assignment(NamedTuple):
    """Pairs of one decoder layer for a whole batch: entry p says that query `queries[p]` of image
    `images[p]` is responsible for object `objects[p]` of that image."""

    images: Tensor
    """(P,) int64"""
    queries: Tensor
    """(P,) int64"""
    objects: Tensor
    """(P,) int64"""


@dataclass
class Queries:
    """What the decoder starts from."""

    content: Tensor
    """(B, Q, C)"""
    position: Tensor | None = None
    """(B, Q, C) position embedding of the queries"""
    reference: Tensor | None = None
    """(B, Q, 2 or 4) reference points or boxes, in [0, 1]"""
    attention_mask: Tensor | None = None
    """(B or 1, Q, Q) bool, True where the row may not attend to the column"""
    denoising: NoisedObjects | None = None
    """the first of the queries, where they are ground truth with noise"""


@dataclass
class NoisedObjects:
    """Queries made from ground truth, which need no matching: D of each image, in G groups."""

    assignment: Assignment
    """which object each of them is to recover; negatives are not in it"""
    valid: Tensor
    """(B, D) bool, False where an image has fewer objects than the fullest one"""
    num_groups: int
    """G, how often every object appears in the assignment"""


class Proposals(NamedTuple):
    """What a query initialiser predicts, to be supervised."""

    output: LayerOutput
    class_agnostic: bool = False
    """whether its first class stands for any object"""


@dataclass
class Predictions:
    """Everything the transformer says, and what is known about it."""

    layers: list[LayerOutput]
    """one per decoder layer, of the queries that are matched"""
    proposals: Proposals | None = None
    denoising: list[LayerOutput] | None = None
    """one per decoder layer, of the D denoising queries"""
    noised: NoisedObjects | None = None
    content: Tensor | None = None
    """(B, Q, C) of the last layer, as its heads see it"""
    memory: Memory | None = None
    """from the encoder"""
    masks: Callable[[Tensor, Tensor], Tensor] | None = None
    """(images (P,), queries (P,)) -> mask logits (P, H, W) of the last layer, where there is a mask
    head"""
    padded_size: tuple[int, int] | None = None
    """height and width of the padded batch in pixels, which these logits cover"""
