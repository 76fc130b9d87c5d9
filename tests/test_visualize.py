"""Pictures of predictions beside ground truth, and of a training."""

import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_util

from detr_d2.data.segments import id_to_rgb
from detr_d2.errors import UserError
from detr_d2.visualize import HEIGHT, draw_comparison, draw_curves, draw_pair

from .training import ROOT


@pytest.fixture(autouse=True)
def white_for_everything(monkeypatch):
    """The visualizer draws colours by lot, and some are nearly black."""
    monkeypatch.setattr("detectron2.utils.visualizer.random_color", lambda **_: np.ones(3))


def test_boxes_are_drawn_where_they_are(tmp_path):
    """A nearly black image, a little bluer than red: whatever is bright was drawn."""
    Image.new("RGB", (100, 50), (1, 0, 3)).save(tmp_path / "black.png")
    MetadataCatalog.get("visualize_test").thing_classes = ["thing"]
    record = {
        "file_name": str(tmp_path / "black.png"),
        "annotations": [
            {"bbox": [60, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        ],
    }
    seen = []

    def predictor(image):
        assert image[0, 0].tolist() == [3, 0, 1]  # BGR
        seen.append(image.shape)
        instances = Instances((50, 100))
        instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 30, 30], [50, 5, 70, 45]]))
        instances.scores = torch.tensor([0.9, 0.2])
        instances.pred_classes = torch.zeros(2, dtype=torch.int64)
        return {"instances": instances}

    path = tmp_path / "new" / "picture.png"
    draw_comparison(predictor, [record, record], "visualize_test", path, columns=1)
    drawn = np.asarray(Image.open(path))
    assert seen == [(50, 100, 3)] * 2
    assert drawn.shape == (2 * (HEIGHT + 16), 2 * 2 * HEIGHT + 24, 3)
    scale = HEIGHT / 50
    prediction, truth = drawn[:HEIGHT, : 2 * HEIGHT], drawn[:HEIGHT, 2 * HEIGHT : 4 * HEIGHT]

    def column_is_bright(picture, x):
        here = round(x * scale)
        return picture[round(20 * scale), here - 6 : here + 7].max() > 30  # colours are random

    # Left edges at 10 (predicted, confident), 50 (predicted, below the threshold), 60 (true).
    assert column_is_bright(prediction, 10) and not column_is_bright(prediction, 50)
    assert column_is_bright(truth, 60) and not column_is_bright(truth, 10)


def test_masks_and_panoptic_segments_are_drawn(tmp_path):
    """Half of a black image is one segment: that half is coloured, on both sides."""
    Image.new("RGB", (100, 50)).save(tmp_path / "black.png")
    left = np.zeros((50, 100), np.uint8)
    left[:, :50] = 1
    Image.fromarray(id_to_rgb(left + 6)).save(tmp_path / "segments.png")
    metadata = MetadataCatalog.get("visualize_masks_test")
    metadata.set(thing_classes=["thing", "wall"], stuff_classes=["thing", "wall"])
    metadata.set(thing_dataset_id_to_contiguous_id={1: 0})
    rle = mask_util.encode(np.asfortranarray(left))
    box = {"bbox": [0, 0, 50, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    instance_record = {
        "file_name": str(tmp_path / "black.png"),
        "annotations": [{**box, "segmentation": rle}],
    }
    panoptic_record = {
        "file_name": str(tmp_path / "black.png"),
        "pan_seg_file_name": str(tmp_path / "segments.png"),
        "segments_info": [{"id": 7, "category_id": 1}],
    }

    def instance_predictor(image):
        instances = Instances((50, 100))
        instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 50, 50]]))
        instances.scores, instances.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        instances.pred_masks = torch.from_numpy(left)[None].bool()
        return {"instances": instances}

    def panoptic_predictor(image):
        info = [{"id": 1, "category_id": 1, "isthing": False}]
        return {**instance_predictor(image), "panoptic_seg": (torch.from_numpy(left).int(), info)}

    pairs = [(instance_predictor, instance_record), (panoptic_predictor, panoptic_record)]
    pairs.append((panoptic_predictor, instance_record))  # segments of no ground truth: instances
    for predictor, record in pairs:
        path = tmp_path / "picture.png"
        assert draw_comparison(predictor, [record], "visualize_masks_test", path, columns=1) == 1
        drawn = np.asarray(Image.open(path)).max(-1)
        for start in (0, 2 * HEIGHT):  # predictions, then ground truth
            half = drawn[20 : HEIGHT - 20, start + 20 : start + HEIGHT - 20]
            other = drawn[20 : HEIGHT - 20, start + HEIGHT + 20 : start + 2 * HEIGHT - 20]
            assert half.mean() > 40 and (half > 20).mean() > 0.9 and other.mean() < 20, start


