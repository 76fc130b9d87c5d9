"""The embedded data set `digit_scenes_{train,val}`: handwritten digits on photographs.

It is made on first use from what scikit-learn ships (1,797 digits of 8x8 pixels, two photographs),
so a detector can be trained and evaluated without a download. Each image has a random generator
of its own: image n is the same however many are made.

Shapes: H, W an image, h, w a part of one, in pixels; while it is drawn, an image has MARGIN more on
each side. Boxes are in pixels, colours RGB in [0, 255], lightness is CIE L* in [0, 100].
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from .digits import CLASSES, MARGIN, Sources, load_sources, render_glyph

logger = logging.getLogger(__name__)

VERSION = 1  # names the folder: whoever changes a pixel or an annotation raises it
SPLITS = ("train", "val")
NUM_TRAIN, NUM_VAL = 4000, 500
STUFF_CLASSES = ("temple", "flower")  # what scikit-learn's two photographs show

SIDES = (112, 128, 144, 160, 176)
MAX_DIGITS = 8
MAX_ATTEMPTS = 60  # at placing the digits of an image; a crowded one may get fewer than drawn
DIGIT_SIZES = (16, 56)  # longer side of the tight box

# What keeps a digit readable.
MAX_HIDDEN = 0.2  # share of a digit's ink that others may cover
MIN_CONTRAST = 30.0  # of lightness, between a digit and what surrounds it ...
MIN_CONTRAST_SHARE = 0.9  # ... in at least this share of the surrounding pixels

_SRGB = np.arange(256) / 255.0
_LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4)
_LUMINANCE = (_LINEAR[:, None] * (0.2126, 0.7152, 0.0722)).astype(np.float32)  # (256, 3)


@dataclass
class PlacedDigit:
    label: int
    source: int  # position in `load_digits`
    top: int
    left: int
    ink: np.ndarray  # (h, w) bool, with MARGIN on each side

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.ink.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def box(self) -> list[int]:
        """x, y, width, height in the image: its margin and that of the ink cancel out."""
        height, width = self.ink.shape
        return [self.left, self.top, width - 2 * MARGIN, height - 2 * MARGIN]


def crop_background(
    rng: np.random.Generator, photo: Image.Image, height: int, width: int
) -> np.ndarray:
    """A part (height, width, 3) of a photograph at a random scale, colouring and sharpness."""
    scale = max(np.exp(rng.uniform(0, np.log(3))), width / photo.width, height / photo.height)
    part = np.array([width, height]) / scale
    left, top = rng.uniform(0, np.maximum(photo.size - part, 0))
    box = (left, top, min(left + part[0], photo.width), min(top + part[1], photo.height))
    crop = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    pixels = np.asarray(crop, dtype=np.float32)
    pixels = pixels[:: rng.choice([-1, 1]), :: rng.choice([-1, 1]), rng.permutation(3)]
    contrast, saturation, brightness = rng.uniform((0.4, 0.2, -60), (1.1, 1.3, 60))
    grey, mean = pixels.mean(2, keepdims=True), pixels.mean()
    pixels = grey + saturation * (pixels - grey)
    pixels = np.clip(mean + brightness, 50, 205) + contrast * (pixels - mean)
    return np.clip(pixels * rng.uniform(0.85, 1.15, 3), 0, 255).astype(np.float32)


def lightness(pixels: np.ndarray) -> np.ndarray:
    """CIE L* (...) of sRGB pixels (..., 3)."""
    values = np.round(pixels).astype(np.uint8)
    luminance = sum(_LUMINANCE[values[..., channel], channel] for channel in range(3))
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    return ndimage.maximum_filter(mask, 2 * pixels + 1)


def surroundings(ink: np.ndarray) -> np.ndarray:
    """The pixels (h, w) two away from a digit: next to it, but beyond its soft edge."""
    return dilate(ink, 2) & ~dilate(ink, 1)


def contrast_share(ink: float, around: np.ndarray) -> float:
    """The share of the surrounding lightness values that differ clearly from the ink's."""
    return float(np.mean(np.abs(around - ink) >= MIN_CONTRAST)) if around.size else 1.0


