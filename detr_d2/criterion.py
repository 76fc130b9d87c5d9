"""The set criterion: match, then compare pair by pair (DETR, section 3.1).

Shapes: B images, Q queries, K logits, P matched pairs. Boxes are cxcywh, normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from .losses import (
    dice_mask_loss,
    focal_mask_loss,
    giou_box_loss,
    l1_box_loss,
    paired_iou,
)
from .processor import autocast
from .structures import Assignment, LayerOutput, NoisedObjects, Predictions, Target


class _Supervised(NamedTuple):
    """One output and what it is compared with."""

    output: LayerOutput
    suffix: str
    targets: Sequence[Target]
    noised: NoisedObjects | None = None


class SetCriterion(nn.Module):
    """Weighted losses of every decoder layer.

    The last layer's are `loss_ce`, `loss_bbox` and `loss_giou`; with deep supervision those of
    the layers before it carry the suffixes `_0`, `_1`, … Those of an initialiser's proposals carry
    `_enc`, those of denoising queries `_dn` before the layer's; with a mask head there are
    `loss_mask` and `loss_dice` of the last layer. All are divided by sums over every
    image of the optimizer step, on all processes, so that the gradient does not depend on how
    the images are spread over processes and accumulation steps. Two things still depend on it: the
    losses of masks, compared over the padded batch as in the original, and the number of
    contrastive denoising groups, which the fullest image of a batch decides.
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
        mask_weight: float = 1.0,
        dice_weight: float = 1.0,
    ):
        """
        Args:
            matcher: (outputs, targets of each) -> one assignment per output.
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
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight

    def forward(
        self,
        predictions: Predictions,
        targets: Sequence[Target],
        object_counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: of the transformer: logits (B, Q, K) and boxes (B, Q, 4) of every decoder
                layer, perhaps proposals and denoising queries.
            targets: one entry per image.
            object_counts: number of objects in each image of this process that shares the
                optimizer step; by default the images of `targets`. Gradient accumulation passes
                those of all its batches.

        Returns:
            Weighted losses by name; their sum is what to minimise.

        Raises:
            FloatingPointError: boxes or logits are not finite, so no assignment has a cost.
        """
        if object_counts is None:
            object_counts = [len(target.classes) for target in targets]
        last = predictions.layers[-1].logits
        with autocast(last.device.type, enabled=False):
            supervised = self._supervised(predictions, targets)
            assignments = self._assign(supervised)
            normalizers = self._normalizers(
                [each.output.logits.shape[1] for each in supervised],
                list(object_counts),
                last.device,
            )
            losses: dict[str, Tensor] = {}
            for each, assignment, normalizer in zip(
                supervised, assignments, normalizers, strict=True
            ):
                pairs, matched = _locate(assignment, each.targets, last.device)
                classes = torch.cat([target.classes for target in each.targets])[matched]
                boxes = torch.cat([target.boxes.float() for target in each.targets])[matched]
                layer = self._layer_losses(each, pairs, classes, boxes, *normalizer)
                losses.update({f"{name}{each.suffix}": loss for name, loss in layer.items()})
                if not each.suffix:
                    if torch.is_grad_enabled():  # not of a validation's losses
                        self._write_diagnostics(each.output.logits, pairs, classes, targets)
                    if predictions.masks is not None:
                        losses |= self._mask_losses(
                            predictions, assignment, pairs, targets, normalizer[0]
                        )
        return losses

    def _supervised(self, predictions: Predictions, targets: Sequence[Target]) -> list[_Supervised]:
        """Everything that has losses, in float32."""
        suffixes = [f"_{index}" for index in range(len(predictions.layers) - 1)] + [""]
        kept = slice(None) if self.deep_supervision else slice(-1, None)
        supervised = [
            _Supervised(output, suffix, targets)
            for output, suffix in list(zip(predictions.layers, suffixes, strict=True))[kept]
        ]
        proposals, noised = predictions.proposals, predictions.noised
        if proposals is not None:
            proposed = targets
            if proposals.class_agnostic:
                proposed = [Target(torch.zeros_like(t.classes), t.boxes) for t in targets]
            supervised.append(_Supervised(proposals.output, "_enc", proposed))
        if noised is not None:
            supervised += [
                _Supervised(output, f"_dn{suffix}", targets, noised)
                for output, suffix in list(zip(predictions.denoising, suffixes, strict=True))[kept]
            ]
        return [
            each._replace(output=LayerOutput(each.output.logits.float(), each.output.boxes.float()))
            for each in supervised
        ]

    def _assign(self, supervised: Sequence[_Supervised]) -> list[Assignment]:
        """Matches what brings no assignment of its own; all at once, see `HungarianMatcher`."""
        unknown = [each for each in supervised if each.noised is None]
        matched = iter(
            self.matcher([each.output for each in unknown], [each.targets for each in unknown])
        )
        return [
            next(matched) if each.noised is None else each.noised.assignment for each in supervised
        ]

    def _layer_losses(
        self,
        supervised: _Supervised,
        pairs: tuple[Tensor, Tensor],
        classes: Tensor,
        boxes: Tensor,
        num_boxes: Tensor,
        class_normalizer: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of one layer, from (image, query), class (P,) and box (P, 4) of each pair."""
        output, noised = supervised.output, supervised.noised
        target_classes = torch.full(
            output.logits.shape[:2], self.classification.num_classes, device=boxes.device
        )
        target_classes[pairs] = classes
        predicted = output.boxes[pairs]
        iou = None
        if self.classification.uses_iou:
            iou = output.boxes.new_zeros(output.boxes.shape[:2])
            iou[pairs] = paired_iou(predicted.detach(), boxes)
        loss_ce = self.classification.loss(
            output.logits,
            target_classes,
            class_normalizer,
            valid=None if noised is None else noised.valid,
            iou=iou,
        )
        # Every object is there once in each group of denoising queries.
        groups = 1 if noised is None else noised.num_groups
        return {
            "loss_ce": self.class_weight * loss_ce / groups,
            "loss_bbox": self.l1_weight * l1_box_loss(predicted, boxes) / (num_boxes * groups),
            "loss_giou": self.giou_weight * giou_box_loss(predicted, boxes) / (num_boxes * groups),
        }

    def _mask_losses(
        self,
        predictions: Predictions,
        assignment: Assignment,
        pairs: tuple[Tensor, Tensor],
        targets: Sequence[Target],
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Of the last layer's pairs; masks are compared at the size of the padded batch."""
        logits = predictions.masks(*pairs).float()
        size = predictions.padded_size
        truth = torch.zeros(len(logits), *size, device=logits.device)
        for index, (image, item) in enumerate(
            zip(assignment.images.tolist(), assignment.objects.tolist(), strict=True)
        ):
            mask = targets[image].masks[item]
            truth[index, : mask.shape[0], : mask.shape[1]] = mask
        if len(logits):
            logits = F.interpolate(logits[:, None], size=size, mode="bilinear")[:, 0]
        else:
            logits = logits.sum() + truth
        return {
            "loss_mask": self.mask_weight * focal_mask_loss(logits, truth) / num_boxes,
            "loss_dice": self.dice_weight * dice_mask_loss(logits, truth) / num_boxes,
        }

    def _normalizers(
        self, num_queries: Sequence[int], object_counts: list[int], device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        """Number of boxes and class normaliser per process, averaged over all processes, for each
        of the supervised outputs.

        Distributed training averages gradients, so the average makes the sum over processes
        equal to one process with all images. At least one box, for batches without any.
        """
        sums = torch.tensor(
            [float(sum(object_counts))]
            + [self.classification.normalizer(number, object_counts) for number in num_queries]
        ).to(device, non_blocking=True)
        # Without gradients there are none to average, and validation sets need not have as many
        # batches on each process: whoever waited for the others would wait for ever.
        world_size = comm.get_world_size() if torch.is_grad_enabled() else 1
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        num_boxes = sums[0].clamp(min=1) / world_size
        # Class weights sum to zero only without objects and NO_OBJECT_WEIGHT 0.
        smallest = self.classification.smallest_normalizer
        return [(num_boxes, each.clamp(min=smallest) / world_size) for each in sums[1:]]

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
