"""One image to detections, through this package's predictor and detectron2's own."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from detr_d2 import get_detr_cfg
from detr_d2.checkpoint import read_checkpoint
from detr_d2.checkpoint.convert import convert_checkpoint
from detr_d2.checkpoint.write import write_checkpoint
from detr_d2.engine import DetrPredictor
from detr_d2.engine.main import evaluate
from detr_d2.engine.predictor import check_image
from detr_d2.errors import UserError

from .helpers import tiny_cfg
from .training import unregistering


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Config whose MODEL.WEIGHTS is a saved random model, as .pth."""
    # Names of an original checkpoint exist for frozen batch norms and torchvision's architectures.
    cfg = tiny_cfg(
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "FrozenBN"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res3"], "DATASETS.TRAIN", (), "DATASETS.TEST", ()),
    )
    torch.manual_seed(3)
    model = build_model(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path_factory.mktemp("weights") / "model.pth")
    write_checkpoint(cfg.MODEL.WEIGHTS, model.state_dict())
    return cfg


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def with_weights(cfg, path):
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(path)
    return cfg


def assert_same(first, second):
    first, second = first["instances"], second["instances"]
    assert first.image_size == second.image_size == (70, 90)
    assert len(first) == len(second) == 7
    torch.testing.assert_close(first.scores, second.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.pred_classes, second.pred_classes)
    boxes = first.pred_boxes.tensor, second.pred_boxes.tensor
    torch.testing.assert_close(*boxes, rtol=1e-4, atol=1e-3)


def test_equals_detectron2s(cfg, image):
    predictor = DetrPredictor(cfg)
    expected = DefaultPredictor(cfg)(image)
    assert_same(predictor(image), expected)
    assert not predictor.model.training


def test_equals_the_model_on_rgb(cfg, image):
    """The image is BGR; the model, by INPUT.FORMAT, is given RGB of the test size."""
    cfg = cfg.clone()
    cfg.INPUT.MIN_SIZE_TEST = 70
    predictor = DetrPredictor(cfg)
    rgb = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
    with torch.no_grad():
        [expected] = predictor.model([{"image": rgb, "height": 70, "width": 90}])
    assert_same(predictor(image), expected)


