"""From one image of a data set to what the model trains on: reading, augmentation, ground truth.

Shapes: C channels, H and W the augmented image's size in pixels, N objects.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.utils.logger import log_first_n
from pycocotools import mask as mask_util

from ..errors import UserError
from .annotations import (
    FaultyAnnotationError,
    check_mode,
    drop_annotations,
    find_faulty_annotations,
    usable_segmentation,
)
from .image import UnreadableImageError, read_image
from .resize import ResizeShortestEdge, ResizeShortestEdgePerBatch
from .segments import read_annotations

logger = logging.getLogger(__name__)

# DETR, section 4, "Technical details".
CROP_PROBABILITY = 0.5
# So many unreadable images in a row are no longer a few broken files but a missing disk.
UNREADABLE_IN_A_ROW = 50


class ImageSizeError(UserError, detection_utils.SizeMismatchError):
    """An image file of another size than its data set says; the message names both."""


def build_augmentation(
    is_train: bool,
    *,
    min_size: int | Sequence[int],
    max_size: int,
    sample_style: str = "choice",
    per_batch: bool = False,
    flip: str = "horizontal",
    crop: tuple[str, Sequence[float]] | None = None,
    crop_resize_sizes: Sequence[int] = (400, 500, 600),
    color_jitter: float = 0.0,
    image_format: str = "RGB",
) -> list[T.Augmentation]:
    """DETR's augmentation (section 4 of the paper): flip, then resize or resize-crop-resize.

    Args:
        is_train: without training only the last resize is left.
        min_size: shorter sides to choose from, in pixels.
        max_size: longest side, in pixels.
        sample_style: "choice" of the sizes in `min_size`, or "range" between two of them.
        per_batch: one choice for all images of a batch.
        flip: "horizontal", "vertical" or "none".
        crop: type and size of detectron2's `RandomCrop`, in the original
            ("absolute_range", (384, 600)); None crops nothing.
        crop_resize_sizes: shorter sides that an image is resized to before the crop, in pixels
            (those of the authors' training code); none: it is not.
        color_jitter: brightness, contrast and saturation are multiplied by 1 plus or minus up to
            this.
        image_format: of the images; grey ones ("L") have no saturation.

    Raises:
        UserError: an unknown flip.
    """
    if not is_train:
        return [ResizeShortestEdge(min_size, max_size, "choice")]
    if flip not in ("none", "horizontal", "vertical"):
        raise UserError(
            f"INPUT.RANDOM_FLIP is '{flip}', it must be 'none', 'horizontal' or 'vertical'."
        )
    augmentations: list[T.Augmentation] = []
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    if crop is not None:
        cropping: list[T.Augmentation] = [T.RandomCrop(*crop)]
        if crop_resize_sizes:
            cropping.insert(0, ResizeShortestEdge(list(crop_resize_sizes), sample_style="choice"))
        augmentations.append(T.RandomApply(T.AugmentationList(cropping), prob=CROP_PROBABILITY))
    resize = ResizeShortestEdgePerBatch if per_batch else ResizeShortestEdge
    augmentations.append(resize(min_size, max_size, sample_style))
    if color_jitter:
        bounds = 1 - color_jitter, 1 + color_jitter
        augmentations += [f(*bounds) for f in (T.RandomBrightness, T.RandomContrast)]
        if image_format != "L":  # grey has no saturation
            augmentations.append(T.RandomSaturation(*bounds))
    return augmentations


class DetrDatasetMapper:
    """Callable that turns one image of a detectron2 data set into one input of the model.

    Boxes are clipped to the crop, as in the original, whether or not there are masks to recompute
    them from. Objects that the crop leaves nothing of are removed; an image without objects stays.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: list[T.Augmentation],
        image_format: str = "RGB",
        use_instance_mask: bool = False,
        instance_mask_format: str = "bitmask",
        faulty_annotations: str = "drop",
        skip_unreadable_images: bool = False,
        num_classes: int | None = None,
    ) -> None:
        """
        Args:
            is_train: otherwise ground truth is left out, and every image must be readable.
            augmentations: see `build_augmentation`.
            image_format: "RGB" or "BGR", whichever the backbone's weights were trained with.
            use_instance_mask: whether to keep the objects' masks; otherwise they are left out.
            instance_mask_format: "bitmask" (rasterised before the augmentation, as in the original)
                or "polygon" (with a crop it needs shapely).
            faulty_annotations: "drop" or "error", see `detr_d2.data.annotations.check_annotations`.
            skip_unreadable_images: in training, take another image in place of an unreadable one.
            num_classes: refuse semantic pictures with other classes; None takes any.

        Raises:
            UserError: an unknown way with faulty annotations, or an unknown mask format.
        """
        check_mode(faulty_annotations)
        if instance_mask_format not in ("bitmask", "polygon"):
            raise UserError(
                f"INPUT.MASK_FORMAT is '{instance_mask_format}', it must be 'bitmask' or 'polygon'."
            )
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format
        self.faulty_annotations = faulty_annotations
        self.skip_unreadable_images = skip_unreadable_images and is_train
        self.num_classes = num_classes
        self._unreadable_in_a_row = 0
        purpose = "training" if is_train else "evaluation"
        logger.info("Augmentations in %s: %s", purpose, augmentations)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        crop = (cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE) if cfg.INPUT.CROP.ENABLED else None
        return {
            "is_train": is_train,
            "augmentations": build_augmentation(
                is_train,
                min_size=cfg.INPUT.MIN_SIZE_TRAIN if is_train else cfg.INPUT.MIN_SIZE_TEST,
                max_size=cfg.INPUT.MAX_SIZE_TRAIN if is_train else cfg.INPUT.MAX_SIZE_TEST,
                sample_style=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
                per_batch=cfg.INPUT.MIN_SIZE_TRAIN_PER_BATCH,
                flip=cfg.INPUT.RANDOM_FLIP,
                crop=crop,
                crop_resize_sizes=cfg.INPUT.CROP.RESIZE_SIZES,
                color_jitter=cfg.INPUT.COLOR_JITTER,
                image_format=cfg.INPUT.FORMAT,
            ),
            "image_format": cfg.INPUT.FORMAT,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "faulty_annotations": cfg.INPUT.FAULTY_ANNOTATIONS,
            "skip_unreadable_images": cfg.INPUT.SKIP_UNREADABLE_IMAGES,
            "num_classes": cfg.MODEL.DETR.NUM_CLASSES or None,  # 0: not settled yet
        }

    def __call__(self, dataset_dict: dict) -> dict | None:
        """
        Args:
            dataset_dict: one image in detectron2's standard format; it is not modified.

        Returns:
            the same dictionary with `image` (C, H, W) uint8 and, in training, `instances` in place
            of its annotations (N objects: `gt_boxes` xyxy in pixels of the augmented image,
            `gt_classes` and, if asked for, `gt_masks`). `height`, `width` stay those of the file.
            None for an unreadable image to be skipped: the loader then takes another.

        Raises:
            UnreadableImageError: the file cannot be read and is not to be skipped, or cannot be
                resized or cropped as asked.
            ImageSizeError: the file has another size than the data set says.
            FaultyAnnotationError: a faulty annotation, and `faulty_annotations` is "error"; in
                either mode a segmentation that cannot be decoded.
            UserError: a picture of segments that cannot be used, or a run-length mask where
                polygons are asked for.
        """
        try:
            image = read_image(dataset_dict["file_name"], self.image_format)
        except UnreadableImageError as error:
            self._skip_or_raise(error)
            return None
        self._unreadable_in_a_row = 0
        check_size(dataset_dict, image)

        augmented = T.AugInput(image)
        augmented.batch_seed = dataset_dict.get("batch_seed")
        try:
            transforms = self.augmentations(augmented)
        except (ValueError, AssertionError) as error:
            height, width = image.shape[:2]
            raise UnreadableImageError(
                f"The image {dataset_dict['file_name']} ({width}x{height} pixels) cannot be "
                f"resized or cropped as INPUT asks ({error}): remove it from the data set."
            ) from error
        output = {k: v for k, v in dataset_dict.items() if k not in ("annotations", "batch_seed")}
        size = dict(zip(("height", "width"), image.shape[:2], strict=True))
        output.update(size)
        # Planes, as detectron2's mapper makes them; torch takes no views with negative strides.
        channels_first = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        output["image"] = torch.from_numpy(channels_first)
        if self.is_train:
            annotations = read_annotations({**dataset_dict, **size}, self.num_classes)
            output["instances"] = self._instances(
                {**output, "annotations": annotations}, transforms, augmented.image.shape[:2]
            )
        return output

    def _skip_or_raise(self, error: UnreadableImageError) -> None:
        if not self.skip_unreadable_images:
            hint = " or set INPUT.SKIP_UNREADABLE_IMAGES True" if self.is_train else ""
            raise UnreadableImageError(
                f"{error}: restore the file, remove it from the data set{hint}."
            ) from error
        self._unreadable_in_a_row += 1
        if self._unreadable_in_a_row >= UNREADABLE_IN_A_ROW:
            raise UnreadableImageError(
                f"{UNREADABLE_IN_A_ROW} images in a row could not be read, check their folder; "
                f"the last was: {error}."
            ) from error
        log_first_n(logging.WARNING, f"{error}: skipped.", n=1, key="message", name=logger.name)

    def _instances(
        self, image: dict, transforms: T.TransformList, image_size: tuple[int, int]
    ) -> Instances:
        """Ground truth of one image, moved along with its augmentation."""
        faults = find_faulty_annotations([image], masks=self.use_instance_mask)
        if faults:
            if self.faulty_annotations == "error":
                raise FaultyAnnotationError(str(faults[0]))
            for fault in faults:
                log_first_n(
                    logging.WARNING, f"{fault}: left out.", n=1, key="message", name=logger.name
                )
            [image] = drop_annotations([image], faults)

        # Copies, because detectron2 transforms annotations in place.
        annotations = [
            self._with_needed_fields(annotation, image)
            for annotation in image["annotations"]
            if not annotation.get("iscrowd", 0)
        ]
        try:
            annotations = [
                detection_utils.transform_instance_annotations(annotation, transforms, image_size)
                for annotation in annotations
            ]
        except ValueError as error:  # of run lengths that only decoding them finds broken
            raise FaultyAnnotationError(
                f"{image['file_name']}: a segmentation cannot be decoded ({error}): correct it, or "
                "take the annotation out."
            ) from error
        instances = detection_utils.annotations_to_instances(
            annotations, image_size, mask_format=self.instance_mask_format
        )
        if self.use_instance_mask and not annotations:
            # An image without objects has the same fields as any other.
            instances.gt_masks = (
                PolygonMasks([])
                if self.instance_mask_format == "polygon"
                else BitMasks(torch.zeros(0, *image_size, dtype=torch.bool))
            )
        return detection_utils.filter_empty_instances(instances)

    def _with_needed_fields(self, annotation: dict, image: dict) -> dict:
        needed = {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")}
        if self.use_instance_mask:
            segmentation = usable_segmentation(
                annotation["segmentation"], image["height"], image["width"]
            )
            if self.instance_mask_format == "bitmask":
                segmentation = to_rle(segmentation, image["height"], image["width"])
            elif isinstance(segmentation, dict):
                raise UserError(
                    f"{image['file_name']}: annotation {annotation.get('id')} is a run-length "
                    "mask, not a polygon: set INPUT.MASK_FORMAT 'bitmask'."
                )
            needed["segmentation"] = segmentation
        return needed


def check_size(dataset_dict: dict, image: np.ndarray) -> None:
    """Raise ImageSizeError where an image (H, W, C) has another size than its data set says."""
    height, width = image.shape[:2]
    said = (dataset_dict.get("width", width), dataset_dict.get("height", height))
    if said == (width, height):
        return
    hint = (
        "the two are swapped, so the annotations were likely made without the file's Exif rotation"
        if said == (height, width)
        else "the annotations were likely made for another version of the file"
    )
    raise ImageSizeError(
        f"The image {dataset_dict['file_name']} has {width}x{height} pixels, its data set says "
        f"{said[0]}x{said[1]}: {hint}; make image, width and height, and boxes agree."
    )


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """Any COCO segmentation as a compressed run-length mask of the whole image."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation
