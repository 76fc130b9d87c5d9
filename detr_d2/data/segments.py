"""Ground truth that is one picture of segments: as annotations like any other.

Panoptic pictures (COCO's format) hold the id of each pixel's segment as R + 256 G + 256² B;
semantic ones the contiguous class of each pixel, 255 where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools import mask as mask_util

from ..errors import UserError

NO_CLASS = 255


def has_segments(dataset_dict: dict[str, Any]) -> bool:
    """Whether the ground truth of an image is in a picture instead of annotations."""
    if "pan_seg_file_name" in dataset_dict:
        return True
    return "sem_seg_file_name" in dataset_dict and "annotations" not in dataset_dict


def listed_objects(dataset_dict: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What says each object's class and whether it is a crowd, without opening a picture; None for
    a semantic picture, which lists nothing."""
    if "pan_seg_file_name" in dataset_dict:
        return dataset_dict["segments_info"]
    return None if has_segments(dataset_dict) else dataset_dict.get("annotations", [])


def check_segment_classes(dataset_dicts: Sequence[dict[str, Any]], num_classes: int) -> None:
    """Whole data sets, without opening a picture.

    Raises:
        UserError: a segments_info has a class that is not within 0..num_classes-1.
    """
    wrong = [
        (d["pan_seg_file_name"], segment)
        for d in dataset_dicts
        if "pan_seg_file_name" in d
        for segment in d["segments_info"]
        if not segment.get("iscrowd", 0) and not 0 <= segment["category_id"] < num_classes
    ]
    if wrong:
        path, segment = wrong[0]
        raise UserError(
            f"The segments_info of {len(wrong)} segments have a category_id that is not within "
            f"0..{num_classes - 1}, first {segment['category_id']} of segment {segment['id']} in "
            f"{path}: number the classes from 0 on, or correct MODEL.DETR.NUM_CLASSES."
        )


def read_annotations(
    dataset_dict: dict[str, Any], num_classes: int | None = None
) -> list[dict[str, Any]]:
    """The annotations of an image, wherever they are; see `read_segments`."""
    if has_segments(dataset_dict):
        return read_segments(dataset_dict, num_classes)
    return dataset_dict.get("annotations", [])


def read_segments(
    dataset_dict: dict[str, Any], num_classes: int | None = None
) -> list[dict[str, Any]]:
    """Annotations in detectron2's format, with masks, of an image with a picture of segments.

    Raises:
        UserError: the picture cannot be read, is of another size than the image, lacks a segment
            or, if it is a semantic one, has a class that is not within 0..num_classes-1.
    """
    if "pan_seg_file_name" in dataset_dict:
        return _panoptic(dataset_dict)
    path = dataset_dict["sem_seg_file_name"]
    classes = _read(path)
    classes = classes[..., 0] if classes.ndim == 3 else classes
    _check_size(path, classes, dataset_dict)
    present = [int(name) for name in np.unique(classes) if name != NO_CLASS]
    if num_classes is not None and present and max(present) >= num_classes:
        raise UserError(
            f"The semantic picture {path} has pixels of class {max(present)}, which is not within "
            f"0..{num_classes - 1}: number the classes from 0 on, with {NO_CLASS} where there is "
            "none, or correct MODEL.DETR.NUM_CLASSES."
        )
    return [to_annotation(classes == name, name) for name in present]


def read_segment_ids(path: str) -> np.ndarray:
    """(H, W) int64, the segment of each pixel of a panoptic picture.

    Raises:
        UserError: the picture cannot be read, or is grey.
    """
    picture = _read(path)
    if picture.ndim != 3 or picture.shape[2] < 3:
        raise UserError(
            f"The panoptic picture {path} is not in colour, but a segment's id is "
            "R + 256 G + 256² B: save it as RGB."
        )
    return rgb_to_id(picture)


def _panoptic(dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
    path = dataset_dict["pan_seg_file_name"]
    ids = read_segment_ids(path)
    _check_size(path, ids, dataset_dict)
    annotations = []
    for segment in dataset_dict["segments_info"]:
        mask = ids == segment["id"]
        if not mask.any():
            raise UserError(
                f"The panoptic picture {path} has no pixel of segment {segment['id']}, which its "
                "segments_info names: the two belong to different versions of the data set."
            )
        annotation = to_annotation(mask, segment["category_id"])
        annotations.append({**annotation, "iscrowd": segment.get("iscrowd", 0)})
    return annotations


def _check_size(path: str, picture: np.ndarray, dataset_dict: dict[str, Any]) -> None:
    height, width = picture.shape
    said = dataset_dict.get("width", width), dataset_dict.get("height", height)
    if said != (width, height):
        raise UserError(
            f"The picture of segments {path} has {width}x{height} pixels, its image "
            f"{dataset_dict.get('file_name')} {said[0]}x{said[1]}: the two must be of one size."
        )


def to_annotation(mask: np.ndarray, category_id: int) -> dict[str, Any]:
    """(H, W) bool -> bounding box, class and run-length mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return {
        "bbox": [float(value) for value in box],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category_id,
        "iscrowd": 0,
        "segmentation": mask_util.encode(np.asfortranarray(mask, dtype=np.uint8)),
    }


def rgb_to_id(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W) int64."""
    red, green, blue = np.moveaxis(picture[..., :3].astype(np.int64), -1, 0)
    return red + 256 * green + 256**2 * blue


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8."""
    ids = ids.astype(np.int64)
    return np.stack((ids % 256, ids // 256 % 256, ids // 256**2 % 256), axis=-1).astype(np.uint8)


def _read(path: str) -> np.ndarray:
    try:
        with PathManager.open(path, "rb") as file:
            return np.asarray(Image.open(file))
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise UserError(
            f"Cannot read the picture of segments {path} ({type(error).__name__}: {error})."
        ) from error
