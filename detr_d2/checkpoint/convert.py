"""Writing a checkpoint of any known format as another."""

from __future__ import annotations

import logging
import os

from ..errors import UserError
from .formats import (
    DETECTRON2_WRAPPER,
    FORMATS,
    HUGGING_FACE,
    ORIGINAL,
    OWN,
    recognise_format,
    with_body_of,
)
from .names import Format
from .read import read_checkpoint
from .report import abbreviate
from .write import write_checkpoint

logger = logging.getLogger(__name__)

WRITABLE: dict[str, Format] = {f.key: f for f in (OWN, ORIGINAL, DETECTRON2_WRAPPER, HUGGING_FACE)}


def convert_checkpoint(source: str, target: str, to: str, half: bool = False) -> None:
    """Reads a checkpoint of any format and writes its weights in another.

    Args:
        source: see `read_checkpoint`.
        target: file to write, its folder made if it is missing; ``.safetensors`` or torch's
            format by its ending.
        to: a key of `WRITABLE`.
        half: matrices and filters as float16; vectors, such as the statistics of norms, stay.

    Raises:
        UserError: ``source`` cannot be read or is of no known format, ``to`` is not one of
            `WRITABLE`, or the target format has no name for one of the tensors.
    """
    if to not in WRITABLE:
        raise UserError(f"'{to}' is no format to write; choose one of {', '.join(WRITABLE)}.")
    checkpoint = read_checkpoint(source)
    state = checkpoint["model"]
    recognised = recognise_format(state)
    if recognised is None:
        raise UserError(
            f"'{source}' has names of no known format ({abbreviate(state, limit=4)}); known are "
            f"{', '.join(f.title for f in FORMATS)}."
        )
    own, ignored = recognised.to_own(state, f"'{source}'")
    if ignored:
        logger.warning("Not converted, of no known part: %s", abbreviate(ignored))
    if to != OWN.key:
        # The formats of others have detectron2's or torchvision's names and frozen batch norms.
        own = {n: t for n, t in with_body_of(own, ()).items() if "num_batches_tracked" not in n}
    converted, nameless = WRITABLE[to].from_own(own)
    if to != OWN.key and any(name.startswith("mask_head.") for name in own):
        # Models with masks keep the box model under `detr.`; detectron2's wrapper has them under
        # `detr.` themselves.
        outer = "detr." if to == DETECTRON2_WRAPPER.key else ""
        of_masks = (f"{outer}mask_head.", f"{outer}bbox_attention.")
        converted = {
            name if name.startswith(of_masks) else f"detr.{name}": t
            for name, t in converted.items()
        }
    if nameless:
        raise UserError(
            f"'{source}' cannot be written as {WRITABLE[to].title}, which has no name for "
            f"{abbreviate(nameless)}."
        )
    if half:
        converted = {n: t.half() if t.ndim >= 2 else t for n, t in converted.items()}
    about = {key: checkpoint.get(key) for key in ("class_names", "config")}
    try:
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        write_checkpoint(target, converted, **about)
    except OSError as error:
        raise UserError(f"'{target}' cannot be written: {error}.") from error
    logger.info(
        "Wrote %d tensors of '%s' (%s) to '%s' (%s).",
        len(converted),
        source,
        recognised.title,
        target,
        WRITABLE[to].title,
    )
