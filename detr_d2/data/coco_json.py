"""Reading annotation files in COCO format, with everything checked but where the boxes lie."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, NoReturn

from detectron2.utils.file_io import PathManager

from ..errors import UserError

JSON_ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that Windows tools begin it with


class DatasetError(UserError):
    """A data set that cannot be used; one sentence names the file and what is wrong in it."""


def read_coco_json(json_file: str) -> dict[str, Any]:
    """Read a COCO-format annotation file and check everything in it but where the boxes lie.

    That is left to `detr_d2.data.annotations.check_annotations`, which may drop single ones.

    Raises:
        DatasetError: the file is missing, not JSON or not COCO; it has no image or no category, or
            nothing but crowds; ids or class names are missing or not unique; an annotation
            has no box, or refers to an image or category that is not in the file.
    """
    content = _read_json(json_file)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DatasetError(
                f"{json_file} is not in COCO format: it has no list '{key}' at its top level."
            )
        if not content[key] and key != "annotations":  # images of background alone are of use
            raise DatasetError(f"{json_file} lists no {key}: the list '{key}' is empty.")
        for index, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise DatasetError(f"{json_file}: number {index} of '{key}' is not an object.")

    _check_categories(content["categories"], json_file)
    _check_images(content["images"], json_file)
    _check_references(content["annotations"], "image_id", content["images"], "images", json_file)
    _check_references(
        content["annotations"], "category_id", content["categories"], "categories", json_file
    )
    _check_boxes(content["annotations"], json_file)
    _check_numbers(content["annotations"], json_file)
    annotations = content["annotations"]
    if annotations and all(is_crowd(annotation) for annotation in annotations):
        raise DatasetError(
            f"All {len(content['annotations'])} annotations in {json_file} are crowds (iscrowd 1), "
            "which neither training nor evaluation uses."
        )
    return content


def is_complete_for_evaluation(content: dict) -> bool:
    """Whether COCO evaluation can read the file itself.

    It needs `area` and `iscrowd`, distinct annotation ids other than 0 (which it takes for "not
    matched") and, in some releases of pycocotools, `info`.
    """
    annotations = content["annotations"]
    ids = {a.get("id") for a in annotations if _is_integer(a.get("id"))}
    return (
        "info" in content
        and len(ids) == len(annotations)
        and 0 not in ids
        and all("iscrowd" in a and not a.get("ignore") for a in annotations)
        and all(isinstance(a.get("area"), (int, float)) and a["area"] >= 0 for a in annotations)
    )


def is_crowd(annotation: dict) -> int:
    return int(bool(annotation.get("iscrowd") or annotation.get("ignore")))


def _read_json(json_file: str) -> Any:
    if not PathManager.isfile(json_file):
        raise DatasetError(f"The annotation file {json_file} does not exist.")
    try:
        with PathManager.open(json_file, "r", encoding=JSON_ENCODING) as f:
            return json.load(f)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{json_file} is not a JSON file: {error}.") from error
    except OSError as error:
        raise DatasetError(f"{json_file} cannot be read: {error}.") from error


def _check_categories(categories: list[dict], json_file: str) -> None:
    for category in categories:
        category_id, name = category.get("id"), category.get("name")
        if not _is_integer(category_id):
            raise DatasetError(
                f"{json_file}: the category {name!r} has the id {category_id!r}, "
                "it must be an integer."
            )
        if not isinstance(name, str) or not name:
            raise DatasetError(f"{json_file}: category {category_id} has no name.")
    _check_unique((c["id"] for c in categories), "category id", json_file)
    _check_unique((c["name"] for c in categories), "category name", json_file)


def _check_images(images: list[dict], json_file: str) -> None:
    for index, image in enumerate(images):
        if not _is_integer(image.get("id")) and not isinstance(image.get("id"), str):
            raise DatasetError(
                f"{json_file}: number {index} of 'images' has the id {image.get('id')!r}, it must "
                "be an integer or a text."
            )
        if not isinstance(image.get("file_name"), str):
            raise DatasetError(f"{json_file}: image {image['id']} has no file_name.")
        for side in ("width", "height"):
            if not _is_integer(image.get(side)) or image[side] <= 0:
                raise DatasetError(
                    f"{json_file}: image {image['id']} ({image['file_name']}) has the {side} "
                    f"{image.get(side)!r}, it must be its number of pixels."
                )
    _check_unique((image["id"] for image in images), "image id", json_file)
    if len({type(image["id"]) for image in images}) > 1:
        text = next(image["id"] for image in images if isinstance(image["id"], str))
        raise DatasetError(
            f"{json_file}: some image ids are integers and some are texts, such as {text!r}: "
            "write all of them without quotation marks, or all with."
        )


def _check_unique(values: Iterable[Hashable], what: str, json_file: str) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise DatasetError(
            f"{json_file}: the {what} {repeated[0]!r} is used more than once"
            + (f", as are {len(repeated) - 1} others." if len(repeated) > 1 else ".")
        )


def _check_references(
    annotations: list[dict], key: str, targets: list[dict], target_name: str, json_file: str
) -> None:
    known = {target["id"] for target in targets}
    unknown = [
        (index, annotation)
        for index, annotation in enumerate(annotations)
        if not isinstance(annotation.get(key), Hashable) or annotation.get(key) not in known
    ]
    if unknown:
        index, first = unknown[0]
        raise DatasetError(
            f"{json_file}: {len(unknown)} of {len(annotations)} annotations have a {key} that is "
            f"not among the {len(known)} {target_name}, the first is annotation "
            f"{first.get('id', f'number {index}')} with {key} {first.get(key)!r}"
            + (
                " (a text: write it without quotation marks)."
                if _quotes(first, key, known)
                else "."
            )
        )


def _quotes(annotation: dict, key: str, known: set) -> bool:
    value = annotation.get(key)
    return isinstance(value, str) and value.isdecimal() and int(value) in known


def _check_boxes(annotations: list[dict], json_file: str) -> None:
    boxless = [
        (index, annotation)
        for index, annotation in enumerate(annotations)
        if not _is_box(annotation.get("bbox"))
    ]
    if boxless:
        index, first = boxless[0]
        raise DatasetError(
            f"{json_file}: {len(boxless)} of {len(annotations)} annotations have no 'bbox' of four "
            f"numbers, the first is annotation {first.get('id', f'number {index}')}: "
            f"{str(first.get('bbox'))[:80]}."
        )


def _check_numbers(annotations: list[dict], json_file: str) -> None:
    """Those that may be left out, but not be something else."""
    for index, annotation in enumerate(annotations):
        for key in ("iscrowd", "ignore"):
            if annotation.get(key) not in (0, 1, None):
                _refuse(annotation, index, key, "0 or 1", json_file)
        if not isinstance(annotation.get("area", 0), (int, float, type(None))):
            _refuse(annotation, index, "area", "a number", json_file)


def _refuse(annotation: dict, index: int, key: str, wanted: str, json_file: str) -> NoReturn:
    raise DatasetError(
        f"{json_file}: annotation {annotation.get('id', f'number {index}')} has the {key} "
        f"{annotation[key]!r}, it must be {wanted}."
    )


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
