"""From a yaml config to the parts of `Detr`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import nn

from ..data.classes import resolve_num_classes
from ..errors import UserError
from .build import build_criterion, build_denoising, build_transformer
from .combinations import check_combination, uses_positions
from .mask_head import MaskHead
from .neck import MultiScaleNeck, SingleScaleNeck
from .panoptic import PanopticMerger
from .position import LearnedPositionEmbedding, SinePositionEmbedding
from .recompute import recompute_backbone


def build_parts(cfg: CfgNode) -> dict[str, Any]:
    """The parts of `Detr` that a config describes, as keyword arguments of its constructor.

    Raises:
        UserError: parts that do not exist or do not go together, with the reason.
    """
    detr = cfg.MODEL.DETR
    check_combination(detr)
    if detr.FROZEN_WEIGHTS and not cfg.MODEL.MASK_ON:
        raise UserError(
            "MODEL.DETR.FROZEN_WEIGHTS freezes the detector to train masks: set MODEL.MASK_ON "
            "True, or give the weights as MODEL.WEIGHTS."
        )
    backbone = build_backbone(cfg)
    recomputed = check_recomputed(cfg.MODEL.ACTIVATION_CHECKPOINTING)
    if "backbone" in recomputed:
        recompute_backbone(backbone)
    neck = build_neck(cfg, backbone)
    if not uses_positions(detr):  # processes would wait for their gradient
        for name, parameter in neck.named_parameters():
            if name.startswith(("position.", "level_embedding")):
                parameter.requires_grad_(False)
    criterion = build_criterion(
        num_classes=resolve_num_classes(cfg),
        classification=detr.CLASSIFICATION,
        no_object_weight=detr.NO_OBJECT_WEIGHT,
        focal_alpha=detr.FOCAL_ALPHA,
        class_weight=detr.CLASS_WEIGHT,
        class_cost=detr.CLASS_COST,
        l1_weight=detr.L1_WEIGHT,
        giou_weight=detr.GIOU_WEIGHT,
        deep_supervision=detr.DEEP_SUPERVISION,
        mask_weight=detr.MASK_WEIGHT,
        dice_weight=detr.DICE_WEIGHT,
    )
    transformer = build_transformer(
        num_logits=criterion.classification.num_logits,
        num_queries=detr.NUM_OBJECT_QUERIES,
        hidden_dim=detr.HIDDEN_DIM,
        num_heads=detr.NHEADS,
        dim_feedforward=detr.DIM_FEEDFORWARD,
        num_encoder_layers=detr.ENC_LAYERS,
        num_decoder_layers=detr.DEC_LAYERS,
        dropout=detr.DROPOUT,
        pre_norm=detr.PRE_NORM,
        activation=detr.ACTIVATION,
        num_levels=neck.num_levels,
        num_points=detr.NUM_POINTS,
        encoder_attention=detr.ENCODER_ATTENTION,
        encoder_position_scale=detr.ENCODER_POSITION_SCALE,
        recompute_encoder="encoder" in recomputed,
        recompute_sampling="sampling" in recomputed,
        queries=detr.QUERIES,
        query_content=detr.QUERY_CONTENT,
        reference_layers=detr.REFERENCE_LAYERS,
        class_agnostic_proposals=detr.CLASS_AGNOSTIC_PROPOSALS,
        supervised_proposals=detr.SUPERVISED_PROPOSALS,
        query_position=detr.QUERY_POSITION,
        self_attention=detr.SELF_ATTENTION,
        cross_attention=detr.CROSS_ATTENTION,
        decoder_norm=detr.DECODER_NORM,
        box_head=detr.BOX_HEAD,
        reference_eps=detr.REFERENCE_EPS,
        refinement=detr.REFINEMENT,
        shared_heads=detr.SHARED_HEADS,
        prior_probability=criterion.classification.prior_probability,
        denoising=build_denoising(
            method=detr.DENOISING.METHOD,
            num_classes=criterion.classification.num_classes,
            hidden_dim=detr.HIDDEN_DIM,
            num_groups=detr.DENOISING.NUM_GROUPS,
            num_queries=detr.DENOISING.NUM_QUERIES,
            label_noise=detr.DENOISING.LABEL_NOISE,
            box_noise=detr.DENOISING.BOX_NOISE,
        ),
    )
    mask_head = build_mask_head(cfg, backbone, neck) if cfg.MODEL.MASK_ON else None
    if detr.PANOPTIC.ENABLED and mask_head is None:
        raise UserError("MODEL.DETR.PANOPTIC needs MODEL.MASK_ON True.")
    return {
        "backbone": backbone,
        "neck": neck,
        "transformer": transformer,
        "criterion": criterion,
        "mask_head": mask_head,
        "panoptic": build_panoptic(cfg) if detr.PANOPTIC.ENABLED else None,
        "frozen_detector": bool(detr.FROZEN_WEIGHTS),
    }


def build_mask_head(cfg: CfgNode, backbone: nn.Module, neck: nn.Module) -> MaskHead:
    """Mask head over the memory and the backbone's finer maps.

    Raises:
        UserError: the memory has several levels, the backbone gives no finer map, or
            `MODEL.DETR.MASK_STRIDE` is not 1 to the stride of the finest.
    """
    shapes, detr = backbone.output_shape(), cfg.MODEL.DETR
    if detr.NECK != "single_scale":
        raise UserError(
            "MODEL.MASK_ON needs MODEL.DETR.NECK single_scale: the mask head enlarges attention "
            "maps over one map of the image, not over several."
        )
    used = shapes[neck.in_feature]
    # From coarse to fine. With dilation, the map before the used one is as fine as that.
    finer = [
        name
        for name in reversed(list(shapes))
        if name != neck.in_feature and shapes[name].stride <= used.stride
    ]
    if not finer:
        raise UserError(
            f"MODEL.MASK_ON needs backbone maps finer than {neck.in_feature}: add them to "
            "MODEL.RESNETS.OUT_FEATURES (MODEL.TIMM.OUT_INDICES) and name "
            f'MODEL.DETR.IN_FEATURES ["{neck.in_feature}"].'
        )
    channels = [shapes[name].channels for name in finer]
    finest = shapes[finer[-1]].stride
    stride = detr.MASK_STRIDE
    if not 1 <= stride <= finest:
        raise UserError(
            f"MODEL.DETR.MASK_STRIDE is {stride}; it must be 1 to {finest}, the stride of the "
            f"backbone's finest map ({finer[-1]})."
        )
    return MaskHead(
        hidden_dim=detr.HIDDEN_DIM,
        num_heads=detr.NHEADS,
        in_features=finer,
        in_channels=channels,
        pixel_stride=stride if stride < finest else 0,
        around_boxes=detr.BOX_HEAD != "absolute",
        width=detr.MASK_DIM,
        image_channels=len(cfg.MODEL.PIXEL_MEAN),
        attention_gain=detr.MASK_ATTENTION_GAIN,
    )


def build_panoptic(cfg: CfgNode) -> PanopticMerger:
    """Merger for the classes of the config's data sets.

    Raises:
        UserError: none of the data sets is panoptic.
    """
    return PanopticMerger.from_datasets(
        (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN),
        score_threshold=cfg.MODEL.DETR.PANOPTIC.SCORE_THRESHOLD,
        min_area=cfg.MODEL.DETR.PANOPTIC.MIN_AREA,
    )


def check_recomputed(parts: Sequence[str]) -> Sequence[str]:
    """
    Raises:
        UserError: activation checkpointing of what cannot be computed again.
    """
    for part in parts:
        if part not in ("backbone", "encoder", "sampling"):
            raise UserError(
                f"MODEL.ACTIVATION_CHECKPOINTING names {part!r}; it may have backbone, encoder and "
                "sampling."
            )
    return parts


def build_neck(cfg: CfgNode, backbone: nn.Module) -> nn.Module:
    """Neck over the backbone maps that `MODEL.DETR.IN_FEATURES` names, by default the last.

    Raises:
        UserError: the backbone has no such maps, or their number does not fit the neck.
    """
    detr, shapes = cfg.MODEL.DETR, backbone.output_shape()
    names = detr.IN_FEATURES or list(shapes)[-1:]
    for name in names:
        if name not in shapes:
            raise UserError(
                f"MODEL.DETR.IN_FEATURES names {name!r}, but the backbone "
                f"{cfg.MODEL.BACKBONE.NAME} gives only {', '.join(shapes)}."
            )
    channels = [shapes[name].channels for name in names]
    if detr.POSITION_EMBEDDING == "learned":
        position: nn.Module = LearnedPositionEmbedding(detr.HIDDEN_DIM)
    else:
        position = SinePositionEmbedding(
            detr.HIDDEN_DIM, detr.POSITION_TEMPERATURE, detr.POSITION_OFFSET
        )
    if detr.NECK == "multi_scale":
        num_levels = detr.NUM_FEATURE_LEVELS or len(names)
        if num_levels < len(names):
            raise UserError(
                f"MODEL.DETR.NUM_FEATURE_LEVELS is {num_levels}, but MODEL.DETR.IN_FEATURES has "
                f"{len(names)} entries: each is a level."
            )
        return MultiScaleNeck(names, channels, detr.HIDDEN_DIM, num_levels, position)
    if len(names) != 1 or detr.NUM_FEATURE_LEVELS > 1:
        raise UserError(
            f"MODEL.DETR.IN_FEATURES has {len(names)} entries ({', '.join(names)}) and "
            f"MODEL.DETR.NUM_FEATURE_LEVELS is {detr.NUM_FEATURE_LEVELS}, but MODEL.DETR.NECK is "
            'single_scale: name one map, or set NECK to "multi_scale".'
        )
    return SingleScaleNeck(names, channels[0], detr.HIDDEN_DIM, position)
