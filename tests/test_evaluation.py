"""Evaluators: equal numbers from every back end, figures derived by hand, and what goes wrong."""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import math
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_d2.engine.launch import run_in_group
from detr_d2.errors import UserError
from detr_d2.evaluation import (
    COCODetectionEvaluator,
    PerClassPascalVOCEvaluator,
    build_evaluator,
    compute_coco_metrics,
)
from detr_d2.evaluation.coco_metrics import choose_backend

HAS_HOTCOCO = importlib.util.find_spec("hotcoco") is not None
needs_hotcoco = pytest.mark.skipif(not HAS_HOTCOCO, reason="hotcoco is not installed")
BACKENDS = ["pycocotools", pytest.param("hotcoco", marks=needs_hotcoco)]
FIRST_SIX = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture(autouse=True)
def _log_reaches_caplog(monkeypatch):
    """detectron2's `setup_logger`, should another test have called it, stops propagation."""
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)


def random_data(seed: int, num_images: int = 20, num_classes: int = 5):
    """Ground truth with holes in the ids, crowds, empty images and all sizes; detections near and
    far from it, with ties in the scores and, in one image, more than any limit."""
    rng = np.random.default_rng(seed)
    categories = [{"id": 3 + 7 * k, "name": f"class {k}"} for k in range(num_classes)]
    images = [
        {"id": 2 + 11 * i, "file_name": f"{i}.jpg", "height": 640, "width": 640}
        for i in range(num_images)
    ]
    annotations, detections = [], []

    def detect(image, category, box):
        score = round(float(rng.random()), 1 if rng.random() < 0.5 else 4)
        region = {"category_id": categories[category]["id"], "bbox": [float(v) for v in box]}
        detections.append({"image_id": image["id"], **region, "score": score})

    for position, image in enumerate(images):
        for _ in range(0 if position % 6 == 0 else rng.integers(1, 12)):
            size = np.exp(rng.uniform(np.log(5), np.log(300), size=2))
            box = np.concatenate([rng.uniform(0, 300, size=2), size])
            category = rng.integers(num_classes - 1)  # the last class has no object
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": categories[category]["id"],
                    "bbox": [float(v) for v in box],
                    "area": float(size.prod() * rng.uniform(0.5, 1)),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 4)):
                detect(image, category, box * rng.uniform(0.9, 1.1, size=4))
        for _ in range(400 if position == 1 else rng.integers(0, 20)):
            category = 0 if position == 1 else rng.integers(num_classes)
            detect(image, category, rng.uniform(1, 300, size=4))
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def official_stats(ground_truth, detections, task="bbox"):
    """pycocotools' own 12 numbers, in [0, 1]; -1 where undefined."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def assert_official(numbers, stats):
    expected = [100 * value if value >= 0 else math.nan for value in stats]
    np.testing.assert_array_equal(list(numbers.values()), expected)


# ------------------------------------------------------------------------------ the 12 numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_twelve_numbers_are_those_of_pycocotools(backend, seed):
    ground_truth, detections = random_data(seed)
    before = copy.deepcopy((ground_truth, detections))
    numbers = compute_coco_metrics(ground_truth, detections, backend=backend).summary()
    assert len(numbers) == 12 and 0 < numbers["AP"] < 100
    assert_official(numbers, official_stats(ground_truth, detections))
    assert (ground_truth, detections) == before


@needs_hotcoco
@pytest.mark.parametrize("limit", [1, 5, 100, 300])
@pytest.mark.parametrize("seed", range(3))
def test_both_back_ends_give_the_same_arrays(seed, limit):
    data = random_data(seed)
    fast = compute_coco_metrics(*data, max_detections_per_image=limit, backend="hotcoco")
    slow = compute_coco_metrics(*data, max_detections_per_image=limit, backend="pycocotools")
    np.testing.assert_array_equal(fast.precision, slow.precision)
    np.testing.assert_array_equal(fast.recall, slow.recall)
    assert fast.precision.max() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_compared_by_masks(backend):
    ground_truth, detections = random_data(0, num_images=6)
    for entry in ground_truth["annotations"] + detections:
        x, y, width, height = (int(v) for v in entry["bbox"])
        mask = np.zeros((640, 640), dtype=np.uint8, order="F")
        mask[y : y + height, x : x + width] = np.tri(height, width, dtype=np.uint8)[
            : 640 - y, : 640 - x
        ]
        rle = mask_utils.encode(mask)
        entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    numbers = compute_coco_metrics(ground_truth, detections, "segm", backend=backend).summary()
    without_boxes = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    assert_official(numbers, official_stats(ground_truth, without_boxes, "segm"))
    assert numbers != compute_coco_metrics(ground_truth, detections, backend=backend).summary()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lack",
    ["no key", "empty", "flat", "another size", "NaN", "texts"]
    + ["broken runs", "negative runs", "too few runs", "runs of texts"],
)
def test_objects_without_a_mask_are_ignored(backend, lack, caplog):
    """Two objects; the second, and what is found in its box, must not count: AP of one found."""
    square = [[0, 0, 10, 0, 10, 10, 0, 10]]
    annotations = [
        {"image_id": 1, "category_id": 7, "bbox": [0, 0, 10, 10], "segmentation": square},
        {"image_id": 1, "category_id": 7, "bbox": [50, 50, 10, 10]},
    ]
    useless = {"empty": [], "flat": square[0], "another size": {"size": [9, 9], "counts": "Q3"}}
    useless |= {
        "NaN": [[math.nan] * 6],
        "texts": [["1"] * 6],
        "broken runs": {"size": [100, 100], "counts": "é"},
        "negative runs": {"size": [100, 100], "counts": [-5, 10005]},
        "too few runs": {"size": [100, 100], "counts": [3, 4]},
        "runs of texts": {"size": [100, 100], "counts": ["a", 3]},
    }
    if lack in useless:
        annotations[1]["segmentation"] = useless[lack]
    ground_truth = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": annotations,
    }
    detections = []
    for corner, score in ((0, 0.5), (50, 0.9)):
        mask = np.zeros((100, 100), dtype=np.uint8, order="F")
        mask[corner : corner + 10, corner : corner + 10] = 1
        found = {"image_id": 1, "category_id": 7, "score": score}
        detections.append({**found, "segmentation": mask_utils.encode(mask)})
    metrics = compute_coco_metrics(ground_truth, detections, "segm", backend=backend)
    assert metrics.summary()["AP"] == pytest.approx(100)
    assert "1 of 2 annotations have no segmentation" in caplog.text
    assert "iscrowd" not in annotations[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_precision_derived_by_hand(backend):
    """Two objects; the best detection is false, the second finds one of them with IoU 0.6.

    Precision is 1/2 up to recall 1/2, which is 51 of the 101 recall points, at the IoU thresholds
    0.50, 0.55 and 0.60 of ten.
    """
    ground_truth = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 10, 10]},
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [50, 50, 10, 10]},
        ],
    }
    detections = [
        {"image_id": 1, "category_id": 7, "bbox": [80, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "category_id": 7, "bbox": [0, 0, 10, 6], "score": 0.8},
    ]
    metrics = compute_coco_metrics(ground_truth, detections, backend=backend)
    ap50 = 100 * 51 / 101 / 2
    assert metrics.summary()["AP50"] == pytest.approx(ap50)
    assert metrics.summary()["AP"] == pytest.approx(ap50 * 3 / 10)
    assert metrics.summary()["AR@1"] == 0
    assert metrics.summary()["AR@100"] == pytest.approx(50 * 3 / 10)
    per_class = metrics.per_class()
    # At the score of 0.8: one of two detections, one of two objects.
    best = {"F1": 50.0, "precision": 50.0, "recall": 50.0, "score": 0.8}
    assert per_class["cat"] == pytest.approx({"AP": ap50 * 3 / 10, "AP50": ap50, **best})
    assert all(math.isnan(value) for value in per_class["dog"].values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("area", [-5.0, math.nan, None])
def test_areas_that_are_none_are_the_boxes(backend, area):
    """COCO's metrics would leave an object of a negative area out of all of them."""
    ground_truth, detections = random_data(0, num_images=6)
    expected = compute_coco_metrics(ground_truth, detections, backend=backend).summary()["AP"]
    for annotation in ground_truth["annotations"]:
        annotation["area"] = area
    result = compute_coco_metrics(ground_truth, detections, backend=backend).summary()
    assert result["AP"] == pytest.approx(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", ["from 0", "repeated", "missing"])
def test_annotation_ids_do_not_matter(backend, ids):
    """pycocotools by itself counts the object with id 0 as never found."""
    ground_truth, _ = random_data(1)
    for position, annotation in enumerate(ground_truth["annotations"]):
        annotation["iscrowd"] = 0
        annotation["id"] = position if ids == "from 0" else 1
        if ids == "missing":
            del annotation["id"], annotation["iscrowd"], annotation["area"]
    perfect = [{**annotation, "score": 1.0} for annotation in ground_truth["annotations"]]
    metrics = compute_coco_metrics(ground_truth, perfect, backend=backend)
    assert metrics.summary()["AP"] == pytest.approx(100)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", ["annotations", "detections"])
def test_nothing_to_compare_is_nan(backend, missing):
    ground_truth, detections = random_data(0, num_images=3)
    if missing == "annotations":
        ground_truth["annotations"] = []
    else:
        detections = []
    metrics = compute_coco_metrics(ground_truth, detections, backend=backend)
    assert all(math.isnan(value) for value in metrics.summary().values())
    assert list(metrics.per_class()) == [f"class {k}" for k in range(5)]


def test_back_end_is_chosen_by_what_is_there(monkeypatch):
    ground_truth, _ = random_data(0, num_images=2)
    assert choose_backend(ground_truth) == ("hotcoco" if HAS_HOTCOCO else "pycocotools")
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert choose_backend(ground_truth) == "pycocotools"


def test_image_ids_that_are_no_numbers():
    ground_truth, detections = random_data(2)
    expected = compute_coco_metrics(ground_truth, detections).summary()
    for image in ground_truth["images"]:
        image["id"] = f"{image['id']:06d}"
    for entry in ground_truth["annotations"] + detections:
        entry["image_id"] = f"{entry['image_id']:06d}"
    assert choose_backend(ground_truth) == "pycocotools"
    assert compute_coco_metrics(ground_truth, detections).summary() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "keypoints"}, "not 'keypoints'"),
        ({"max_detections_per_image": 0}, "max_detections_per_image to 1 or more"),
        ({"backend": "other"}, "not on 'other'"),
    ],
)
def test_wrong_arguments_of_the_metrics(arguments, message):
    with pytest.raises(ValueError, match=message):
        compute_coco_metrics(*random_data(0, num_images=2), **arguments)


