"""Images of one's own to pictures and a file of detections."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image

from detr_d2.data.image import read_image
from detr_d2.errors import UserError
from detr_d2.predict import image_files, predict_files
from detr_d2.visualize import as_input

from .training import ROOT, environment


class Predictor:
    """Finds one object, where an image is brightest in its red channel."""

    metadata = Metadata(thing_classes=["cat", "dog"])
    input_format = "RGB"

    def __call__(self, image):
        height, width = image.shape[:2]
        row, column = np.unravel_index(image[..., 2].argmax(), (height, width))
        instances = Instances((height, width))
        box = [[float(column), float(row), column + 4.0, row + 2.0]]
        instances.pred_boxes = Boxes(torch.tensor(box))
        instances.scores = torch.tensor([0.75])
        instances.pred_classes = torch.tensor([1])
        return {"instances": instances}


@pytest.fixture
def folder(tmp_path):
    """Two images, one below another folder, a red and a blue pixel in each; and a text."""
    for name, (row, column) in {"a.png": (5, 7), "deep/a.jpg.png": (20, 30)}.items():
        pixels = np.zeros((40, 60, 3), np.uint8)
        pixels[row, column], pixels[0, 0] = (255, 0, 0), (0, 0, 255)
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def test_files_and_folders(folder):
    files = image_files([str(folder)])
    assert list(files) == ["a.png", "deep/a.jpg.png"]
    assert files["deep/a.jpg.png"] == folder / "deep" / "a.jpg.png"
    assert list(image_files([str(folder / "a.png"), str(folder / "deep")])) == [
        "a.jpg.png",
        "a.png",
    ]


def test_wrong_inputs(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for given, message in (
        ([str(tmp_path / "gone.png")], "gone.png' does not exist"),
        ([str(tmp_path / "empty")], "empty' holds no image"),
        ([str(folder / "a.png"), str(folder)], "Two images of --input are called 'a.png'"),
    ):
        with pytest.raises(UserError, match=message):
            image_files(given)


def test_detections_are_written_where_they_are(folder, tmp_path):
    """BGR reaches the predictor; boxes are xywh; pictures lie as the images do."""
    output = tmp_path / "out"
    assert predict_files(Predictor(), image_files([str(folder)]), str(output)) == 2
    first, second = json.loads((output / "detections.json").read_text())
    assert first == {
        "image_id": "a.png",
        "category_id": 1,
        "category": "dog",
        "bbox": [7.0, 5.0, 4.0, 2.0],
        "score": 0.75,
    }
    assert second["image_id"] == "deep/a.jpg.png" and second["bbox"][:2] == [30.0, 20.0]
    picture = np.asarray(Image.open(output / "deep" / "a.jpg.png.png"))
    assert picture.shape == (40, 60, 3)
    original = np.asarray(Image.open(folder / "deep" / "a.jpg.png"))
    assert (picture != original).any(-1)[15:30, 25:40].any()


def test_unreadable_images_are_named_and_left_out(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    output = str(tmp_path / "out")
    assert predict_files(Predictor(), image_files([str(folder)]), output) == 2
    assert "Cannot read the image" in caplog.text and "broken.jpg" in caplog.text


def test_what_was_found_before_an_interruption_is_written(folder, tmp_path):
    class Interrupted(Predictor):
        def __call__(self, image):
            if (tmp_path / "a.png.png").exists():
                raise KeyboardInterrupt
            return super().__call__(image)

    with pytest.raises(KeyboardInterrupt):
        predict_files(Interrupted(), image_files([str(folder)]), str(tmp_path))
    [found] = json.loads((tmp_path / "detections.json").read_text())
    assert found["image_id"] == "a.png"


def test_output_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output '.*file/out' cannot be written to"):
        predict_files(Predictor(), image_files([str(folder)]), str(tmp_path / "file" / "out"))


def test_grey_models_are_given_grey_images(folder):
    grey = Predictor()
    grey.input_format = "L"
    file = str(folder / "a.png")
    image = read_image(file, "RGB")
    assert as_input(grey, image, file).shape == (40, 60, 1)
    assert as_input(Predictor(), image, file)[5, 7].tolist() == [0, 0, 255]
    assert as_input(lambda image: None, image, file).shape == (40, 60, 3)


def test_the_command_as_typed(folder, tmp_path):
    """The committed model looks at two nearly black images."""
    command = [sys.executable, str(ROOT / "tools" / "predict.py"), "--input", str(folder)]
    config = str(ROOT / "configs" / "DigitScenes" / "fast_small.yaml")
    command += ["--config-file", config, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "detections with scores of at least 0.5 in 2 images" in done.stdout
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert all(each["score"] >= 0.5 for each in found)
    assert (tmp_path / "out" / "a.png.png").exists()
