"""What scenes of digits are drawn from: scikit-learn's handwritten digits and photographs.

Whoever changes how a digit looks raises `VERSION` in digit_scenes.py.

Shapes: N digits, h and w of a drawn one in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from ..errors import UserError

CLASSES = tuple("0123456789")
MARGIN = 4  # pixels on each side of a drawn digit
VAL_SHARE = 0.15  # of the digits of each class
VAL_PHOTO_SHARE = 0.45  # lower part of the photographs, which training never sees

# What keeps a digit readable.
HOLES = ({1}, {0}, {0}, {0}, {0, 1}, {0}, {1}, {0}, {2}, {1})  # by class
MIN_HOLE, MAX_HALF_STROKE = 12, 9.0  # area and width for a digit drawn 48 pixels high


@dataclass
class Sources:
    """What one split is drawn from."""

    images: np.ndarray  # (N, 12, 12) sharpened, 0 paper, 1 ink
    labels: np.ndarray  # (N,)
    indices: np.ndarray  # (N,) positions in scikit-learn's `load_digits`
    photos: list[Image.Image]


def load_sources() -> dict[str, Sources]:
    """Both splits; they share no digit and no part of a photograph.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
        from sklearn.model_selection import cross_val_predict
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise UserError(
            "The data set digit_scenes is made from scikit-learn's digits: "
            "run `pip install 'detr_d2[digits]'` or `pip install scikit-learn`."
        ) from error
    digits = load_digits()
    labels, images = digits.target, sharpen(digits.images / 16)
    legible = cross_val_predict(KNeighborsClassifier(5), digits.data, labels) == labels
    legible &= [is_legible(images[i], labels[i]) for i in range(len(labels))]
    val = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(0)
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(legible & (labels == label)))
        val[members[: round(VAL_SHARE * len(members))]] = True
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    sources = {}
    for split, chosen in (("train", legible & ~val), ("val", val)):
        parts = []
        for photo in photos:
            border = round(photo.height * (1 - VAL_PHOTO_SHARE))
            top, bottom = (0, border) if split == "train" else (border, photo.height)
            parts.append(photo.crop((0, top, photo.width, bottom)))
        sources[split] = Sources(images[chosen], labels[chosen], np.flatnonzero(chosen), parts)
    return sources


def sharpen(images: np.ndarray) -> np.ndarray:
    """Deepens the grey gaps of digits (N, 8, 8) in [0, 1], so that they stay open when enlarged.

    Returns (N, 12, 12) float32: two more pixels on each side.
    """
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    blurred = ndimage.convolve1d(padded, [0.25, 0.5, 0.25], axis=1)
    blurred = ndimage.convolve1d(blurred, [0.25, 0.5, 0.25], axis=2)
    return (2.5 * padded - 1.5 * blurred).astype(np.float32)


def is_legible(image: np.ndarray, label: int) -> bool:
    """Whether a sharpened digit (12, 12) is one stroke, not too thick, with its class's holes."""
    ink = enlarge(image, 72, np.eye(2)) > 0.5
    pieces = ndimage.label(ink)[1]
    areas = np.bincount(ndimage.label(~ink)[0].ravel())[2:]  # after ink and what is around it
    thickest = ndimage.distance_transform_edt(ink).max()
    fitting = len(areas) in HOLES[label] and (areas >= MIN_HOLE).all()
    return pieces == 1 and fitting and thickest <= MAX_HALF_STROKE


def enlarge(image: np.ndarray, side: int, shape: np.ndarray) -> np.ndarray:
    """The coverage (side, side) in [0, 1] of a sharpened digit under a linear map (2, 2)."""
    matrix = shape * (len(image) / side)
    offset = len(image) / 2 - matrix @ np.full(2, side / 2)
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    method, resampling = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    smooth = Image.fromarray(image).transform((side, side), method, affine, resampling)
    return np.clip((np.asarray(smooth) - 0.5) / 0.2 + 0.5, 0, 1)


def render_glyph(rng: np.random.Generator, image: np.ndarray, size: int) -> np.ndarray:
    """Draws a digit, slightly rotated, sheared and stretched, never mirrored.

    Returns its coverage (h, w) in [0, 1], with MARGIN on each side of the tight box of coverage
    over 0.5, whose longer side is at most `size` pixels and hardly less.
    """
    angle = np.deg2rad(rng.uniform(-12, 12))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretched = np.array([[np.exp(rng.uniform(-0.15, 0.15)), rng.uniform(-0.2, 0.2)], [0, 1]])
    coverage = trim(enlarge(image, 2 * max(size, 24), 1.2 * rotation @ stretched))
    scale = size / max(coverage.shape)
    height, width = (round(side * scale) for side in coverage.shape)
    resized = Image.fromarray(coverage).resize((width, height), Image.Resampling.BILINEAR)
    return np.pad(trim(np.asarray(resized)), MARGIN)


def trim(coverage: np.ndarray) -> np.ndarray:
    """The part within the tight box of coverage over 0.5."""
    return coverage[ndimage.find_objects((coverage > 0.5).astype(int))[0]]