def test_safetensors(cfg, image, tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(str(path), torch.load(cfg.MODEL.WEIGHTS)["model"])
    assert_same(DetrPredictor(with_weights(cfg, path))(image), DetrPredictor(cfg)(image))


@pytest.mark.parametrize("file", ["original.pth", "original.safetensors"])
def test_original_format(cfg, image, tmp_path, file):
    path = tmp_path / file
    convert_checkpoint(cfg.MODEL.WEIGHTS, str(path), "original")
    assert_same(DetrPredictor(with_weights(cfg, path))(image), DetrPredictor(cfg)(image))


def test_metadata_is_that_of_the_data_set(cfg, tmp_path):
    cfg = with_weights(cfg, tmp_path / "model.pth")
    cfg.MODEL.DETR.NUM_CLASSES = 80
    write_checkpoint(cfg.MODEL.WEIGHTS, build_model(cfg).state_dict())
    cfg.MODEL.DETR.NUM_CLASSES = 0
    cfg.DATASETS.TEST = ("coco_2017_val",)
    predictor = DetrPredictor(cfg)
    assert predictor.metadata is MetadataCatalog.get("coco_2017_val")


def test_the_data_is_not_loaded_where_the_checkpoint_tells_its_classes(cfg, tmp_path):
    """Projects register at import, also on machines that have not the data."""
    weights = read_checkpoint(cfg.MODEL.WEIGHTS)["model"]
    names = [f"class {i}" for i in range(cfg.MODEL.DETR.NUM_CLASSES)]
    bare = with_weights(cfg, tmp_path / "model.pth")
    bare.DATASETS.TEST, bare.MODEL.DETR.NUM_CLASSES = ("gone_val",), 0
    with unregistering():
        register_coco_instances("gone_val", {}, "/nowhere/val.json", "/nowhere")
        torch.save({"model": weights, "class_names": names}, bare.MODEL.WEIGHTS)
        assert DetrPredictor(bare).metadata.thing_classes == names
        torch.save({"model": weights}, bare.MODEL.WEIGHTS)
        with pytest.raises(UserError, match=r"/nowhere/val\.json.*DETECTRON2_DATASETS"):
            DetrPredictor(bare)


def test_names_of_heads_with_a_row_for_each_category_id(cfg, tmp_path):
    """As published models have them: COCO's dog has the id 18, with a hole before it."""
    cfg = with_weights(cfg, tmp_path / "model.pth")
    cfg.DATASETS.TEST, cfg.MODEL.DETR.NUM_CLASSES = ("coco_2017_val",), 91
    write_checkpoint(cfg.MODEL.WEIGHTS, build_model(cfg).state_dict())
    names = DetrPredictor(cfg).metadata.thing_classes
    assert (names[18], names[12], names[90]) == ("dog", "N/A", "toothbrush")
    cfg.MODEL.DETR.NUM_CLASSES = 3  # a model of something else
    write_checkpoint(cfg.MODEL.WEIGHTS, build_model(cfg).state_dict())
    assert DetrPredictor(cfg).metadata.get("thing_classes") is None
    weights = read_checkpoint(cfg.MODEL.WEIGHTS)["model"]
    torch.save({"model": weights, "class_names": ["a", "b"]}, cfg.MODEL.WEIGHTS)
    assert DetrPredictor(cfg).metadata.get("thing_classes") is None


def test_empty_weights(cfg):
    with pytest.raises(UserError, match="MODEL.WEIGHTS is empty: name the checkpoint"):
        DetrPredictor(with_weights(cfg, ""))


def test_missing_weights(cfg, tmp_path):
    with pytest.raises(UserError, match="nothing.pth.*does not exist"):
        DetrPredictor(with_weights(cfg, tmp_path / "nothing.pth"))


def test_own_weights_need_no_registered_data_set(cfg, tmp_path):
    """As on the machine a model is used on: only the config and the checkpoint are there."""
    from detr_d2.checkpoint import DetrCheckpointer

    cfg = cfg.clone()
    cfg.MODEL.INFERENCE.BACKEND = "none"
    model = DetrPredictor(cfg).model
    names = [f"class {i}" for i in range(cfg.MODEL.DETR.NUM_CLASSES)]
    DetrCheckpointer(model, str(tmp_path), class_names=names).save("model")
    bare = with_weights(cfg, tmp_path / "model.pth")
    bare.DATASETS.TRAIN, bare.DATASETS.TEST = ("nowhere_train",), ("nowhere_val",)
    bare.MODEL.DETR.NUM_CLASSES = 0
    predictor = DetrPredictor(bare)
    assert predictor.metadata.thing_classes == names
    head = predictor.model.transformer.decoder.heads[0].class_head.weight
    assert torch.equal(head, model.transformer.decoder.heads[0].class_head.weight)


class Recorder:
    """In place of a runtime: finds one thing, and remembers the images."""

    def __call__(self, images, sizes):
        self.images = images
        boxes = torch.tensor([[[1.0, 2.0, 30.0, 40.0]]])
        return boxes, torch.tensor([[0.5]]), torch.tensor([[1]])


@pytest.fixture
def exported(monkeypatch, tmp_path):
    """Config of a file whose description has the given values, and its runtime."""
    recorder = Recorder()
    monkeypatch.setattr("detr_d2.deploy.runtime.open_model", lambda path, dtype: recorder)

    def make(cfg, **description):
        (tmp_path / "model.onnx").write_bytes(b"")
        description = {"input_format": "RGB", "class_names": ["cat", "dog"]} | description
        (tmp_path / "model.onnx.json").write_text(json.dumps(description))
        return with_weights(cfg, tmp_path / "model.onnx"), recorder

    return make


def test_exported_models_tell_their_pixels_and_classes(exported, image):
    """With a config that knows nothing of them; detectron2's channels are BGR."""
    cfg, recorder = exported(get_detr_cfg(), min_size=70, max_size=90)
    assert cfg.INPUT.FORMAT == "BGR"
    predictor = DetrPredictor(cfg)
    predictor(image)
    rgb = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
    assert torch.equal(recorder.images[0], rgb.float())
    assert predictor.metadata.thing_classes == ["cat", "dog"]
    DetrPredictor(exported(get_detr_cfg(), input_format="BGR", min_size=70)[0])(image)
    assert torch.equal(recorder.images[0].flip(0), rgb.float())


def test_sizes_of_the_config_come_before_those_of_the_file(exported, image):
    cfg, recorder = exported(get_detr_cfg(), min_size=70, max_size=90)
    cfg.INPUT.MIN_SIZE_TEST = 35
    DetrPredictor(cfg)(image)
    assert recorder.images.shape[2:] == (35, 45)


def test_what_a_file_does_not_follow_is_said(exported, caplog):
    panoptic = {"thing_classes": [0], "score_threshold": 0.85, "min_area": 4}
    of_file = {"detections_per_image": 20, "mask_threshold": 0.5, "panoptic": panoptic}
    cfg = get_detr_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg, _ = exported(cfg, **of_file)
    DetrPredictor(cfg)
    assert not caplog.messages  # defaults, or what the file has
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    cfg.MODEL.MASK_THRESHOLD = 0.4
    cfg.MODEL.DETR.PANOPTIC.SCORE_THRESHOLD, cfg.MODEL.DETR.PANOPTIC.MIN_AREA = 0.6, 9
    DetrPredictor(cfg)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "MODEL.MASK_THRESHOLD 0.4 changes nothing",
        "MODEL.DETR.PANOPTIC.SCORE_THRESHOLD 0.6 changes nothing",
        "MODEL.DETR.PANOPTIC.MIN_AREA 9 changes nothing",
    ]
    assert "model.onnx' was exported with 0.5." in caplog.messages[0]
    caplog.clear()
    cfg.TEST.DETECTIONS_PER_IMAGE = 50
    DetrPredictor(exported(cfg, detections_per_image=20)[0])  # a file without masks
    [message] = caplog.messages
    assert "TEST.DETECTIONS_PER_IMAGE 50 changes nothing" in message and "with 20." in message
    caplog.clear()
    DetrPredictor(exported(cfg)[0])  # of an earlier version, which did not say
    assert not caplog.messages


