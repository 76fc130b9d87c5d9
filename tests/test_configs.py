"""Every yaml builds, with exactly the parameters it should have."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from detectron2.modeling import build_model

from detr_d2 import get_detr_cfg

from .helpers import CONFIGS

# With the published 91 classes, as the original has them.
OFFICIAL = {
    "detr_R_50_500ep": 41_524_768,
    "detr_R_50_DC5_500ep": 41_524_768,
    "detr_R_101_500ep": 60_464_672,
    "detr_R_101_DC5_500ep": 60_464_672,
}
# A class has 256 weights and a bias.
PARAMETERS = {
    **{f"COCO-Detection/{name}.yaml": count - 11 * 257 for name, count in OFFICIAL.items()},
    "COCO-Detection/conditional_detr_R_50_50ep.yaml": 43_415_574,
    "COCO-Detection/conditional_detr_R_50_DC5_50ep.yaml": 43_415_574,
    "COCO-Detection/conditional_detr_R_101_50ep.yaml": 62_355_478,
    "COCO-Detection/conditional_detr_R_101_DC5_50ep.yaml": 62_355_478,
    "COCO-Detection/dab_detr_R_50_50ep.yaml": 43_668_690,
    "COCO-Detection/dab_detr_R_50_DC5_50ep.yaml": 43_668_690,
    "COCO-Detection/dab_detr_R_101_50ep.yaml": 62_608_594,
    "COCO-Detection/dab_detr_R_101_DC5_50ep.yaml": 62_608_594,
    "COCO-Detection/dn_detr_R_50_50ep.yaml": 43_689_345,
    "COCO-Detection/dn_detr_R_50_DC5_50ep.yaml": 43_689_345,
    "COCO-Detection/dn_detr_R_101_50ep.yaml": 62_629_249,
    "COCO-Detection/dn_detr_R_101_DC5_50ep.yaml": 62_629_249,
    "COCO-Detection/deformable_detr_R_50_50ep.yaml": 40_066_838,
    "COCO-Detection/deformable_detr_refine_R_50_50ep.yaml": 40_832_698,
    "COCO-Detection/deformable_detr_two_stage_R_50_50ep.yaml": 41_161_740,
    "COCO-Detection/dino_4scale_R_50_12ep.yaml": 46_884_712,
    "COCO-Detection/dino_4scale_R_50_24ep.yaml": 46_884_712,
    "COCO-Detection/dino_4scale_R_50_36ep.yaml": 46_884_712,
    "COCO-Detection/dino_5scale_R_50_12ep.yaml": 47_247_336,
    "COCO-PanopticSegmentation/detr_R_50.yaml": 42_899_288 - 117 * 257,
    "COCO-PanopticSegmentation/detr_R_50_DC5.yaml": 42_899_288 - 117 * 257,
    "COCO-PanopticSegmentation/detr_R_101.yaml": 61_839_192 - 117 * 257,
    "COCO-PanopticSegmentation/detr_R_50_boxes.yaml": 41_524_768 + 42 * 257,
    "COCO-PanopticSegmentation/detr_R_50_DC5_boxes.yaml": 41_524_768 + 42 * 257,
    "COCO-PanopticSegmentation/detr_R_101_boxes.yaml": 60_464_672 + 42 * 257,
    "DigitScenes/fast_small_masks.yaml": 3_884_061,
    "DigitScenes/fast_small_panoptic.yaml": 3_879_681,
    "DigitScenes/detr_tiny.yaml": 2_141_999,
    "DigitScenes/conditional_tiny.yaml": 2_406_320,
    "DigitScenes/dab_tiny.yaml": 2_486_278,
    "DigitScenes/dn_tiny.yaml": 2_487_675,
    "DigitScenes/deformable_tiny.yaml": 2_214_800,
    "DigitScenes/deformable_refine_tiny.yaml": 2_284_460,
    "DigitScenes/deformable_two_stage_tiny.yaml": 2_396_984,
    "DigitScenes/dino_tiny.yaml": 2_314_652,
    "DigitScenes/fast_tiny.yaml": 1_974_108,
    "DigitScenes/fast_small.yaml": 3_639_460,
    "finetune/fast_efficientnet_lite0.yaml": 4_049_578,
}
# From the authors' repositories; R101 of DAB and DN from their papers' tables.
PUBLISHED_AP = {
    "detr_R_50_500ep": "AP 42.0, AP50 62.4",
    "detr_R_50_DC5_500ep": "AP 43.3, AP50 63.1",
    "detr_R_101_500ep": "AP 43.5, AP50 63.8",
    "detr_R_101_DC5_500ep": "AP 44.9, AP50 64.7",
    "conditional_detr_R_50_50ep": "AP 41.0",
    "conditional_detr_R_50_DC5_50ep": "AP 43.7",
    "conditional_detr_R_101_50ep": "AP 42.8",
    "conditional_detr_R_101_DC5_50ep": "AP 45.0",
    "dab_detr_R_50_50ep": "AP 42.2",
    "dab_detr_R_50_DC5_50ep": "AP 44.5",
    "dab_detr_R_101_50ep": "AP 43.5",
    "dab_detr_R_101_DC5_50ep": "AP 45.8",
    "dn_detr_R_50_50ep": "AP 44.4",
    "dn_detr_R_50_DC5_50ep": "AP 46.3",
    "dn_detr_R_101_50ep": "AP 45.2",
    "dn_detr_R_101_DC5_50ep": "AP 47.3",
    "deformable_detr_R_50_50ep": "AP 44.5",
    "deformable_detr_refine_R_50_50ep": "AP 46.2",
    "deformable_detr_two_stage_R_50_50ep": "AP 46.9",
    "dino_4scale_R_50_12ep": "AP 49.0",
    "dino_4scale_R_50_24ep": "AP 50.4",
    "dino_4scale_R_50_36ep": "AP 50.9",
    "dino_5scale_R_50_12ep": "AP 49.4",
}
# The papers' recipes: images per step, learning rate, queries, detections, dropout.
RECIPES = {
    "detr": (64, 1e-4, 100, 100, 0.1),
    "conditional_detr": (16, 1e-4, 300, 100, 0.1),
    "dab_detr": (16, 1e-4, 300, 300, 0.0),
    "dn_detr": (16, 1e-4, 300, 300, 0.0),
    "deformable_detr": (32, 2e-4, 300, 100, 0.1),
    "dino_4scale": (16, 1e-4, 900, 300, 0.0),
    "dino_5scale": (16, 1e-4, 900, 300, 0.0),
}
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml"))
PANOPTIC = [
    name for name in FILES if name.startswith("COCO-Pan") and not name.endswith("_boxes.yaml")
]


def load(name: str):
    cfg = get_detr_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def build(name: str, *options):
    """On the meta device: shapes without memory or initial values."""
    cfg = load(name)
    cfg.merge_from_list(["MODEL.DEVICE", "meta", *options])
    with torch.device("meta"):
        return build_model(cfg)


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_every_file_is_pinned_here():
    assert set(FILES) == set(PARAMETERS)


@pytest.mark.parametrize("name", FILES)
def test_parameters(name):
    # Data sets of one's own are not there; one with a class stands for all.
    options = ("MODEL.DETR.NUM_CLASSES", 1) if name.startswith("finetune") else ()
    assert count(build(name, *options).parameters()) == PARAMETERS[name]


def test_panoptic_parameters_with_the_published_classes():
    """250 in the original: category ids up to 249; 133 contiguous ones here."""
    model = build("COCO-PanopticSegmentation/detr_R_50.yaml", "MODEL.DETR.NUM_CLASSES", 250)
    assert count(model.parameters()) == 42_899_288


@pytest.mark.parametrize("name", PANOPTIC)
def test_panoptic_configs_say_what_is_published(name):
    first = (CONFIGS / name).read_text().splitlines()[0]
    published = {
        "detr_R_50": "PQ 43.4, box AP 38.8, mask AP 31.1",
        "detr_R_50_DC5": "PQ 44.6, box AP 40.2, mask AP 31.9",
        "detr_R_101": "PQ 45.1, box AP 40.1, mask AP 33",
    }
    assert first.startswith(f"# {published[Path(name).stem]} on COCO val2017 (https://")


def test_parameters_with_the_published_classes():
    r50 = build("COCO-Detection/detr_R_50_500ep.yaml", "MODEL.DETR.NUM_CLASSES", 91)
    assert count(r50.parameters()) == 41_524_768
    # The original logs this one: without the frozen stem (64 x 3 x 7 x 7) and res2.
    trained = count(p for p in r50.parameters() if p.requires_grad)
    assert trained == 41_302_368


@pytest.mark.parametrize("depth", [50, 101])
def test_parameters_by_part(depth):
    model = build(f"COCO-Detection/detr_R_{depth}_500ep.yaml")
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")()
    convolutions = [m for m in theirs.modules() if isinstance(m, torch.nn.Conv2d)]
    assert count(model.backbone.parameters()) == sum(m.weight.numel() for m in convolutions)
    assert count(model.neck.parameters()) == 2048 * 256 + 256

    attention = 4 * (256 * 256 + 256)
    feed_forward = 256 * 2048 + 2048 + 2048 * 256 + 256
    norm = 2 * 256
    encoder = 6 * (attention + feed_forward + 2 * norm)
    decoder = 6 * (2 * attention + feed_forward + 3 * norm) + norm
    heads = 81 * 257 + 2 * (256 * 256 + 256) + 4 * 257
    queries = 100 * 256
    assert count(model.transformer.parameters()) == encoder + decoder + heads + queries


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("COCO-Detection")])
def test_the_first_comment_gives_the_published_ap_and_where_it_stands(name):
    first = (CONFIGS / name).read_text().splitlines()[0]
    assert first.startswith(f"# {PUBLISHED_AP[Path(name).stem]} on COCO val2017")
    assert re.search(r"\(https://\S+\)$", first)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("COCO-Detection")])
def test_deltas_on_a_base(name):
    """A key whose value is the base's has no place in a delta."""
    delta = yaml.safe_load((CONFIGS / name).read_text())
    base_name = delta.pop("_BASE_")
    base = load((Path(name).parent / base_name).as_posix())
    own = flatten(delta)
    # The first config of a variant says what it is, the others what they change.
    assert len(own) <= (24 if base_name.startswith("..") else 4)
    assert [key for key, value in own.items() if value == flatten(base)[key]] == []


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("COCO-Detection")])
def test_recipes(name):
    cfg, solver = load(name), load(name).SOLVER
    variant, epochs = re.fullmatch(r"(\w+)_R_\d+_(?:DC5_)?(\d+)ep", Path(name).stem).groups()
    batch, learning_rate, queries, detections, dropout = RECIPES[
        variant.split("_r")[0].split("_t")[0]
    ]
    if variant == "conditional_detr" and "_DC5_" in name:
        batch = 8
    drop = {500: 400, 50: 40, 12: 11, 24: 20, 36: 30}[int(epochs)]
    schedule = (solver.EPOCHS, solver.STEP_EPOCHS, solver.IMS_PER_BATCH, solver.BASE_LR)
    assert schedule == (int(epochs), [drop], batch, learning_rate)
    multipliers = (solver.BACKBONE_MULTIPLIER, solver.SAMPLING_MULTIPLIER)
    assert multipliers == (0.1, 0.1 if variant.startswith("deformable") else 1.0)
    model = (
        cfg.MODEL.DETR.NUM_OBJECT_QUERIES,
        cfg.TEST.DETECTIONS_PER_IMAGE,
        cfg.MODEL.DETR.DROPOUT,
    )
    assert model == (queries, detections, dropout)
    crop = (cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, tuple(cfg.INPUT.CROP.SIZE))
    assert crop == (True, "absolute_range", (384, 600))


