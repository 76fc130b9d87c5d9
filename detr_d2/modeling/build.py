"""From config to parts: the only place that chooses by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import nn

from ..criterion import SetCriterion
from ..data.classes import resolve_num_classes
from ..errors import UserError
from ..matcher import HungarianMatcher
from .attention import ConditionalAttention, PlainAttention, SelfAttention, SeparateSelfAttention
from .combinations import check_combination, uses_positions
from .deformable import DeformableAttention
from .denoising import ContrastiveDenoising, Denoising
from .heads import (
    MLP,
    PredictionHead,
    SigmoidClassification,
    SoftmaxClassification,
    VarifocalClassification,
)
from .mask_head import MaskHead
from .neck import MultiScaleNeck, SingleScaleNeck
from .panoptic import PanopticMerger
from .position import LearnedPositionEmbedding, SinePositionEmbedding
from .queries import AnchorQueries, LearnedQueries, PointQueries, TopKQueries
from .query_position import (
    BoxQueryPosition,
    ConditionalQueryPosition,
    ModulatedQueryPosition,
    StaticQueryPosition,
)
from .recompute import recompute_backbone
from .registry import CROSS_ATTENTION_REGISTRY, QUERIES_REGISTRY
from .transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer

QUERY_POSITIONS: dict[str, Callable[[int], nn.Module]] = {
    "static": lambda hidden_dim: StaticQueryPosition(),
    "conditional": ConditionalQueryPosition,
    "modulated": ModulatedQueryPosition,
    "box": BoxQueryPosition,
    "padded_box": partial(BoxQueryPosition, relative_to_padding=True),
}
SELF_ATTENTIONS = {"plain": SelfAttention, "separate": SeparateSelfAttention}
ACTIVATIONS = {"relu": nn.ReLU, "prelu": nn.PReLU}


def build_parts(cfg: CfgNode) -> dict[str, nn.Module]:
    """The parts of `Detr` that a config describes, by the names of its arguments."""
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
    panoptic = None
    if detr.PANOPTIC.ENABLED:
        if mask_head is None:
            raise UserError("MODEL.DETR.PANOPTIC needs MODEL.MASK_ON True.")
        panoptic = PanopticMerger.from_datasets(
            (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN),
            score_threshold=detr.PANOPTIC.SCORE_THRESHOLD,
            min_area=detr.PANOPTIC.MIN_AREA,
        )
    return {
        "backbone": backbone,
        "neck": neck,
        "transformer": transformer,
        "criterion": criterion,
        "mask_head": mask_head,
        "panoptic": panoptic,
        "frozen_detector": bool(detr.FROZEN_WEIGHTS),
    }


def build_mask_head(cfg: CfgNode, backbone: nn.Module, neck: nn.Module) -> MaskHead:
    """Mask head over the memory and the backbone's finer maps.

    Raises:
        UserError: the memory has several levels, or the backbone gives no finer map.
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
    pixel_stride = stride if stride < finest else 0
    around_boxes = detr.BOX_HEAD != "absolute"
    sizes = detr.HIDDEN_DIM, detr.NHEADS
    return MaskHead(
        *sizes,
        finer,
        channels,
        pixel_stride,
        around_boxes,
        detr.MASK_DIM,
        image_channels=len(cfg.MODEL.PIXEL_MEAN),
    )


def check_recomputed(parts: Sequence[str]) -> Sequence[str]:
    for part in parts:
        if part not in ("backbone", "encoder"):
            raise UserError(
                f"MODEL.ACTIVATION_CHECKPOINTING names {part!r}; it may have backbone and encoder."
            )
    return parts


def build_neck(cfg: CfgNode, backbone: nn.Module) -> nn.Module:
    """Neck over the backbone maps that `MODEL.DETR.IN_FEATURES` names, by default the last."""
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