# --------------------------------------------------------------------------- the COCO evaluator


def register(ground_truth, folder, evaluator_type="coco", file_name="annotations.json"):
    """Register as detectron2 does, under a fresh name, with the mapping its loader would set."""
    name = f"evaluation_{uuid.uuid4().hex}"
    path = folder / file_name
    path.write_text(json.dumps(ground_truth))
    ids = sorted(category["id"] for category in ground_truth["categories"])
    MetadataCatalog.get(name).set(
        json_file=str(path),
        evaluator_type=evaluator_type,
        thing_classes=[f"class {k}" for k in range(len(ids))],
        thing_dataset_id_to_contiguous_id={identity: k for k, identity in enumerate(ids)},
    )
    return name


def as_batches(ground_truth, detections):
    """What a model would return: per image, `Instances` with boxes xyxy and contiguous classes."""
    ids = sorted(category["id"] for category in ground_truth["categories"])
    for image in ground_truth["images"]:
        own = [d for d in detections if d["image_id"] == image["id"]]
        boxes = torch.tensor([d["bbox"] for d in own], dtype=torch.float32).reshape(-1, 4)
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = torch.tensor([d["score"] for d in own], dtype=torch.float32)
        instances.pred_classes = torch.tensor(
            [ids.index(d["category_id"]) for d in own], dtype=torch.long
        )
        yield [{"image_id": image["id"]}], [{"instances": instances}]


