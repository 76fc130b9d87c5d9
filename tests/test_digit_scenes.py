import json
import multiprocessing
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from detr_d2.data import digit_scenes
from detr_d2.errors import UserError

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def sources():
    return digit_scenes.load_sources()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    digit_scenes.generate_digit_scenes(folder, num_train=40, num_val=10)
    return folder


def scenes(folder, split):
    """Yields the decoded picture of each image and its annotations with decoded masks."""
    content = json.loads((folder / f"{split}.json").read_text())
    for image in content["images"]:
        picture = np.asarray(Image.open(folder / split / image["file_name"]))
        annotations = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        yield (
            image,
            picture,
            annotations,
            [coco_mask.decode(a["segmentation"]) for a in annotations],
        )


def checksum(folder, split, images):
    crc = 0
    for image, picture, annotations, _ in list(scenes(folder, split))[:images]:
        crc = zlib.crc32(picture.tobytes() + json.dumps([image, annotations]).encode(), crc)
    return crc


@pytest.mark.parametrize("split, count", [("train", 40), ("val", 10)])
def test_images_and_objects_are_as_documented(folder, split, count):
    assert len(list((folder / split).iterdir())) == count
    seen_counts, seen_shapes = set(), set()
    for image, picture, annotations, masks in scenes(folder, split):
        assert picture.shape == (image["height"], image["width"], 3)
        assert all(112 <= side <= 176 for side in picture.shape[:2])
        assert 1 <= len(annotations) <= 8
        seen_counts.add(len(annotations))
        seen_shapes.add(picture.shape)
        for annotation, mask in zip(annotations, masks, strict=True):
            x, y, width, height = annotation["bbox"]
            assert x >= 0 and y >= 0
            assert x + width <= image["width"] and y + height <= image["height"]
            assert 16 <= max(width, height) <= 56
            assert 1 <= annotation["category_id"] <= 10
            assert annotation["iscrowd"] == 0
            assert mask.shape == picture.shape[:2]
            assert mask.sum() > 0
            assert annotation["area"] == mask.sum()
    assert len(seen_counts) >= 4 and len(seen_shapes) >= 4


def test_boxes_are_tight_on_the_ink(folder):
    tight = []
    for _, _, annotations, masks in scenes(folder, "train"):
        overlap = np.sum(masks, axis=0)
        assert overlap.max() == 1, "visible masks are disjoint"
        for annotation, mask in zip(annotations, masks, strict=True):
            ys, xs = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            visible = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            full = [x, y, x + width, y + height]
            assert (np.array(visible[:2]) >= full[:2]).all()
            assert (np.array(visible[2:]) <= full[2:]).all()
            tight.append(visible == full)
    # Only a digit that another one hides in part may have a box larger than its visible ink.
    assert np.mean(tight) > 0.9


def test_some_digits_overlap_and_none_is_hidden_by_more_than_a_fifth(sources, monkeypatch):
    proposed, propose = {}, digit_scenes.propose_digit

    def remember(*arguments):
        digit, coverage = propose(*arguments)
        proposed[(digit.source, *digit.box)] = digit.ink.sum()
        return digit, coverage

    monkeypatch.setattr(digit_scenes, "propose_digit", remember)
    rng, visible = np.random.default_rng(5), []
    for _ in range(25):
        _, objects = digit_scenes.draw_scene(rng, sources["train"])
        visible += [o["mask"].sum() / proposed[(o["source"], *o["box"])] for o in objects]
    assert 0.8 <= min(visible) < 1
    assert np.mean(np.array(visible) < 1) > 0.01


def luminance_to_lightness(picture):
    rgb = picture / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, (29 / 3) ** 3 * y)


def test_lightness_agrees_with_the_formula():
    picture = np.random.default_rng(0).integers(0, 256, (50, 50, 3))
    expected = luminance_to_lightness(picture)
    np.testing.assert_allclose(digit_scenes.lightness(picture), expected, atol=0.01)


@pytest.mark.parametrize("split", ["train", "val"])
def test_digits_contrast_with_what_surrounds_them(folder, split):
    """Measured on the decoded JPEG, by distances from the mask instead of the generator's rings."""
    from scipy.ndimage import distance_transform_cdt

    for image, picture, annotations, masks in scenes(folder, split):
        light = luminance_to_lightness(picture)
        for annotation, mask in zip(annotations, masks, strict=True):
            away = distance_transform_cdt(mask == 0, metric="chessboard")
            ink, around = np.median(light[mask > 0]), light[away == 2]
            share = np.mean(np.abs(around - ink) > 25)
            assert share > 0.8, (image["file_name"], annotation["bbox"], share)


