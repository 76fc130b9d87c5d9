"""Which parts go together, and why others do not."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from detectron2.config import CfgNode

from ..errors import UserError
from .registry import CROSS_ATTENTION_REGISTRY, QUERIES_REGISTRY

REGISTRIES = {
    "QUERIES": QUERIES_REGISTRY,
    "CROSS_ATTENTION": CROSS_ATTENTION_REGISTRY,
    "ENCODER_ATTENTION": CROSS_ATTENTION_REGISTRY,
}
CHOICES = {
    "POSITION_EMBEDDING": ("sine", "learned"),
    "NECK": ("single_scale", "multi_scale"),
    "ENCODER_ATTENTION": ("plain", "deformable"),
    "ACTIVATION": ("relu", "prelu"),
    "QUERIES": ("learned", "point", "anchor", "top_k"),
    "QUERY_CONTENT": ("zero", "learned", "memory", "position"),
    "SUPERVISED_PROPOSALS": ("chosen", "all"),
    "QUERY_POSITION": ("static", "conditional", "modulated", "box", "padded_box"),
    "SELF_ATTENTION": ("plain", "separate"),
    "CROSS_ATTENTION": ("plain", "conditional", "deformable"),
    "BOX_HEAD": ("absolute", "offset"),
    "REFINEMENT": ("none", "detached", "look_forward_twice"),
    "CLASSIFICATION": ("softmax", "sigmoid", "varifocal"),
    "DENOISING.METHOD": ("none", "dn", "contrastive"),
}


# Where nothing is known of it: what no rule objects to.
OF_THE_CRITERION = {"CLASSIFICATION": None, "DEEP_SUPERVISION": True}


def uses_positions(detr: CfgNode) -> bool:
    """Whether anything may look at the positions of the encoder's tokens. Registered queries and
    attentions may."""
    return (
        detr.ENC_LAYERS > 0
        or detr.CROSS_ATTENTION != "deformable"
        or detr.QUERIES not in CHOICES["QUERIES"]
    )


def check_combination(detr: CfgNode) -> None:
    """
    Args:
        detr: `cfg.MODEL.DETR`.

    Raises:
        UserError: see `check_parts`.
    """
    check_parts({**detr, "DENOISING.METHOD": detr.DENOISING.METHOD})


def check_parts(parts: Mapping[str, Any]) -> None:
    """
    Args:
        parts: values of the keys of `MODEL.DETR`; those of the criterion may be missing.

    Raises:
        UserError: a part that does not exist, or parts that make no sense together; with the
            reason.
    """
    given = {key: parts[key] for key in CHOICES if key in parts}
    for key, value in given.items():
        check_choice(key, value)
    # Of registered parts nothing is known.
    if any(value not in CHOICES[key] for key, value in given.items()):
        return
    for is_wrong, reason in _rules(SimpleNamespace(**OF_THE_CRITERION | dict(parts))):
        if is_wrong:
            raise UserError("These parts do not go together. " + reason)


def check_choice(key: str, value: str) -> None:
    """
    Args:
        key: of `MODEL.DETR`.

    Raises:
        UserError: no part has that name.
    """
    known = [*CHOICES[key], *(name for name, _ in REGISTRIES.get(key, ()))]
    if value not in known:
        argument = key.rpartition(".")[2].lower()
        raise UserError(
            f"MODEL.DETR.{key} (in a LazyConfig: {argument}) is {value!r}; it must be one of "
            f"{', '.join(known)}."
        )


def _rules(detr: SimpleNamespace) -> list[tuple[bool, str]]:
    """What is wrong where it is true, and why; the attributes are keys of `MODEL.DETR`."""
    has_position = detr.QUERIES in ("learned", "point") or (
        detr.QUERIES == "top_k" and detr.QUERY_CONTENT == "position"
    )
    has_box = detr.QUERIES in ("anchor", "top_k")
    from_box = detr.QUERY_POSITION in ("modulated", "box", "padded_box")
    refines = detr.REFINEMENT != "none"
    spatial = detr.QUERY_POSITION in ("conditional", "modulated")
    denoises = getattr(detr, "DENOISING.METHOD") != "none"
    return [
        (
            detr.QUERIES != "top_k" and detr.QUERY_CONTENT in ("memory", "position"),
            f"MODEL.DETR.QUERY_CONTENT {detr.QUERY_CONTENT} is made from the encoder's proposals: "
            "it needs QUERIES top_k.",
        ),
        (
            detr.QUERIES == "top_k" and detr.QUERY_CONTENT == "zero",
            "MODEL.DETR.QUERIES top_k needs QUERY_CONTENT learned, memory or position.",
        ),
        (
            detr.QUERIES == "learned" and detr.QUERY_CONTENT != "zero",
            "MODEL.DETR.QUERIES learned are positions only: QUERY_CONTENT must be zero.",
        ),
        (
            detr.QUERY_POSITION in ("static", "conditional") and not has_position,
            f"MODEL.DETR.QUERY_POSITION {detr.QUERY_POSITION} needs queries that bring a position: "
            "QUERIES learned or point, or top_k with QUERY_CONTENT position; with boxes choose "
            "modulated or box.",
        ),
        (
            detr.QUERY_POSITION == "conditional" and detr.QUERIES == "learned",
            "MODEL.DETR.QUERY_POSITION conditional needs a reference: QUERIES point or top_k.",
        ),
        (
            from_box and not has_box,
            f"MODEL.DETR.QUERY_POSITION {detr.QUERY_POSITION} is made from boxes: it needs QUERIES "
            "anchor or top_k.",
        ),
        (
            detr.CROSS_ATTENTION == "conditional" and not spatial,
            "MODEL.DETR.CROSS_ATTENTION conditional compares places apart from contents: it needs "
            "QUERY_POSITION conditional or modulated.",
        ),
        (
            detr.CROSS_ATTENTION != "conditional" and spatial,
            f"MODEL.DETR.QUERY_POSITION {detr.QUERY_POSITION} makes a place for CROSS_ATTENTION "
            "conditional only, others would leave its parameters without a gradient.",
        ),
        (
            detr.CROSS_ATTENTION == "deformable" and detr.QUERIES == "learned",
            "MODEL.DETR.CROSS_ATTENTION deformable looks about a reference, which QUERIES learned "
            "do not have: choose point, anchor or top_k.",
        ),
        (
            detr.BOX_HEAD == "offset" and detr.QUERIES == "learned",
            "MODEL.DETR.BOX_HEAD offset needs a reference to start from: QUERIES point, anchor or "
            "top_k.",
        ),
        (
            detr.BOX_HEAD == "absolute" and detr.QUERIES != "learned",
            f"MODEL.DETR.BOX_HEAD absolute ignores the references of QUERIES {detr.QUERIES}: "
            "choose offset.",
        ),
        (
            refines and detr.BOX_HEAD == "absolute",
            f"MODEL.DETR.REFINEMENT {detr.REFINEMENT} moves references, which BOX_HEAD absolute "
            "does not have: choose offset.",
        ),
        (
            not detr.SHARED_HEADS and not detr.DEEP_SUPERVISION,
            "MODEL.DETR.SHARED_HEADS False without DEEP_SUPERVISION leaves all heads but the last "
            "without a loss.",
        ),
        (
            detr.QUERIES == "top_k" and detr.CLASSIFICATION == "softmax",
            "MODEL.DETR.QUERIES top_k ranks tokens by the probability of an object, each on its "
            "own: it needs CLASSIFICATION sigmoid or varifocal.",
        ),
        (
            detr.QUERIES != "top_k" and detr.CLASS_AGNOSTIC_PROPOSALS,
            "MODEL.DETR.CLASS_AGNOSTIC_PROPOSALS is for QUERIES top_k: others propose nothing.",
        ),
        (
            detr.QUERIES != "top_k" and detr.SUPERVISED_PROPOSALS != "chosen",
            "MODEL.DETR.SUPERVISED_PROPOSALS is for QUERIES top_k: others propose nothing.",
        ),
        (
            denoises and (not has_box or has_position),
            "MODEL.DETR.DENOISING makes queries from boxes alone: it needs QUERIES anchor or "
            "top_k, with QUERY_CONTENT other than position.",
        ),
        (
            denoises and detr.CLASSIFICATION == "softmax",
            "MODEL.DETR.DENOISING divides its losses by objects, softmax by the weights of all "
            "queries: set CLASSIFICATION to sigmoid or varifocal.",
        ),
        (
            detr.ENCODER_POSITION_SCALE and detr.ENC_LAYERS == 0,
            "MODEL.DETR.ENCODER_POSITION_SCALE needs encoder layers.",
        ),
    ]
