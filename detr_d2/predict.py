"""From a folder of images to pictures of what a model finds in them, and a file of it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from PIL import Image

from .checkpoint.write import write_atomically
from .data.image import UnreadableImageError
from .errors import UserError
from .visualize import draw_predictions

logger = logging.getLogger(__name__)

ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def image_files(inputs: Sequence[str]) -> dict[str, Path]:
    """Files given by name, and those in folders, at any depth, that end as images do.

    Returns:
        ``{name: file}`` in alphabetical order; the name of a file in a folder is its path there.

    Raises:
        UserError: there is no such file or folder, no image in it, or two have one name.
    """
    named: list[tuple[str, Path]] = []
    for given in map(Path, inputs):
        if given.is_dir():
            inside = [f for f in sorted(given.rglob("*")) if f.suffix.lower() in ENDINGS]
            if not inside:
                raise UserError(f"--input '{given}' holds no image ({', '.join(sorted(ENDINGS))}).")
            named += [(f.relative_to(given).as_posix(), f) for f in inside]
        elif given.is_file():
            named.append((given.name, given))
        else:
            raise UserError(f"--input '{given}' does not exist.")
    files = dict(sorted(named))
    if len(files) < len(named):
        names = [name for name, _ in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"Two images of --input are called '{twice}': give their common folder.")
    return files


def predict_files(
    predictor: Callable[[np.ndarray], dict[str, Any]], files: dict[str, Path], output: str
) -> int:
    """Writes ``detections.json``, and each image as ``<name>.png`` with its detections drawn.

    The entries of the file are COCO results (bbox xywh in pixels; a mask as run lengths) whose
    ``image_id`` is the image's name and ``category_id`` the model's class from 0, and
    ``category``, its name, where the model tells. What cannot be read is named and left out.

    Args:
        predictor: a `DetrPredictor`.
        files: see `image_files`.
        output: folder, made if missing.

    Returns:
        The number of detections.

    Raises:
        UserError: nothing can be written there.
    """
    found: list[dict[str, Any]] = []
    try:
        is_whole = False
        try:
            for name, file in files.items():
                found += _predict_file(predictor, name, file, output)
            is_whole = True
        finally:  # what was found before an interruption is not lost
            if found or is_whole:
                os.makedirs(output, exist_ok=True)
                path = os.path.join(output, "detections.json")
                write_atomically(path, lambda stream: stream.write(json.dumps(found).encode()))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--output '{output}' cannot be written to: {error}.") from error
    return len(found)


def _predict_file(
    predictor: Callable[[np.ndarray], dict[str, Any]], name: str, file: Path, output: str
) -> list[dict[str, Any]]:
    """The entries of one image; none where it cannot be read."""
    metadata = getattr(predictor, "metadata", Metadata())
    classes = metadata.get("thing_classes")
    try:
        picture, instances = draw_predictions(predictor, str(file), metadata)
    except UnreadableImageError as error:
        logger.warning("%s It is left out.", error)
        return []
    path = os.path.join(output, f"{name}.png")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(picture).save(path)
    entries = instances_to_coco_json(instances, name)
    if classes:
        entries = [{**e, "category": classes[e["category_id"]]} for e in entries]
    return entries