@pytest.mark.parametrize("with_mask", [0, 1])
def test_an_object_without_a_mask_beside_one_with(tmp_path, with_mask):
    Image.new("RGB", (100, 50)).save(tmp_path / "black.png")
    MetadataCatalog.get("visualize_test").thing_classes = ["thing"]
    annotations = [
        {"bbox": [x, 10, 30, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0} for x in (5, 60)
    ]
    x = annotations[with_mask]["bbox"][0]
    annotations[with_mask]["segmentation"] = [[x, 10, x + 30, 10, x + 30, 40, x, 40]]
    record = {"file_name": str(tmp_path / "black.png"), "annotations": annotations}

    def predictor(image):
        instances = Instances((50, 100))
        instances.pred_boxes, instances.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        instances.pred_classes = torch.zeros(0, dtype=torch.int64)
        instances.pred_masks = torch.zeros(0, 50, 100, dtype=torch.bool)
        return {"instances": instances}

    drawn, _ = draw_pair(predictor, record, "visualize_test", 0.5)
    truth = drawn[:, 2 * HEIGHT : 4 * HEIGHT].max(-1)
    scale = HEIGHT / 50
    inside = [truth[round(30 * scale), round((c + 15) * scale)] > 20 for c in (5, 60)]
    assert inside == [with_mask == 0, with_mask == 1]


def test_no_image_to_draw_is_refused():
    main = runpy.run_path(str(ROOT / "tools" / "visualize.py"))["main"]
    with pytest.raises(UserError, match="--num-images is 0: draw 1 or more"):
        main(SimpleNamespace(num_images=0))


def test_curves_are_drawn_from_metrics(tmp_path, monkeypatch):
    rows = [{"iteration": 19, "total_loss": 9.0}, {"iteration": 39, "total_loss": 7.0}]
    rows += [{"iteration": 39, "bbox/AP": 12.0, "bbox/AP50": 30.0}]
    rows = [{"iteration": 39, "total_loss": 7.5}, *rows]  # of a training before it was resumed
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    drawn = []
    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axis, x, y, *a, **k: (drawn.append((x, y)), plot(axis, x, y, *a, **k))
    )
    draw_curves(tmp_path / "metrics.json", tmp_path / "curve.png")
    assert drawn == [((19, 39), (9.0, 7.0)), ((39,), (12.0,)), ((39,), (30.0,))]
    assert np.asarray(Image.open(tmp_path / "curve.png")).std() > 0


@pytest.mark.parametrize("content", [None, "no json"])
def test_what_is_no_metrics_file_is_named(tmp_path, content):
    path = tmp_path / "metrics.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match="metrics.json' cannot be read as the metrics.json of"):
        draw_curves(path, tmp_path / "curve.png")


def test_the_demo_writes_to_a_folder_of_any_name(monkeypatch, tmp_path):
    tool = runpy.run_path(str(ROOT / "tools" / "demo.py"))
    commands = []

    def record(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setitem(tool["main"].__globals__, "average_precision", lambda folder: 1.0)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "my demo")])
    tool["main"]()
    folders = {word for command in commands for word in command if "my demo" in word}
    assert {str(tmp_path / "my demo" / name) for name in ("trained", "new")} <= folders
