"""The dataset mapper and the check of ground truth, on tiny images written to disk."""

import copy
import json
import logging
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from PIL import Image
from pycocotools import mask as mask_util

from detr_d2 import get_detr_cfg
from detr_d2.data import annotations as annotations_module
from detr_d2.data import dataset_mapper as mapper_module
from detr_d2.data.annotations import (
    FaultyAnnotationError,
    check_annotations,
    find_faulty_annotations,
    find_xyxy_given_as_xywh,
)
from detr_d2.data.dataset_mapper import (
    DetrDatasetMapper,
    ImageSizeError,
    build_augmentation,
)
from detr_d2.data.image import UnreadableImageError
from detr_d2.errors import UserError

WIDTH, HEIGHT = 40, 30


def annotation(bbox, category_id=0, mode=BoxMode.XYWH_ABS, **more):
    return {"bbox": bbox, "bbox_mode": mode, "category_id": category_id, "iscrowd": 0, **more}


@pytest.fixture
def image(tmp_path):
    """One image, 40x30, red left half and blue right half, with two objects."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:, : WIDTH // 2, 0] = 200
    pixels[:, WIDTH // 2 :, 2] = 100
    path = tmp_path / "scene.png"
    Image.fromarray(pixels).save(path)
    return {
        "file_name": str(path),
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 7,
        "annotations": [
            annotation([4.0, 6.0, 10.0, 12.0], 1, id=11),
            annotation([25.0, 3.0, 8.0, 20.0], 0, id=12),
        ],
    }


def resize_only(size, **arguments):
    augmentations = build_augmentation(False, min_size=size, max_size=10_000)
    return DetrDatasetMapper(True, augmentations=augmentations, **arguments)


def config():
    cfg = get_detr_cfg()
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (15, 30, 60)
    cfg.INPUT.MAX_SIZE_TRAIN = 1000
    cfg.INPUT.MIN_SIZE_TEST = 45
    cfg.INPUT.MAX_SIZE_TEST = 1000
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    return cfg


# What comes out


def test_resize_moves_boxes_with_the_image(image):
    output = resize_only(60)(image)
    assert output["image"].shape == (3, 60, 80) and output["image"].dtype == torch.uint8
    instances = output["instances"]
    assert instances.image_size == (60, 80)
    # xywh to xyxy, then times two: 60 / 30 and 80 / 40.
    expected = [[8, 12, 28, 36], [50, 6, 66, 46]]
    assert instances.gt_boxes.tensor.tolist() == expected
    assert instances.gt_classes.tolist() == [1, 0] and instances.gt_classes.dtype == torch.int64
    # Evaluators need the size of the file, not that of the resized image.
    assert (output["height"], output["width"], output["image_id"]) == (HEIGHT, WIDTH, 7)
    assert output["file_name"] == image["file_name"]
    assert "annotations" not in output


def test_the_given_dictionary_is_not_modified(image):
    image["annotations"][0]["segmentation"] = [[4.0, 6.0, 14.0, 6.0, 14.0, 18.0, 4.0, 18.0]]
    image["annotations"][1]["segmentation"] = [[25.0, 3.0, 33.0, 3.0, 33.0, 23.0]]
    before = copy.deepcopy(image)
    resize_only(60, use_instance_mask=True)(image)
    assert image == before


@pytest.mark.parametrize(("image_format", "red"), [("RGB", 0), ("BGR", 2)])
def test_channel_order(image, image_format, red):
    pixels = resize_only(HEIGHT, image_format=image_format)(image)["image"]
    assert pixels[red, 0, 0] == 200 and pixels[2 - red, 0, 0] == 0
    assert pixels[2 - red, 0, -1] == 100 and pixels[red, 0, -1] == 0


def test_grey_palette_and_transparent_images_become_three_channels(image, tmp_path):
    for mode in ("L", "P", "RGBA", "LA", "CMYK"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (WIDTH, HEIGHT)).save(path)
        output = resize_only(HEIGHT)({**image, "file_name": str(path)})
        assert output["image"].shape == (3, HEIGHT, WIDTH), mode


def test_evaluation_only_resizes_and_has_no_ground_truth(image):
    cfg = config()
    cfg.INPUT.CROP.ENABLED = True
    mapper = DetrDatasetMapper(cfg, is_train=False)
    outputs = [mapper(image) for _ in range(8)]
    assert all(o["image"].shape == (3, 45, 60) for o in outputs)
    assert all(torch.equal(o["image"], outputs[0]["image"]) for o in outputs)
    assert "instances" not in outputs[0] and "annotations" not in outputs[0]


def test_crowds_are_neither_trained_on_nor_checked(image):
    image["annotations"][0]["iscrowd"] = 1
    image["annotations"] += [annotation([math.nan] * 4) | {"iscrowd": 1}]
    instances = resize_only(30, faulty_annotations="error")(image)["instances"]
    assert instances.gt_classes.tolist() == [0]


def test_boxes_sticking_out_are_clipped(image):
    image["annotations"] = [annotation([-3.0, 20.0, 50.0, 14.0])]
    boxes = resize_only(60, faulty_annotations="error")(image)["instances"].gt_boxes.tensor
    assert boxes.tolist() == [[0, 40, 80, 60]]


@pytest.mark.parametrize("masks", [False, True])
def test_an_image_without_objects_is_kept(image, masks):
    image["annotations"] = []
    instances = resize_only(60, use_instance_mask=masks)(image)["instances"]
    assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.shape == (0,)
    assert instances.has("gt_masks") == masks
    if masks:
        assert instances.gt_masks.tensor.shape == (0, 60, 80)


# Masks


def test_masks_are_not_even_looked_at_unless_asked_for(image):
    for a in image["annotations"]:
        a["segmentation"] = "not a segmentation"
    assert not resize_only(30)(image)["instances"].has("gt_masks")


UNUSABLE = {
    "flat polygon": [4.0, 6.0, 14.0, 6.0, 14.0, 18.0],
    "two points": [[4.0, 6.0, 14.0, 6.0]],
    "another size": {"counts": [0, 1200], "size": [WIDTH, HEIGHT]},
    "half a size": {"counts": [0, 1200], "size": [HEIGHT]},
    "no counts": {"size": [HEIGHT, WIDTH]},
}


def test_runs_that_only_decoding_finds_broken_are_told(image):
    for annotation in image["annotations"]:
        annotation["segmentation"] = {"counts": "abc", "size": [HEIGHT, WIDTH]}
    mapper = DetrDatasetMapper(True, augmentations=[], use_instance_mask=True)
    with pytest.raises(FaultyAnnotationError, match="png: a segmentation cannot be decoded"):
        mapper(image)


@pytest.mark.parametrize("fault", UNUSABLE)
def test_a_segmentation_that_cannot_be_used_is_told(image, fault):
    image["annotations"][0]["segmentation"] = UNUSABLE[fault]
    image["annotations"][1]["segmentation"] = [[25.0, 3.0, 33.0, 3.0, 33.0, 23.0]]
    assert len(resize_only(30)(image)["instances"]) == 2
    assert len(resize_only(30, use_instance_mask=True)(image)["instances"]) == 1
    with pytest.raises(FaultyAnnotationError, match="11: has no segmentation that .*polygons"):
        check_annotations([image], "error", masks=True)


def test_masks_of_every_form_agree(image):
    """The same rectangle as polygon, as run lengths and as compressed run lengths."""
    rectangle = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    rectangle[6:18, 4:14] = 1
    compressed = mask_util.encode(np.asfortranarray(rectangle))
    column_major = rectangle.T.reshape(-1)
    changes = np.flatnonzero(np.diff(column_major)) + 1
    counts = np.diff([0, *changes, column_major.size]).tolist()
    segmentations = (
        [[4.0, 6.0, 14.0, 6.0, 14.0, 18.0, 4.0, 18.0]],
        {"counts": counts, "size": [HEIGHT, WIDTH]},
        compressed,
        {**compressed, "counts": compressed["counts"].decode()},
    )
    expected = np.zeros((60, 80), dtype=bool)
    expected[12:36, 8:28] = True
    for segmentation in segmentations:
        image["annotations"] = [annotation([4, 6, 10, 12], segmentation=segmentation)]
        masks = resize_only(60, use_instance_mask=True)(image)["instances"].gt_masks
        assert isinstance(masks, BitMasks)
        assert np.array_equal(masks.tensor[0].numpy(), expected)


def test_polygon_masks(image):
    image["annotations"] = [
        annotation([4, 6, 10, 12], segmentation=[[4.0, 6.0, 14.0, 6.0, 14.0, 18.0]])
    ]
    masks = resize_only(60, use_instance_mask=True, instance_mask_format="polygon")(image)[
        "instances"
    ].gt_masks
    assert isinstance(masks, PolygonMasks)
    assert masks.polygons[0][0].tolist() == [8, 12, 28, 12, 28, 36]

    image["annotations"][0]["segmentation"] = {"counts": [1200], "size": [HEIGHT, WIDTH]}
    with pytest.raises(UserError, match="INPUT.MASK_FORMAT 'bitmask'"):
        resize_only(60, use_instance_mask=True, instance_mask_format="polygon")(image)


def test_an_object_without_a_mask_is_dropped_where_masks_are_needed(image):
    image["annotations"][1]["segmentation"] = [[25.0, 3.0, 33.0, 3.0, 33.0, 23.0]]
    assert resize_only(30, use_instance_mask=True)(image)["instances"].gt_classes.tolist() == [0]
    with pytest.raises(FaultyAnnotationError, match="annotation 11: has no segmentation that"):
        resize_only(30, use_instance_mask=True, faulty_annotations="error")(image)


def test_masks_and_boxes_go_through_the_crop_together(image):
    """A filled rectangle's mask, cropped and resized, must still span its box."""
    x, y, w, h = 10, 8, 20, 14
    image["annotations"] = [
        annotation([x, y, w, h], segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
    ]
    cfg = config()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "relative", [0.6, 0.6]
    cfg.INPUT.CROP.RESIZE_SIZES = [60]
    mapper = DetrDatasetMapper(cfg)
    np.random.seed(0)
    for _ in range(20):
        instances = mapper(image)["instances"]
        assert len(instances) == 1
        around_mask = instances.gt_masks.get_bounding_boxes().tensor
        assert (around_mask - instances.gt_boxes.tensor).abs().max() <= 2.0


# Augmentation


def test_flip_mirrors_pixels_and_boxes(image):
    augmentations = [T.RandomFlip(prob=1.0)]
    output = DetrDatasetMapper(True, augmentations=augmentations)(image)
    assert output["image"][0, 0, 0] == 0 and output["image"][0, 0, -1] == 200
    # x0' = 40 - x1, x1' = 40 - x0
    expected = [[26, 6, 36, 18], [7, 3, 15, 23]]
    assert output["instances"].gt_boxes.tensor.tolist() == expected


@pytest.mark.parametrize(("flip", "low", "high"), [("none", 0, 0), ("horizontal", 70, 130)])
def test_flip_by_key(image, flip, low, high):
    cfg = config()
    cfg.INPUT.RANDOM_FLIP = flip
    mapper = DetrDatasetMapper(cfg)
    np.random.seed(0)
    mirrored = sum(bool(mapper(image)["image"][0, 0, -1] > 0) for _ in range(200))
    assert low <= mirrored <= high  # 200 fair coins: 100 +- 7 each standard deviation


def test_an_unknown_flip_is_refused():
    cfg = config()
    cfg.INPUT.RANDOM_FLIP = "both"
    with pytest.raises(UserError, match="INPUT.RANDOM_FLIP is 'both'"):
        DetrDatasetMapper(cfg)


def test_every_scale_is_used_and_the_longest_side_is_kept(image):
    cfg = config()
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MAX_SIZE_TRAIN = 70
    mapper = DetrDatasetMapper(cfg)
    np.random.seed(0)
    sizes = {tuple(mapper(image)["image"].shape[1:]) for _ in range(60)}
    # 60x80 would be longer than 70, so it becomes 70 * 30 / 40 = 52.5, rounded half up.
    assert sizes == {(15, 20), (30, 40), (53, 70)}


def test_crop_is_made_half_of_the_time_and_between_two_resizes():
    augmentations = build_augmentation(
        True, min_size=(480, 800), max_size=1333, crop=("absolute_range", (384, 600))
    )
    pixels = np.zeros((300, 500, 3), dtype=np.uint8)
    kinds, first_sizes, crops = [], set(), []
    np.random.seed(0)
    for _ in range(300):
        transforms = T.AugmentationList(augmentations)(T.AugInput(pixels))
        chain = [t for t in transforms.transforms if not isinstance(t, (T.NoOpTransform,))]
        chain = [t for t in chain if not isinstance(t, T.HFlipTransform)]
        names = [type(t).__name__ for t in chain]
        kinds.append(names)
        if len(chain) == 3:
            first_sizes.add(min(chain[0].new_h, chain[0].new_w))
            crops.append((chain[1].h, chain[1].w))
        assert min(chain[-1].new_h, chain[-1].new_w) <= 800
        assert max(chain[-1].new_h, chain[-1].new_w) <= 1333
    resize = "TensorResizeTransform"
    cropped = kinds.count([resize, "CropTransform", resize])
    plain = kinds.count([resize])
    assert cropped + plain == 300 and 115 <= cropped <= 185  # 150 +- 4 standard deviations of 8.7
    assert first_sizes == {400, 500, 600}
    assert all(384 <= h <= 600 and 384 <= w <= 600 for h, w in crops)
    assert len(set(crops)) > 50


def test_boxes_after_a_crop_by_hand(image):
    """Crop x 20..40, y 10..25 of the 40x30 image, then times two."""
    augmentations = [T.CropTransform(20, 10, 20, 15), T.ResizeTransform(15, 20, 30, 40)]
    output = DetrDatasetMapper(True, augmentations=augmentations)(image)
    # The first object (x 4..14) is cropped away; the second (25..33, 3..23) becomes
    # ((25-20)*2, (10-10)*2, (33-20)*2, (23-10)*2).
    assert output["instances"].gt_boxes.tensor.tolist() == [[10, 0, 26, 26]]
    assert output["instances"].gt_classes.tolist() == [0]


def test_boxes_stay_on_their_objects_under_random_augmentation(tmp_path):
    """The object is the only bright rectangle, so its box can be read off the augmented pixels."""
    pixels = np.zeros((120, 160, 3), dtype=np.uint8)
    pixels[30:90, 40:120] = 255
    path = tmp_path / "bright.png"
    Image.fromarray(pixels).save(path)
    image = {
        "file_name": str(path),
        "height": 120,
        "width": 160,
        "annotations": [annotation([40, 30, 80, 60])],
    }
    augmentations = build_augmentation(
        True,
        min_size=(90, 150),
        max_size=400,
        crop=("relative_range", (0.5, 0.5)),
        crop_resize_sizes=(100, 140),
    )
    mapper = DetrDatasetMapper(True, augmentations=augmentations)
    np.random.seed(1)
    partly_visible = 0
    for _ in range(60):
        output = mapper(image)
        bright = output["image"][0].numpy() > 127
        ys, xs = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        seen = [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
        box = output["instances"].gt_boxes.tensor[0].tolist()
        assert np.abs(np.subtract(seen, box)).max() <= 3  # two resizes, both enlarging
        partly_visible += bright[0].any() or bright[-1].any()
    assert partly_visible > 5


def test_the_same_seed_gives_the_same_images(image):
    cfg = config()
    cfg.INPUT.CROP.ENABLED = True
    mapper = DetrDatasetMapper(cfg)

    def run(seed):
        np.random.seed(seed)
        return [mapper(image)["image"] for _ in range(6)]

    first, second, other = run(3), run(3), run(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# Images that cannot be read


def broken_files(folder):
    whole = folder / "whole.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    (folder / "truncated.jpg").write_bytes(whole.read_bytes()[:-300])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "folder.png").mkdir()
    # Promises 30,000 x 30,000 pixels, more than Pillow is willing to decode.
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    bomb = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    return ["truncated.jpg", "empty.jpg", "text.png", "folder.png", "bomb.png", "missing.jpg"]


def test_an_unreadable_image_is_named(image, tmp_path):
    mapper = resize_only(30)
    for name in broken_files(tmp_path):
        with pytest.raises(UnreadableImageError) as caught:
            mapper({**image, "file_name": str(tmp_path / name)})
        message = str(caught.value)
        assert str(tmp_path / name) in message
        assert "INPUT.SKIP_UNREADABLE_IMAGES" in message
        assert "\n" not in message


def test_an_unreadable_image_is_skipped_by_key_in_training_only(image, tmp_path, caplog):
    cfg = config()
    cfg.INPUT.SKIP_UNREADABLE_IMAGES = True
    gone = {**image, "file_name": str(tmp_path / "gone.jpg")}
    with caplog.at_level(logging.WARNING):
        assert DetrDatasetMapper(cfg)(gone) is None
    assert "gone.jpg" in caplog.text and "skipped" in caplog.text
    with pytest.raises(UnreadableImageError, match="gone.jpg"):
        DetrDatasetMapper(cfg, is_train=False)(gone)


def test_the_loader_takes_another_image_in_place_of_a_skipped_one(image, tmp_path):
    data = [{**image, "image_id": 1, "file_name": str(tmp_path / "gone.jpg")}]
    data += [{**image, "image_id": i} for i in (2, 3)]
    mapper = resize_only(30, skip_unreadable_images=True)
    loader = build_detection_train_loader(data, mapper=mapper, total_batch_size=2, num_workers=0)
    batches = iter(loader)
    seen = {x["image_id"] for _ in range(6) for x in next(batches)}
    assert seen == {2, 3}


def test_a_missing_folder_is_not_skipped_for_ever(image, monkeypatch):
    monkeypatch.setattr(mapper_module, "UNREADABLE_IN_A_ROW", 3)
    mapper = resize_only(30, skip_unreadable_images=True)
    gone = {**image, "file_name": "nowhere/gone.jpg"}
    assert mapper(gone) is None and mapper(gone) is None
    assert mapper(image) is not None  # a readable one starts the count again
    assert mapper(gone) is None and mapper(gone) is None
    with pytest.raises(UnreadableImageError, match="3 images in a row.*gone.jpg"):
        mapper(gone)


def test_an_image_of_another_size_than_its_data_set_says(image):
    with pytest.raises(ImageSizeError, match=r"scene.png has 40x30 pixels.*says 41x30"):
        resize_only(30)({**image, "width": 41})
    with pytest.raises(ImageSizeError, match="Exif"):
        resize_only(30)({**image, "width": HEIGHT, "height": WIDTH})


def test_exif_rotation_is_applied(image, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees to show
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)
    turned = {**image, "file_name": str(path), "width": HEIGHT, "height": WIDTH}
    assert resize_only(30)(turned)["image"].shape == (3, WIDTH, HEIGHT)


# Faulty ground truth

FAULTS = {
    "zero width": ([5, 5, 0, 10], "zero or negative width or height"),
    "negative height": ([5, 15, 10, -10], "zero or negative width or height"),
    "nan": ([5, math.nan, 10, 10], "not four finite numbers"),
    "infinite": ([5, 5, math.inf, 10], "not four finite numbers"),
    "null": ([None, 5, 10, 10], "not four finite numbers"),
    "five numbers": ([5, 5, 10, 10, 0.5], "not four finite numbers"),
    "missing": (None, "not four finite numbers"),
    "right of the image": ([40, 5, 10, 10], "outside the image"),
    "below the image": ([5, 30.5, 10, 10], "outside the image"),
    "left of the image": ([-10, 5, 10, 10], "outside the image"),
    "above the image": ([5, -30, 10, 10], "outside the image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_annotation_is_dropped_or_refused(image, fault, caplog):
    bbox, reason = FAULTS[fault]
    image["annotations"][0]["bbox"] = bbox
    name = image["file_name"]
    [found] = find_faulty_annotations([image])
    assert (found.file_name, found.annotation_id) == (name, 11) and reason in found.reason

    with caplog.at_level(logging.WARNING):
        given = [image]
        [kept] = check_annotations(given, "drop", "mine")
    assert [a["id"] for a in kept["annotations"]] == [12]
    assert given == [image] and len(image["annotations"]) == 2, "the given data was modified"
    assert all(part in caplog.text for part in ("1 faulty", "'mine'", name, "annotation 11"))
    with pytest.raises(FaultyAnnotationError, match="'mine'") as caught:
        check_annotations([image], "error", "mine")
    assert f"{name}: annotation 11" in str(caught.value) and reason in str(caught.value)

    # Without the check of the whole data set, the mapper must not let it through either.
    assert resize_only(30)(image)["instances"].gt_classes.tolist() == [0]
    with pytest.raises(FaultyAnnotationError, match="annotation 11"):
        resize_only(30, faulty_annotations="error")(image)


def test_corner_boxes_with_crossed_corners_are_faulty(image):
    image["annotations"] = [annotation([20, 5, 10, 15], mode=BoxMode.XYXY_ABS, id=3)]
    [found] = find_faulty_annotations([image])
    assert found.annotation_id == 3 and "zero or negative" in found.reason


def test_sound_annotations_pass_untouched(image):
    image["annotations"] += [
        annotation([-0.6, -0.4, 41.0, 31.0], id=13),  # rounding at all four sides
        annotation([0, 0, 1e-3, 1e-3], id=14),
        annotation([5, 5, 10, 10], mode=BoxMode.XYXY_ABS, id=15),
        annotation(np.array([5, 5, 10, 10]), id=16),
    ]
    data = [image, {**image, "annotations": []}]
    assert find_faulty_annotations(data, num_classes=2) == []
    assert check_annotations(data, "error") is data


def test_class_ids_out_of_range(image):
    for wrong in (2, -1):
        image["annotations"][1]["category_id"] = wrong
        [found] = find_faulty_annotations([image], num_classes=2)
        assert found.annotation_id == 12 and f"{wrong} is not within 0..1" in found.reason


def test_an_annotation_without_an_id_is_counted(image):
    image["annotations"][1] = annotation([0, 0, 0, 0])
    [found] = find_faulty_annotations([image])
    assert str(found).startswith(f"{image['file_name']}: annotation number 1 of this image: ")


def test_the_report_shows_the_first_and_counts_all(image):
    image["annotations"] = [annotation([0, 0, 0, 0], id=i) for i in range(25)]
    image["annotations"] += [annotation([0, 0, 5, 5])]
    with pytest.raises(FaultyAnnotationError) as caught:
        check_annotations([image], "error")
    message = str(caught.value)
    assert message.startswith("25 faulty annotations")
    assert message.count("zero or negative") == annotations_module.SHOWN == 10
    assert message.endswith("and 15 more")


def test_nothing_left_is_an_error_even_when_dropping(image):
    image["annotations"] = [annotation([0, 0, 0, 0], id=1)]
    image["annotations"] += [annotation([0, 0, 9, 9], id=2) | {"iscrowd": 1}]
    with pytest.raises(FaultyAnnotationError, match="mine.*no annotation to train on"):
        check_annotations([image], "drop", "mine")


def test_an_unknown_mode_is_refused(image):
    with pytest.raises(UserError, match="INPUT.FAULTY_ANNOTATIONS is 'ignore'"):
        check_annotations([image], "ignore")
    with pytest.raises(UserError, match="INPUT.FAULTY_ANNOTATIONS is 'ignore'"):
        resize_only(30, faulty_annotations="ignore")


def random_corners(rng, count):
    x = np.sort(rng.uniform(0, WIDTH, (count, 2)), axis=1)
    y = np.sort(rng.uniform(0, HEIGHT, (count, 2)), axis=1)
    corners = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    wide = (corners[:, 2:] - corners[:, :2] > 1).all(axis=1)
    return corners[wide]


@pytest.mark.parametrize("mode", ["drop", "error"])
def test_corners_given_as_width_and_height_are_told(image, mode):
    corners = random_corners(np.random.default_rng(0), 60)
    image["annotations"] = [annotation(c.tolist(), id=i) for i, c in enumerate(corners)]
    overhanging = np.flatnonzero(
        (corners[:, 0] + corners[:, 2] > WIDTH + 2) | (corners[:, 1] + corners[:, 3] > HEIGHT + 2)
    )
    found = find_xyxy_given_as_xywh([image])
    assert [f.annotation_id for f in found] == overhanging.tolist()
    with pytest.raises(FaultyAnnotationError, match="'mine' look like x0, y0, x1, y1") as caught:
        check_annotations([image], mode, "mine")
    assert f"annotation {overhanging[0]}:" in str(caught.value)
    assert f"{len(overhanging)} of them" in str(caught.value)


def test_true_widths_and_heights_are_not_mistaken_for_corners(image):
    corners = random_corners(np.random.default_rng(1), 60)
    sizes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    sloppy = sizes + [0, 0, 3, 3]  # many now leave the image, as in hand-made annotations
    for boxes in (sizes, sloppy):
        image["annotations"] = [annotation(b.tolist()) for b in boxes]
        assert find_xyxy_given_as_xywh([image]) == []
        assert check_annotations([image], "error") == [image]
    image["annotations"] = [annotation(c.tolist(), mode=BoxMode.XYXY_ABS) for c in corners]
    assert find_xyxy_given_as_xywh([image]) == []


def test_a_data_set_without_annotations_can_be_checked(image):
    assert find_xyxy_given_as_xywh([]) == [] and find_faulty_annotations([]) == []
    bare = {k: v for k, v in image.items() if k != "annotations"}
    assert find_faulty_annotations([bare]) == []
    assert len(resize_only(30)(bare)["instances"]) == 0  # trained on as background


def test_json_constants_for_nan_are_found(image):
    """Python writes NaN into JSON and reads it back, so it does occur in annotation files."""
    image["annotations"][0]["bbox"] = json.loads("[NaN, 1, 2, 3]")
    assert len(find_faulty_annotations([image])) == 1


def test_every_error_is_one_that_the_tools_print_without_a_traceback():
    for error in (FaultyAnnotationError, ImageSizeError, UnreadableImageError):
        assert issubclass(error, UserError)


def test_deep_pixels_are_refused_rather_than_clipped(tmp_path):
    """Pillow turns 16 bits into 8 by clipping: nearly everything becomes white."""
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((20, 30), 40000, dtype=np.uint16)).save(path)
    record = {"file_name": str(path), "height": 20, "width": 30, "annotations": []}
    with pytest.raises(UnreadableImageError, match="deep.png.*I;16, convert it to 8 bits"):
        resize_only(30)(record)


def test_thin_images_keep_a_pixel_and_what_no_augmentation_can_do_is_named(tmp_path):
    path = tmp_path / "thin.png"
    Image.new("RGB", (3000, 2)).save(path)
    record = {"file_name": str(path), "height": 2, "width": 3000, "annotations": []}
    mapper = DetrDatasetMapper(
        True, augmentations=build_augmentation(True, min_size=[30], max_size=100, flip="none")
    )
    assert mapper(record)["image"].shape == (3, 1, 100)

    class Impossible(T.Augmentation):
        def get_transform(self, image):
            raise ValueError("too thin")

    mapper = DetrDatasetMapper(True, augmentations=[Impossible()])
    with pytest.raises(UnreadableImageError, match=r"thin.png \(3000x2 pixels\) cannot be.*thin"):
        mapper(record)


def test_crop_without_a_resize_before_it(tmp_path):
    """The crop is taken from the image as it is: half its sides, then resized."""
    augmentations = build_augmentation(
        True,
        min_size=50,
        max_size=400,
        flip="none",
        crop=("relative", (0.5, 0.5)),
        crop_resize_sizes=(),
    )
    pixels = np.arange(40 * 80, dtype=np.uint8).reshape(40, 80, 1).repeat(3, 2)
    np.random.seed(0)
    shapes = set()
    for _ in range(20):
        augmented = T.AugInput(pixels)
        transforms = T.AugmentationList(augmentations)(augmented)
        crops = [t for t in transforms.transforms if hasattr(t, "w") and hasattr(t, "x0")]
        shapes.update((crop.h, crop.w) for crop in crops)
        assert augmented.image.shape[:2] == (50, 100)
    assert shapes == {(20, 40)}


def test_color_jitter_changes_pixels_not_boxes(image):
    def mapped(color_jitter):
        augmentations = build_augmentation(
            True, min_size=30, max_size=100, flip="none", color_jitter=color_jitter
        )
        np.random.seed(0)
        return DetrDatasetMapper(True, augmentations=augmentations)(image)

    plain, jittered = mapped(0.0), mapped(0.4)
    assert torch.equal(plain["instances"].gt_boxes.tensor, jittered["instances"].gt_boxes.tensor)
    assert plain["image"].shape == jittered["image"].shape
    assert not torch.equal(plain["image"], jittered["image"])
    assert len(build_augmentation(False, min_size=30, max_size=100, color_jitter=0.4)) == 1