def run(evaluator, batches):
    evaluator.reset()
    for inputs, outputs in batches:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [100, 300])
def test_results_are_those_of_detectron2(backend, limit, tmp_path, caplog):
    ground_truth, detections = random_data(3)
    name = register(ground_truth, tmp_path)
    batches = list(as_batches(ground_truth, detections))
    ours = COCODetectionEvaluator(
        name, str(tmp_path / "ours"), max_detections_per_image=limit, backend=backend
    )
    theirs = COCOEvaluator(
        name, ("bbox",), output_dir=str(tmp_path / "theirs"), max_dets_per_image=limit
    )
    with caplog.at_level(logging.INFO, logger="detr_d2"):
        results = run(ours, batches)["bbox"]
    expected = run(theirs, batches)["bbox"]
    assert list(results) == list(expected)
    np.testing.assert_array_equal(list(results.values()), list(expected.values()))

    file_name = "coco_instances_results.json"
    assert (tmp_path / "ours" / file_name).read_bytes() == (
        tmp_path / "theirs" / file_name
    ).read_bytes()
    written = json.loads((tmp_path / "ours" / "per_class_ap.json").read_text())["bbox"]
    assert list(written) == [f"class {k}" for k in range(5)]
    assert written["class 1"]["AP"] == results["AP-class 1"]
    figures = ("AP", "AP50", "F1", "precision", "recall", "score")
    assert written["class 4"] == dict.fromkeys(figures)
    assert written["class 0"]["AP50"] > written["class 0"]["AP"]
    table = next(r.getMessage() for r in caplog.records if "Per-class bbox AP" in r.getMessage())
    assert f"{results['AP-class 1']:.3f}" in table and "class 4" in table