def build_transformer(
    *,
    num_logits: int,
    num_queries: int = 100,
    hidden_dim: int = 256,
    num_heads: int = 8,
    dim_feedforward: int = 2048,
    num_encoder_layers: int = 6,
    num_decoder_layers: int = 6,
    dropout: float = 0.1,
    pre_norm: bool = False,
    activation: str = "relu",
    num_levels: int = 1,
    num_points: int = 4,
    encoder_attention: str = "plain",
    encoder_position_scale: bool = False,
    recompute_encoder: bool = False,
    queries: str = "learned",
    query_content: str = "zero",
    reference_layers: int = 2,
    class_agnostic_proposals: bool = False,
    supervised_proposals: str = "chosen",
    query_position: str = "static",
    self_attention: str = "plain",
    cross_attention: str = "plain",
    decoder_norm: bool = True,
    box_head: str = "absolute",
    reference_eps: float = 1e-5,
    refinement: str = "none",
    shared_heads: bool = True,
    prior_probability: float | None = None,
    denoising: nn.Module | None = None,
) -> Transformer:
    """Encoder, queries and decoder; the defaults are DETR's (appendix A.3). The arguments are the
    keys of `MODEL.DETR` by their names, see config.py."""
    attention: dict[str, Any] = {"hidden_dim": hidden_dim, "num_heads": num_heads}
    deformable: dict[str, Any] = {**attention, "num_levels": num_levels, "num_points": num_points}
    layer: dict[str, Any] = {
        "hidden_dim": hidden_dim,
        "dim_feedforward": dim_feedforward,
        "dropout": dropout,
        "pre_norm": pre_norm,
        "activation": ACTIVATIONS[activation],
    }

    def over_memory(kind: str, is_first: bool = False) -> nn.Module:
        if kind == "deformable":
            return DeformableAttention(**deformable)
        if kind == "conditional":
            return ConditionalAttention(**attention, dropout=dropout, is_first=is_first)
        if kind in CROSS_ATTENTION_REGISTRY:
            registered = CROSS_ATTENTION_REGISTRY.get(kind)
            return registered(**attention, dropout=dropout, num_levels=num_levels)
        return PlainAttention(**attention, dropout=dropout)

    def head(index: int = 0) -> PredictionHead:
        # Width and height have no start at a point, and later layers start from boxes: a head that
        # all of them share would add its own again and again.
        is_first = index == 0 and not shared_heads
        from_points = queries == "point" and (refinement == "none" or is_first)
        return PredictionHead(
            hidden_dim,
            num_logits,
            is_offset=box_head == "offset",
            reference_eps=reference_eps,
            prior_probability=prior_probability,
            initial_size_logit=-2.0 if from_points and cross_attention == "deformable" else 0.0,
        )

    encoder = Encoder(
        [
            EncoderLayer(self_attn=over_memory(encoder_attention), **layer)
            for _ in range(num_encoder_layers)
        ],
        norm=nn.LayerNorm(hidden_dim) if pre_norm else None,
        position_scale=(
            MLP(hidden_dim, hidden_dim, hidden_dim, num_layers=2)
            if encoder_position_scale
            else None
        ),
        recompute=recompute_encoder,
    )
    decoder = Decoder(
        [
            DecoderLayer(
                self_attn=SELF_ATTENTIONS[self_attention](**attention, dropout=dropout),
                cross_attn=over_memory(cross_attention, is_first=index == 0),
                **layer,
            )
            for index in range(num_decoder_layers)
        ],
        norm=nn.LayerNorm(hidden_dim) if decoder_norm else nn.Identity(),
        heads=[head(index) for index in range(1 if shared_heads else num_decoder_layers)],
        query_position=QUERY_POSITIONS[query_position](hidden_dim),
        refinement=refinement,
    )
    initialisers = {
        "learned": lambda: LearnedQueries(num_queries, hidden_dim),
        "point": lambda: PointQueries(
            num_queries, hidden_dim, query_content == "learned", reference_layers
        ),
        "anchor": lambda: AnchorQueries(num_queries, hidden_dim, query_content == "learned"),
        "top_k": lambda: TopKQueries(
            num_queries,
            hidden_dim,
            head(),
            query_content,
            class_agnostic_proposals,
            supervise_all=supervised_proposals == "all",
        ),
    }
    if queries in initialisers:
        initialiser = initialisers[queries]()
    else:
        initialiser = QUERIES_REGISTRY.get(queries)(num_queries=num_queries, hidden_dim=hidden_dim)
    return Transformer(encoder, initialiser, decoder, denoising)


def build_denoising(
    *,
    method: str,
    num_classes: int,
    hidden_dim: int,
    num_groups: int = 5,
    num_queries: int = 100,
    label_noise: float = 0.2,
    box_noise: float = 0.4,
) -> nn.Module | None:
    """DN-DETR's or DINO's denoising; None for "none"."""
    if method == "dn":
        return Denoising(num_classes, hidden_dim, num_groups, label_noise, box_noise)
    if method == "contrastive":
        return ContrastiveDenoising(num_classes, hidden_dim, num_queries, label_noise, box_noise)
    return None


def build_criterion(
    *,
    num_classes: int,
    classification: str = "softmax",
    no_object_weight: float = 0.1,
    focal_alpha: float = 0.25,
    class_weight: float = 1.0,
    class_cost: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    deep_supervision: bool = True,
    mask_weight: float = 1.0,
    dice_weight: float = 1.0,
) -> SetCriterion:
    """Criterion whose matching costs of boxes are its loss weights (DETR, section 3.1)."""
    classes = {
        "softmax": lambda: SoftmaxClassification(num_classes, no_object_weight),
        "sigmoid": lambda: SigmoidClassification(num_classes, focal_alpha),
        "varifocal": lambda: VarifocalClassification(num_classes, focal_alpha),
    }[classification]()
    matcher = HungarianMatcher(
        classes, class_cost=class_cost, l1_cost=l1_weight, giou_cost=giou_weight
    )
    return SetCriterion(
        matcher,
        classes,
        class_weight=class_weight,
        l1_weight=l1_weight,
        giou_weight=giou_weight,
        deep_supervision=deep_supervision,
        mask_weight=mask_weight,
        dice_weight=dice_weight,
    )
