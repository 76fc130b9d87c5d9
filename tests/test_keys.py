"""Every key reaches the part that it is of, with a value that is no default."""

from operator import attrgetter

import pytest
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from detr_d2.data.dataset_mapper import DetrDatasetMapper

from .helpers import tiny_cfg
from .test_masks import MASKS

KEYS = [
    ("DETR.NO_OBJECT_WEIGHT", 0.3, (), "criterion.classification.no_object_weight"),
    ("DETR.FOCAL_ALPHA", 0.4, ("CLASSIFICATION", "sigmoid"), "criterion.classification.alpha"),
    ("DETR.CLASS_WEIGHT", 3.0, (), "criterion.class_weight"),
    ("DETR.L1_WEIGHT", 4.0, (), "criterion.l1_weight"),
    ("DETR.GIOU_WEIGHT", 6.0, (), "criterion.giou_weight"),
    ("DETR.CLASS_COST", 7.0, (), "criterion.matcher.class_cost"),
    ("DETR.L1_WEIGHT", 4.0, (), "criterion.matcher.l1_cost"),
    ("DETR.GIOU_WEIGHT", 6.0, (), "criterion.matcher.giou_cost"),
    ("DETR.DEEP_SUPERVISION", False, (), "criterion.deep_supervision"),
    ("DETR.MASK_WEIGHT", 8.0, (), "criterion.mask_weight"),
    ("DETR.DICE_WEIGHT", 9.0, (), "criterion.dice_weight"),
    ("MASK_THRESHOLD", 0.25, (), "mask_threshold"),
    ("DETR.PANOPTIC.MIN_AREA", 11, ("PANOPTIC.ENABLED", True), "panoptic.min_area"),
    ("DETR.PANOPTIC.SCORE_THRESHOLD", 0.6, ("PANOPTIC.ENABLED", True), "panoptic.score_threshold"),
]


@pytest.mark.parametrize(("key", "value", "others", "place"), KEYS)
def test_keys_of_the_model(key, value, others, place):
    MetadataCatalog.get("keys_test").set(
        thing_classes=["a", "b"],
        stuff_classes=["a", "b"],
        thing_dataset_id_to_contiguous_id={1: 0},
        stuff_dataset_id_to_contiguous_id={2: 1},
    )
    others = [f"MODEL.DETR.{other}" if i % 2 == 0 else other for i, other in enumerate(others)]
    names = ("DATASETS.TRAIN", ("keys_test",), "DATASETS.TEST", ("keys_test",))
    options = (*MASKS, *names, "MODEL.DETR.NUM_CLASSES", 2, *others)
    model = build_model(tiny_cfg(*options, f"MODEL.{key}", value))
    assert attrgetter(place)(model) == value
    assert attrgetter(place)(build_model(tiny_cfg(*options))) != value


def test_focal_models_start_from_the_prior_probability():
    """0.01, without which the first losses are those of thousands of false objects."""
    heads = build_model(tiny_cfg(config="deformable_tiny")).transformer.decoder.heads
    for head in heads:
        assert head.class_head.bias.sigmoid().mean().item() == pytest.approx(0.01)


def augmentations(*options):
    cfg = tiny_cfg("INPUT.RANDOM_FLIP", "none", "INPUT.CROP.ENABLED", False, *options)
    return DetrDatasetMapper(cfg, is_train=True).augmentations.augs


def test_keys_of_the_augmentation():
    flips = {
        name: augmentations("INPUT.RANDOM_FLIP", name)[0] for name in ("horizontal", "vertical")
    }
    assert (flips["horizontal"].horizontal, flips["horizontal"].vertical) == (True, False)
    assert (flips["vertical"].horizontal, flips["vertical"].vertical) == (False, True)
    jitter = augmentations("INPUT.COLOR_JITTER", 0.25)[1:]
    assert [type(each).__name__ for each in jitter] == [
        "RandomBrightness",
        "RandomContrast",
        "RandomSaturation",
    ]
    assert {(each.intensity_min, each.intensity_max) for each in jitter} == {(0.75, 1.25)}
    grey = augmentations("INPUT.COLOR_JITTER", 0.25, "INPUT.FORMAT", "L")
    assert len(grey) == 3  # grey has no saturation
    assert len(augmentations()) == 1