def test_other_classes_than_the_data_sets_are_the_files(exported):
    cfg, _ = exported(get_detr_cfg())
    cfg.DATASETS.TEST = ("coco_2017_val",)
    assert DetrPredictor(cfg).metadata.thing_classes == ["cat", "dog"]
    coco = MetadataCatalog.get("coco_2017_val")
    cfg, _ = exported(cfg, class_names=coco.thing_classes)
    assert DetrPredictor(cfg).metadata is coco


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"input_format": "BGR"}, "expects BGR images, and INPUT.FORMAT is RGB: set INPUT.FORMAT"),
        ({}, "has 2 classes and the data set 80; class 0 is 'cat' in the file and 'person' in"),
    ],
)
def test_files_for_other_pixels_or_classes_are_not_evaluated(exported, description, message):
    cfg = tiny_cfg("DATASETS.TEST", ("coco_2017_val",))
    with pytest.raises(UserError, match=f"model.onnx' {message}"):
        evaluate(exported(cfg, **description)[0])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"input_format": 1, "class_names": 2}'])
def test_descriptions_that_are_none_are_refused(exported, tmp_path, text):
    cfg, _ = exported(get_detr_cfg())
    (tmp_path / "model.onnx.json").write_text(text)
    with pytest.raises(UserError, match="model.onnx.json' does not describe an exported model"):
        DetrPredictor(cfg)
    (tmp_path / "model.onnx.json").unlink()
    with pytest.raises(
        UserError, match="model.onnx.json' is missing: it says what the pixels, classes"
    ):
        DetrPredictor(cfg)


def test_device_is_the_cpu_where_there_is_no_gpu(cfg, image, monkeypatch):
    """What detectron2's configs say, most of which are made for GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = cfg.clone()
    cuda.MODEL.DEVICE = "cuda"
    assert_same(DetrPredictor(cuda)(image), DetrPredictor(cfg)(image))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "is None: OpenCV could not read"),
        (np.zeros((8, 8), np.uint8), r"is uint8 of shape \(8, 8\), it must be"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.float32), "is float32"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        ([[1, 2, 3]], "is list"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(UserError, match=message):
        check_image(image)


def test_low_scores_are_left_out(cfg, image):
    everything = DetrPredictor(cfg)(image)["instances"]
    threshold = everything.scores.sort().values[3].item()
    some = cfg.clone()
    some.TEST.SCORE_THRESHOLD = threshold
    kept = DetrPredictor(some)(image)["instances"]
    assert len(everything) == 7 and len(kept) == 4
    assert torch.equal(kept.scores, everything.scores[everything.scores >= threshold])


def test_models_of_grey_images_take_one_channel(tmp_path):
    """And find what the model itself finds in the resized image; colours are refused."""
    options = ("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [120.0], "MODEL.PIXEL_STD", [60.0])
    cfg = tiny_cfg(*options, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    path = str(tmp_path / "grey.pth")
    write_checkpoint(path, model.state_dict())
    predictor = DetrPredictor(with_weights(cfg, path))
    grey = np.random.default_rng(0).integers(0, 256, (64, 96, 1), dtype=np.uint8)
    with torch.no_grad():
        [expected] = model([{"image": torch.from_numpy(grey.transpose(2, 0, 1).copy())}])
    found, expected = predictor(grey)["instances"], expected["instances"]
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    boxes = found.pred_boxes.tensor, expected.pred_boxes.tensor
    torch.testing.assert_close(*boxes, rtol=1e-4, atol=1e-3)
    with pytest.raises(UserError, match=r"must be a uint8 array of shape \(height, width, 1\)"):
        predictor(np.repeat(grey, 3, axis=2))