def test_model_that_detects_nothing(tmp_path):
    ground_truth, _ = random_data(0, num_images=3)
    name = register(ground_truth, tmp_path)
    results = run(COCODetectionEvaluator(name), as_batches(ground_truth, []))["bbox"]
    assert list(results)[:6] == list(FIRST_SIX)
    assert all(math.isnan(value) for value in results.values())


def test_no_image_and_no_annotations(tmp_path, caplog):
    ground_truth, detections = random_data(0, num_images=3)
    batches = list(as_batches(ground_truth, detections))
    del ground_truth["annotations"]  # as in COCO's files for the test server
    evaluator = COCODetectionEvaluator(register(ground_truth, tmp_path), str(tmp_path))
    assert run(evaluator, []) == {} and "no image was processed" in caplog.text
    assert run(evaluator, batches) == {}
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(written) == len(detections)


def test_detections_that_are_not_finite_are_dropped(tmp_path, caplog):
    ground_truth, detections = random_data(0, num_images=3)
    name = register(ground_truth, tmp_path)
    expected = run(COCODetectionEvaluator(name), as_batches(ground_truth, detections))
    image_id = ground_truth["images"][2]["id"]
    broken = {"image_id": image_id, "category_id": 3, "bbox": [1.0, 1.0, 5.0, 5.0]}
    detections.append({**broken, "score": math.nan})
    detections.append({**broken, "score": 0.99, "bbox": [1.0, math.inf, 5.0, 5.0]})
    results = run(COCODetectionEvaluator(name), as_batches(ground_truth, detections))
    np.testing.assert_equal(results, expected)
    assert f"Image {image_id}: 2 of" in caplog.text


def test_class_the_data_set_does_not_have(tmp_path):
    ground_truth, detections = random_data(0, num_images=3)
    name = register(ground_truth, tmp_path)
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id.pop(31)
    detections.append({**detections[0], "category_id": 31})
    with pytest.raises(UserError, match="predicts class 4, .* has 4 classes"):
        run(COCODetectionEvaluator(name), as_batches(ground_truth, detections))


def test_data_set_without_annotation_file(tmp_path):
    name = f"evaluation_{uuid.uuid4().hex}"
    annotation = {"bbox": [10, 10, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    image = {"file_name": "a.jpg", "image_id": 5, "height": 50, "width": 60}
    DatasetCatalog.register(name, lambda: [{**image, "annotations": [annotation]}])
    MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=["cat", "dog"])
    with pytest.raises(UserError, match="no COCO annotation file"):
        build_evaluator(None, name)
    instances = Instances((50, 60))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 30.0, 40.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.5]), torch.tensor([1])
    evaluator = build_evaluator(None, name, str(tmp_path))
    results = run(evaluator, [([{"image_id": 5}], [{"instances": instances}])])["bbox"]
    assert results["AP"] == results["AP-dog"] == pytest.approx(100)


# ------------------------------------------------------------------------------------ Pascal VOC


def make_voc(folder, year=2012):
    """Two images: a cat and a dog; a cat and a difficult dog. Boxes are 1-based and inclusive."""
    objects = {
        "a": [("cat", (11, 11, 60, 50), 0), ("dog", (100, 20, 180, 90), 0)],
        "b": [("cat", (5, 5, 90, 95), 0), ("dog", (30, 30, 50, 50), 1)],
    }
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "test.txt").write_text("a\nb\n")
    for image, entries in objects.items():
        xml = ""
        for label, box, difficult in entries:
            corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            bounds = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
            xml += (
                f"<object><name>{label}</name><pose>Left</pose><truncated>0</truncated>"
                f"<difficult>{difficult}</difficult><bndbox>{bounds}</bndbox></object>"
            )
        (folder / "Annotations" / f"{image}.xml").write_text(f"<annotation>{xml}</annotation>")
    name = f"evaluation_{uuid.uuid4().hex}"
    MetadataCatalog.get(name).set(
        evaluator_type="pascal_voc",
        dirname=str(folder),
        split="test",
        year=year,
        thing_classes=["cat", "dog"],
    )
    return name


