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

# 41,524,768 is the original's DETR R50, with 91 classes. A class has 256 weights and a bias.
R50 = 41_524_768 - 11 * 257
R101 = 60_464_672 - 11 * 257
PARAMETERS = {
    "COCO-Detection/detr_R_50_500ep.yaml": R50,
    "COCO-Detection/detr_R_50_DC5_500ep.yaml": R50,
    "COCO-Detection/detr_R_101_500ep.yaml": R101,
    "COCO-Detection/detr_R_101_DC5_500ep.yaml": R101,
    "DigitScenes/detr_tiny.yaml": 2_141_999,
}
PUBLISHED_AP = {
    "COCO-Detection/detr_R_50_500ep.yaml": "AP 42.0, AP50 62.4",
    "COCO-Detection/detr_R_50_DC5_500ep.yaml": "AP 43.3, AP50 63.1",
    "COCO-Detection/detr_R_101_500ep.yaml": "AP 43.5, AP50 63.8",
    "COCO-Detection/detr_R_101_DC5_500ep.yaml": "AP 44.9, AP50 64.7",
}
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml"))


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
    assert count(build(name).parameters()) == PARAMETERS[name]


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
    assert first.startswith(f"# {PUBLISHED_AP[name]} on COCO val2017")
    assert re.search(r"\(https://\S+\)$", first)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("COCO-Detection")])
def test_deltas_on_a_base(name):
    """A key whose value is the base's has no place in a delta."""
    delta = yaml.safe_load((CONFIGS / name).read_text())
    base = load((Path(name).parent / delta.pop("_BASE_")).as_posix())
    own = flatten(delta)
    assert len(own) <= 3
    assert [key for key, value in own.items() if value == flatten(base)[key]] == []


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
        assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.280, 103.530], name
        assert cfg.MODEL.PIXEL_STD == [58.395, 57.120, 57.375], name
        assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE == 0.1, name
        if name.startswith("COCO-Detection"):
            assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1, name
