"""Bipartite matching between predictions and ground truth (DETR, section 3.1, equation 1).

Shapes: B images, Q queries, K logits, T objects of the fullest image, P matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .box_ops import cxcywh_to_xyxy, generalized_box_iou
from .structures import Assignment, LayerOutput, Target, pad_targets


class HungarianMatcher(nn.Module):
    """Finds, for every image, the assignment of objects to queries with the lowest total cost.

    The cost of a pair is `class_cost * classification.matching_cost + l1_cost * |b - b'|_1
    - giou_cost * GIoU(b, b')`. Each layer of the decoder is matched on its own. An image with
    more objects than queries leaves its worst objects unmatched.
    """

    def __init__(
        self, classification: nn.Module, class_cost: float, l1_cost: float, giou_cost: float
    ):
        super().__init__()
        self.classification = classification
        self.class_cost = class_cost
        self.l1_cost = l1_cost
        self.giou_cost = giou_cost

    @torch.no_grad()
    def forward(
        self, outputs: Sequence[LayerOutput], targets: Sequence[Sequence[Target]]
    ) -> list[Assignment]:
        """
        Args:
            outputs: one entry per decoder layer, logits (B, Q, K) and boxes (B, Q, 4); Q may
                differ between entries.
            targets: for each of them, one entry per image; classes may differ, objects may not.

        Returns:
            One assignment per entry of `outputs`, on the CPU, sorted by image and query.

        Raises:
            FloatingPointError: boxes or logits are not finite, so no assignment has a cost.
        """
        counts = [len(target.classes) for target in targets[0]]
        costs = [
            self.pair_costs(output, *pad_targets(each)[:2])
            for output, each in zip(outputs, targets, strict=True)
        ]
        # The only time in a forward pass that the host waits for the device, for all layers.
        host = torch.cat([cost.flatten() for cost in costs]).cpu()
        per_layer = host.split([cost.numel() for cost in costs])
        return [
            _assign(flat.view(cost.shape), counts)
            for flat, cost in zip(per_layer, costs, strict=True)
        ]

    def pair_costs(self, output: LayerOutput, classes: Tensor, boxes: Tensor) -> Tensor:
        """Cost of giving each object of an image to each query of the same image.

        Args:
            output: predictions of one layer.
            classes, boxes: (B, T) and (B, T, 4) cxcywh, padded to the fullest image.

        Returns:
            (B, Q, T) float32.
        """
        # fp16 has too few digits for boxes and too small a range for areas (autocast is off here).
        predicted = output.boxes.float()
        class_cost = self.classification.matching_cost(output.logits.float(), classes)
        l1_cost = torch.cdist(predicted, boxes, p=1)
        giou = generalized_box_iou(
            cxcywh_to_xyxy(predicted)[:, :, None], cxcywh_to_xyxy(boxes)[:, None]
        )
        return self.class_cost * class_cost + self.l1_cost * l1_cost - self.giou_cost * giou


def _assign(cost: Tensor, counts: Sequence[int]) -> Assignment:
    """(B, Q, T) costs on the CPU -> the cheapest pairs of every image."""
    if not torch.isfinite(cost).all():
        raise FloatingPointError(
            "The matching cost is not finite: the model predicted NaN or infinite boxes or logits."
        )
    images, queries, objects = [], [], []
    for image, count in enumerate(counts):
        rows, columns = linear_sum_assignment(cost[image, :, :count].numpy())
        images.append(torch.full((len(rows),), image))
        queries.append(torch.from_numpy(rows))
        objects.append(torch.from_numpy(columns))
    return Assignment(torch.cat(images), torch.cat(queries), torch.cat(objects))
