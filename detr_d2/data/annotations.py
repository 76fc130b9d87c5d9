"""Checking ground truth before it reaches the matcher.

A single box with a NaN or a negative width makes the assignment fail hundreds of steps later, in a
message that names neither the image nor the annotation. So the whole data set is checked once,
before the first step.

Shapes: N annotations. Boxes are in pixels of the original image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from ..errors import UserError

logger = logging.getLogger(__name__)

MODES = ("drop", "error")
SHOWN = 10

# A box that leaves the image by less than this is rounding, by more a sign of another box format.
OVERHANG_PIXELS = 2.0
OVERHANG_FRACTION = 0.02
# Boxes that really are xywh hardly ever all have w > x and h > y: these shares together are clear.
XYXY_EVIDENCE = 3
XYXY_FITTING_SHARE = 0.98
XYXY_OVERHANGING_SHARE = 0.1


class FaultyAnnotationError(UserError):
    """Ground truth that cannot be trained on; the message names files and annotation ids."""


class FaultyAnnotation(NamedTuple):
    """Where a faulty annotation stands, and why it is one.

    `image_index` counts in the list of images, `index` in the annotations of that image.
    """

    image_index: int
    index: int
    file_name: str
    annotation_id: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.file_name}: annotation {self.annotation_id}: {self.reason}"


def find_faulty_annotations(
    dataset_dicts: list[dict], num_classes: int | None = None, masks: bool = False
) -> list[FaultyAnnotation]:
    """Annotations that must not be trained on; crowds are left out, for training never uses them.

    Args:
        dataset_dicts: images in detectron2's standard format; `height` and `width` where known.
        num_classes: also report category ids outside 0..num_classes-1.
        masks: also report annotations without a segmentation that can be used.

    Returns:
        one entry per faulty annotation, in the order of the data set, with one reason: of several
        the one that explains the others.
    """
    places, annotations, sizes = _gather(dataset_dicts)
    numbers = _box_numbers(annotations)
    boxes = _to_xyxy(numbers, annotations)
    width, height = sizes[:, 0], sizes[:, 1]

    with np.errstate(invalid="ignore"):
        not_finite = ~np.isfinite(numbers).all(axis=1)
        empty = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
        outside = (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
        outside |= (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)
    # Where several apply, the last is reported: it explains the others.
    reasons = {
        i: f"{reason} (image {width[i]:g}x{height[i]:g})"
        for wrong, reason in (
            (outside, "lies outside the image"),
            (empty, "has zero or negative width or height"),
            (not_finite, "is not four finite numbers"),
        )
        for i in np.flatnonzero(wrong).tolist()
    }
    faults = []
    for i, (place, annotation) in enumerate(zip(places, annotations, strict=True)):
        if i in reasons:
            faults.append(_fault(dataset_dicts, place, f"{_shown(annotation)} {reasons[i]}"))
        elif reason := _label_fault(annotation, dataset_dicts[place[0]], num_classes, masks):
            faults.append(_fault(dataset_dicts, place, reason))
    return faults


def find_xyxy_given_as_xywh(dataset_dicts: list[dict]) -> list[FaultyAnnotation]:
    """Annotations of a data set whose boxes are labelled xywh but hold corners (x0, y0, x1, y1).

    It can only be told of a data set as a whole: nearly all boxes fit into their images when read
    as corners, and a clear share leaves the image when read as width and height.

    Returns:
        the annotations that leave their image, as evidence; an empty list where it cannot be told.
    """
    places, annotations, sizes = _gather(dataset_dicts)
    numbers = _box_numbers(annotations)
    is_xywh = np.array([a.get("bbox_mode") == BoxMode.XYWH_ABS for a in annotations], dtype=bool)
    usable = is_xywh & np.isfinite(numbers).all(axis=1) & np.isfinite(sizes).all(axis=1)
    if not usable.any():
        return []
    allowed = sizes + np.maximum(OVERHANG_PIXELS, OVERHANG_FRACTION * sizes)
    first, second = numbers[:, :2], numbers[:, 2:]
    with np.errstate(invalid="ignore", over="ignore"):
        fits_as_xyxy = usable & ((second > first) & (second <= allowed)).all(axis=1)
        overhangs = usable & (first + second > allowed).any(axis=1)
    if (
        overhangs.sum() < max(XYXY_EVIDENCE, XYXY_OVERHANGING_SHARE * usable.sum())
        or fits_as_xyxy.sum() < XYXY_FITTING_SHARE * usable.sum()
    ):
        return []
    return [
        _fault(
            dataset_dicts,
            places[i],
            f"{_shown(annotations[i])} fits the image ({sizes[i, 0]:g}x{sizes[i, 1]:g}) "
            "as two corners, but not as x, y, width, height",
        )
        for i in np.flatnonzero(overhangs)
    ]


def refuse_xyxy_given_as_xywh(dataset_dicts: list[dict], dataset_name: str = "") -> None:
    """Raise FaultyAnnotationError for a data set as `find_xyxy_given_as_xywh` finds it."""
    if corners := find_xyxy_given_as_xywh(dataset_dicts):
        raise FaultyAnnotationError(
            f"The boxes of {_quoted(dataset_name)} look like x0, y0, x1, y1 but are labelled as x, "
            f"y, width, height, and {len(corners)} of them leave their image: write them as x, y, "
            f"width, height (or, in code, set bbox_mode to BoxMode.XYXY_ABS).{_listed(corners)}"
        )


def report_faulty_annotations(dataset_dicts: list[dict], dataset_name: str) -> None:
    """Warns, once, of boxes of a data set to evaluate on which no detector can find."""
    if faults := find_faulty_annotations(dataset_dicts):
        message = (
            f"{len(faults)} faulty annotations in {_quoted(dataset_name)}, which is evaluated on: "
            "no detection can match them, so that they lower the figures; correct them or take "
            f"them out.{_listed(faults)}"
        )
        log_first_n(logging.WARNING, message, key="message", name=logger.name)


def check_annotations(
    dataset_dicts: list[dict],
    mode: str = "drop",
    dataset_name: str = "",
    *,
    num_classes: int | None = None,
    masks: bool = False,
) -> list[dict]:
    """Check a data set once, report its faults in one message, and return what can be trained on.

    Args:
        dataset_dicts: one data set in detectron2's standard format (boxes in pixels).
        mode: `INPUT.FAULTY_ANNOTATIONS`: "drop" leaves faulty annotations out, "error" refuses the
            data set.
        dataset_name: for the message.
        num_classes: also check category ids against 0..num_classes-1.
        masks: also check that every annotation has a segmentation that can be used.

    Returns:
        the same images in the same order, without faulty annotations; nothing given is modified.

    Raises:
        FaultyAnnotationError: in mode "error", on any fault; in both modes when the boxes are
            corners labelled as xywh (dropping would leave only wrong ones) or none is left.
    """
    check_mode(mode)
    refuse_xyxy_given_as_xywh(dataset_dicts, dataset_name)
    faults = find_faulty_annotations(dataset_dicts, num_classes, masks)
    if not faults:
        return dataset_dicts

    summary = f"{len(faults)} faulty annotations in {_quoted(dataset_name)}"
    if mode == "error":
        raise FaultyAnnotationError(
            f"{summary}: correct them, or leave them out with INPUT.FAULTY_ANNOTATIONS 'drop'."
            f"{_listed(faults)}"
        )
    usable = sum(not a.get("iscrowd", 0) for d in dataset_dicts for a in d.get("annotations", ()))
    if len(faults) == usable:
        raise FaultyAnnotationError(
            f"{summary}, so that no annotation to train on is left: correct them.{_listed(faults)}"
        )
    logger.warning("%s are left out (INPUT.FAULTY_ANNOTATIONS 'drop').%s", summary, _listed(faults))
    return drop_annotations(dataset_dicts, faults)


def usable_segmentation(
    segmentation: Any, height: int | None, width: int | None
) -> list | dict | None:
    """What of a COCO segmentation is an area: its polygons of three or more finite points, or a
    run-length mask of the image's size (of any, where that is None); None where nothing is."""
    if isinstance(segmentation, list):
        return [p for p in segmentation if _is_polygon(p)] or None
    if not isinstance(segmentation, dict):
        return None
    size = segmentation.get("size")
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return None
    fits = None in (height, width) or list(size) == [height, width]
    return segmentation if fits and _are_runs(segmentation.get("counts"), size) else None


