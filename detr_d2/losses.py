"""Loss terms of matched pairs. All are sums; the criterion normalises them.

Shapes: P matched pairs. Boxes are cxcywh, normalised.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .box_ops import box_iou, cxcywh_to_xyxy, generalized_box_iou


def l1_box_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum over (P, 4) of |predicted - target| (DETR, section 3.1, second term of equation 9)."""
    return F.l1_loss(predicted, target, reduction="sum")


def giou_box_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum over P of 1 - GIoU (DETR, appendix A.2, equation 10)."""
    giou = generalized_box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    return (1 - giou).sum()


def paired_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """(P, 4), (P, 4) -> (P,) in [0, 1]."""
    return box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
