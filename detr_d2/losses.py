"""Loss terms. Those of matched pairs are sums; the criterion normalises them.

Shapes: P matched pairs, H and W of a mask. Boxes are cxcywh, normalised.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .box_ops import box_iou, cxcywh_to_xyxy, generalized_box_iou


def l1_box_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum over (P, 4) of |predicted - target| (DETR, appendix A.2, second term of equation 9)."""
    return F.l1_loss(predicted, target, reduction="sum")


def giou_box_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum over P of 1 - GIoU (DETR, appendix A.2, equation 10)."""
    giou = generalized_box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    return (1 - giou).sum()


def paired_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """(P, 4), (P, 4) -> (P,) in [0, 1]."""
    return box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))


def focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of each logit (Lin et al., 2017, equation 5); no sum, of any shape.

    Args:
        target: 0 or 1, of the logits' shape.
        alpha: weight of ones; zeros have 1 - alpha.
        gamma: the larger, the less easy examples count.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    wrong = probability + target - 2 * probability * target
    weight = (1 - alpha) + (2 * alpha - 1) * target
    return weight * wrong**gamma * cross_entropy


def focal_mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sum over P of the mean focal loss of a mask's pixels (DETR, section 4.4).

    Args:
        logits: (P, H, W).
        target: (P, H, W) 0 or 1.
    """
    return focal_loss(logits, target).mean((1, 2)).sum()


def dice_mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sum over P of 1 - dice coefficient, smoothed by one pixel (DETR, appendix A.2, equation 11).

    Args:
        logits, target: as for `focal_mask_loss`.
    """
    probability = logits.sigmoid()
    intersection = (probability * target).sum((1, 2))
    total = probability.sum((1, 2)) + target.sum((1, 2))
    return (1 - (2 * intersection + 1) / (total + 1)).sum()
