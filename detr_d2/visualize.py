"""Pictures of what a model finds and how it learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from .data.annotations import usable_segmentation
from .data.image import read_image
from .data.segments import read_annotations, read_segment_ids
from .engine.compare import Result
from .errors import UserError

# Height of one drawn image, in pixels, so that small images stay legible.
HEIGHT = 360


def draw_comparison(
    predictor: Callable[[np.ndarray], dict[str, Any]],
    dataset_dicts: Sequence[dict],
    dataset_name: str,
    path: str | Path,
    score_threshold: float = 0.5,
    columns: int = 3,
) -> int:
    """Writes a picture with predictions on the left and ground truth on the right of each image.

    Args:
        predictor: BGR image (H, W, 3) -> {"instances": Instances}, e.g. `DetrPredictor`. Masks
            and "panoptic_seg" are drawn where they are there.
        dataset_dicts: the images to draw, in detectron2's standard format.
        dataset_name: for the class names.
        score_threshold: detections below are not drawn.
        columns: images side by side.

    Returns:
        The number of detections drawn, or of panoptic segments.
    """
    drawn = [draw_pair(predictor, d, dataset_name, score_threshold) for d in dataset_dicts]
    pairs = [pair for pair, _ in drawn]
    rows = [np.hstack(pairs[i : i + columns]) for i in range(0, len(pairs), columns)]
    width = max(row.shape[1] for row in rows)
    rows = [_pad(row, width) for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with refusing_unknown_endings(path):
        Image.fromarray(np.vstack(rows)).save(path)
    return sum(count for _, count in drawn)


def draw_pair(
    predictor: Callable[[np.ndarray], dict[str, Any]],
    dataset_dict: dict,
    dataset_name: str,
    score_threshold: float,
) -> tuple[np.ndarray, int]:
    """(HEIGHT, width, 3) RGB of one image, predictions, then ground truth; number of the former."""
    image = read_image(dataset_dict["file_name"], "RGB")
    metadata = MetadataCatalog.get(dataset_name)
    scale = HEIGHT / image.shape[0]
    result = predictor(as_input(predictor, image, dataset_dict["file_name"]))
    predicted, truth = (Visualizer(image, metadata, scale) for _ in range(2))
    if "panoptic_seg" in result and "pan_seg_file_name" in dataset_dict:
        segments, info = result["panoptic_seg"]
        predicted.draw_panoptic_seg(segments.cpu(), info)
        truth.draw_panoptic_seg(*_true_segments(dataset_dict, metadata))
        count = len(info)
    else:
        instances = result["instances"].to("cpu")
        instances = instances[instances.scores >= score_threshold]
        predicted.draw_instance_predictions(instances)
        size = image.shape[:2] if instances.has("pred_masks") else None
        annotations = [_to_draw(a, size) for a in read_annotations(dataset_dict)]
        truth.draw_dataset_dict({"annotations": annotations})
        count = len(instances)
    drawn = [_fit_height(each.output.get_image()) for each in (predicted, truth)]
    return np.hstack([*drawn, np.full((HEIGHT, 24, 3), 255, np.uint8)]), count


def draw_predictions(
    predictor: Callable[[np.ndarray], dict[str, Any]], file: str, metadata: Metadata
) -> tuple[np.ndarray, Instances]:
    """(H, W, 3) RGB of one image file with all that the predictor finds, and its detections."""
    image = read_image(file, "RGB")
    result = predictor(as_input(predictor, image, file))
    instances = result["instances"].to("cpu")
    drawing = Visualizer(image, metadata)
    if "panoptic_seg" in result:
        segments, info = result["panoptic_seg"]
        return drawing.draw_panoptic_seg(segments.cpu(), info).get_image(), instances
    return drawing.draw_instance_predictions(instances).get_image(), instances


def as_input(
    predictor: Callable[[np.ndarray], dict[str, Any]], image: np.ndarray, file: str
) -> np.ndarray:
    """(H, W, 3) RGB -> what the predictor takes: (H, W, 3) BGR; of grey models (H, W, 1), which is
    read from the file as in training."""
    is_grey = getattr(predictor, "input_format", "BGR") == "L"
    return read_image(file, "L") if is_grey else image[:, :, ::-1]


def _to_draw(annotation: dict[str, Any], size: tuple[int, int] | None) -> dict[str, Any]:
    """Box and class, and with the image's size, (height, width), the mask."""
    kept = {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")}
    if size is not None:
        # detectron2 wants masks of all objects or of none; of an empty one it draws nothing.
        kept["segmentation"] = usable_segmentation(annotation.get("segmentation"), *size) or []
    return kept


def _true_segments(
    dataset_dict: dict[str, Any], metadata: Metadata
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Panoptic ground truth in the format of `panoptic_seg`."""
    ids = torch.from_numpy(read_segment_ids(dataset_dict["pan_seg_file_name"]))
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    info = [
        {**segment, "isthing": segment["category_id"] in things}
        for segment in dataset_dict["segments_info"]
    ]
    return ids, info


def draw_curves(metrics_file: str | Path, path: str | Path) -> None:
    """Writes a picture of loss and AP against iterations.

    Args:
        metrics_file: the `metrics.json` that training leaves in `OUTPUT_DIR`.

    Raises:
        UserError: it is no such file.
    """
    try:
        with PathManager.open(str(metrics_file)) as lines:
            metrics = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{metrics_file}' cannot be read as the metrics.json of a training: {error}."
        ) from error
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    curves = {"loss": ["total_loss"], "AP on the validation set": ["bbox/AP", "bbox/AP50"]}
    for axis, (title, names) in zip(axes, curves.items(), strict=True):
        for name in names:
            # Once each: a training that was resumed wrote some iterations twice.
            points = sorted({m["iteration"]: m[name] for m in metrics if name in m}.items())
            if points:
                axis.plot(*zip(*points, strict=True), ".-", markersize=4, label=name)
        axis.set(xlabel="iteration", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with refusing_unknown_endings(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_designs(results: Sequence[Result], path: str | Path) -> None:
    """Writes a picture of AP against minutes of training, a line for each design."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for result in sorted(results, key=lambda r: -r.ap[-1]):
        label = f"{result.ap[-1]:.1f}  {result.name}"
        axis.plot([0, *result.minutes], [0, *result.ap], "o-", markersize=4, label=label)
    axis.set(xlabel="minutes of training, on one core", ylabel="AP", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with refusing_unknown_endings(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)


def _fit_height(image: np.ndarray) -> np.ndarray:
    width = max(1, round(image.shape[1] * HEIGHT / image.shape[0]))
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, HEIGHT)))


def _pad(image: np.ndarray, width: int) -> np.ndarray:
    """White on the right up to `width`, and a white line below."""
    missing = ((0, 16), (0, width - image.shape[1]), (0, 0))
    return np.pad(image, missing, constant_values=255)


@contextmanager
def refusing_unknown_endings(path: str | Path) -> Iterator[None]:
    """
    Raises:
        UserError: the ending of `path` is none of a picture.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} cannot be written, {error}: let it end in .png.") from error