def _is_polygon(points: Any) -> bool:
    if not isinstance(points, (list, tuple, np.ndarray)) or len(points) < 6 or len(points) % 2:
        return False
    try:
        numbers = np.asarray(points)
    except ValueError:  # lists in it, of several lengths
        return False
    is_flat = numbers.ndim == 1 and numbers.dtype.kind in "iuf"
    return is_flat and bool(np.isfinite(numbers).all())


def _are_runs(counts: Any, size: Sequence[int]) -> bool:
    """Whether run lengths, plain or compressed, are of a mask of that size. Of compressed ones
    only the area is looked at: this is asked of every object of every image."""
    if isinstance(counts, list):
        return all(type(n) is int and n >= 0 for n in counts) and sum(counts) == size[0] * size[1]
    try:
        area = mask_util.area({"counts": counts, "size": list(size)})
    except (TypeError, ValueError):
        return False
    return 0 <= area <= size[0] * size[1]


def drop_annotations(dataset_dicts: list[dict], faults: list[FaultyAnnotation]) -> list[dict]:
    """The images without the named annotations; images are kept even when none is left."""
    dropped: dict[int, set[int]] = {}
    for fault in faults:
        dropped.setdefault(fault.image_index, set()).add(fault.index)
    kept = list(dataset_dicts)
    for image_index, indices in dropped.items():
        image = dataset_dicts[image_index]
        annotations = [a for i, a in enumerate(image["annotations"]) if i not in indices]
        kept[image_index] = {**image, "annotations": annotations}
    return kept


