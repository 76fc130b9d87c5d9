"""COCO's average precision and recall, computed by hotcoco or by pycocotools.

Both packages have the same interface and, on what `compute_coco_metrics` hands them, give the same
arrays bit for bit; hotcoco is tens of times faster.

Shape letters: T = 10 IoU thresholds 0.50:0.05:0.95, R = 101 recall points, K = categories sorted
by id, A = 4 areas (all, small, medium, large), M = 3 limits on the detections per image and class
(see `detection_limits`).
"""

import contextlib
import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.annotations import usable_segmentation
from ..errors import UserError

logger = logging.getLogger(__name__)

AREAS = {"s": 1, "m": 2, "l": 3}


@dataclass(frozen=True)
class COCOMetrics:
    """Precision and recall of a whole data set, and the figures COCO derives from them.

    Attributes:
        precision: (T, R, K, A, M), in [0, 1]; -1 where a category has no ground truth.
        recall: (T, K, A, M), likewise.
        scores: (T, R, K, A, M), of the detections that reach each recall; -1 as above.
        class_names: K names, in the order of the K axis.
        max_detections_per_image: the last of the M limits; COCO's own figures use 100.
    """

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray
    class_names: list[str]
    max_detections_per_image: int = 100

    def summary(self) -> dict[str, float]:
        """COCO's 12 numbers in COCO's order, in percent; NaN where there is no ground truth."""
        numbers = {
            "AP": _mean_percent(self.precision[:, :, :, 0, -1]),
            "AP50": _mean_percent(self.precision[0, :, :, 0, -1]),
            "AP75": _mean_percent(self.precision[5, :, :, 0, -1]),
        }
        for suffix, area in AREAS.items():
            numbers[f"AP{suffix}"] = _mean_percent(self.precision[:, :, :, area, -1])
        for index, limit in enumerate(detection_limits(self.max_detections_per_image)):
            numbers[f"AR@{limit}"] = _mean_percent(self.recall[:, :, 0, index])
        for suffix, area in AREAS.items():
            numbers[f"AR{suffix}"] = _mean_percent(self.recall[:, :, area, -1])
        return numbers

    def per_class(self) -> dict[str, dict[str, float]]:
        """``{class name: {"AP", "AP50", "F1", "precision", "recall", "score"}}``, in percent but
        for the score; NaN without ground truth.

        F1 is the largest there is at an IoU of 0.5, precision and recall are what it is made of,
        and score is the threshold that reaches it.
        """
        return {
            name: {
                "AP": _mean_percent(self.precision[:, :, k, 0, -1]),
                "AP50": _mean_percent(self.precision[0, :, k, 0, -1]),
                **best_f1(self.precision[0, :, k, 0, -1], self.scores[0, :, k, 0, -1]),
            }
            for k, name in enumerate(self.class_names)
        }


