"""Masks beside detections: ground truth in, instance and panoptic results out.

Shapes: B images, Q queries, P masks asked for, D detections of an image, T objects, H and W in
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor

from .mask_head import resize_masks
from .panoptic import PanopticMerger

MasksOf = Callable[[Tensor, Tensor], Tensor]
# Masks that are computed and enlarged at a time, so that memory does not grow with the detections.
CHUNK = 10


def to_bitmasks(instances: Instances, height: int, width: int) -> Tensor:
    """detectron2's ground truth, `gt_masks` of either kind -> (T, H, W) bool."""
    if not len(instances):  # detectron2's mapper then leaves the masks out
        return torch.zeros(0, height, width, dtype=torch.bool)
    masks = instances.gt_masks
    if isinstance(masks, BitMasks):
        return masks.tensor
    bitmasks = [torch.from_numpy(polygons_to_bitmask(p, height, width)) for p in masks.polygons]
    return torch.stack(bitmasks)


def add_masks(
    results: Sequence[dict[str, Any]],
    masks_of: MasksOf,
    batched_inputs: Sequence[dict[str, Any]],
    padded_size: tuple[int, int],
    threshold: float = 0.5,
) -> None:
    """Adds `pred_masks` to detections, in place; takes their `pred_queries` away.

    Args:
        masks_of: (P,) images and queries -> (P, h, w) logits.
    """
    for index, (result, x) in enumerate(zip(results, batched_inputs, strict=True)):
        instances = result["instances"]
        queries = instances.pred_queries
        masks = queries.new_zeros(len(queries), *instances.image_size, dtype=torch.bool)
        # A query may be there with several classes.
        distinct, place = queries.unique(return_inverse=True)
        for first in range(0, len(distinct), CHUNK):
            chunk = distinct[first : first + CHUNK]
            logits = masks_of(torch.full_like(chunk, index), chunk)
            resized = resize_masks(
                logits, padded_size, x["image"].shape[-2:], instances.image_size, threshold
            )
            here = (place >= first) & (place < first + len(chunk))
            masks[here] = resized[place[here] - first]
        instances.pred_masks = masks
        instances.remove("pred_queries")


def add_panoptic(
    results: Sequence[dict[str, Any]],
    scores: Tensor,
    classes: Tensor,
    masks_of: MasksOf,
    merger: PanopticMerger,
    batched_inputs: Sequence[dict[str, Any]],
    padded_size: tuple[int, int],
) -> None:
    """Adds `panoptic_seg` to the results, in place; scores and classes (B, Q) of every query."""
    for index, (result, x) in enumerate(zip(results, batched_inputs, strict=True)):
        queries = merger.candidates(scores[index])
        height, width = x["image"].shape[-2:]
        logits = torch.cat(
            [
                F.interpolate(
                    masks_of(torch.full_like(chunk, index), chunk)[:, None].float(),
                    size=padded_size,
                    mode="bilinear",
                )[:, 0, :height, :width]
                for chunk in (queries.split(CHUNK) if len(queries) else ())
            ]
            or [scores.new_zeros(0, height, width)]
        )
        size = x.get("height", height), x.get("width", width)
        result["panoptic_seg"] = merger(
            logits, scores[index, queries], classes[index, queries], size
        )
