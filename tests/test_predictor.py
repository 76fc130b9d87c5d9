"""One image to detections, through this package's predictor and detectron2's own."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from detr_d2.checkpoint.convert import convert_checkpoint
from detr_d2.checkpoint.write import write_checkpoint
from detr_d2.engine import DetrPredictor
from detr_d2.errors import UserError

from .helpers import tiny_cfg


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


def test_metadata_is_that_of_the_data_set(cfg):
    cfg = cfg.clone()
    cfg.MODEL.DETR.NUM_CLASSES = 0
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.MODEL.WEIGHTS = ""
    predictor = DetrPredictor(cfg)
    assert predictor.metadata is MetadataCatalog.get("coco_2017_val")


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
