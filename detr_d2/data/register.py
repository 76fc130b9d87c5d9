"""Bringing one's own data: COCO-format annotations become a detectron2 data set.

Everything that can be wrong with the files is found here, in one sentence, before anything is
built. detectron2's own loader is not used: it asserts without naming the annotation, drops objects
whose polygon is degenerate even when only boxes are wanted, and leaves out the annotation ids that
error messages need.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from .annotations import usable_segmentation
from .coco_json import DatasetError, is_complete_for_evaluation, is_crowd, read_coco_json
from .dataset_mapper import to_rle

logger = logging.getLogger(__name__)

# Looking for every image of a large data set would take minutes on a network disk.
IMAGES_LOOKED_FOR = 5000


def parse_register_argument(argument: str) -> tuple[str, str, str]:
    """Split "NAME=annotations.json:image_dir" into name, annotation file and image folder.

    The first '=' ends the name; the last ':' separates the paths, not counting those of Windows
    drives ("C:\\images") and URLs ("s3://images").

    Raises:
        UserError: a part is missing.
    """
    name, equals, paths = argument.partition("=")
    separators = [
        match.start()
        for match in re.finditer(":", paths)
        if not re.match(r"://", paths[match.start() :])
        and not re.search(r"(?:^|:)[A-Za-z]:$", paths[: match.start() + 1])
    ]
    parts = (name.strip(), *_split_at(paths, separators[-1] if separators else None))
    if not equals or not all(parts):
        raise UserError(
            f"'--register {argument}' is not of the form NAME=annotations.json:image_dir, "
            "such as --register my_train=data/train.json:data/images."
        )
    return parts


def register_coco_dataset(
    name: str, json_file: str, image_dir: str, *, allow_missing_images: bool = False
) -> None:
    """Register COCO-format data under a name that `DATASETS.TRAIN` and `DATASETS.TEST` accept.

    The annotation file is read and checked at once, so that the class names are known from then on.
    Category ids may be any distinct integers; classes are numbered 0..K-1 in their order.
    Registering the same files again does nothing.

    Args:
        name: the data set's name.
        json_file: annotations in COCO format ("images", "annotations", "categories").
        image_dir: the folder that the `file_name`s in it are relative to.
        allow_missing_images: only warn when some images are missing, which
            `INPUT.SKIP_UNREADABLE_IMAGES` then skips in training.

    Raises:
        DatasetError: see `read_coco_json`; images are missing, or the name is taken by other files.
    """
    json_file, image_dir = os.fspath(json_file), os.fspath(image_dir)
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        if getattr(metadata, "registered_from", None) == (json_file, image_dir):
            return
        raise DatasetError(f"There is already a data set named '{name}': choose another name.")

    content = read_coco_json(json_file)
    if not PathManager.isdir(image_dir):
        raise DatasetError(f"The image folder {image_dir} of data set '{name}' does not exist.")
    _check_images_exist(content["images"], json_file, image_dir, allow_missing_images)

    categories = sorted(content["categories"], key=lambda category: category["id"])
    contiguous_ids = {category["id"]: i for i, category in enumerate(categories)}
    classes = [category["name"] for category in categories]
    DatasetCatalog.register(name, partial(load_coco_dataset, json_file, image_dir))
    metadata.set(
        thing_classes=classes,
        thing_dataset_id_to_contiguous_id=contiguous_ids,
        image_root=image_dir,
        evaluator_type="coco",
        registered_from=(json_file, image_dir),
    )
    # Without the attribute, detectron2's COCO evaluator writes a complete annotation file itself.
    if is_complete_for_evaluation(content):
        metadata.set(json_file=json_file)

    objects = Counter(a["category_id"] for a in content["annotations"])
    logger.info(
        "Registered '%s': %d images, %d annotations, %d classes: %s",
        name,
        len(content["images"]),
        len(content["annotations"]),
        len(classes),
        ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else ""),
    )
    if unused := [c["name"] for c in categories if c["id"] not in objects]:
        logger.warning(
            "%d of the %d classes of '%s' have no annotation: %s",
            len(unused),
            len(classes),
            name,
            ", ".join(unused[:20]) + (", ..." if len(unused) > 20 else ""),
        )


def load_coco_dataset(json_file: str, image_dir: str) -> list[dict]:
    """COCO-format annotations as detectron2's standard dictionaries, one per image, in file order.

    Boxes stay as they are written (xywh in pixels), crowds too; each annotation keeps its id. An
    annotation whose segmentation is no area, such as a polygon of two points, or is of another size
    than the image, keeps its box alone.

    Raises:
        DatasetError: see `read_coco_json`.
    """
    content = read_coco_json(json_file)
    contiguous_ids = {
        category_id: i
        for i, category_id in enumerate(sorted(c["id"] for c in content["categories"]))
    }
    images = {
        image["id"]: {
            "file_name": os.path.join(image_dir, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "annotations": [],
        }
        for image in content["images"]
    }
    for index, annotation in enumerate(content["annotations"]):
        loaded = {
            "id": annotation.get("id", f"number {index} of the file"),
            "bbox": annotation.get("bbox"),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": contiguous_ids[annotation["category_id"]],
            "iscrowd": is_crowd(annotation),
        }
        image = images[annotation["image_id"]]
        size = image["height"], image["width"]
        if segmentation := usable_segmentation(annotation.get("segmentation"), *size):
            is_rle = isinstance(segmentation, dict)
            loaded["segmentation"] = to_rle(segmentation, *size) if is_rle else segmentation
        image["annotations"].append(loaded)
    return list(images.values())


def load_dataset(name: str) -> list[dict]:
    """The dictionaries of a registered data set.

    Raises:
        DatasetError: one of its files does not exist.
    """
    try:
        return DatasetCatalog.get(name)
    except FileNotFoundError as error:
        raise missing_file(error) from error


def missing_file(error: FileNotFoundError) -> DatasetError:
    """The same, of a data set's file, and what to do."""
    return DatasetError(
        f"{error} (detectron2's own data sets lie below the folder that the environment variable "
        "DETECTRON2_DATASETS names, by default datasets; others are given with --register)"
    )