def voc_batches(miss_a_cat=False):
    """Perfect detections, in detectron2's 0-based coordinates."""
    detections = {
        "a": [(0, (10, 10, 60, 50)), (1, (99, 19, 180, 90))],
        "b": [] if miss_a_cat else [(0, (4, 4, 90, 95))],
    }
    for image, entries in detections.items():
        instances = Instances((100, 200))
        boxes = torch.tensor([box for _, box in entries], dtype=torch.float32)
        instances.pred_boxes = Boxes(boxes.reshape(-1, 4))
        instances.scores = torch.full((len(entries),), 0.9)
        instances.pred_classes = torch.tensor([label for label, _ in entries], dtype=torch.long)
        yield [{"image_id": image}], [{"instances": instances}]


@pytest.mark.parametrize(
    ("year", "cat"),
    # One of two cats found: area under the curve 1/2, or 6 of the 11 recall points 0, 0.1 ... 0.5.
    [(2012, 50), (2007, 100 * 6 / 11)],
)
def test_pascal_voc(year, cat, tmp_path):
    name = make_voc(tmp_path / "voc", year)
    evaluator = build_evaluator(None, name, str(tmp_path / "out"))
    perfect = run(evaluator, voc_batches())["bbox"]
    assert perfect == pytest.approx(
        {"AP": 100, "AP50": 100, "AP75": 100, "AP-cat": 100, "AP-dog": 100}
    )
    results = run(evaluator, voc_batches(miss_a_cat=True))["bbox"]
    assert results["AP-cat"] == pytest.approx(cat) and results["AP-dog"] == pytest.approx(100)
    assert results["AP"] == pytest.approx((cat + 100) / 2)
    written = json.loads((tmp_path / "out" / "per_class_ap.json").read_text())["bbox"]
    assert written["cat"]["AP50"] == pytest.approx(cat)
    plain = run(PascalVOCDetectionEvaluator(name), voc_batches(miss_a_cat=True))["bbox"]
    assert {key: results[key] for key in plain} == pytest.approx(plain)


def test_private_names_of_the_voc_evaluator(tmp_path):
    """`PerClassPascalVOCEvaluator` sets ``_class_names`` and ``_predictions`` of its base class."""
    evaluator = PascalVOCDetectionEvaluator(make_voc(tmp_path))
    evaluator.reset()
    assert evaluator._class_names == ["cat", "dog"]
    for inputs, outputs in voc_batches():
        evaluator.process(inputs, outputs)
    assert sorted(evaluator._predictions) == [0, 1] and len(evaluator._predictions[0]) == 2


# ------------------------------------------------------------------------------------------ LVIS


def test_lvis(tmp_path):
    pytest.importorskip("lvis")
    ground_truth, _ = random_data(4, num_images=6)
    for annotation in ground_truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        annotation.update(iscrowd=0, segmentation=[corners])
    for category, frequency in zip(ground_truth["categories"], "rcfff", strict=True):
        category["frequency"] = frequency
    for image in ground_truth["images"]:
        image.update(neg_category_ids=[], not_exhaustive_category_ids=[])
    name = register(ground_truth, tmp_path, "lvis")
    numpy_names = set(vars(np))
    evaluator = build_evaluator(None, name, str(tmp_path / "out"))
    assert set(vars(np)) == numpy_names

    perfect = [{**annotation, "score": 0.5} for annotation in ground_truth["annotations"]]
    results = run(evaluator, as_batches(ground_truth, perfect))["bbox"]
    assert [results[key] for key in ("AP", "APr", "APc", "APf")] == pytest.approx([100] * 4)
    assert (tmp_path / "out" / "lvis_instances_results.json").is_file()
    rare = ground_truth["categories"][0]["id"]
    common = [detection for detection in perfect if detection["category_id"] != rare]
    results = run(evaluator, as_batches(ground_truth, common))["bbox"]
    assert (results["APr"], results["APc"]) == pytest.approx((0, 100))
    names = {c["id"]: c["name"] for c in ground_truth["categories"]}
    assert results[f"AP-{names.pop(rare)}"] == 0
    others = [results[f"AP-{other}"] for other in names.values()]
    assert [ap for ap in others if ap == ap] == pytest.approx([100] * 3)  # one has no object
    written = json.loads((tmp_path / "out" / "per_class_ap.json").read_text())["bbox"]
    known = [figures["AP"] for figures in written.values() if figures["AP"] is not None]
    assert len(known) == 4 and np.mean(known) == pytest.approx(results["AP"])


