"""Pictures of predictions beside ground truth, and of a training."""

import json

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from detr_d2.visualize import HEIGHT, draw_comparison, draw_curves


def test_boxes_are_drawn_where_they_are(tmp_path):
    """A black image: whatever is bright was drawn."""
    Image.new("RGB", (100, 50)).save(tmp_path / "black.png")
    MetadataCatalog.get("visualize_test").thing_classes = ["thing"]
    record = {
        "file_name": str(tmp_path / "black.png"),
        "annotations": [
            {"bbox": [60, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        ],
    }
    seen = []

    def predictor(image):
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


def test_curves_are_drawn_from_metrics(tmp_path, monkeypatch):
    rows = [{"iteration": 19, "total_loss": 9.0}, {"iteration": 39, "total_loss": 7.0}]
    rows += [{"iteration": 39, "bbox/AP": 12.0, "bbox/AP50": 30.0}]
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