def best_f1(precision: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Largest harmonic mean of precision and recall, at COCO's 101 recalls.

    Args:
        precision, scores: (R,) of one class; -1 where it has no ground truth.
    """
    recall = np.linspace(0, 1, len(precision))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    best = int(f1.argmax())
    if not f1[best] > 0:
        missing = float("nan") if precision[0] < 0 else 0.0
        return {"F1": missing, "precision": missing, "recall": missing, "score": float("nan")}
    found = {"F1": f1[best], "precision": precision[best], "recall": recall[best]}
    return {**{k: float(100 * v) for k, v in found.items()}, "score": float(scores[best])}


def detection_limits(most: int) -> list[int]:
    """COCO's 1, 10 and 100, with `most` for the last; ascending, as hotcoco takes them."""
    return [1, min(10, most), most]


def compute_coco_metrics(
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]],
    task: str = "bbox",
    max_detections_per_image: int = 100,
    backend: str | None = None,
) -> COCOMetrics:
    """Compare detections with the ground truth by COCO's rules. Neither argument is changed.

    Args:
        ground_truth: content of a COCO annotation file: images, annotations, categories. Missing
            ``area`` (the box's is taken) and ``iscrowd`` (0) are allowed, and so are annotation
            ids that are missing, repeated or start from 0. Where the task is "segm", objects
            without a usable segmentation are ignored.
        detections: entries of a COCO results file: image_id, category_id, score and bbox (xywh in
            pixels), or segmentation (RLE) where the task is "segm". Without any detection every
            number is NaN, as in detectron2.
        task: "bbox" or "segm".
        max_detections_per_image: only so many of an image's best detections in each category count.
        backend: "hotcoco" or "pycocotools"; chosen by `choose_backend` if None.

    Raises:
        ValueError: an unknown task.
        UserError: a limit below 1.
    """
    if task not in ("bbox", "segm"):
        raise ValueError(f"COCO evaluation knows the tasks 'bbox' and 'segm', not '{task}'.")
    if max_detections_per_image < 1:
        raise UserError(
            "COCO evaluation needs at least 1 detection per image, but the limit is "
            f"{max_detections_per_image}; set max_detections_per_image to 1 or more."
        )
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    class_names = [category["name"] for category in categories]
    if not detections:
        precision = np.full((10, 101, len(categories), 4, 3), -1.0)
        return COCOMetrics(
            precision, precision[:, 0], precision, class_names, max_detections_per_image
        )

    coco, coco_eval = _load_backend(backend or choose_backend(ground_truth))
    # pycocotools prints its progress to the standard output and cannot be told not to.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = _normalize_ground_truth(ground_truth, task)
        truth.createIndex()
        evaluation = coco_eval(truth, truth.loadRes(_keep_task_fields(detections, task)), task)
        evaluation.params.maxDets = detection_limits(max_detections_per_image)
        evaluation.evaluate()
        evaluation.accumulate()
    return COCOMetrics(
        np.asarray(evaluation.eval["precision"]),
        np.asarray(evaluation.eval["recall"]),
        np.asarray(evaluation.eval["scores"]),
        class_names,
        max_detections_per_image,
    )


def choose_backend(ground_truth: dict[str, Any]) -> str:
    """Return "hotcoco" where it is installed and can read the data set, else "pycocotools".

    hotcoco refuses ids that are not non-negative integers, which COCO's format does not forbid.
    """
    try:
        _load_backend("hotcoco")
    except ImportError:
        return "pycocotools"
    ids = [entry["id"] for key in ("images", "categories") for entry in ground_truth[key]]
    readable = all(type(identity) is int and 0 <= identity < 2**63 for identity in ids)
    return "hotcoco" if readable else "pycocotools"


def _load_backend(name: str) -> tuple[type, type]:
    if name == "hotcoco":
        from hotcoco import COCO, COCOeval
    elif name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        raise ValueError(f"COCO evaluation runs on 'hotcoco' or 'pycocotools', not on '{name}'.")
    return COCO, COCOeval


def _normalize_ground_truth(ground_truth: dict[str, Any], task: str) -> dict[str, Any]:
    """Keep what the task needs and fill in what annotation files leave out.

    Annotations are numbered from 1, because pycocotools takes the id 0 for "not matched" and counts
    a detection of that object as false; no metric depends on the ids otherwise.

    An object without a mask can be neither found nor missed: like a crowd it is ignored, and so are
    detections in its box.
    """
    annotations, maskless = [], 0
    images = {image["id"]: image for image in ground_truth["images"]} if task == "segm" else {}
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        kept = {
            "id": number,
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "area": annotation.get("area"),
            "iscrowd": int(annotation.get("iscrowd") or 0),
        }
        if kept["area"] is None or not kept["area"] >= 0:  # also NaN
            kept["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if task == "segm":
            image = images.get(annotation["image_id"], {})
            kept["segmentation"] = usable_segmentation(
                annotation.get("segmentation"), image.get("height"), image.get("width")
            )
            if kept["segmentation"] is None:
                maskless += 1
                kept["iscrowd"], kept["segmentation"] = 1, [_as_polygon(annotation["bbox"])]
        annotations.append(kept)
    if maskless:
        logger.warning(
            "%d of %d annotations have no segmentation that can be used: evaluation of masks "
            "ignores these objects, and detections in their boxes.",
            maskless,
            len(annotations),
        )
    return {
        "info": {},
        "images": ground_truth["images"],
        "annotations": annotations,
        "categories": ground_truth["categories"],
    }


def _as_polygon(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _keep_task_fields(detections: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Leave the box out of mask results, so that a mask's own area tells its size."""
    region = "bbox" if task == "bbox" else "segmentation"
    fields = ("image_id", "category_id", "score", region)
    return [{field: detection[field] for field in fields} for detection in detections]


def _mean_percent(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else float("nan")
