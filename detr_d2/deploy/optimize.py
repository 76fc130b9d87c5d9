"""A detector made fast for inference, without a change of what it finds."""

from __future__ import annotations

import copy
import logging
import tempfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..config import get_detr_cfg
from ..errors import UserError
from ..modeling.heads import PredictionHead
from ..modeling.meta_arch import Detr
from ..modeling.queries import PointQueries, TopKQueries
from ..processor import has_bfloat16, in_float32
from . import pack
from .export import export_model
from .fold import folded
from .runtime import ExportedDetr, load_exported, to_dtype

logger = logging.getLogger(__name__)

BACKENDS = {"torch": "", "onnxruntime": ".onnx", "openvino": ".xml"}


def optimize_for_inference(
    model: Detr,
    dtype: torch.dtype | str = torch.float32,
    compile: bool = False,
    backend: str = "torch",
) -> Detr | ExportedDetr:
    """A copy of a model that computes the same, faster; the model itself stays as it is.

    The copy is made of the weights that the model has now; it takes no others and gives none.
    Batch norms are folded into convolutions. On CPUs weights are packed for oneDNN, activations are
    computed with the layer before them, and position embeddings of unpadded images are kept.
    Proposals that only training looks at are not made.

    Args:
        model: a `Detr`.
        dtype: float32, or bfloat16, on GPUs also float16, for everything but prediction heads and
            coordinates; devices that would be slower in bfloat16 run float32.
        compile: `torch.compile` backbone and transformer instead of packing; every new image size
            may take minutes.
        backend: "torch", or "openvino" or "onnxruntime", for which the model is exported first.

    Raises:
        UserError: another type or backend, the backend's package is missing, or it is to be
            compiled.
    """
    dtype = to_dtype(dtype)
    if backend not in BACKENDS:
        raise UserError(f"The backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    if compile and backend != "torch":
        raise UserError(
            f"The backend {backend} is not compiled by PyTorch: set MODEL.INFERENCE.COMPILE False "
            "(compile=False), or the backend to torch."
        )
    if backend != "torch":
        return exported(model, dtype, BACKENDS[backend])
    device = model.device.type
    if dtype == torch.float16 and device != "cuda":
        raise UserError(f"float16 is for GPUs, the model is on {device!r}: choose bfloat16.")
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        other = " (float16 is faster)" if device == "cuda" else ""
        logger.warning(
            f"This {device} device is slower in bfloat16 than in float32{other}: the model runs in "
            "float32."
        )
        dtype = torch.float32
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    fast.backbone = folded(fast.backbone, fast.device, len(fast.pixel_mean))
    fast.load_state_dict = fast.state_dict = refuse
    queries = fast.transformer.queries
    if isinstance(queries, TopKQueries):
        queries.supervise_all = False
    # In float32 whatever the type: a box in bfloat16 is as coarse as 1/256 of the image.
    heads = [m for m in fast.modules() if isinstance(m, PredictionHead)]
    points = [m for m in fast.modules() if isinstance(m, PointQueries)]
    if compile:
        fast.backbone = torch.compile(fast.backbone)
        fast.transformer = torch.compile(fast.transformer)
    elif fast.device.type == "cpu" and pack.is_available():
        fast.neck.position = CachedPositionEmbedding(fast.neck.position)
        for part in heads + [m.reference_head for m in points]:
            pack.pack(part, torch.float32)
        pack.pack(fast, dtype)
        # Packed weights are the processor's own: they can neither be copied nor pickled.
        fast.__deepcopy__ = fast.__reduce_ex__ = refuse
        return fast
    if dtype != torch.float32:
        fast.inference_dtype = dtype
        for head in heads:
            head.class_head, head.box_head = InFloat32(head.class_head), InFloat32(head.box_head)
        for part in points:
            part.reference_head = InFloat32(part.reference_head)
    return fast


def refuse(*args: Any, **kwargs: Any) -> None:
    """In place of what an optimised copy cannot do.

    Raises:
        UserError: always.
    """
    raise UserError(
        "This is an optimised copy: its weights are folded and packed, it neither takes nor gives "
        "any. Load, save, copy or export the model it was made from, and optimise that again, or "
        "set MODEL.INFERENCE.BACKEND none."
    )


class InFloat32(nn.Module):
    """A part that autocast leaves alone."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(self.part, x)


def prepare_for_inference(cfg: CfgNode, model: Detr) -> nn.Module:
    """The model as `MODEL.INFERENCE` wants it.

    Raises:
        UserError: it wants what its backend cannot do.
    """
    settings = cfg.MODEL.INFERENCE
    if settings.BACKEND == "none":
        if settings.COMPILE or to_dtype(settings.DTYPE) != torch.float32:
            raise UserError(
                "MODEL.INFERENCE.BACKEND none runs the model as it is, and DTYPE is "
                f"{settings.DTYPE}, COMPILE {settings.COMPILE}: set BACKEND torch, or float32 and "
                "False."
            )
        return model.eval()
    return optimize_for_inference(model, settings.DTYPE, settings.COMPILE, settings.BACKEND)


def load_from_config(cfg: CfgNode) -> ExportedDetr:
    """The exported model that `MODEL.WEIGHTS` names. Its file says what runs it.

    Raises:
        UserError: see `load_exported`.
    """
    settings, path = cfg.MODEL.INFERENCE, cfg.MODEL.WEIGHTS
    [backend] = [b for b, suffix in BACKENDS.items() if suffix == Path(path).suffix] or ["torch"]
    if settings.COMPILE or settings.BACKEND not in ("torch", backend):
        logger.warning(
            f"'{path}' runs on {backend}: MODEL.INFERENCE.BACKEND {settings.BACKEND} and COMPILE "
            f"{settings.COMPILE} change nothing."
        )
    model = load_exported(path, settings.DTYPE)
    _warn_of_ignored(cfg, model)
    return model


def _warn_of_ignored(cfg: CfgNode, model: ExportedDetr) -> None:
    """What a file computes with stays what it was at the export. Defaults need not be meant."""
    of_file = {
        "TEST.DETECTIONS_PER_IMAGE": model.detections_per_image,
        "MODEL.MASK_THRESHOLD": model.mask_threshold,
        "MODEL.DETR.PANOPTIC.SCORE_THRESHOLD": getattr(model.panoptic, "score_threshold", None),
        "MODEL.DETR.PANOPTIC.MIN_AREA": getattr(model.panoptic, "min_area", None),
    }
    defaults = get_detr_cfg()
    for key, ours in of_file.items():
        asked, default = (attrgetter(key)(config) for config in (cfg, defaults))
        if ours is not None and asked not in (ours, default):
            logger.warning(
                f"{key} {asked} changes nothing: '{cfg.MODEL.WEIGHTS}' was exported with {ours}. "
                "Export it again for another."
            )


def exported(model: Detr, dtype: torch.dtype, suffix: str) -> ExportedDetr:
    """The model by way of a file that is gone again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        export_model(model, path)
        return load_exported(path, dtype)


class CachedPositionEmbedding(nn.Module):
    """Position embeddings of maps without padding, made once for each size."""

    capacity = 64

    def __init__(self, position: nn.Module):
        """
        Args:
            position: (B, H, W) padding -> (B, C, H, W).
        """
        super().__init__()
        self.position = position
        self._known: dict[tuple[int, ...], Tensor] = {}

    def forward(self, padding: Tensor) -> Tensor:
        """(B, H, W) bool, True on padding -> (B, C, H, W)."""
        if padding.any():
            return self.position(padding)
        size = tuple(padding.shape[1:])
        if size not in self._known:
            if len(self._known) >= self.capacity:
                self._known.pop(next(iter(self._known)))
            self._known[size] = self.position(padding[:1])
        return self._known[size].expand(padding.shape[0], -1, -1, -1)