def paint(rng: np.random.Generator, patch: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Paints a glyph (h, w) on a patch (h, w, 3), with an outline where no colour stands out."""
    around = lightness(patch)[surroundings(coverage > 0.5)]
    colours = rng.uniform(0, 255, (8, 3))
    shares = (np.abs(around - lightness(colours)[:, None]) >= MIN_CONTRAST).mean(1)
    stands_out = bool((shares >= 0.97).any())
    # The first that stands out, not the best: that would always be nearly black or white.
    colour = colours[np.argmax(shares >= 0.97) if stands_out else np.argmax(shares)]
    if not stands_out or rng.random() < 0.1:
        light = lightness(colour) > 50
        colour = 255 - 0.5 * (255 - colour) if light else 0.5 * colour
        outline = Image.fromarray(dilate(coverage > 0.3, 2).astype(np.uint8) * 255)
        opacity = np.asarray(outline.filter(ImageFilter.GaussianBlur(0.6))) * (0.9 / 255)
        patch = patch + ((0 if light else 255) - patch) * opacity[..., None]
    return patch + (colour - patch) * coverage[..., None]


def propose_digit(
    rng: np.random.Generator, sources: Sources, canvas: tuple[int, int], placed: list[PlacedDigit]
) -> tuple[PlacedDigit, np.ndarray]:
    """A random digit and its coverage (h, w); every third at the edge of one already there."""
    label = int(rng.integers(len(CLASSES)))
    pick = rng.choice(np.flatnonzero(sources.labels == label))
    size = round(np.exp(rng.uniform(*np.log(DIGIT_SIZES))))
    coverage = render_glyph(rng, sources.images[pick], size)
    room = np.subtract(canvas, coverage.shape)
    position = rng.integers(0, room + 1)
    if placed and rng.random() < 0.35:
        neighbour = placed[rng.integers(len(placed))]
        direction = rng.uniform(-1, 1, 2)
        direction /= np.abs(direction).max()
        reach = np.add(coverage.shape, neighbour.ink.shape) / 2 - 2 * MARGIN
        centre = np.subtract(neighbour.ink.shape, coverage.shape) / 2
        position = (
            (neighbour.top, neighbour.left) + centre + direction * reach * rng.uniform(0.75, 1)
        )
        position = np.clip(np.round(position), 0, room)
    top, left = (int(value) for value in position)
    return PlacedDigit(label, int(sources.indices[pick]), top, left, coverage > 0.5), coverage


def is_readable(
    picture: np.ndarray, owner: np.ndarray, outlined: np.ndarray, digit: PlacedDigit, number: int
) -> bool:
    """Whether enough of a digit shows and contrasts with the background and with its neighbours.

    Args:
        picture: (H, W, 3)
        owner: (H, W) number of the digit whose ink is on top, else -1
        outlined: (H, W) the same for ink and its possible outline
    """
    owner, shown = owner[digit.window], digit.ink & (outlined[digit.window] == number)
    if shown.sum() < (1 - MAX_HIDDEN) * digit.ink.sum():
        return False
    light, around = lightness(picture[digit.window]), surroundings(owner == number)
    ink = float(np.median(light[shown]))
    return all(
        contrast_share(ink, light[pixels]) >= MIN_CONTRAST_SHARE
        for pixels in (around, around & (owner >= 0))
    )


def choose_setting(rng: np.random.Generator) -> tuple[int, int, int]:
    """Height and width of a picture, and which photograph is behind it."""
    height, width = (int(side) for side in rng.choice(SIDES, 2))
    return height, width, int(rng.integers(len(STUFF_CLASSES)))


def photograph_behind(split: str, number: int, seed: int = 0) -> int:
    """Index in `STUFF_CLASSES` of what is behind image `number` of a split."""
    return choose_setting(generator_of(split, number, seed))[2]


def generator_of(split: str, number: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), number])


def draw_scene(rng: np.random.Generator, sources: Sources) -> tuple[np.ndarray, list[dict]]:
    """Draws one picture (H, W, 3) uint8 and its objects.

    An object has `label`, `source` (position in `load_digits`), `box` (x, y, width, height of all
    its ink, hidden or not) and `mask` ((H, W) bool, its visible ink).
    """
    height, width, photograph = choose_setting(rng)
    photo = sources.photos[photograph]
    picture = crop_background(rng, photo, height + 2 * MARGIN, width + 2 * MARGIN)
    owner = np.full(picture.shape[:2], -1)
    outlined = owner.copy()
    placed: list[PlacedDigit] = []
    count = rng.integers(1, MAX_DIGITS + 1)
    for _ in range(MAX_ATTEMPTS):
        digit, coverage = propose_digit(rng, sources, owner.shape, placed)
        before, number = (picture.copy(), owner.copy(), outlined.copy()), len(placed)
        near = set(owner[digit.window].ravel().tolist()) - {-1} | {number}
        picture[digit.window] = paint(rng, picture[digit.window], coverage)
        owner[digit.window][digit.ink] = number
        outlined[digit.window][dilate(digit.ink, 2)] = number
        placed.append(digit)
        if not all(is_readable(picture, owner, outlined, placed[k], k) for k in near):
            picture, owner, outlined = before
            placed.pop()
        if len(placed) == count:
            break
    inside = (slice(MARGIN, -MARGIN),) * 2
    objects = [
        {"label": d.label, "source": d.source, "box": d.box, "mask": (owner == number)[inside]}
        for number, d in enumerate(placed)
    ]
    return np.round(picture[inside].clip(0, 255)).astype(np.uint8), objects


def generate_digit_scenes(
    folder: str | os.PathLike, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL, seed: int = 0
) -> None:
    """Makes `train.json`, `train/*.jpg` and the same for `val` in `folder`, unless it exists.

    COCO format; the category id is the digit plus one. The folder appears whole or not at all, and
    processes that ask for it at the same time wait for the first of them.

    Raises:
        UserError: scikit-learn is not installed.
    """
    from iopath.common.file_io import file_lock

    folder = Path(folder)
    if folder.is_dir():
        return
    with file_lock(str(folder)):
        if folder.is_dir():
            return
        sources = load_sources()
        logger.info("Making the data set digit_scenes in %s: about a minute, once.", folder)
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
        for split, count in (("train", num_train), ("val", num_val)):
            _write_split(unfinished, split, sources[split], count, seed)
        os.rename(unfinished, folder)


def _write_split(folder: Path, split: str, sources: Sources, count: int, seed: int) -> None:
    from pycocotools import mask as coco_mask
    from tqdm import tqdm

    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for number in tqdm(range(1, count + 1), f"digit_scenes_{split}", mininterval=2):
        rng = generator_of(split, number, seed)
        picture, objects = draw_scene(rng, sources)
        height, width = picture.shape[:2]
        name = f"{number:06d}.jpg"
        Image.fromarray(picture).save(folder / split / name, quality=92, subsampling=0)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for entry in objects:
            rle = coco_mask.encode(np.asfortranarray(entry["mask"], dtype=np.uint8))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": entry["label"] + 1,
                "bbox": entry["box"],
                "area": int(entry["mask"].sum()),
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
                "iscrowd": 0,
                "source_digit": entry["source"],
            }
            annotations.append(annotation)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(content))


def data_set_folder(root: str | None) -> str:
    root = os.path.expanduser(root or os.getenv("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(root, f"digit_scenes_v{VERSION}")


def register_split(
    name: str, load: Callable[[], list[dict]], *, folder: str, split: str, **metadata: Any
) -> None:
    """Registers a data set on the scenes of a split, in place of an earlier one of that name."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    json_file, image_root = os.path.join(folder, f"{split}.json"), os.path.join(folder, split)
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, **metadata)


def register_digit_scenes(root: str | None = None) -> None:
    """Registers `digit_scenes_train` and `digit_scenes_val`, which are made when first loaded.

    Args:
        root: folder of data sets, by default $DETECTRON2_DATASETS or else `datasets`. A second call
            moves both names to its root.
    """
    from detectron2.data.datasets import load_coco_json

    folder = data_set_folder(root)

    def load(split: str) -> list[dict]:
        generate_digit_scenes(folder, NUM_TRAIN, NUM_VAL)
        json_file, image_root = os.path.join(folder, f"{split}.json"), os.path.join(folder, split)
        return load_coco_json(json_file, image_root, f"digit_scenes_{split}", ["id"])

    for split in SPLITS:
        register_split(
            f"digit_scenes_{split}",
            partial(load, split),
            folder=folder,
            split=split,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
