"""Names that ``save_pretrained`` of Hugging Face's detectors writes: rows of tables, see names.py.

Without the backbones.
"""

from __future__ import annotations

from .official_names import (
    MASK_HEAD,
    OWN_HEAD,
    OWN_QUERIES,
    QUERY_POSITION,
    Rows,
    deformable_attention,
    separate_projections,
)

_OWN_ENCODER, _OWN_DECODER = "transformer.encoder.layers.#.", "transformer.decoder.layers.#."
_ENCODER, _DECODER = "model.encoder.layers.#.", "model.decoder.layers.#."


def _attention(own: str, foreign: str) -> Rows:
    return tuple(
        (f"{own}{name}_proj.*", f"{foreign}{name}_proj.*") for name in ("q", "k", "v", "out")
    )


def _feed_forward(own: str, foreign: str) -> Rows:
    return (
        (own + "ffn.linear1.*", foreign + "fc1.*"),
        (own + "ffn.linear2.*", foreign + "fc2.*"),
        (own + "ffn.activation.*", foreign + "activation_fn.*"),
        (own + "ffn_norm.*", foreign + "final_layer_norm.*"),
    )


def _decoder_norms(self_attention: str, cross_attention: str) -> Rows:
    return (
        (_OWN_DECODER + "self_attn_norm.*", f"{_DECODER}{self_attention}_layer_norm.*"),
        (_OWN_DECODER + "cross_attn_norm.*", f"{_DECODER}{cross_attention}_layer_norm.*"),
    )


_LAYERS = (
    *_feed_forward(_OWN_ENCODER, _ENCODER),
    *_feed_forward(_OWN_DECODER, _DECODER),
    (_OWN_ENCODER + "self_attn_norm.*", _ENCODER + "self_attn_layer_norm.*"),
    ("transformer.decoder.norm.*", "model.decoder.layernorm.*"),
)

_SINGLE_SCALE = (
    *_LAYERS,
    *_attention(_OWN_ENCODER + "self_attn.", _ENCODER + "self_attn."),
    ("neck.projections.0.*", "model.input_projection.*"),
    ("neck.position.row_embedding.*", "model.position_embedding.row_embeddings.*"),
    ("neck.position.column_embedding.*", "model.position_embedding.column_embeddings.*"),
    (OWN_HEAD + "0.box_head.layers.#.*", "bbox_predictor.layers.#.*"),
)

_LEARNED = (
    *_SINGLE_SCALE,
    *_decoder_norms("self_attn", "encoder_attn"),
    (OWN_QUERIES + "position.weight", "model.query_position_embeddings.weight"),
    (OWN_HEAD + "0.class_head.*", "class_labels_classifier.*"),
)

DETR = (
    *MASK_HEAD,
    *_LEARNED,
    *_attention(_OWN_DECODER + "self_attn.", _DECODER + "self_attn."),
    *_attention(_OWN_DECODER + "cross_attn.", _DECODER + "encoder_attn."),
)

_SCALE = (QUERY_POSITION + "scale.layers.#.*", "model.decoder.query_scale.layers.#.*")

CONDITIONAL_DETR = (
    *MASK_HEAD,
    *_LEARNED,
    *separate_projections(_OWN_DECODER, _DECODER),
    (_OWN_DECODER + "self_attn.out_proj.*", _DECODER + "self_attn.out_proj.*"),
    (_OWN_DECODER + "cross_attn.out_proj.*", _DECODER + "encoder_attn.out_proj.*"),
    _SCALE,
    (OWN_QUERIES + "reference_head.layers.#.*", "model.decoder.ref_point_head.layers.#.*"),
)


def _dab_attention(name: str) -> Rows:
    own, foreign = f"{_OWN_DECODER}{name}.", f"{_DECODER}{name}.{name}"
    rows = [
        (own + "v_proj.*", foreign + "_value_proj.*"),
        (own + "out_proj.*", foreign + ".output_proj.*"),
    ]
    for ours, theirs in (("content", "content"), ("position", "pos")):
        rows += [
            (f"{own}{ours}_{x[0]}_proj.*", f"{foreign}_{x}_{theirs}_proj.*")
            for x in ("query", "key")
        ]
    return tuple(rows)


DAB_DETR = (
    *_SINGLE_SCALE,
    *_decoder_norms("self_attn.self_attn", "cross_attn.cross_attn"),
    *_dab_attention("self_attn"),
    *_dab_attention("cross_attn"),
    (
        _OWN_DECODER + "cross_attn.spatial_q_proj.*",
        _DECODER + "cross_attn.cross_attn_query_pos_sine_proj.*",
    ),
    (OWN_HEAD + "0.class_head.*", "class_embed.*"),
    _SCALE,
    (QUERY_POSITION + "box_mlp.layers.#.*", "model.decoder.ref_point_head.layers.#.*"),
    (QUERY_POSITION + "size_mlp.layers.#.*", "model.decoder.ref_anchor_head.layers.#.*"),
    ("transformer.encoder.position_scale.layers.#.*", "model.encoder.query_scale.layers.#.*"),
    (OWN_QUERIES + "anchors.weight", "model.query_refpoint_embeddings.weight"),
)

_MULTI_SCALE = (
    *_LAYERS,
    *_decoder_norms("self_attn", "encoder_attn"),
    *deformable_attention(_OWN_ENCODER + "self_attn.", _ENCODER + "self_attn."),
    *_attention(_OWN_DECODER + "self_attn.", _DECODER + "self_attn."),
    *deformable_attention(_OWN_DECODER + "cross_attn.", _DECODER + "encoder_attn."),
    ("neck.projections.#.#.*", "model.input_proj.#.#.*"),
    ("neck.level_embedding", "model.level_embed"),
    (OWN_HEAD + "#.class_head.*", "class_embed.#.*"),
    (OWN_HEAD + "#.box_head.layers.#.*", "bbox_embed.#.layers.#.*"),
)

DEFORMABLE_DETR = (
    *_MULTI_SCALE,
    (OWN_QUERIES + "[position,content].weight", "model.query_position_embeddings.weight"),
    (OWN_QUERIES + "reference_head.layers.0.*", "model.reference_points.*"),
)

TWO_STAGE_DEFORMABLE_DETR = (
    (OWN_QUERIES + "head.class_head.*", "class_embed.last.*"),
    (OWN_QUERIES + "head.box_head.layers.#.*", "bbox_embed.last.layers.#.*"),
    *_MULTI_SCALE,
    (OWN_QUERIES + "memory_proj.*", "model.enc_output.*"),
    (OWN_QUERIES + "memory_norm.*", "model.enc_output_norm.*"),
    (OWN_QUERIES + "position_proj.*", "model.pos_trans.*"),
    (OWN_QUERIES + "position_norm.*", "model.pos_trans_norm.*"),
)
