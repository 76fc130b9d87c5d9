"""The set criterion: match, then compare pair by pair (DETR, section 3.1).

Shapes: B images, Q queries, K logits, P matched pairs. Boxes are cxcywh, normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from .losses import giou_box_loss, l1_box_loss
from .structures import Assignment, LayerOutput, Target


class SetCriterion(nn.Module):
    """Weighted losses of every decoder layer.

    The last layer's are `loss_ce`, `loss_bbox` and `loss_giou`; with deep supervision those of
    the layers before it carry the suffixes `_0`, `_1`, … All are divided by sums over every
    image of the optimizer step, on all processes, so that the gradient does not depend on how
    the images are spread over processes and accumulation steps.
    """

    # Writing a number to the event storage makes the host wait for the device.
    diagnostics_period = 20

    def __init__(
        self,
        matcher: nn.Module,
        classification: nn.Module,
        class_weight: float,
        l1_weight: float,
        giou_weight: float,
        deep_supervision: bool = True,
    ):
        """
        Args:
            matcher: (outputs, targets) -> one assignment per output.
            classification: the class loss and its normaliser, e.g. SoftmaxClassification.
            deep_supervision: whether the layers before the last have losses of their own.
        """
        super().__init__()
        self.matcher = matcher
        self.classification = classification
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.deep_supervision = deep_supervision

    def forward(
        self,
        outputs: Sequence[LayerOutput],
        targets: Sequence[Target],
        object_counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            outputs: logits (B, Q, K) and boxes (B, Q, 4), one entry per decoder layer.
            targets: one entry per image.
            object_counts: number of objects in each image of this process that shares the
                optimizer step; by default the images of `targets`. Gradient accumulation passes
                those of all its batches.

        Returns:
            Weighted losses by name; their sum is what to minimise.
        """
        if object_counts is None:
            object_counts = [len(target.classes) for target in targets]
        if not self.deep_supervision:
            outputs = outputs[-1:]
        device = outputs[0].logits.device
        with torch.autocast(device.type, enabled=False):
            outputs = [LayerOutput(o.logits.float(), o.boxes.float()) for o in outputs]
            assignments = self.matcher(outputs, targets)
            located = [_locate(assignment, targets, device) for assignment in assignments]
            classes = torch.cat([target.classes for target in targets])
            boxes = torch.cat([target.boxes.float() for target in targets])
            normalizers = self._normalizers(
                outputs[-1].logits.shape[1], list(object_counts), device
            )
            losses = {}
            for index, (output, (pairs, matched)) in enumerate(zip(outputs, located, strict=True)):
                suffix = "" if index == len(outputs) - 1 else f"_{index}"
                layer = self._layer_losses(
                    output, pairs, classes[matched], boxes[matched], *normalizers
                )
                losses.update({f"{name}{suffix}": loss for name, loss in layer.items()})
            pairs, matched = located[-1]
            self._write_diagnostics(outputs[-1].logits, pairs, classes[matched], targets)
        return losses

    def _layer_losses(
        self,
        output: LayerOutput,
        pairs: tuple[Tensor, Tensor],
        classes: Tensor,
        boxes: Tensor,
        num_boxes: Tensor,
        class_normalizer: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of one layer, from (image, query), class (P,) and box (P, 4) of each pair."""
        target_classes = torch.full(
            output.logits.shape[:2], self.classification.num_classes, device=boxes.device
        )
        target_classes[pairs] = classes
        loss_ce = self.classification.loss(output.logits, target_classes, class_normalizer)
        predicted = output.boxes[pairs]
        return {
            "loss_ce": self.class_weight * loss_ce,
            "loss_bbox": self.l1_weight * l1_box_loss(predicted, boxes) / num_boxes,
            "loss_giou": self.giou_weight * giou_box_loss(predicted, boxes) / num_boxes,
        }

    def _normalizers(
        self, num_queries: int, object_counts: list[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Number of boxes and class normaliser per process, averaged over all processes.

        Distributed training averages gradients, so the average makes the sum over processes
        equal to one process with all images. At least one box, for batches without any.
        """
        sums = torch.tensor(
            [
                float(sum(object_counts)),
                self.classification.normalizer(num_queries, object_counts),
            ]
        ).to(device, non_blocking=True)
        world_size = comm.get_world_size()
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        num_boxes, class_normalizer = sums.unbind()
        # At least 1 box; the class weights sum to zero only without objects and NO_OBJECT_WEIGHT 0.
        return num_boxes.clamp(min=1) / world_size, class_normalizer.clamp(min=1e-6) / world_size

    @torch.no_grad()
    def _write_diagnostics(
        self,
        logits: Tensor,
        pairs: tuple[Tensor, Tensor],
        classes: Tensor,
        targets: Sequence[Target],
    ) -> None:
        """Puts class and cardinality error of the last layer into detectron2's event storage."""
        if not has_event_storage():
            return
        storage = get_event_storage()
        if storage.iter % self.diagnostics_period:
            return
        storage.put_scalars(
            class_error=class_error(logits[pairs], classes),
            cardinality_error=cardinality_error(self.classification.background(logits), targets),
        )


def class_error(logits: Tensor, classes: Tensor) -> Tensor:
    """(P, K) logits and (P,) classes of matched pairs -> per cent of them classified wrongly."""
    correct = (logits.argmax(-1) == classes).float().sum()
    return 100 * (1 - correct / max(len(classes), 1))


def cardinality_error(background: Tensor, targets: Sequence[Target]) -> Tensor:
    """Mean over images of |predicted - true number of objects|.

    Args:
        background: (B, Q) bool, True where a query predicts no object.
    """
    counts = torch.tensor([len(target.classes) for target in targets], device=background.device)
    return ((~background).sum(1) - counts).abs().float().mean()


def _locate(
    assignment: Assignment, targets: Sequence[Target], device: torch.device
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Indices on the device: (image, query) of each pair, and its object in the batch's
    concatenated ground truth."""
    counts = torch.tensor([len(target.classes) for target in targets])
    first_object = counts.cumsum(0) - counts
    matched = first_object[assignment.images] + assignment.objects
    indices = torch.stack((assignment.images, assignment.queries, matched))
    images, queries, matched = indices.to(device, non_blocking=True)
    return (images, queries), matched