def test_validation_digits_and_photographs_are_not_in_training(folder, sources):
    used = {
        split: {a["source_digit"] for _, _, found, _ in scenes(folder, split) for a in found}
        for split in ("train", "val")
    }
    assert used["train"] and used["val"]
    assert not used["train"] & used["val"]
    train, val = (set(sources[split].indices.tolist()) for split in ("train", "val"))
    assert not train & val
    assert used["train"] <= train and used["val"] <= val
    for split in ("train", "val"):
        assert np.bincount(sources[split].labels, minlength=10).min() >= 15
    for train_photo, val_photo in zip(sources["train"].photos, sources["val"].photos, strict=True):
        assert train_photo.height + val_photo.height == 427


def test_labels_are_those_of_the_source_digits(folder):
    from sklearn.datasets import load_digits

    targets = load_digits().target
    found = [a for _, _, annotations, _ in scenes(folder, "train") for a in annotations]
    assert all(a["category_id"] - 1 == targets[a["source_digit"]] for a in found)


def test_digits_are_never_mirrored(folder):
    """The drawn digit correlates with its source more than with the mirrored source."""
    from sklearn.datasets import load_digits

    images = load_digits().images
    agreement = []
    for _, _, annotations, masks in scenes(folder, "train"):
        for annotation, mask in zip(annotations, masks, strict=True):
            if annotation["category_id"] - 1 not in (2, 3, 4, 5, 6, 7, 9):
                continue
            x, y, width, height = annotation["bbox"]
            drawn = mask[y : y + height, x : x + width].astype(np.float32)
            source = images[annotation["source_digit"]]
            ys, xs = np.nonzero(source > 6)
            source = source[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.float32)
            size = (16, 16)
            drawn = np.asarray(Image.fromarray(drawn).resize(size))
            source = np.asarray(Image.fromarray(source).resize(size))
            upright = np.corrcoef(drawn.ravel(), source.ravel())[0, 1]
            flips = (source[:, ::-1], source[::-1])
            agreement.append(
                all(upright > np.corrcoef(drawn.ravel(), f.ravel())[0, 1] for f in flips)
            )
    assert len(agreement) > 50
    assert np.mean(agreement) > 0.95


def test_generation_is_deterministic_and_independent_of_the_count(folder, tmp_path):
    digit_scenes.generate_digit_scenes(tmp_path / "again", num_train=12, num_val=3)
    assert checksum(tmp_path / "again", "train", 12) == checksum(folder, "train", 12)
    assert checksum(tmp_path / "again", "val", 3) == checksum(folder, "val", 3)
    digit_scenes.generate_digit_scenes(tmp_path / "other", num_train=12, num_val=3, seed=1)
    assert checksum(tmp_path / "other", "train", 12) != checksum(folder, "train", 12)


@pytest.fixture
def small_set(monkeypatch):
    monkeypatch.setattr(digit_scenes, "NUM_TRAIN", 6)
    monkeypatch.setattr(digit_scenes, "NUM_VAL", 3)
    yield
    monkeypatch.undo()
    digit_scenes.register_digit_scenes()


def test_registering_is_lazy_and_follows_the_environment(small_set, tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    digit_scenes.register_digit_scenes()
    metadata = MetadataCatalog.get("digit_scenes_val")
    assert metadata.thing_classes == list("0123456789")
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_dataset_id_to_contiguous_id[10] == 9
    assert not list(tmp_path.iterdir()), "nothing is made before it is needed"

    dicts = DatasetCatalog.get("digit_scenes_val")
    assert len(dicts) == 3
    assert Path(dicts[0]["file_name"]).is_file()
    assert {a["category_id"] for d in dicts for a in d["annotations"]} <= set(range(10))
    assert len(COCO(metadata.json_file).imgs) == 3
    assert len(DatasetCatalog.get("digit_scenes_train")) == 6

    digit_scenes.register_digit_scenes(str(tmp_path / "elsewhere"))
    assert MetadataCatalog.get("digit_scenes_val").json_file.startswith(str(tmp_path / "elsewhere"))


def test_processes_that_start_together_all_get_the_whole_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    target = tmp_path / "set"
    arguments = (target, 15, 5)
    processes = [
        context.Process(target=digit_scenes.generate_digit_scenes, args=arguments) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(scenes(target, "train"))) == 15
    assert len(list(scenes(target, "val"))) == 5
    assert not target.with_name("set.unfinished").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_nothing_that_passes_for_the_set(tmp_path):
    target = tmp_path / "set"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=digit_scenes.generate_digit_scenes, args=(target, 100_000, 5))
    process.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/train/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert list(tmp_path.glob("*/train/*.jpg")), "the process was killed while it wrote"
    assert not target.exists()
    digit_scenes.generate_digit_scenes(target, num_train=4, num_val=2)
    assert len(list((target / "train").iterdir())) == 4
    assert len(list(scenes(target, "val"))) == 2


def test_missing_scikit_learn_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'detr_d2\[digits\]'"):
        digit_scenes.generate_digit_scenes(tmp_path / "set", num_train=1, num_val=1)
    assert not (tmp_path / "set").exists()