@pytest.mark.parametrize("name", PANOPTIC)
def test_panoptic_recipes_have_two_stages(name):
    """Boxes for 300 epochs, then masks for 25 on what they left
    (https://github.com/facebookresearch/detr#coco-panoptic-segmentation)."""
    masks, boxes = load(name), load(name.replace(".yaml", "_boxes.yaml"))
    assert f"{boxes.OUTPUT_DIR}/model_final.pth" == masks.MODEL.DETR.FROZEN_WEIGHTS
    for cfg, schedule in ((boxes, (300, [200])), (masks, (25, [15]))):
        assert schedule == (cfg.SOLVER.EPOCHS, cfg.SOLVER.STEP_EPOCHS)
        assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 1e-4)
        assert cfg.MODEL.BACKBONE.NAME == masks.MODEL.BACKBONE.NAME
        assert cfg.MODEL.RESNETS.DEPTH == masks.MODEL.RESNETS.DEPTH
        assert cfg.DATASETS.TRAIN == ("coco_2017_train_panoptic",)
    assert masks.MODEL.MASK_ON and not boxes.MODEL.MASK_ON


def test_denoising_of_the_papers():
    """Of the training scripts of DN-DETR and DINO."""
    dn = load("COCO-Detection/dn_detr_R_50_50ep.yaml").MODEL.DETR.DENOISING
    assert (dn.METHOD, dn.NUM_GROUPS, dn.LABEL_NOISE, dn.BOX_NOISE) == ("dn", 5, 0.2, 0.4)
    for name in ("4scale_R_50_12ep", "4scale_R_50_24ep", "4scale_R_50_36ep", "5scale_R_50_12ep"):
        dino = load(f"COCO-Detection/dino_{name}.yaml").MODEL.DETR.DENOISING
        assert (dino.METHOD, dino.NUM_QUERIES) == ("contrastive", 100)
        assert (dino.LABEL_NOISE, dino.BOX_NOISE) == (0.5, 1.0)


def flatten(node: dict, prefix: str = "") -> dict:
    """Nested keys -> "MODEL.DETR.NHEADS" and the like."""
    leaves = {}
    for key, value in node.items():
        if isinstance(value, dict):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def test_models_read_rgb_with_torchvisions_statistics():
    """detectron2's own defaults are BGR with other statistics: that trains, badly, in silence."""
    for name in FILES:
        cfg = load(name)
        assert cfg.INPUT.FORMAT == "RGB", name
        if name.startswith("finetune"):  # TensorFlow's statistics, as its weights want them
            assert cfg.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_STD == [127.5] * 3
            continue
        assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.280, 103.530], name
        assert cfg.MODEL.PIXEL_STD == [58.395, 57.120, 57.375], name
        clip = 10.0 if name.endswith("_panoptic.yaml") else 0.1
        assert clip == cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, name
        if name.startswith("COCO"):
            assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1, name
