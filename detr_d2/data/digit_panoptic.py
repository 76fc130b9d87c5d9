"""The embedded data set with a segment for every pixel: `digit_scenes_{train,val}_panoptic`.

Digits are things; what is behind them, one of two photographs, is stuff.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from .digit_scenes import (
    CLASSES,
    NUM_TRAIN,
    NUM_VAL,
    SPLITS,
    STUFF_CLASSES,
    data_set_folder,
    generate_digit_scenes,
    photograph_behind,
    register_split,
)
from .segments import id_to_rgb

logger = logging.getLogger(__name__)


def generate_digit_panoptic(folder: Path, split: str) -> None:
    """Makes `<split>_panoptic.json` and `<split>_panoptic/*.png` beside the scenes, unless they are
    there. The folder of pictures appears last, and whole."""
    from iopath.common.file_io import file_lock

    pictures = folder / f"{split}_panoptic"
    if pictures.is_dir():
        return
    with file_lock(str(pictures)):
        if pictures.is_dir():
            return
        logger.info("Making the panoptic pictures of digit_scenes_%s in %s.", split, folder)
        content = json.loads((folder / f"{split}.json").read_text())
        unfinished = pictures.with_name(pictures.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
        unfinished.mkdir()
        annotations = _write_pictures(content, split, unfinished)
        things = [{**category, "isthing": 1} for category in content["categories"]]
        stuff = [
            {"id": len(CLASSES) + index + 1, "name": name, "isthing": 0}
            for index, name in enumerate(STUFF_CLASSES)
        ]
        panoptic = {
            "images": content["images"],
            "annotations": annotations,
            "categories": things + stuff,
        }
        (folder / f"{split}_panoptic.json").write_text(json.dumps(panoptic))
        os.rename(unfinished, pictures)


def _write_pictures(content: dict[str, Any], split: str, folder: Path) -> list[dict[str, Any]]:
    digits: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        digits[annotation["image_id"]].append(annotation)
    results = []
    for image in content["images"]:
        here = digits[image["id"]]
        background = len(here) + 1
        ids = np.full((image["height"], image["width"]), background, dtype=np.int64)
        for number, annotation in enumerate(here, 1):
            ids[mask_util.decode(annotation["segmentation"]) > 0] = number
        name = Path(image["file_name"]).with_suffix(".png").name
        Image.fromarray(id_to_rgb(ids)).save(folder / name)
        photograph = len(CLASSES) + 1 + photograph_behind(split, image["id"])
        categories = [annotation["category_id"] for annotation in here] + [photograph]
        areas = np.bincount(ids.ravel(), minlength=background + 1)
        segments = [
            {"id": number, "category_id": category, "area": int(areas[number]), "iscrowd": 0}
            for number, category in enumerate(categories, 1)
        ]
        results.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
    return results


def register_digit_panoptic(root: str | None = None) -> None:
    """Registers both splits, which are made when first loaded; `root` as for the scenes."""
    folder = data_set_folder(root)
    names = [*CLASSES, *STUFF_CLASSES]

    def load(split: str) -> list[dict[str, Any]]:
        generate_digit_scenes(folder, NUM_TRAIN, NUM_VAL)
        generate_digit_panoptic(Path(folder), split)
        content = json.loads((Path(folder) / f"{split}_panoptic.json").read_text())
        images = {image["id"]: image for image in content["images"]}
        dicts = []
        for annotation in content["annotations"]:
            image = images[annotation["image_id"]]
            segments = [
                {**segment, "category_id": segment["category_id"] - 1}
                for segment in annotation["segments_info"]
            ]
            pictures = os.path.join(folder, f"{split}_panoptic")
            dicts.append(
                {
                    "file_name": os.path.join(folder, split, image["file_name"]),
                    "image_id": image["id"],
                    "height": image["height"],
                    "width": image["width"],
                    "pan_seg_file_name": os.path.join(pictures, annotation["file_name"]),
                    "segments_info": segments,
                }
            )
        return dicts

    for split in SPLITS:
        register_split(
            f"digit_scenes_{split}_panoptic",
            partial(load, split),
            folder=folder,
            split=split,
            panoptic_json=os.path.join(folder, f"{split}_panoptic.json"),
            panoptic_root=os.path.join(folder, f"{split}_panoptic"),
            evaluator_type="coco_panoptic_seg",
            thing_classes=names,
            stuff_classes=names,
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
            stuff_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES), len(names))},
        )
