"""The formats that can be loaded and written, one table each, and how they are recognised.

Own names are those of the meta-architecture ``Detr``; its ResNet has detectron2's names. A new
format is a new entry of `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Collection

from .names import Format, Row, StateDict

# What comes before the names proper when a whole model was wrapped before it was saved.
_WRAPPED = ((r"^module\.", ""), (r"^_orig_mod\.", ""))


def _torchvision_resnet(prefix: str) -> tuple[Row, ...]:
    """torchvision's and timm's names, bottleneck and basic blocks alike."""
    rows = [
        ("backbone.stem.conv1.weight", prefix + "conv1.weight"),
        ("backbone.stem.conv1.norm.*", prefix + "bn1.*"),
    ]
    for stage in range(1, 5):
        own, foreign = f"backbone.res{stage + 1}.#.", f"{prefix}layer{stage}.#."
        rows += [
            (own + "shortcut.weight", foreign + "downsample.0.weight"),
            (own + "shortcut.norm.*", foreign + "downsample.1.*"),
        ]
        for conv in (1, 2, 3):
            rows += [
                (own + f"conv{conv}.weight", foreign + f"conv{conv}.weight"),
                (own + f"conv{conv}.norm.*", foreign + f"bn{conv}.*"),
            ]
    return tuple(rows)


def _huggingface_resnet(prefix: str) -> tuple[Row, ...]:
    """Hugging Face's own ResNet, the body of models made with ``use_timm_backbone=False``."""
    rows = [
        ("backbone.stem.conv1.weight", prefix + "embedder.embedder.convolution.weight"),
        ("backbone.stem.conv1.norm.*", prefix + "embedder.embedder.normalization.*"),
    ]
    for stage in range(4):
        own, foreign = f"backbone.res{stage + 2}.#.", f"{prefix}encoder.stages.{stage}.layers.#."
        rows += [
            (own + "shortcut.weight", foreign + "shortcut.convolution.weight"),
            (own + "shortcut.norm.*", foreign + "shortcut.normalization.*"),
        ]
        for conv in (0, 1, 2):
            rows += [
                (own + f"conv{conv + 1}.weight", foreign + f"layer.{conv}.convolution.weight"),
                (own + f"conv{conv + 1}.norm.*", foreign + f"layer.{conv}.normalization.*"),
            ]
    return tuple(rows)


def _original_detr(prefix: str) -> tuple[Row, ...]:
    """All but the backbone, in the names of facebookresearch/detr."""
    encoder, decoder = "transformer.encoder.layers.#.", "transformer.decoder.layers.#."
    rows = [
        ("neck.projections.0.*", "input_proj.*"),
        ("neck.position.row_embedding.*", "backbone.1.row_embed.*"),
        ("neck.position.column_embedding.*", "backbone.1.col_embed.*"),
        ("transformer.queries.position.weight", "query_embed.weight"),
        ("transformer.decoder.heads.0.class_head.*", "class_embed.*"),
        ("transformer.decoder.heads.0.box_head.layers.#.*", "bbox_embed.layers.#.*"),
        ("transformer.encoder.norm.*", "transformer.encoder.norm.*"),
        ("transformer.decoder.norm.*", "transformer.decoder.norm.*"),
        (encoder + "self_attn_norm.*", encoder + "norm1.*"),
        (encoder + "ffn_norm.*", encoder + "norm2.*"),
        (decoder + "self_attn_norm.*", decoder + "norm1.*"),
        (decoder + "cross_attn_norm.*", decoder + "norm2.*"),
        (decoder + "ffn_norm.*", decoder + "norm3.*"),
    ]
    for layer in (encoder, decoder):
        rows += [(f"{layer}ffn.linear{n}.*", f"{layer}linear{n}.*") for n in (1, 2)]
    for own, foreign in (
        (encoder + "self_attn.", encoder + "self_attn."),
        (decoder + "self_attn.", decoder + "self_attn."),
        (decoder + "cross_attn.", decoder + "multihead_attn."),
    ):
        rows += [
            (own + "{q_proj,k_proj,v_proj}.*", foreign + "in_proj_*"),
            (own + "out_proj.*", foreign + "out_proj.*"),
        ]
    return tuple((own, prefix + foreign) for own, foreign in rows)


def _huggingface_detr() -> tuple[Row, ...]:
    """All but the backbone, in the names that ``save_pretrained`` writes."""
    rows = [
        ("neck.projections.0.*", "model.input_projection.*"),
        ("neck.position.row_embedding.*", "model.position_embedding.row_embeddings.*"),
        ("neck.position.column_embedding.*", "model.position_embedding.column_embeddings.*"),
        ("transformer.queries.position.weight", "model.query_position_embeddings.weight"),
        ("transformer.decoder.heads.0.class_head.*", "class_labels_classifier.*"),
        ("transformer.decoder.heads.0.box_head.layers.#.*", "bbox_predictor.layers.#.*"),
        ("transformer.decoder.norm.*", "model.decoder.layernorm.*"),
    ]
    for part, attentions in (
        ("encoder", {"self_attn": "self_attn"}),
        ("decoder", {"self_attn": "self_attn", "cross_attn": "encoder_attn"}),
    ):
        own, foreign = f"transformer.{part}.layers.#.", f"model.{part}.layers.#."
        rows += [
            (own + "ffn.linear1.*", foreign + "fc1.*"),
            (own + "ffn.linear2.*", foreign + "fc2.*"),
            (own + "ffn_norm.*", foreign + "final_layer_norm.*"),
        ]
        for own_attention, foreign_attention in attentions.items():
            ours, theirs = own + own_attention, foreign + foreign_attention
            rows.append((ours + "_norm.*", theirs + "_layer_norm.*"))
            rows += [
                (f"{ours}.{name}_proj.*", f"{theirs}.{name}_proj.*")
                for name in ("q", "k", "v", "out")
            ]
    return tuple(rows)


