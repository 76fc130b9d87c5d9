"""The formats that can be loaded and written, one table each, and how they are recognised.

Own names are those of the meta-architecture ``Detr``; its ResNet has detectron2's names. A new
format is a new entry of `FORMATS`; rows of tables are in backbone_names.py, official_names.py and
huggingface_names.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from . import huggingface_names, official_names
from .backbone_names import efficientnet_lite0, huggingface_resnet, torchvision_resnet
from .names import Format, Row, StateDict

# What comes before the names proper when a whole model was wrapped before it was saved.
_WRAPPED = ((r"^module\.", ""), (r"^_orig_mod\.", ""))
_MODULES = ("backbone", "neck", "transformer", "mask_head")
_EVERY_MODULE = tuple((f"{module}.**", f"{module}.**") for module in _MODULES)

OWN = Format(
    "own",
    "detr_d2",
    signature=(
        r"neck\.projections\.|transformer\.(queries|decoder\.heads)\.|backbone\.(stem|body)\.",
    ),
    rows=_EVERY_MODULE,
    spellings=_WRAPPED,
)

# ------------------------------------------------------------------- official implementations

_HEADS = r"(?:class|bbox)_embed"
# Heads that the decoder needs for refinement are there a second time.
_DECODERS_COPY = (rf"^transformer\.decoder\.(?={_HEADS}\.)", "")
# A head that all layers share is there for each of them.
_LAYERS_COPIES = (rf"^({_HEADS})\.\d+\.", r"\1.0.")


def _official(
    key: str,
    title: str,
    signature: tuple[str, ...],
    rows: tuple[Row, ...],
    no_object: bool = False,
    **options: Any,
) -> Format:
    """A format that has a torchvision ResNet below ``backbone.0.body.``."""
    body = "backbone.0.body."
    return Format(
        key,
        title,
        signature=(r"backbone\.0\.body\.", *signature),
        rows=(
            *rows,
            *torchvision_resnet(body),
            ("backbone.body.**", body + "**"),  # any other body of timm's
        ),
        # The model with a mask head keeps the box model under `detr.`.
        spellings=(*_WRAPPED, (r"^detr\.", "")),
        no_object=no_object,
        **options,
    )


ORIGINAL = _official("original", "original DETR", (), official_names.DETR, no_object=True)

CONDITIONAL_DETR = _official(
    "conditional",
    "official Conditional DETR",
    (r"transformer\.decoder\.layers\.0\.ca_qpos_sine_proj\.",),
    official_names.CONDITIONAL_DETR,
)

DAB_DETR = _official(
    "dab",
    "official DAB-DETR",
    (r"transformer\.decoder\.ref_anchor_head\.",),
    official_names.DAB_DETR,
    copies=(_DECODERS_COPY,),
)

DN_DAB_DETR = _official(
    "dn-dab",
    "official DN-DAB-DETR",
    (*DAB_DETR.signature, r"label_enc\."),
    official_names.DN_DAB_DETR,
    copies=(_DECODERS_COPY,),
)

DEFORMABLE_DETR = _official(
    "deformable",
    "official Deformable DETR",
    (r"transformer\.level_embed",),
    official_names.DEFORMABLE_DETR,
    copies=(_LAYERS_COPIES,),
)

REFINED_DEFORMABLE_DETR = _official(
    "deformable-refine",
    "official Deformable DETR with box refinement",
    (*DEFORMABLE_DETR.signature, r"transformer\.decoder\.bbox_embed\."),
    official_names.DEFORMABLE_DETR,
    copies=(_DECODERS_COPY,),
)

TWO_STAGE_DEFORMABLE_DETR = _official(
    "deformable-two-stage",
    "official two-stage Deformable DETR",
    (*DEFORMABLE_DETR.signature, r"transformer\.pos_trans\."),
    official_names.TWO_STAGE_DEFORMABLE_DETR,
    copies=(_DECODERS_COPY,),
    last=_HEADS,
)

DINO = _official(
    "dino",
    "official DINO",
    (*DEFORMABLE_DETR.signature, r"transformer\.enc_out_class_embed\."),
    official_names.DINO,
    copies=(_DECODERS_COPY, _LAYERS_COPIES),
)

DETECTRON2_WRAPPER = Format(
    "detectron2-wrapper",
    "detectron2 wrapper of the original DETR",
    signature=(r"detr\.backbone\.0\.backbone\.",),
    rows=(
        *((own, "detr." + foreign) for own, foreign in official_names.DETR),
        ("backbone.**", "detr.backbone.0.backbone.**"),
    ),
    # With masks, the wrapper's `detr` is the mask model, whose `detr` is the box model.
    spellings=(*_WRAPPED, (r"^detr\.detr\.", "detr.")),
    not_ours=r"criterion\.|pixel_(mean|std)$",
    no_object=True,
)

# ------------------------------------------------------------------------------- Hugging Face

# Versions 5 and later name the modules differently from what they save.
_NEW_SPELLINGS = (
    (r"^model\.backbone\.(?=model\.)", "model.backbone.conv_encoder."),
    (r"^model\.backbone\.(?=position_embedding\.)", "model."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.(?=fc\d|activation_fn|final_layer_norm)", "."),
    (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"^mask_head\.conv(\d)\.conv\.", r"mask_head.lay\1."),
    (r"^mask_head\.conv(\d)\.norm\.", r"mask_head.gn\1."),
    (r"^mask_head\.output_conv\.", "mask_head.out_lay."),
    *(
        (rf"^mask_head\.fpn_stages\.{n}\.fpn_adapter\.", f"mask_head.adapter{n + 1}.")
        for n in range(3)
    ),
    *(
        (rf"^mask_head\.fpn_stages\.{n}\.refine\.conv\.", f"mask_head.lay{n + 3}.")
        for n in range(3)
    ),
    *((rf"^mask_head\.fpn_stages\.{n}\.refine\.norm\.", f"mask_head.gn{n + 3}.") for n in range(3)),
)
_NEW_CONDITIONAL_SPELLINGS = tuple(
    (rf"(decoder\.layers\.\d+\.){attention}\.{projection}", rf"\1{short}_{replacement}")
    for attention, short in (("self_attn", "sa"), ("encoder_attn", "ca"))
    for projection, replacement in (("([qk])_(content|pos)_", r"\2\3_"), ("v_", "v_"))
)


def _huggingface(
    key: str,
    model: str,
    signature: tuple[str, ...],
    rows: tuple[Row, ...],
    spellings: tuple[tuple[str, str], ...] = (),
    note: str = "",
    no_object: bool = False,
    **options: Any,
) -> Format:
    """A format that has timm's or Hugging Face's ResNet below ``model.backbone.conv_encoder.``."""
    body = "model.backbone.conv_encoder.model."
    return Format(
        key,
        f"Hugging Face {model}ForObjectDetection{note}",
        signature=(r"model\.backbone\.conv_encoder\.", *signature),
        rows=(
            *rows,
            *torchvision_resnet(body),
            *huggingface_resnet(body),
            ("backbone.body.**", body + "**"),
        ),
        spellings=(*_WRAPPED, (r"^detr\.", ""), *_NEW_SPELLINGS, *spellings),
        no_object=no_object,
        **options,
    )


HUGGING_FACE = _huggingface("huggingface", "Detr", (), huggingface_names.DETR, no_object=True)

HUGGING_FACE_CONDITIONAL = _huggingface(
    "huggingface-conditional",
    "ConditionalDetr",
    (r"model\.decoder\.ref_point_head\.",),
    huggingface_names.CONDITIONAL_DETR,
    spellings=_NEW_CONDITIONAL_SPELLINGS,
)

HUGGING_FACE_DAB = _huggingface(
    "huggingface-dab",
    "DabDetr",
    (r"model\.decoder\.ref_anchor_head\.",),
    huggingface_names.DAB_DETR,
    copies=((r"^model\.decoder\.bbox_embed\.", "bbox_predictor."),),
)

HUGGING_FACE_DEFORMABLE = _huggingface(
    "huggingface-deformable",
    "DeformableDetr",
    (r"model\.level_embed",),
    huggingface_names.DEFORMABLE_DETR,
    copies=(_LAYERS_COPIES,),
)

_HUGGING_FACE_DECODERS_COPY = (rf"^model\.decoder\.(?={_HEADS}\.)", "")

HUGGING_FACE_REFINED_DEFORMABLE = _huggingface(
    "huggingface-deformable-refine",
    "DeformableDetr",
    (*HUGGING_FACE_DEFORMABLE.signature, r"model\.decoder\.bbox_embed\."),
    huggingface_names.DEFORMABLE_DETR,
    copies=(_HUGGING_FACE_DECODERS_COPY,),
    note=" with box refinement",
)

HUGGING_FACE_TWO_STAGE_DEFORMABLE = _huggingface(
    "huggingface-deformable-two-stage",
    "DeformableDetr",
    (*HUGGING_FACE_DEFORMABLE.signature, r"model\.pos_trans\."),
    huggingface_names.TWO_STAGE_DEFORMABLE_DETR,
    copies=(_HUGGING_FACE_DECODERS_COPY,),
    last=_HEADS,
    note=" with two stages",
)

# -------------------------------------------------------------------------------- backbones

TORCHVISION = Format(
    "torchvision",
    "torchvision or timm ResNet (backbone only)",
    signature=(r"layer1\.0\.conv1\.weight",),
    rows=torchvision_resnet(""),
    spellings=_WRAPPED,
    not_ours=r"fc\.",
)

DETECTRON2_BACKBONE = Format(
    "detectron2-backbone",
    "detectron2 ResNet (backbone only)",
    signature=(r"res2\.0\.conv1\.weight",),
    rows=(("backbone.**", "**"),),
    spellings=_WRAPPED,
    not_ours=r"stem\.fc\.|fc\.|linear\.",
)

EFFICIENTNET_LITE0 = Format(
    "efficientnet-lite0",
    "EfficientNet-Lite0 (backbone only)",
    signature=(r"_blocks\.0\._depthwise_conv\.weight",),
    rows=efficientnet_lite0(""),
    spellings=_WRAPPED,
    not_ours=r"_conv_head\.|_bn1\.|_fc\.",
)

# What has a part more than another comes before it: the first that the names sign decides.
FORMATS = (
    OWN,
    DETECTRON2_WRAPPER,
    DN_DAB_DETR,
    DAB_DETR,
    CONDITIONAL_DETR,
    DINO,
    TWO_STAGE_DEFORMABLE_DETR,
    REFINED_DEFORMABLE_DETR,
    DEFORMABLE_DETR,
    ORIGINAL,
    HUGGING_FACE_DAB,
    HUGGING_FACE_CONDITIONAL,
    HUGGING_FACE_TWO_STAGE_DEFORMABLE,
    HUGGING_FACE_REFINED_DEFORMABLE,
    HUGGING_FACE_DEFORMABLE,
    HUGGING_FACE,
    TORCHVISION,
    DETECTRON2_BACKBONE,
    EFFICIENTNET_LITE0,
)

# The same ResNet inside a model whose backbone is built by timm.
TIMM_BODY = Format(
    "timm", "timm (backbone only)", signature=(r"(?!)",), rows=torchvision_resnet("backbone.body.")
)


def recognise_format(names: Collection[str]) -> Format | None:
    """The format of a state dict with these tensor names; None when no format has them."""
    for candidate in FORMATS:
        if candidate.is_signed_by(names):
            return candidate
    return None


def with_body_of(state: StateDict, model_names: Collection[str]) -> StateDict:
    """Renames a ResNet body in own names to the library's names the model's backbone has.

    A ResNet of detectron2 has ``backbone.res2...``, below an FPN ``backbone.bottom_up.res2...``,
    one of timm ``backbone.body.layer1...``.
    """
    if any(name.startswith("backbone.bottom_up.") for name in model_names):
        body = re.compile(r"backbone\.(?=stem\.|res\d\.)")
        return {body.sub("backbone.bottom_up.", name): state[name] for name in state}
    wants_timm = any(name.startswith("backbone.body.") for name in model_names)
    renamed, others = (TIMM_BODY.from_own if wants_timm else TIMM_BODY.to_own)(state)
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
