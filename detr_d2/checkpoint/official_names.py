"""Names of the official implementations: rows of tables, see names.py.

All of them descend from facebookresearch/detr and have most of its names. Without the backbones.
"""

from __future__ import annotations

from .names import Row

Rows = tuple[Row, ...]

OWN_QUERIES = "transformer.queries."
OWN_HEAD = "transformer.decoder.heads."
QUERY_POSITION = "transformer.decoder.query_position."
_ENCODER, _DECODER = "transformer.encoder.layers.#.", "transformer.decoder.layers.#."


def separate_projections(own: str, foreign: str) -> Rows:
    """The projections of a decoder layer that keeps content and position apart."""
    rows = [
        (own + "self_attn.v_proj.*", foreign + "sa_v_proj.*"),
        (own + "cross_attn.v_proj.*", foreign + "ca_v_proj.*"),
        (own + "cross_attn.spatial_q_proj.*", foreign + "ca_qpos_sine_proj.*"),
    ]
    for attention, short in (("self_attn", "sa"), ("cross_attn", "ca")):
        for part, theirs in (("content", "content"), ("position", "pos")):
            rows += [
                (f"{own}{attention}.{part}_{x}_proj.*", f"{foreign}{short}_{x}{theirs}_proj.*")
                for x in "qk"
            ]
    return tuple(rows)


def deformable_attention(own: str, foreign: str) -> Rows:
    return tuple(
        (f"{own}{name}.*", f"{foreign}{name}.*")
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    )


def _plain_attention(own: str, foreign: str) -> Rows:
    return (
        (own + "{q_proj,k_proj,v_proj}.*", foreign + "in_proj_*"),
        (own + "out_proj.*", foreign + "out_proj.*"),
    )


def _layers(*decoder_norms: str) -> Rows:
    """Feed-forward networks and norms; `decoder_norms` in the order of their numbers."""
    rows = [
        ("transformer.encoder.norm.*", "transformer.encoder.norm.*"),
        ("transformer.decoder.norm.*", "transformer.decoder.norm.*"),
    ]
    for layer, norms in ((_ENCODER, ("self_attn", "ffn")), (_DECODER, decoder_norms)):
        rows += [(f"{layer}{own}_norm.*", f"{layer}norm{n}.*") for n, own in enumerate(norms, 1)]
        rows += [
            (f"{layer}ffn.{name}.*", f"{layer}{name}.*")
            for name in ("linear1", "linear2", "activation")
        ]
    return tuple(rows)


def _heads(number: str = "0.", foreign_number: str = "") -> Rows:
    return _head(
        f"{OWN_HEAD}{number}", f"class_embed.{foreign_number}", f"bbox_embed.{foreign_number}"
    )


def _head(own: str, classes: str, boxes: str) -> Rows:
    return (
        (own + "class_head.*", classes + "*"),
        (own + "box_head.layers.#.*", boxes + "layers.#.*"),
    )


_SINGLE_SCALE = (
    ("neck.projections.0.*", "input_proj.*"),
    ("neck.position.row_embedding.*", "backbone.1.row_embed.*"),
    ("neck.position.column_embedding.*", "backbone.1.col_embed.*"),
    *_plain_attention(_ENCODER + "self_attn.", _ENCODER + "self_attn."),
    *_layers("self_attn", "cross_attn", "ffn"),
    *_heads(),
)

MASK_HEAD = (
    ("mask_head.q_proj.*", "bbox_attention.q_linear.*"),
    ("mask_head.k_proj.*", "bbox_attention.k_linear.*"),
    *((f"mask_head.convs.{n}.*", f"mask_head.lay{n + 1}.*") for n in range(5)),
    *((f"mask_head.norms.{n}.*", f"mask_head.gn{n + 1}.*") for n in range(5)),
    *((f"mask_head.adapters.{n}.*", f"mask_head.adapter{n + 1}.*") for n in range(3)),
    ("mask_head.out.*", "mask_head.out_lay.*"),
)

