"""A detector as a file that other runtimes read: `torch.export`, ONNX, OpenVINO.

Number of images, height and width are free in every format; the inputs and outputs are those of
`ExportableDetr`. Beside the file lies another, its name with `.json` added, that says what its
pixels and classes are.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, require_package
from ..modeling.meta_arch import Detr
from .exportable import INPUTS, ExportableDetr
from .pt2 import save_program
from .runtime import Run, description_of, open_model

logger = logging.getLogger(__name__)

SUFFIXES = {".pt2": "torch.export", ".onnx": "ONNX", ".xml": "OpenVINO"}
# (images, height, width) of what is compared with PyTorch before a file counts as written, and the
# largest differences of scores, of boxes in pixels, and of masks' probabilities. Scores differ by
# fractions: the images are noise, and a good detector is sure that there is nothing in them.
TRIALS = ((1, 333, 447), (1, 512, 384), (2, 405, 419))
SCORE_TOLERANCE, PIXEL_TOLERANCE, MASK_TOLERANCE = 1e-2, 0.5, 1e-2


def export_model(
    model: Detr,
    path: str | Path,
    class_names: Sequence[str] | None = None,
    trials: Sequence[tuple[int, int, int]] = TRIALS,
    **described: Any,
) -> None:
    """Writes a model to `.pt2`, `.onnx` or `.xml` (with a `.bin` beside it), whatever `path` ends
    in, after its detections were compared with PyTorch's.

    Args:
        class_names: written to the `.json`.
        trials: sizes that are compared, see `TRIALS`.
        described: further plain values for the `.json`.

    Raises:
        UserError: another ending, another number of names, a package that is missing, a folder
            that cannot be written to, or detections that differ or are none.
    """
    path = Path(path)
    if model.detections_per_image < 1 or not trials:
        raise UserError(
            f"TEST.DETECTIONS_PER_IMAGE is {model.detections_per_image} and the number of trials "
            f"{len(trials)}: without a detection '{path}' cannot be compared with PyTorch."
        )
    number = model.criterion.classification.num_classes
    if class_names and len(class_names) != number:
        raise UserError(
            f"The model has {number} classes, and {len(class_names)} names are given: name the "
            "data set that it was trained on in DATASETS.TEST."
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path}' must end in one of {', '.join(SUFFIXES)}.")
    refuse_to_overwrite(path)
    exportable = ExportableDetr(model).cpu()
    if model.panoptic is not None:
        refuse_few_detections(exportable, trials[0])
    # Only what was compared gets its final name, in one move: a program may have an earlier file
    # open. What is opened first comes last.
    with draft_folder(path) as folder:
        draft = Path(folder) / path.name
        write(exportable, draft)
        scores, pixels, masks = largest_differences(exportable, open_model(draft), trials)
        found = f"scores differ from PyTorch's by up to {scores:.1%}, boxes by {pixels:.1e} pixels"
        if model.mask_head is not None:
            found += f", masks by a probability of {masks:.1e}"
        close = scores <= SCORE_TOLERANCE and pixels <= PIXEL_TOLERANCE and masks <= MASK_TOLERANCE
        if not close:  # NaN neither
            raise UserError(f"'{path}' is not written: its {found}.")
        description = describe(model, class_names, exportable.size_divisibility) | described
        description_of(draft).write_text(json.dumps(description, indent=1))
        try:
            for file in sorted(
                Path(folder).iterdir(), key=lambda f: (f == draft, f.suffix == ".bin")
            ):
                os.replace(file, path.parent / file.name)
        except OSError as error:
            raise UserError(f"'{path}' cannot be written: {error}.") from error
    logger.info("Wrote '%s' (%s): %s.", path, SUFFIXES[path.suffix], found)


@contextmanager
def draft_folder(path: Path) -> Iterator[str]:
    """A folder beside `path` that is gone afterwards.

    Raises:
        UserError: nothing can be written there; before the minutes that an export takes.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error}.") from error
    with folder as name:
        yield name


@torch.no_grad()
def refuse_few_detections(exportable: ExportableDetr, trial: tuple[int, int, int]) -> None:
    """
    Raises:
        UserError: the file may lack queries whose masks belong to the segments.
    """
    _, height, width = trial
    images = torch.zeros(1, len(exportable.pixel_mean), height, width)
    queries = exportable.num_queries(images)
    if exportable.detections_per_image < queries:
        raise UserError(
            f"TEST.DETECTIONS_PER_IMAGE is {exportable.detections_per_image}, and segments are "
            f"merged of {queries} queries: raise it to that, or set MODEL.DETR.PANOPTIC.ENABLED "
            "False."
        )


def refuse_to_overwrite(path: Path) -> None:
    """
    Raises:
        UserError: a `.xml` would bring a `.bin` in place of one that is no OpenVINO model's, as
            Hugging Face's weights are called.
    """
    beside = path.with_suffix(".bin")
    is_ours = path.exists() or description_of(path).exists()
    if path.suffix == ".xml" and beside.exists() and not is_ours:
        raise UserError(f"'{path}' would overwrite '{beside}': choose another name.")