def test_lvis_without_its_package(monkeypatch, tmp_path):
    name = register(random_data(0, num_images=2)[0], tmp_path, "lvis")
    monkeypatch.setitem(sys.modules, "lvis", None)
    with pytest.raises(UserError, match=r"package lvis is needed.*pip install --no-deps lvis"):
        build_evaluator(None, name)


# --------------------------------------------------------------------- choice, folder, processes


def test_config_gives_the_folder_and_no_limit(tmp_path, caplog):
    """AP of models that return 300 detections is published with COCO's 100."""
    ground_truth, detections = random_data(5)
    name = register(ground_truth, tmp_path)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    batches = list(as_batches(ground_truth, detections))
    results = run(build_evaluator(cfg, name), batches)
    assert (tmp_path / "output" / "inference" / "per_class_ap.json").is_file()
    np.testing.assert_equal(results, run(build_evaluator(None, name), batches))
    assert "published COCO figures use 100" not in caplog.text
    more = run(build_evaluator(cfg, name, max_detections_per_image=300), batches)
    np.testing.assert_equal(
        more, run(COCODetectionEvaluator(name, max_detections_per_image=300), batches)
    )
    assert results["bbox"]["AP"] != more["bbox"]["AP"]
    cfg.TEST.MAX_EVALUATED_DETECTIONS = 300
    np.testing.assert_equal(more, run(build_evaluator(cfg, name), batches))
    assert "published COCO figures use 100" in caplog.text


def test_several_data_sets_have_folders_of_their_own(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    names = []
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        names.append(register(random_data(seed)[0], tmp_path / str(seed)))
    cfg.DATASETS.TEST = tuple(names)
    for seed, name in enumerate(names):
        run(build_evaluator(cfg, name), as_batches(*random_data(seed)))
        assert (tmp_path / "output" / "inference" / name / "per_class_ap.json").is_file()


def test_evaluators_that_cannot_be_built(tmp_path):
    with pytest.raises(UserError, match="'nowhere' has the evaluator_type None; set .*'coco'"):
        build_evaluator(None, "nowhere")
    name = register(random_data(0, num_images=2)[0], tmp_path, "cityscapes")
    with pytest.raises(UserError, match="evaluator_type 'cityscapes'"):
        build_evaluator(None, name)
    MetadataCatalog.get(name).set(dirname=str(tmp_path), split="test")
    del MetadataCatalog.get(name).evaluator_type
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    with pytest.raises(UserError, match="cannot be evaluated without year; set"):
        build_evaluator(None, name)
    name = register(random_data(0, num_images=2)[0], tmp_path, file_name="gone.json")
    (tmp_path / "gone.json").unlink()
    with pytest.raises(UserError, match=r"gone\.json of data set .* does not exist"):
        build_evaluator(None, name)


def evaluate_own_share(folder):
    """Runs in each of two processes: every second image is this process's."""
    rank = torch.distributed.get_rank()
    (folder / str(rank)).mkdir()
    ground_truth, detections = random_data(3)
    coco = COCODetectionEvaluator(register(ground_truth, folder / str(rank)))
    voc = PerClassPascalVOCEvaluator(make_voc(folder / str(rank) / "voc"))
    results = {
        "coco": run(coco, list(as_batches(ground_truth, detections))[rank::2]),
        "voc": run(voc, list(voc_batches(miss_a_cat=True))[rank::2]),
    }
    torch.save(results, folder / f"{rank}.pt")


def test_two_processes_give_the_results_of_one(tmp_path):
    # A program of its own, since processes started from within pytest cannot import this file.
    command = [sys.executable, __file__, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert second == {"coco": {}, "voc": {}}
    ground_truth, detections = random_data(3)
    single = COCODetectionEvaluator(register(ground_truth, tmp_path))
    expected = run(single, as_batches(ground_truth, detections))["bbox"]
    assert list(first["coco"]["bbox"]) == list(expected)
    np.testing.assert_equal(first["coco"]["bbox"], expected)
    assert first["voc"]["bbox"]["AP"] == pytest.approx(75)


if __name__ == "__main__":
    arguments = (evaluate_own_share, Path(sys.argv[1]))
    launch(run_in_group, 2, dist_url="auto", args=arguments)
