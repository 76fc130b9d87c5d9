"""Denoising: ground truth with noise as additional queries, which need no matching.

`(queries, targets or None) -> Queries` with the denoising queries in front. Without targets, at
inference, there are none.

Shapes: B images, T objects of the fullest image, G groups, D = G * T or, with negatives, G * 2T
denoising queries, Q matching queries, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..structures import Assignment, NoisedObjects, Queries, Target, pad_targets


class Denoising(nn.Module):
    """Every object G times with noise in label and box (DN-DETR, Li et al., 2022, section 4).

    The last channel of the content tells denoising queries from others, which start as class K,
    "unknown".
    """

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int,
        num_groups: int = 5,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
    ):
        """
        Args:
            num_classes: K.
            num_groups: G; 0: none, which leaves only the content of the matching queries.
            label_noise: probability of another label.
            box_noise: largest shift of a centre, as a share of half the box's size, and largest
                change of the size, as a share of the size.
        """
        super().__init__()
        self.num_groups = num_groups
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_dim - 1)

    def forward(self, queries: Queries, targets: Sequence[Target] | None) -> Queries:
        """See the head of this file."""
        unknown = self.label_embedding.weight[-1]
        unknown = torch.cat((unknown, unknown.new_zeros(1))).to(queries.content.dtype)
        queries = replace(queries, content=queries.content + unknown)
        if targets is None or self.num_groups == 0:
            return queries
        classes, boxes, valid = _groups(targets, self.num_groups)
        classes = _noised_classes(
            classes, self.label_embedding.num_embeddings - 1, self.label_noise
        )
        noise = 2 * torch.rand_like(boxes) - 1
        extent = torch.cat((boxes[..., 2:] / 2, boxes[..., 2:]), dim=-1)
        boxes = (boxes + self.box_noise * noise * extent).clamp(0, 1)
        content = self.label_embedding(classes)
        content = torch.cat((content, torch.ones_like(content[..., :1])), dim=-1)
        return _prepend(queries, content, boxes, valid, targets)


class ContrastiveDenoising(nn.Module):
    """Every object G times with little noise, to be recovered, and G times with more, to be
    rejected (DINO, Zhang et al., 2023, section 3.3)."""

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int,
        num_queries: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
    ):
        """
        Args:
            num_classes: K.
            num_queries: positives of the fullest image, about: groups are added as long as there
                are not more, but one is always there. 0: none.
            label_noise: twice the probability of another label.
            box_noise: largest shift of a corner's coordinate, as a share of half the box's size;
                those of negatives are between once and twice as large.
        """
        super().__init__()
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        # The last row is never used; published models have it.
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_dim)
        if num_queries == 0:  # several processes would wait for gradients that never come
            self.label_embedding.requires_grad_(False)

    def forward(self, queries: Queries, targets: Sequence[Target] | None) -> Queries:
        """See the head of this file."""
        if targets is None or self.num_queries == 0:
            return queries
        most = max(len(target.classes) for target in targets)
        classes, boxes, valid = _groups(targets, max(self.num_queries // max(most, 1), 1), copies=2)
        classes = _noised_classes(
            classes, self.label_embedding.num_embeddings - 1, self.label_noise / 2
        )
        distance = torch.rand_like(boxes)
        distance[:, :, most:] += 1
        sign = 2 * torch.randint_like(boxes, 2) - 1
        boxes = _shift_corners(boxes, self.box_noise * distance * sign)
        return _prepend(queries, self.label_embedding(classes), boxes, valid, targets)


def _groups(
    targets: Sequence[Target], num_groups: int, copies: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (B, G, copies * T), boxes (B, G, copies * T, 4) and (B, G, copies * T) bool, False
    where an image has fewer objects than the fullest."""
    classes, boxes, valid = pad_targets(targets, fill=0.5)
    return (
        classes[:, None].repeat(1, num_groups, copies),
        boxes[:, None].repeat(1, num_groups, copies, 1),
        valid[:, None].repeat(1, num_groups, copies),
    )


def _noised_classes(classes: Tensor, num_classes: int, probability: float) -> Tensor:
    other = torch.randint_like(classes, num_classes)
    return torch.where(
        torch.rand(classes.shape, device=classes.device) < probability, other, classes
    )


def _shift_corners(boxes: Tensor, shift: Tensor) -> Tensor:
    """Moves each of x1, y1, x2, y2 of cxcywh boxes by (..., 4) times half the box's size. The
    result is cxcywh inside the image; where two sides crossed, the width or height is 0."""
    half = boxes[..., 2:] / 2
    low = (boxes[..., :2] - half + shift[..., :2] * half).clamp(0, 1)
    high = (boxes[..., :2] + half + shift[..., 2:] * half).clamp(0, 1)
    return torch.cat(((low + high) / 2, (high - low).clamp(min=0)), dim=-1)


def _prepend(
    queries: Queries,
    content: Tensor,
    boxes: Tensor,
    valid: Tensor,
    targets: Sequence[Target],
) -> Queries:
    """Puts denoising queries in front of the matching ones.

    Args:
        queries: Q of each image, whose references are boxes and which have no position.
        content: (B, G, N, C), N = T or 2T; the first T of a group are to be recovered.
        boxes: (B, G, N, 4).
        valid: (B, G, N) bool.

    Raises:
        UserError: the queries are of another kind.
    """
    has_box = queries.reference is not None and queries.reference.shape[-1] == 4
    if queries.position is not None or not has_box:
        raise UserError(
            "Denoising makes queries from boxes alone: those of the initialiser (QUERIES) must "
            "have boxes for references, and no positions of their own."
        )
    num_groups, size = boxes.shape[1:3]
    valid = valid.flatten(1)
    return Queries(
        content=torch.cat(
            (content.flatten(1, 2).to(queries.content.dtype), queries.content), dim=1
        ),
        reference=torch.cat((boxes.flatten(1, 2), queries.reference), dim=1),
        attention_mask=_attention_mask(valid, num_groups, queries.content.shape[1]),
        denoising=NoisedObjects(_assignment(targets, num_groups, size), valid, num_groups),
    )


def _attention_mask(valid: Tensor, num_groups: int, num_queries: int) -> Tensor:
    """Nobody sees a denoising query but those of its own group, and nobody sees one that stands
    for no object (DN-DETR, section 4.4).

    Args:
        valid: (B, D) bool.

    Returns:
        (B, D+Q, D+Q) bool, True where the row may not attend to the column.
    """
    batch, noised = valid.shape
    # Group -1: the matching queries, which everyone sees.
    group = torch.arange(noised, device=valid.device) // max(noised // num_groups, 1)
    group = torch.cat((group, group.new_full((num_queries,), -1)))
    hidden = (group[:, None] != group) & (group >= 0)
    missing = torch.cat((~valid, valid.new_zeros(batch, num_queries)), dim=1)
    return hidden | missing[:, None]


def _assignment(targets: Sequence[Target], num_groups: int, size: int) -> Assignment:
    """Object t of an image belongs to query t of every group; on the CPU."""
    images, queries, objects = [], [], []
    for image, target in enumerate(targets):
        each = torch.arange(len(target.classes))
        images.append(torch.full((num_groups * len(each),), image))
        queries.append((torch.arange(num_groups)[:, None] * size + each).flatten())
        objects.append(each.repeat(num_groups))
    return Assignment(torch.cat(images), torch.cat(queries), torch.cat(objects))
