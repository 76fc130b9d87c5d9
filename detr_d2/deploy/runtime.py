"""Exported detectors, run by PyTorch, ONNX Runtime or OpenVINO.

Shapes: B images, H and W of the padded batch in pixels, D detections per image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ..errors import UserError, require_package
from ..modeling.meta_arch import Detr

# (images (B, 3, H, W), sizes (B, 2)) -> boxes (B, D, 4), scores (B, D), classes (B, D)
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# OpenVINO: how often a size of batches comes before it has a network of its own, and how many have.
SPECIALISE_AFTER, MOST_SPECIALISED = 3, 8


class ExportedDetr(nn.Module):
    """An exported detector with `Detr`'s interface for inference, for evaluators and predictors."""

    def __init__(self, run: Run, input_format: str = "RGB", class_names: Sequence[str] = ()):
        super().__init__()
        self.run = run
        self.input_format = input_format
        self.class_names = list(class_names)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """See `Detr.forward` for inputs and outputs at inference."""
        # By numpy: PyTorch's threads would still be awake, and in the way of the runtime's own.
        arrays = [x["image"].cpu().numpy() for x in batched_inputs]
        sizes = np.array([array.shape[-2:] for array in arrays], np.int64)
        images = as_batch(arrays)
        outputs = self.run(torch.from_numpy(images), torch.from_numpy(sizes))
        return Detr.detections(*outputs, batched_inputs)


def as_batch(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(C, H, W) of any size and type -> (B, C, H, W) float32, padded with zeros."""
    if len(arrays) == 1:  # of float32 it is no copy
        return np.ascontiguousarray(arrays[0], np.float32)[None]
    height, width = np.max([array.shape[-2:] for array in arrays], axis=0)
    batch = np.zeros((len(arrays), len(arrays[0]), height, width), np.float32)
    for padded, array in zip(batch, arrays, strict=True):
        padded[:, : array.shape[1], : array.shape[2]] = array
    return batch


def is_exported(path: str) -> bool:
    """Whether a path names an exported model instead of weights."""
    return Path(path).suffix in _OPENERS


def load_exported(path: str | Path, dtype: torch.dtype = torch.float32) -> ExportedDetr:
    """Opens what `export_model` wrote.

    Args:
        dtype: float32; OpenVINO computes in bfloat16, too, where the processor can.

    Raises:
        UserError: there is no such file, it cannot be read, or its runtime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no exported model at '{path}'.")
    described: dict[str, Any] = {}
    description = path.with_suffix(".json")
    if description.is_file():
        described = json.loads(description.read_text())
    run = open_model(path, dtype)
    return ExportedDetr(
        run, described.get("input_format", "RGB"), described.get("class_names") or ()
    )


def open_model(path: Path, dtype: torch.dtype = torch.float32) -> Run:
    """The function in a `.pt2`, `.onnx` or `.xml` file, see `load_exported`."""
    if dtype != torch.float32 and path.suffix != ".xml":
        raise UserError(f"'{path}' computes in float32; only OpenVINO's files can do otherwise.")
    try:
        return _OPENERS[path.suffix](path, dtype)
    except UserError:
        raise
    except Exception as error:  # every runtime has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"'{path}' cannot be opened as an exported model: {reason}") from error


def _open_torch(path: Path, dtype: torch.dtype) -> Run:
    module = torch.export.load(path).module()

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return tuple(module(images, sizes))

    return run


def _open_onnx(path: Path, dtype: torch.dtype) -> Run:
    runtime = require_package("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        return tuple(torch.from_numpy(output) for output in outputs)

    return run


def _open_openvino(path: Path, dtype: torch.dtype) -> Run:
    openvino = require_package("openvino", "export")
    settings = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    model = core.read_model(str(path))
    compiled = core.compile_model(model, "CPU", settings)
    seen: Counter[tuple[int, ...]] = Counter()
    specialised: dict[tuple[int, ...], Any] = {}

    def compiled_for(shape: tuple[int, ...]) -> Any:
        """Faster at one size, but a second to make: for sizes that come again and again."""
        seen[shape] += 1
        is_common = seen[shape] > SPECIALISE_AFTER and len(specialised) < MOST_SPECIALISED
        if shape not in specialised and is_common:
            fixed = model.clone()
            fixed.reshape({"images": list(shape), "sizes": [shape[0], 2]})
            specialised[shape] = core.compile_model(fixed, "CPU", settings)
        return specialised.get(shape, compiled)

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        network = compiled_for(tuple(images.shape))
        outputs = network([images.numpy(), sizes.numpy()]).values()
        return tuple(torch.from_numpy(np.array(output)) for output in outputs)

    return run


_OPENERS: dict[str, Callable[[Path, torch.dtype], Run]] = {
    ".pt2": _open_torch,
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
}