def describe(
    model: Detr, class_names: Sequence[str] | None, size_divisibility: int
) -> dict[str, Any]:
    """What a program must know that runs the file."""
    description = {
        "inputs": f"images (B, {len(model.pixel_mean)}, H, W) float32 in [0, 255], padded below "
        "and right; sizes (B, 2) int64 height and width without padding",
        "outputs": "boxes (B, D, 4) x1, y1, x2, y2 in pixels of the image as given, which they "
        "may leave; scores (B, D), best first, of which low ones are no objects; classes (B, D), "
        "from 0; no object is there twice, so non-maximum suppression is not needed",
        "resize": "shorter side to min_size or, where the longer one would exceed max_size, to "
        "less; rounded; bilinear with anti-aliasing, as Pillow's",
        "input_format": model.input_format,
        "class_names": list(class_names) if class_names else None,
        "detections_per_image": model.detections_per_image,
    }
    if model.mask_head is not None:
        description["outputs"] += (
            "; queries (B, D); masks (B, D, h, w) logits, to be enlarged to (H, W), each rounded "
            "up to a multiple of size_divisibility, cut to the image's size and compared with "
            "mask_threshold after a sigmoid"
        )
        description["size_divisibility"] = size_divisibility
        description["mask_threshold"] = model.mask_threshold
    if model.panoptic is not None:
        description["panoptic"] = {
            "thing_classes": sorted(model.panoptic.thing_classes),
            "score_threshold": model.panoptic.score_threshold,
            "min_area": model.panoptic.min_area,
        }
    return description


def write(exportable: ExportableDetr, path: Path) -> None:
    """Traces the model and writes it in the format that `path` ends in."""
    images = torch.zeros(2, len(exportable.pixel_mean), 320, 352)
    sizes = torch.tensor([[320, 352], [256, 300]])
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            exportable, (images, sizes), dynamic_shapes=({0: free, 2: free, 3: free}, {0: free})
        )
    if path.suffix == ".pt2":
        save_program(program, path)
        return
    onnx = path.with_suffix(".onnx")
    _write_onnx(program, (images, sizes), exportable.outputs, onnx)
    if path.suffix == ".xml":
        openvino = require_package("openvino", "export")
        # By way of ONNX, whose operators OpenVINO knows better than those of PyTorch's programs.
        openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)
        onnx.unlink()


def _write_onnx(
    program: Any, inputs: tuple[Tensor, ...], outputs: Sequence[str], path: Path
) -> None:
    for package in ("onnx", "onnxscript"):
        require_package(package, "export")
    for talkative in ("onnxscript", "onnx_ir"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program, inputs, dynamo=True, input_names=INPUTS, output_names=outputs, verbose=False
        )
        converted.save(str(path))


def largest_differences(
    exportable: ExportableDetr, run: Run, trials: Sequence[tuple[int, int, int]]
) -> tuple[float, float, float]:
    """Largest differences of scores as fractions, of boxes in pixels, and of masks' probabilities
    (0 without masks) from PyTorch's.

    The images of a batch have different sizes. Equal scores may come in any order and be cut off
    anywhere, so each of the file's detections is compared with the most similar one of PyTorch's,
    of which more are asked for.
    """
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(3)
    for batch, height, width in trials:
        size = (batch, len(exportable.pixel_mean), height, width)
        images = 255 * torch.rand(size, generator=generator)
        sizes = torch.tensor([[height - 20 * i, width - 33 * i] for i in range(batch)])
        actual = run(images, sizes)
        count = actual[1].shape[1]
        with torch.no_grad():
            expected = exportable(images, sizes)
            more = exportable.detections(images, sizes, 2 * count + 100)
        _, scores, pixels = most_similar(actual, more)
        scores = scores.maximum(relative(actual[1], expected[1]))
        found = [scores.amax(), pixels.amax(), torch.zeros(())]
        if exportable.mask_head is not None:
            found[2] = mask_difference(actual, expected)
        worst = worst.maximum(torch.stack(found))
    return tuple(worst.tolist())


def most_similar(
    detections: Sequence[Tensor], others: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each detection the most similar other of its class: its index, the difference of the
    scores as a fraction, and of the boxes in pixels, infinite where there is none; (B, D) each."""
    pixels = torch.cdist(detections[0], others[0], p=inf)
    pixels = pixels.masked_fill(detections[2][..., None] != others[2][:, None], inf)
    scores = relative(detections[1][..., None], others[1][:, None])
    index = (pixels / PIXEL_TOLERANCE).maximum(scores / SCORE_TOLERANCE).argmin(-1, keepdim=True)
    return index[..., 0], scores.gather(-1, index)[..., 0], pixels.gather(-1, index)[..., 0]


def relative(actual: Tensor, expected: Tensor) -> Tensor:
    """Differences of scores as fractions of those expected."""
    return (actual - expected).abs() / expected.clamp(min=1e-6)


def mask_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """The largest, of the detections that are the same; infinite where none is."""
    index, scores, pixels = most_similar(actual, expected)
    same = (scores <= SCORE_TOLERANCE) & (pixels <= PIXEL_TOLERANCE)
    if not same.any():
        return torch.tensor(inf)
    rows = torch.arange(len(index))[:, None]
    differences = actual[4].sigmoid() - expected[4][rows, index].sigmoid()
    return differences[same].abs().amax()
