"""From config to parts: the only place that chooses by name."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import nn

from ..criterion import SetCriterion
from ..data.classes import resolve_num_classes
from ..errors import UserError
from ..matcher import HungarianMatcher
from .attention import PlainCrossAttention, SelfAttention
from .heads import PredictionHead, SoftmaxClassification
from .neck import SingleScaleNeck
from .position import LearnedPositionEmbedding, SinePositionEmbedding
from .queries import LearnedQueries
from .transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer

POSITION_EMBEDDINGS = {"sine": SinePositionEmbedding, "learned": LearnedPositionEmbedding}


def build_parts(cfg: CfgNode) -> dict[str, nn.Module]:
    """The parts of `Detr` that a config describes, by the names of its arguments."""
    if cfg.MODEL.MASK_ON or cfg.MODEL.DETR.FROZEN_WEIGHTS:
        raise UserError(
            "MODEL.MASK_ON and MODEL.DETR.FROZEN_WEIGHTS need a mask head, which this version does "
            "not have: set them to False and ''."
        )
    backbone = build_backbone(cfg)
    classification = SoftmaxClassification(
        resolve_num_classes(cfg), cfg.MODEL.DETR.NO_OBJECT_WEIGHT
    )
    return {
        "backbone": backbone,
        "neck": build_neck(cfg, backbone),
        "transformer": build_transformer(cfg, classification),
        "criterion": build_criterion(cfg, classification),
    }


def build_neck(cfg: CfgNode, backbone: nn.Module) -> nn.Module:
    """Neck over the backbone map that `MODEL.DETR.IN_FEATURES` names, by default the last."""
    shapes = backbone.output_shape()
    names = cfg.MODEL.DETR.IN_FEATURES or list(shapes)[-1:]
    for name in names:
        if name not in shapes:
            raise UserError(
                f"MODEL.DETR.IN_FEATURES names {name!r}, but the backbone "
                f"{cfg.MODEL.BACKBONE.NAME} gives only {', '.join(shapes)}."
            )
    if len(names) != 1:
        raise UserError(
            f"MODEL.DETR.IN_FEATURES has {len(names)} entries ({', '.join(names)}): DETR's encoder "
            "attends to one map, name one."
        )
    position = _choose(
        POSITION_EMBEDDINGS, cfg.MODEL.DETR.POSITION_EMBEDDING, "MODEL.DETR.POSITION_EMBEDDING"
    )
    hidden_dim = cfg.MODEL.DETR.HIDDEN_DIM
    return SingleScaleNeck(names, shapes[names[0]].channels, hidden_dim, position(hidden_dim))


def build_transformer(cfg: CfgNode, classification: nn.Module) -> Transformer:
    """Encoder, learned queries and decoder with one head shared by all layers."""
    detr = cfg.MODEL.DETR
    hidden_dim, pre_norm = detr.HIDDEN_DIM, detr.PRE_NORM
    attention: dict[str, Any] = {
        "hidden_dim": hidden_dim,
        "num_heads": detr.NHEADS,
        "dropout": detr.DROPOUT,
    }
    layer: dict[str, Any] = {
        "hidden_dim": hidden_dim,
        "dim_feedforward": detr.DIM_FEEDFORWARD,
        "dropout": detr.DROPOUT,
        "pre_norm": pre_norm,
    }
    encoder = Encoder(
        [
            EncoderLayer(self_attn=SelfAttention(**attention), **layer)
            for _ in range(detr.ENC_LAYERS)
        ],
        norm=nn.LayerNorm(hidden_dim) if pre_norm else None,
    )
    decoder = Decoder(
        [
            DecoderLayer(
                self_attn=SelfAttention(**attention),
                cross_attn=PlainCrossAttention(**attention),
                **layer,
            )
            for _ in range(detr.DEC_LAYERS)
        ],
        norm=nn.LayerNorm(hidden_dim),
        heads=[PredictionHead(hidden_dim, classification.num_logits)],
    )
    return Transformer(encoder, LearnedQueries(detr.NUM_OBJECT_QUERIES, hidden_dim), decoder)


def build_criterion(cfg: CfgNode, classification: nn.Module) -> SetCriterion:
    """Criterion whose matching costs are its loss weights, as in DETR, section 3.1."""
    detr = cfg.MODEL.DETR
    matcher = HungarianMatcher(
        classification, class_cost=1.0, l1_cost=detr.L1_WEIGHT, giou_cost=detr.GIOU_WEIGHT
    )
    return SetCriterion(
        matcher,
        classification,
        class_weight=1.0,
        l1_weight=detr.L1_WEIGHT,
        giou_weight=detr.GIOU_WEIGHT,
        deep_supervision=detr.DEEP_SUPERVISION,
    )


def _choose(table: dict[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise UserError(f"{key} is {name!r}; it must be one of {', '.join(sorted(table))}.")
    return table[name]
