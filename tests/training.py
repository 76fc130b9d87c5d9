"""A tiny data set on disk and a training on it that takes milliseconds a step."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from PIL import Image

from detr_d2.data import register_coco_dataset

from .helpers import tiny_cfg

ROOT = Path(__file__).parents[1]
TRAIN_NET = str(ROOT / "tools" / "train_net.py")
# 1-based ids with holes, as people's own data has them.
CATEGORIES = [
    {"id": 1, "name": "red"},
    {"id": 4, "name": "green"},
    {"id": 7, "name": "blue"},
]


def write_rectangles(
    folder: Path,
    num_images: int = 12,
    seed: int = 0,
    categories: Sequence[dict[str, Any]] = CATEGORIES,
    polygons: bool = False,
) -> tuple[str, str]:
    """Writes images of rectangles in three colours; gives annotation file and image folder.

    Sides are of 64 to 96 pixels. Every fourth image has no object, the others have one to three.
    """
    images_folder = folder / "images"
    images_folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for index in range(num_images):
        height, width = rng.integers(64, 97, 2).tolist()
        pixels = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        for _ in range(0 if index % 4 == 3 else rng.integers(1, 4)):
            colour, size = rng.integers(len(categories)), rng.integers(16, 40, 2)
            left, top = (
                rng.integers(0, side - s) for side, s in ((width, size[0]), (height, size[1]))
            )
            pixels[top : top + size[1], left : left + size[0]] = 255 * np.eye(3)[colour % 3]
            box = [int(v) for v in (left, top, *size)]
            x, y, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
            outline = [x, y, right, y, right, bottom, x, bottom]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": categories[colour]["id"],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    **({"segmentation": [outline]} if polygons else {}),
                }
            )
        name = f"{index}.png"
        Image.fromarray(pixels).save(images_folder / name)
        images.append({"id": index, "file_name": name, "width": width, "height": height})
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": list(categories),
    }
    json_file = folder / "annotations.json"
    json_file.write_text(json.dumps(content))
    return str(json_file), str(images_folder)


@contextmanager
def registered_rectangles(folder: Path, **options: Any) -> Iterator[str]:
    """Name of a data set of `write_rectangles` that is registered while this is open."""
    with unregistering():
        name = f"rectangles_{uuid4().hex}"
        register_coco_dataset(name, *write_rectangles(folder, **options))
        yield name


@contextmanager
def unregistering() -> Iterator[None]:
    """Removes the data sets that are registered while this is open."""
    known = set(DatasetCatalog.list())
    try:
        yield
    finally:
        for name in set(DatasetCatalog.list()) - known:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@contextmanager
def logging_as_before() -> Iterator[None]:
    """Undoes what detectron2's `setup_logger` does to the loggers."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "detr_d2")]
    states = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    try:
        yield
    finally:
        for logger, (level, propagate, handlers) in zip(loggers, states, strict=True):
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.level, logger.propagate, logger.handlers = level, propagate, handlers


def training_cfg(train: str, output: Path, *options: Any) -> CfgNode:
    """Three classes, batches of 4, with dropout and augmentation; no evaluation, no workers."""
    return tiny_cfg(
        *("DATASETS.TRAIN", (train,), "DATASETS.TEST", (), "OUTPUT_DIR", str(output)),
        *("MODEL.DETR.NUM_CLASSES", 0, "MODEL.DETR.DROPOUT", 0.1, "DATALOADER.NUM_WORKERS", 0),
        *("INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MIN_SIZE_TEST", 64),
        *("INPUT.RANDOM_FLIP", "horizontal", "SOLVER.AMP.ENABLED", False),
        *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ()),
        *("SOLVER.WARMUP_ITERS", 2, "TEST.EVAL_PERIOD", 0, *options),
    )


def command(*arguments: Any) -> list[str]:
    return [sys.executable, TRAIN_NET, *map(str, arguments)]


def environment() -> dict[str, str]:
    """For a process that shall compute exactly what another one does."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a training's metrics.json."""
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Lets this process take itself for one of several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "get_rank", lambda: rank)
        patch.setattr(comm, "get_world_size", lambda: world_size)
        yield