def check_mode(mode: str) -> None:
    """
    Raises:
        UserError: none of `MODES`.
    """
    if mode not in MODES:
        raise UserError(
            f"INPUT.FAULTY_ANNOTATIONS is '{mode}', it must be one of {', '.join(MODES)}."
        )


def _gather(dataset_dicts: list[dict]) -> tuple[list[tuple[int, int]], list[dict], np.ndarray]:
    """Every annotation but crowds: its place, itself, and its image's width and height.

    The sizes are (N, 2), infinite where they are unknown.
    """
    places, annotations, sizes = [], [], []
    for image_index, image in enumerate(dataset_dicts):
        size = (image.get("width", np.inf), image.get("height", np.inf))
        for index, annotation in enumerate(image.get("annotations", ())):
            if not annotation.get("iscrowd", 0):
                places.append((image_index, index))
                annotations.append(annotation)
                sizes.append(size)
    return places, annotations, np.array(sizes, dtype=np.float64).reshape(-1, 2)


def _box_numbers(annotations: list[dict]) -> np.ndarray:
    """The boxes as they are written, (N, 4); rows of NaN where a box is not four numbers."""
    numbers = np.full((len(annotations), 4), np.nan)
    try:
        # One call for the usual case: a data set has up to a million boxes.
        numbers[:] = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    except (KeyError, TypeError, ValueError):
        for i, annotation in enumerate(annotations):
            try:
                numbers[i] = np.array(annotation["bbox"], dtype=np.float64).reshape(4)
            except (KeyError, TypeError, ValueError):
                continue
    return numbers


def _to_xyxy(numbers: np.ndarray, annotations: list[dict]) -> np.ndarray:
    is_xywh = np.array([a.get("bbox_mode") == BoxMode.XYWH_ABS for a in annotations], dtype=bool)
    boxes = numbers.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        boxes[is_xywh, 2:] += boxes[is_xywh, :2]
    return boxes


def _label_fault(annotation: dict, image: dict, num_classes: int | None, masks: bool) -> str | None:
    if num_classes is not None and not 0 <= annotation["category_id"] < num_classes:
        return f"category id {annotation['category_id']} is not within 0..{num_classes - 1}"
    size = image.get("height"), image.get("width")
    if masks and usable_segmentation(annotation.get("segmentation"), *size) is None:
        return (
            "has no segmentation that MODEL.MASK_ON can use: a list of polygons "
            "[[x, y, x, y, x, y, ...], ...] or a run-length mask of the image's size"
        )
    return None


def _quoted(dataset_name: str) -> str:
    return f"data set '{dataset_name}'" if dataset_name else "the data set"


def _listed(faults: list[FaultyAnnotation]) -> str:
    lines = [f"\n  {fault}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"\n  and {len(faults) - SHOWN} more")
    return "".join(lines)


def _fault(dataset_dicts: list[dict], place: tuple[int, int], reason: str) -> FaultyAnnotation:
    image_index, index = place
    image = dataset_dicts[image_index]
    file_name = image.get("file_name", f"image {image_index}")
    annotation_id = image["annotations"][index].get("id", f"number {index} of this image")
    return FaultyAnnotation(image_index, index, file_name, annotation_id, reason)


def _shown(annotation: dict) -> str:
    box = annotation.get("bbox")
    return f"box {box.tolist() if isinstance(box, np.ndarray) else box}"[:100]