DETR = (
    *MASK_HEAD,
    *_SINGLE_SCALE,
    *_plain_attention(_DECODER + "self_attn.", _DECODER + "self_attn."),
    *_plain_attention(_DECODER + "cross_attn.", _DECODER + "multihead_attn."),
    (OWN_QUERIES + "position.weight", "query_embed.weight"),
)

_CONDITIONAL_ATTENTION = (
    *_SINGLE_SCALE,
    *separate_projections(_DECODER, _DECODER),
    (_DECODER + "self_attn.out_proj.*", _DECODER + "self_attn.out_proj.*"),
    (_DECODER + "cross_attn.out_proj.*", _DECODER + "cross_attn.out_proj.*"),
    (QUERY_POSITION + "scale.layers.#.*", "transformer.decoder.query_scale.layers.#.*"),
)

CONDITIONAL_DETR = (
    *_CONDITIONAL_ATTENTION,
    (OWN_QUERIES + "position.weight", "query_embed.weight"),
    (
        OWN_QUERIES + "reference_head.layers.#.*",
        "transformer.decoder.ref_point_head.layers.#.*",
    ),
)

_BOX_MLP = (
    QUERY_POSITION + "box_mlp.layers.#.*",
    "transformer.decoder.ref_point_head.layers.#.*",
)

DAB_DETR = (
    *_CONDITIONAL_ATTENTION,
    _BOX_MLP,
    (QUERY_POSITION + "size_mlp.layers.#.*", "transformer.decoder.ref_anchor_head.layers.#.*"),
    (
        "transformer.encoder.position_scale.layers.#.*",
        "transformer.encoder.query_scale.layers.#.*",
    ),
    (OWN_QUERIES + "anchors.weight", "refpoint_embed.weight"),
)

_LABELS = ("transformer.denoising.label_embedding.weight", "label_enc.weight")

DN_DAB_DETR = (*DAB_DETR, _LABELS)

_MULTI_SCALE = (
    ("neck.projections.#.#.*", "input_proj.#.#.*"),
    ("neck.level_embedding", "transformer.level_embed"),
    *deformable_attention(_ENCODER + "self_attn.", _ENCODER + "self_attn."),
    *_plain_attention(_DECODER + "self_attn.", _DECODER + "self_attn."),
    *deformable_attention(_DECODER + "cross_attn.", _DECODER + "cross_attn."),
    *_layers("cross_attn", "self_attn", "ffn"),
)

DEFORMABLE_DETR = (
    *_MULTI_SCALE,
    *_heads("#.", "#."),
    (OWN_QUERIES + "[position,content].weight", "query_embed.weight"),
    (OWN_QUERIES + "reference_head.layers.0.*", "transformer.reference_points.*"),
)

_TOP_K = (
    (OWN_QUERIES + "memory_proj.*", "transformer.enc_output.*"),
    (OWN_QUERIES + "memory_norm.*", "transformer.enc_output_norm.*"),
)

TWO_STAGE_DEFORMABLE_DETR = (
    *_MULTI_SCALE,
    *_head(OWN_QUERIES + "head.", "class_embed.last.", "bbox_embed.last."),
    *_heads("#.", "#."),
    *_TOP_K,
    (OWN_QUERIES + "position_proj.*", "transformer.pos_trans.*"),
    (OWN_QUERIES + "position_norm.*", "transformer.pos_trans_norm.*"),
)

DINO = (
    *_MULTI_SCALE,
    *_head(
        OWN_QUERIES + "head.",
        "transformer.enc_out_class_embed.",
        "transformer.enc_out_bbox_embed.",
    ),
    *_heads(foreign_number="0."),
    *_TOP_K,
    (OWN_QUERIES + "content.weight", "transformer.tgt_embed.weight"),
    _BOX_MLP,
    _LABELS,
)
