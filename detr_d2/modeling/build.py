"""From names to parts: the only place that chooses by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..criterion import SetCriterion
from ..matcher import HungarianMatcher
from .attention import ConditionalAttention, PlainAttention, SelfAttention, SeparateSelfAttention
from .combinations import check_choice, check_parts
from .deformable import DeformableAttention
from .denoising import ContrastiveDenoising, Denoising
from .heads import (
    MLP,
    PredictionHead,
    SigmoidClassification,
    SoftmaxClassification,
    VarifocalClassification,
)
from .queries import AnchorQueries, LearnedQueries, PointQueries, TopKQueries
from .query_position import (
    BoxQueryPosition,
    ConditionalQueryPosition,
    ModulatedQueryPosition,
    StaticQueryPosition,
)
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
    recompute_sampling: bool = False,
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
    keys of `MODEL.DETR` by their names, see config.py.

    Raises:
        UserError: a part that does not exist, or parts that make no sense together.
    """
    check_parts(
        {
            "ENC_LAYERS": num_encoder_layers,
            "ENCODER_POSITION_SCALE": encoder_position_scale,
            "CLASS_AGNOSTIC_PROPOSALS": class_agnostic_proposals,
            "SHARED_HEADS": shared_heads,
            "DENOISING.METHOD": "none" if denoising is None else "dn",
            "ACTIVATION": activation,
            "ENCODER_ATTENTION": encoder_attention,
            "QUERIES": queries,
            "QUERY_CONTENT": query_content,
            "SUPERVISED_PROPOSALS": supervised_proposals,
            "QUERY_POSITION": query_position,
            "SELF_ATTENTION": self_attention,
            "CROSS_ATTENTION": cross_attention,
            "BOX_HEAD": box_head,
            "REFINEMENT": refinement,
        }
    )
    attention: dict[str, Any] = {"hidden_dim": hidden_dim, "num_heads": num_heads}
    deformable: dict[str, Any] = {
        **attention,
        "num_levels": num_levels,
        "num_points": num_points,
        "recompute": recompute_sampling,
    }
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
        # A point says nothing of width and height: there the head's bias alone decides, and -2
        # makes boxes of 0.12 of the image (Deformable DETR's code). Not where one head refines
        # layer after layer: each would shrink the box again.
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
            MLP(hidden_dim, hidden_dim, hidden_dim, num_layers=2, xavier=True)
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
    count: dict[str, int] = {"num_queries": num_queries, "hidden_dim": hidden_dim}
    has_content = query_content == "learned"
    if queries == "learned":
        initialiser: nn.Module = LearnedQueries(**count)
    elif queries == "point":
        initialiser = PointQueries(
            **count, learned_content=has_content, reference_layers=reference_layers
        )
    elif queries == "anchor":
        initialiser = AnchorQueries(**count, learned_content=has_content)
    elif queries == "top_k":
        initialiser = TopKQueries(
            **count,
            head=head(),
            content=query_content,
            class_agnostic=class_agnostic_proposals,
            supervise_all=supervised_proposals == "all",
        )
    else:
        initialiser = QUERIES_REGISTRY.get(queries)(**count)
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
    """DN-DETR's or DINO's denoising; None for "none".

    Raises:
        UserError: no such method.
    """
    check_choice("DENOISING.METHOD", method)
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
    """Criterion whose matching costs of boxes are its loss weights (DETR, section 3.1).

    Raises:
        UserError: no such classification.
    """
    check_choice("CLASSIFICATION", classification)
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
