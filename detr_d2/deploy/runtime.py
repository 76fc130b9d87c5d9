"""Exported detectors, run by PyTorch, ONNX Runtime or OpenVINO.

Shapes: B images, H and W of the padded batch in pixels, D detections per image, h and w of masks.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ..errors import UserError, require_package
from ..modeling.meta_arch import Detr
from ..modeling.panoptic import PanopticMerger
from ..modeling.segmentation import add_masks, add_panoptic
from ..processor import has_bfloat16
from .pt2 import load_program

logger = logging.getLogger(__name__)

# (images (B, 3, H, W), sizes (B, 2)) -> boxes (B, D, 4), scores (B, D), classes (B, D); with masks
# also queries (B, D), logits (B, D, h, w). `smallest_side`, where it has one: of H and W.
Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
# OpenVINO: how often a size of batches comes before it has a network of its own, and how many have.
SPECIALISE_AFTER, MOST_SPECIALISED = 3, 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportedDetr(nn.Module):
    """An exported detector with `Detr`'s interface for inference, for evaluators and predictors."""

    def __init__(
        self,
        run: Run,
        input_format: str = "RGB",
        class_names: Sequence[str] = (),
        mask_threshold: float | None = None,
        panoptic: PanopticMerger | None = None,
        size_divisibility: int = 1,
        min_size: int | None = None,
        max_size: int | None = None,
        detections_per_image: int | None = None,
    ):
        """
        Args:
            run: the function in the file.
            input_format, class_names: as the model was trained.
            mask_threshold, panoptic: as those of `Detr`; None: the file has no masks.
            size_divisibility: what the file pads images to before it makes masks.
            min_size, max_size: of images as the model is tested; None: nobody said.
            detections_per_image: at most; None: nobody said.
        """
        super().__init__()
        self.run = run
        self.input_format = input_format
        self.class_names = list(class_names)
        self.mask_threshold = mask_threshold
        self.panoptic = panoptic
        self.size_divisibility = size_divisibility
        self.min_size = min_size
        self.max_size = max_size
        self.detections_per_image = detections_per_image

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """See `Detr.forward` for inputs and outputs at inference."""
        # By numpy: PyTorch's threads would still be awake, and in the way of the runtime's own.
        arrays = [x["image"].cpu().numpy() for x in batched_inputs]
        sizes = np.array([array.shape[-2:] for array in arrays], np.int64)
        images = as_batch(arrays, getattr(self.run, "smallest_side", 1))
        outputs = self.run(torch.from_numpy(images), torch.from_numpy(sizes))
        boxes, scores, classes = outputs[:3]
        if self.mask_threshold is None:
            return Detr.detections(boxes, scores, classes, batched_inputs)
        queries, logits = outputs[3:]
        results = Detr.detections(boxes, scores, classes, batched_inputs, queries)

        def masks_of(rows: Tensor, wanted: Tensor) -> Tensor:
            """Of the first detection of each query; its others have the same."""
            places = (queries[rows] == wanted[:, None]).int().argmax(1)
            return logits[rows, places]

        divisor = self.size_divisibility
        size = tuple(-(-length // divisor) * divisor for length in images.shape[-2:])
        add_masks(results, masks_of, batched_inputs, size, self.mask_threshold)
        if self.panoptic is not None:
            best = best_of_queries(scores, classes, queries)
            add_panoptic(results, *best, masks_of, self.panoptic, batched_inputs, size)
        return results


def check_same(
    model: ExportedDetr, path: str, input_format: str, class_names: Sequence[str] | None
) -> None:
    """
    Args:
        input_format, class_names: of the images that the model is to be evaluated on.

    Raises:
        UserError: those of the file are others.
    """
    if model.input_format != input_format:
        raise UserError(
            f"'{path}' expects {model.input_format} images, and INPUT.FORMAT is {input_format}: "
            f"set INPUT.FORMAT {model.input_format}."
        )
    ours, theirs = model.class_names, list(class_names or ())
    if not ours or not theirs or ours == theirs:
        return
    pairs = zip_longest(ours, theirs)
    index, pair = next((i, pair) for i, pair in enumerate(pairs) if len(set(pair)) > 1)
    raise UserError(
        f"'{path}' has {len(ours)} classes and the data set {len(theirs)}; class {index} is "
        f"{pair[0]!r} in the file and {pair[1]!r} in the data set: evaluate on data with the "
        "classes of the file."
    )


def best_of_queries(scores: Tensor, classes: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Detections (B, D), best first -> score and class (B, Q) of the best of each query; score 0
    where there is none."""
    same = queries[:, :, None] == queries[:, None]
    rows, places = (~same.tril(-1).any(-1)).nonzero(as_tuple=True)
    place = rows, queries[rows, places]
    best_scores = scores.new_zeros(len(queries), int(queries.max()) + 1)
    best_classes = classes.new_zeros(best_scores.shape)
    best_scores[place], best_classes[place] = scores[rows, places], classes[rows, places]
    return best_scores, best_classes


def as_batch(arrays: Sequence[np.ndarray], smallest_side: int = 1) -> np.ndarray:
    """(C, H, W) of any size and type -> (B, C, H, W) float32, padded with zeros to one size, and to
    `smallest_side`."""
    if len(arrays) == 1 and min(arrays[0].shape[-2:]) >= smallest_side:  # of float32 no copy
        return np.ascontiguousarray(arrays[0], np.float32)[None]
    sides = [array.shape[-2:] for array in arrays]
    height, width = np.max([*sides, (smallest_side, smallest_side)], axis=0)
    batch = np.zeros((len(arrays), len(arrays[0]), height, width), np.float32)
    for padded, array in zip(batch, arrays, strict=True):
        padded[:, : array.shape[1], : array.shape[2]] = array
    return batch


def to_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """
    Raises:
        UserError: none of `DTYPES`.
    """
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise UserError(f"Inference runs in {', '.join(DTYPES)}, not in {dtype}.")
    return dtype


def is_exported(path: str) -> bool:
    """Whether a path names an exported model instead of weights."""
    return Path(path).suffix in _OPENERS


def load_exported(path: str | Path, dtype: torch.dtype | str = torch.float32) -> ExportedDetr:
    """Opens what `export_model` wrote.

    Args:
        dtype: float32; OpenVINO computes in bfloat16, too, where the processor can.

    Raises:
        UserError: there is no such file, it or its `.json` cannot be read, or its runtime is not
            installed.
    """
    path, dtype = Path(path), to_dtype(dtype)
    if not path.is_file():
        raise UserError(f"There is no exported model at '{path}'.")
    run = open_model(path, dtype)
    description = description_of(path)
    if not description.is_file():
        raise UserError(
            f"'{description}' is missing: it says what the pixels, classes and masks of '{path}' "
            "are, so copy it, too, or export the model again."
        )
    try:
        described = json.loads(description.read_text())
        panoptic = described.get("panoptic")
        return ExportedDetr(
            run,
            described["input_format"],
            described["class_names"] or (),
            described.get("mask_threshold"),
            PanopticMerger(**panoptic) if panoptic else None,
            described.get("size_divisibility", 1),
            described.get("min_size"),
            described.get("max_size"),
            described.get("detections_per_image"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{description}' does not describe an exported model ({type(error).__name__}: "
            f"{error}): export the model again."
        ) from error


def description_of(path: Path) -> Path:
    """The file that says what a model's pixels, classes and masks are."""
    return path.with_name(f"{path.name}.json")


def open_model(path: Path, dtype: torch.dtype = torch.float32) -> Run:
    """The function in a `.pt2`, `.onnx` or `.xml` file, see `load_exported`.

    Raises:
        UserError: the file cannot be opened, or does not compute in that type.
    """
    if dtype == torch.float16 or (dtype == torch.bfloat16 and path.suffix != ".xml"):
        raise UserError(f"'{path}' computes in float32; only OpenVINO's files can in bfloat16.")
    if torch.cuda.is_available():
        logger.warning(f"'{path}' computes on the CPU: on a GPU, weights in PyTorch are faster.")
    try:
        return _OPENERS[path.suffix](path, dtype)
    except UserError:
        raise
    except Exception as error:  # every runtime has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"'{path}' cannot be opened as an exported model: {reason}") from error


def _open_torch(path: Path, dtype: torch.dtype) -> Run:
    module, smallest_side = load_program(path)

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(module(images, sizes))

    run.smallest_side = smallest_side
    return run


def _open_onnx(path: Path, dtype: torch.dtype) -> Run:
    runtime = require_package("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
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
    if dtype == torch.bfloat16 and not has_bfloat16("cpu"):
        logger.warning(
            "This processor has no fast bfloat16: OpenVINO is slower in it, or ignores it."
        )
    compiled = core.compile_model(model, "CPU", settings)
    # An image of a few pixels must not be what a network sees first: with maps of 1x1, or fewer
    # tokens than queries, OpenVINO leaves out operators that every later image needs.
    channels = model.input("images").partial_shape[1].get_length()
    compiled([np.zeros((1, channels, 512, 512), np.float32), np.full((1, 2), 512)])
    # A network has one place for its outputs, and a call uses all cores: one at a time.
    lock = Lock()
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

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        with lock:
            network = compiled_for(tuple(images.shape))
            outputs = network([images.numpy(), sizes.numpy()]).values()
            return tuple(torch.from_numpy(np.array(output)) for output in outputs)

    return run


_OPENERS: dict[str, Callable[[Path, torch.dtype], Run]] = {
    ".pt2": _open_torch,
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
}
