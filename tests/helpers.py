"""A tiny model and random inputs, for every test that needs some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from detr_d2 import get_detr_cfg
from detr_d2.box_ops import cxcywh_to_xyxy
from detr_d2.criterion import SetCriterion
from detr_d2.matcher import HungarianMatcher
from detr_d2.modeling.heads import SoftmaxClassification
from detr_d2.structures import LayerOutput, Target

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_CLASSES = 5


# One small config of each design.
VARIANTS = (
    "detr_tiny",
    "conditional_tiny",
    "dab_tiny",
    "dn_tiny",
    "deformable_tiny",
    "deformable_refine_tiny",
    "deformable_two_stage_tiny",
    "dino_tiny",
    "fast_tiny",
)


def tiny_cfg(*options: Any, config: str = "detr_tiny") -> CfgNode:
    """A config of configs/DigitScenes shrunk to some 50,000 parameters; `options` as on a command
    line: key, value, key, value, …"""
    cfg = get_detr_cfg()
    cfg.merge_from_file(str(CONFIGS / "DigitScenes" / f"{config}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE = [1, 1, 1]
    detr = cfg.MODEL.DETR
    detr.NUM_CLASSES = NUM_CLASSES
    detr.HIDDEN_DIM, detr.NHEADS, detr.DIM_FEEDFORWARD = 32, 4, 64
    detr.ENC_LAYERS, detr.DEC_LAYERS, detr.NUM_OBJECT_QUERIES = 2, 3, 7
    cfg.merge_from_list(list(options))
    return cfg


def make_criterion(
    weights: Sequence[float] = (1.0, 5.0, 2.0),
    deep_supervision: bool = True,
    num_classes: int = NUM_CLASSES,
) -> SetCriterion:
    """Criterion whose weights of class, L1 and GIoU are those of the matching costs as well."""
    classification = SoftmaxClassification(num_classes, no_object_weight=0.1)
    matcher = HungarianMatcher(classification, 1.0, 5.0, 2.0)
    return SetCriterion(matcher, classification, *weights, deep_supervision=deep_supervision)


def random_boxes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """(*shape, 4) cxcywh inside the unit square."""
    size = 0.1 + 0.4 * torch.rand(*shape, 2, generator=generator)
    centre = size / 2 + (1 - size) * torch.rand(*shape, 2, generator=generator)
    return torch.cat((centre, size), dim=-1)


def random_outputs(
    batch: int, queries: int = 7, layers: int = 1, num_classes: int = NUM_CLASSES, seed: int = 0
) -> list[LayerOutput]:
    """Leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        LayerOutput(
            torch.randn(batch, queries, num_classes + 1, generator=generator).requires_grad_(),
            random_boxes(batch, queries, generator=generator).requires_grad_(),
        )
        for _ in range(layers)
    ]


def random_targets(
    counts: Sequence[int], num_classes: int = NUM_CLASSES, seed: int = 1
) -> list[Target]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Target(
            torch.randint(num_classes, (count,), generator=generator),
            random_boxes(count, generator=generator),
        )
        for count in counts
    ]


def random_inputs(
    sizes: Sequence[tuple[int, int]], counts: Sequence[int] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """detectron2's standard input of images with (height, width) `sizes`; with ground truth of
    `counts` objects."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for index, (height, width) in enumerate(sizes):
        image = 255 * torch.rand(3, height, width, generator=generator)
        inputs.append({"image": image.to(torch.uint8)})
        if counts is not None:
            (target,) = random_targets([counts[index]], seed=seed + index)
            instances = Instances((height, width))
            scale = torch.tensor([width, height, width, height])
            instances.gt_boxes = Boxes(cxcywh_to_xyxy(target.boxes) * scale)
            instances.gt_classes = target.classes
            inputs[-1]["instances"] = instances
    return inputs