_EVERY_ROOM = tuple((f"{room}.**", f"{room}.**") for room in ("backbone", "neck", "transformer"))
_MASKS = r"mask_head\.|bbox_attention\."

OWN = Format(
    "own",
    "detr_d2",
    signature=r"neck\.projections\.|transformer\.(queries|decoder\.heads)\.|backbone\.(stem|body)\.",
    rows=_EVERY_ROOM,
    spellings=_WRAPPED,
)

ORIGINAL = Format(
    "original",
    "original DETR",
    signature=r"backbone\.0\.body\.",
    rows=(
        *_original_detr(""),
        *_torchvision_resnet("backbone.0.body."),
        ("backbone.body.**", "backbone.0.body.**"),  # any other body of timm's
    ),
    # The model with a mask head keeps the box model under `detr.`.
    spellings=(*_WRAPPED, (r"^detr\.", "")),
    not_ours=_MASKS,
)

DETECTRON2_WRAPPER = Format(
    "detectron2-wrapper",
    "detectron2 wrapper of the original DETR",
    signature=r"detr\.backbone\.0\.backbone\.",
    rows=(*_original_detr("detr."), ("backbone.**", "detr.backbone.0.backbone.**")),
    # With masks, the wrapper's `detr` is the mask model, whose `detr` is the box model.
    spellings=(*_WRAPPED, (r"^detr\.detr\.", "detr."), (r"^detr\.(?=" + _MASKS + ")", "")),
    not_ours=_MASKS + r"|criterion\.|pixel_(mean|std)$",
)

HUGGING_FACE = Format(
    "huggingface",
    "Hugging Face DetrForObjectDetection",
    signature=r"model\.backbone\.conv_encoder\.",
    rows=(
        *_huggingface_detr(),
        *_torchvision_resnet("model.backbone.conv_encoder.model."),
        *_huggingface_resnet("model.backbone.conv_encoder.model."),
        ("backbone.body.**", "model.backbone.conv_encoder.model.**"),
    ),
    # Versions 5 and later name the modules differently from what they save.
    spellings=(
        *_WRAPPED,
        (r"^detr\.", ""),
        (r"^model\.backbone\.(?=model\.)", "model.backbone.conv_encoder."),
        (r"^model\.backbone\.(?=position_embedding\.)", "model."),
        (r"\.o_proj\.", ".out_proj."),
        (r"\.mlp\.(?=fc\d)", "."),
    ),
    not_ours=_MASKS,
)

TORCHVISION = Format(
    "torchvision",
    "torchvision or timm ResNet (backbone only)",
    signature=r"layer1\.0\.conv1\.weight",
    rows=_torchvision_resnet(""),
    spellings=_WRAPPED,
    not_ours=r"fc\.",
)

DETECTRON2_BACKBONE = Format(
    "detectron2-backbone",
    "detectron2 ResNet (backbone only)",
    signature=r"res2\.0\.conv1\.weight",
    rows=(("backbone.**", "**"),),
    spellings=_WRAPPED,
    not_ours=r"stem\.fc\.|fc\.|linear\.",
)

FORMATS = (OWN, DETECTRON2_WRAPPER, ORIGINAL, HUGGING_FACE, TORCHVISION, DETECTRON2_BACKBONE)

# The same ResNet inside a model whose backbone is built by timm.
_TIMM_BODY = Format("timm", "timm", signature=r"(?!)", rows=_torchvision_resnet("backbone.body."))


def recognise_format(names: Collection[str]) -> Format | None:
    """The format of a state dict with these tensor names; None when no format has them."""
    for candidate in FORMATS:
        if any(candidate.is_signed_by(name) for name in names):
            return candidate
    return None


def with_body_of(state: StateDict, model_names: Collection[str]) -> StateDict:
    """Renames a ResNet body in own names to the library's names the model's backbone has.

    A backbone of detectron2 has ``backbone.res2...``, one of timm ``backbone.body.layer1...``.
    """
    wants_timm = any(name.startswith("backbone.body.") for name in model_names)
    renamed, others = (_TIMM_BODY.from_own if wants_timm else _TIMM_BODY.to_own)(state)
    return renamed | {name: state[name] for name in others}


def timm_names(names: Collection[str], model_names: Collection[str]) -> dict[str, str]:
    """Pairs the names of a whole timm classifier with those of a model's timm backbone.

    As feature extractor timm may flatten containers (``stages.0.x`` to ``stages_0.x``), so dots and
    underscores count as equal.

    Returns:
        file name -> model name; empty unless the file has most of the backbone.
    """
    body = [name for name in model_names if name.startswith("backbone.body.")]
    flat = {name.removeprefix("backbone.body.").replace(".", "_"): name for name in body}
    pairs = {name: flat[key] for name in names if (key := name.replace(".", "_")) in flat}
    return pairs if len(pairs) > len(body) / 2 else {}
