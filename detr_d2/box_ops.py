"""Boxes as tensors. Shapes: `...` any leading shape, N and M boxes."""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps quotients of boxes without area finite.
_TINY = 1e-12


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre, width, height -> (..., 4) two corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) two corners -> (..., 4) centre, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., 2019, algorithm 1) of boxes that broadcast together.

    Pairwise values of (N, 4) and (M, 4) come from `boxes1[:, None]` and `boxes2[None]`.
    Unlike a quotient written naively it is finite for boxes without area: a prediction of width
    zero is legal early in training and must not end it.

    Args:
        boxes1, boxes2: (..., 4) xyxy, x1 <= x2 and y1 <= y2.

    Returns:
        (...) in [-1, 1].
    """
    intersection, union = _intersection_and_union(boxes1, boxes2)
    hull_low = boxes1[..., :2].minimum(boxes2[..., :2])
    hull_high = boxes1[..., 2:].maximum(boxes2[..., 2:])
    hull = _product(hull_high - hull_low)
    return intersection / union.clamp(min=_TINY) - (hull - union) / hull.clamp(min=_TINY)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of boxes that broadcast together: (..., 4) xyxy twice -> (...) in [0, 1]."""
    intersection, union = _intersection_and_union(boxes1, boxes2)
    return intersection / union.clamp(min=_TINY)


def _intersection_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    low = boxes1[..., :2].maximum(boxes2[..., :2])
    high = boxes1[..., 2:].minimum(boxes2[..., 2:])
    intersection = _product((high - low).clamp(min=0))
    return intersection, box_area(boxes1) + box_area(boxes2) - intersection


def box_area(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy -> (...)."""
    return _product(boxes[..., 2:] - boxes[..., :2])


def _product(size: Tensor) -> Tensor:
    """(..., 2) -> (...). The backward pass of `Tensor.prod` looks for zeros on the host, which
    would make it wait for the device."""
    return size[..., 0] * size[..., 1]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of numbers in [0, 1], finite also at the ends: both sides of the quotient are at least
    `eps` (published models differ in it)."""
    x = x.clamp(min=0, max=1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