def classes_of(dataset_names: Sequence[str]) -> list[str] | None:
    """The class names that registered data sets share; None where they have none.

    Raises:
        DatasetError: a data set is not registered, or two have different classes.
    """
    for name in dataset_names:
        if name not in DatasetCatalog:
            raise DatasetError(
                f"There is no data set named '{name}': register it with "
                f"--register {name}=annotations.json:image_dir, or name another in DATASETS."
            )
        if not hasattr(MetadataCatalog.get(name), "thing_classes"):
            load_dataset(name)  # many data sets learn their classes only when they are loaded
    check_same_classes(dataset_names)
    if not dataset_names:
        return None
    classes = getattr(MetadataCatalog.get(dataset_names[0]), "thing_classes", None)
    return None if classes is None else list(classes)


def check_same_classes(dataset_names: Sequence[str]) -> None:
    """Raise DatasetError when data sets used together, such as train and val, differ in classes."""
    known = [
        (name, list(MetadataCatalog.get(name).thing_classes))
        for name in dataset_names
        if hasattr(MetadataCatalog.get(name), "thing_classes")
    ]
    for name, classes in known[1:]:
        first_name, first_classes = known[0]
        if classes == first_classes:
            continue
        lacking = [c for c in first_classes if c not in classes]
        added = [c for c in classes if c not in first_classes]
        if lacking or added:
            difference = "; ".join(
                f"only in '{where}': {', '.join(which[:5])}{', ...' if len(which) > 5 else ''}"
                for where, which in ((first_name, lacking), (name, added))
                if which
            )
        else:
            i = next(
                i
                for i, pair in enumerate(zip(first_classes, classes, strict=False))
                if pair[0] != pair[1]
            )
            difference = f"class {i} is '{first_classes[i]}' in one and '{classes[i]}' in the other"
        raise DatasetError(
            f"The number or names of classes differ: '{first_name}' has {len(first_classes)}, "
            f"'{name}' has {len(classes)} ({difference}): give both annotation files the same "
            "categories with the same ids."
        )


def _split_at(text: str, position: int | None) -> tuple[str, str]:
    return ("", "") if position is None else (text[:position], text[position + 1 :])


def _check_images_exist(
    images: list[dict], json_file: str, image_dir: str, allow_missing: bool
) -> None:
    step = -(-len(images) // IMAGES_LOOKED_FOR)
    looked_for = images[::step]
    missing = [
        image
        for image in looked_for
        if not PathManager.isfile(os.path.join(image_dir, image["file_name"]))
    ]
    if not missing:
        return
    message = (
        f"{len(missing)} of {len(looked_for)} images looked for of those listed in {json_file} are "
        f"not in the folder {image_dir}, the first is {missing[0]['file_name']}."
    )
    some_are_there = len(missing) < len(looked_for)
    if allow_missing and some_are_there:
        logger.warning("%s", message)
        return
    advice = _how_to_find(missing[0]["file_name"], image_dir)
    if not advice:
        advice = "Restore them, or take them out of the annotations" + (
            "; for training there is INPUT.SKIP_UNREADABLE_IMAGES, too." if some_are_there else "."
        )
    raise DatasetError(f"{message} {advice}")


def _how_to_find(name: str, image_dir: str) -> str:
    """What labelling tools write in place of a path below the image folder; "" if none of it."""
    if "://" in name:
        return "It is a URL: download the images, and write their file names."
    plain = name.replace("\\", "/")
    if plain != name and PathManager.isfile(os.path.join(image_dir, plain)):
        return f"It is there as {plain}: write file_name with slashes in place of backslashes."
    for part in (plain.partition("/")[2], plain.rpartition("/")[2]):
        if part and PathManager.isfile(os.path.join(image_dir, part)):
            return f"It is there as {part}: write that as file_name, or name a folder above."
    return ""
