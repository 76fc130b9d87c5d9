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
    detr = cfg.MODEL.DETR
    if cfg.MODEL.MASK_ON or detr.FROZEN_WEIGHTS:
        raise UserError(
            "MODEL.MASK_ON and MODEL.DETR.FROZEN_WEIGHTS need a mask head, which this version does "
            "not have: set them to False and ''."
        )
    backbone = build_backbone(cfg)
    criterion = build_criterion(
        num_classes=resolve_num_classes(cfg),
        no_object_weight=detr.NO_OBJECT_WEIGHT,
        l1_weight=detr.L1_WEIGHT,
        giou_weight=detr.GIOU_WEIGHT,
        deep_supervision=detr.DEEP_SUPERVISION,
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
    )
    return {
        "backbone": backbone,
        "neck": build_neck(cfg, backbone),
        "transformer": transformer,
        "criterion": criterion,
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
) -> Transformer:
    """Encoder, learned queries and decoder with one head shared by all layers (DETR, A.3)."""
    attention: dict[str, Any] = {
        "hidden_dim": hidden_dim,
        "num_heads": num_heads,
        "dropout": dropout,
    }
    layer: dict[str, Any] = {
        "hidden_dim": hidden_dim,
        "dim_feedforward": dim_feedforward,
        "dropout": dropout,
        "pre_norm": pre_norm,
    }
    encoder = Encoder(
        [
            EncoderLayer(self_attn=SelfAttention(**attention), **layer)
            for _ in range(num_encoder_layers)
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
            for _ in range(num_decoder_layers)
        ],
        norm=nn.LayerNorm(hidden_dim),
        heads=[PredictionHead(hidden_dim, num_logits)],
    )
    return Transformer(encoder, LearnedQueries(num_queries, hidden_dim), decoder)


def build_criterion(
    *,
    num_classes: int,
    no_object_weight: float = 0.1,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    deep_supervision: bool = True,
) -> SetCriterion:
    """Softmax criterion whose matching costs are its loss weights (DETR, section 3.1)."""
    classification = SoftmaxClassification(num_classes, no_object_weight)
    matcher = HungarianMatcher(
        classification, class_cost=1.0, l1_cost=l1_weight, giou_cost=giou_weight
    )
    return SetCriterion(
        matcher,
        classification,
        class_weight=1.0,
        l1_weight=l1_weight,
        giou_weight=giou_weight,
        deep_supervision=deep_supervision,
    )


def _choose(table: dict[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise UserError(f"{key} is {name!r}; it must be one of {', '.join(sorted(table))}.")
    return table[name]
