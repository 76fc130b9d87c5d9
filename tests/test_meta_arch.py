"""The meta-architecture: sizes, order and identity of detections, and how models are built."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_model
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from detr_d2 import add_detr_config, get_detr_cfg
from detr_d2.errors import UserError
from detr_d2.modeling import Detr, build_criterion, build_transformer
from detr_d2.modeling.neck import SingleScaleNeck
from detr_d2.modeling.position import LearnedPositionEmbedding, SinePositionEmbedding
from detr_d2.structures import LayerOutput, Predictions

from .helpers import NUM_CLASSES, random_inputs, tiny_cfg

SIZES = [(64, 96), (80, 64)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(tiny_cfg()).eval()


class FixedOutput(nn.Module):
    """A transformer that always predicts the same."""

    def __init__(self, logits, boxes):
        super().__init__()
        self.output = LayerOutput(logits, boxes)

    def forward(self, memory, targets=None, last_only=False):
        batch = len(memory.tokens)
        return Predictions([LayerOutput(*(t.expand(batch, -1, -1) for t in self.output))])


def predicting(probabilities, boxes, *options):
    """Model whose queries have these class probabilities ("no object" last) and boxes."""
    model = build_model(tiny_cfg(*options)).eval()
    logits = torch.tensor(probabilities).log()
    model.transformer = FixedOutput(logits[None], torch.tensor(boxes)[None])
    return model


# Three queries; the best classes are 1, 0 and 4 with probability 0.6, 0.3 and 0.7.
PROBABILITIES = [
    [0.1, 0.6, 0.1, 0.1, 0.05, 0.05],
    [0.3, 0.1, 0.05, 0.02, 0.03, 0.5],
    [0.05, 0.05, 0.05, 0.05, 0.7, 0.1],
]
BOXES = [[0.5, 0.5, 0.5, 0.25], [0.9, 0.9, 0.4, 0.4], [0.25, 0.5, 0.1, 0.2]]


@torch.no_grad()
def test_detections_by_hand():
    """An image of 40 rows and 80 columns, shown in 100 rows and 400 columns."""
    inputs = random_inputs([(40, 80)])
    inputs[0].update(height=100, width=400)
    instances = predicting(PROBABILITIES, BOXES)(inputs)[0]["instances"]
    assert instances.image_size == (100, 400)
    assert instances.scores.tolist() == pytest.approx([0.7, 0.6, 0.3])
    assert instances.pred_classes.tolist() == [4, 1, 0]
    expected = [
        [80, 40, 120, 60],
        [100, 37.5, 300, 62.5],
        # Clipped: it reached to 440 and 110.
        [280, 70, 400, 100],
    ]
    torch.testing.assert_close(instances.pred_boxes.tensor, torch.tensor(expected))


@torch.no_grad()
def test_without_height_and_width_the_size_is_the_inputs():
    """Also where the image is padded in a batch."""
    model = predicting(PROBABILITIES, BOXES)
    results = model(random_inputs([(40, 80), (120, 60)]))
    assert [result["instances"].image_size for result in results] == [(40, 80), (120, 60)]
    assert results[0]["instances"].pred_boxes.tensor[1].tolist() == [20, 15, 60, 25]
    assert results[1]["instances"].pred_boxes.tensor[1].tolist() == [15, 45, 45, 75]


@torch.no_grad()
def test_detections_per_image():
    model = predicting(PROBABILITIES, BOXES, "TEST.DETECTIONS_PER_IMAGE", 2)
    instances = model(random_inputs([(40, 80)]))[0]["instances"]
    assert instances.pred_classes.tolist() == [4, 1]


@torch.no_grad()
def test_detections_of_a_real_model(model):
    inputs = random_inputs(SIZES)
    inputs[1].update(height=200, width=100)
    for result, (height, width) in zip(model(inputs), ((64, 96), (200, 100)), strict=True):
        instances = result["instances"]
        assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        assert 0 < len(instances) <= 7
        assert (instances.scores.diff() <= 0).all()
        x1, y1, x2, y2 = instances.pred_boxes.tensor.unbind(1)
        assert (x1 >= 0).all() and (y1 >= 0).all()
        assert (x2 <= width).all() and (y2 <= height).all()
        assert (x1 < x2).all() and (y1 < y2).all()
        assert ((instances.pred_classes >= 0) & (instances.pred_classes < NUM_CLASSES)).all()


@torch.no_grad()
def test_predict_gives_every_layer_and_forward_uses_the_same(model):
    inputs = random_inputs(SIZES, [2, 1])
    outputs = model.predict(inputs)
    assert len(outputs) == 3
    for output in outputs:
        assert isinstance(output, LayerOutput)
        assert output.logits.shape == (2, 7, NUM_CLASSES + 1)
        assert output.boxes.shape == (2, 7, 4)
        assert (output.boxes > 0).all() and (output.boxes < 1).all()

    expected = model.inference(outputs[-1], inputs)
    for result, wanted in zip(model(inputs), expected, strict=True):
        wanted = wanted["instances"].pred_boxes.tensor
        assert torch.equal(result["instances"].pred_boxes.tensor, wanted)
    model.train().backbone.eval()  # its batch norms would see this batch
    losses = model(inputs)
    targets = model.prepare_targets(inputs)
    assert losses == model.criterion(Predictions(outputs), targets)


def test_targets_are_normalised_to_the_unpadded_image(model):
    inputs = random_inputs([(40, 80), (120, 60)], [1, 0])
    inputs[0]["instances"].gt_boxes.tensor[0] = torch.tensor([20.0, 10.0, 60.0, 40.0])
    first, second = model.prepare_targets(inputs)
    assert first.boxes.tolist() == [[0.5, 0.625, 0.5, 0.75]]
    assert second.boxes.shape == (0, 4)
    assert second.classes.dtype == torch.int64


def test_images_are_normalised_then_padded_with_zeros(model):
    inputs = random_inputs([(40, 80), (64, 60)])
    images = model.preprocess_image(inputs)
    assert images.tensor.shape == (2, 3, 64, 80)
    assert images.image_sizes == [(40, 80), (64, 60)]
    mean = torch.tensor([123.675, 116.280, 103.530])
    std = torch.tensor([58.395, 57.120, 57.375])
    expected = (inputs[0]["image"][:, 7, 11] - mean) / std
    torch.testing.assert_close(images.tensor[0, :, 7, 11], expected)
    assert not images.tensor[0, :, 40:].any()
    assert not images.tensor[1, :, :, 60:].any()


class Patches(Backbone):
    """A map whose every cell sees its own 16x16 pixels only."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 12, kernel_size=16, stride=16)

    def forward(self, x):
        return {"patches": self.convolution(x)}

    def output_shape(self):
        return {"patches": ShapeSpec(channels=12, stride=16)}


def patch_model(position):
    """The model from explicit arguments, without a config."""
    torch.manual_seed(0)
    return Detr(
        backbone=Patches(),
        neck=SingleScaleNeck(["patches"], 12, 32, position),
        transformer=build_transformer(
            num_logits=6, num_queries=9, hidden_dim=32, num_heads=4, dim_feedforward=64,
            num_encoder_layers=2, num_decoder_layers=2,
        ),
        criterion=build_criterion(num_classes=5),
        pixel_mean=[120.0, 110.0, 100.0],
        pixel_std=[58.0, 57.0, 57.0],
    ).eval()  # fmt: skip


@pytest.mark.parametrize("position", [SinePositionEmbedding, LearnedPositionEmbedding])
@torch.no_grad()
def test_an_image_alone_and_padded_in_a_batch(position):
    """Sizes are multiples of the stride, so the tokens are equal and the detections must be."""
    model = patch_model(position(32))
    inputs = random_inputs([(48, 96), (128, 64), (80, 80)])
    together = model(inputs)
    raw_together = model.predict(inputs)
    for index, one in enumerate(inputs):
        raw = model.predict([one])
        for ours, alone in zip(raw_together, raw, strict=True):
            torch.testing.assert_close(ours.boxes[index], alone.boxes[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.logits[index], alone.logits[0], rtol=0, atol=1e-5)
        expected, actual = model([one])[0]["instances"], together[index]["instances"]
        torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-5)
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        torch.testing.assert_close(
            actual.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-2
        )


@torch.no_grad()
def test_images_of_one_size_do_not_see_each_other(model):
    inputs = random_inputs([(64, 96)] * 3)
    together = model.predict(inputs)[-1]
    for index, one in enumerate(inputs):
        alone = model.predict([one])[-1]
        torch.testing.assert_close(together.boxes[index], alone.boxes[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.logits[index], alone.logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_default_predictor(input_format):
    """detectron2's predictor takes BGR arrays and turns them round where the model wants RGB."""
    torch.manual_seed(0)
    predictor = DefaultPredictor(tiny_cfg("INPUT.FORMAT", input_format, "INPUT.MIN_SIZE_TEST", 128))
    # The shorter side already has MIN_SIZE_TEST pixels: nothing is resized.
    image = np.random.default_rng(0).integers(0, 256, (128, 160, 3), dtype=np.uint8)
    instances = predictor(image)["instances"]
    channels = image[:, :, ::-1] if input_format == "RGB" else image
    tensor = torch.from_numpy(channels.transpose(2, 0, 1).copy())
    with torch.no_grad():
        expected = predictor.model([{"image": tensor}])[0]["instances"]
    assert len(instances) == len(expected) > 0
    assert instances.image_size == (128, 160)
    torch.testing.assert_close(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(instances.pred_classes, expected.pred_classes)


def test_default_predictor_gives_boxes_in_the_original_image():
    predictor = DefaultPredictor(tiny_cfg())
    box = torch.tensor([[[0.5, 0.5, 0.5, 0.5]]])
    predictor.model.transformer = FixedOutput(torch.zeros(1, 1, 6), box)
    instances = predictor(np.zeros((300, 500, 3), dtype=np.uint8))["instances"]
    assert instances.image_size == (300, 500)
    expected = torch.tensor([[125.0, 75.0, 375.0, 225.0]])
    torch.testing.assert_close(instances.pred_boxes.tensor, expected)


@torch.no_grad()
def test_state_dict_round_trip(model, tmp_path):
    inputs = random_inputs(SIZES)
    expected = model.predict(inputs)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = build_model(tiny_cfg()).eval()
    assert not torch.equal(other.predict(inputs)[-1].boxes, expected[-1].boxes)
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    for actual, wanted in zip(other.predict(inputs), expected, strict=True):
        assert torch.equal(actual.logits, wanted.logits)
        assert torch.equal(actual.boxes, wanted.boxes)


def test_the_checkpoint_holds_learned_values_only(model):
    names = set(model.state_dict())
    assert not {name for name in names if "pixel" in name or "criterion" in name}
    rooms = {name.split(".")[0] for name in names}
    assert rooms == {"backbone", "neck", "transformer"}


def test_training_changes_every_part(model):
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = random_inputs(SIZES, [2, 3])
    first = None
    for _ in range(8):
        loss = sum(model(inputs).values())
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    unchanged = [name for name, p in model.named_parameters() if torch.equal(before[name], p)]
    assert unchanged == []


# The keys and values of the original DETR's own detectron2 config.
ORIGINAL_WRAPPER = """
MODEL:
  META_ARCHITECTURE: "Detr"
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  MASK_ON: False
  RESNETS:
    DEPTH: 50
    STRIDE_IN_1X1: False
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  DETR:
    GIOU_WEIGHT: 2.0
    L1_WEIGHT: 5.0
    NUM_OBJECT_QUERIES: 100
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER:
  IMS_PER_BATCH: 64
  BASE_LR: 0.0001
  STEPS: (369600,)
  MAX_ITER: 554400
  WARMUP_FACTOR: 1.0
  WARMUP_ITERS: 10
  WEIGHT_DECAY: 0.0001
  OPTIMIZER: "ADAMW"
  BACKBONE_MULTIPLIER: 0.1
  CLIP_GRADIENTS:
    ENABLED: True
    CLIP_TYPE: "full_model"
    CLIP_VALUE: 0.01
    NORM_TYPE: 2.0
INPUT:
  MIN_SIZE_TRAIN: (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
  CROP:
    ENABLED: True
    TYPE: "absolute_range"
    SIZE: (384, 600)
  FORMAT: "RGB"
TEST:
  EVAL_PERIOD: 4000
DATALOADER:
  FILTER_EMPTY_ANNOTATIONS: False
  NUM_WORKERS: 4
VERSION: 2
"""


def test_the_original_wrappers_yaml_loads_unchanged(tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL_WRAPPER)
    cfg = get_detr_cfg()
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert type(model) is META_ARCH_REGISTRY.get("Detr") is Detr
    assert len(MetadataCatalog.get("coco_2017_train").thing_classes) == 80
    head = model.transformer.decoder.heads[0].class_head
    assert model.criterion.classification.num_classes == 80
    assert head.weight.shape == (81, 256)
    # The encoder sees the last of the four maps, at stride 32.
    assert model.neck.projections[0].weight.shape == (256, 2048, 1, 1)
    assert (model.criterion.l1_weight, model.criterion.giou_weight) == (5.0, 2.0)
    # 6 + 6 layers, 8 heads, 2048 wide: the wrapper's defaults.
    assert len(model.transformer.encoder.layers) == len(model.transformer.decoder.layers) == 6
    assert model.transformer.encoder.layers[0].ffn.linear1.weight.shape == (2048, 256)
    assert model.transformer.encoder.layers[0].self_attn.num_heads == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.DETR.IN_FEATURES", ["res9"]), "names 'res9', but .* gives only res4"),
        (("MODEL.DETR.IN_FEATURES", ["res4", "res4"]), "has 2 entries .*name one"),
        (("MODEL.DETR.POSITION_EMBEDDING", "cosine"), "'cosine'; it must be one of sine, learned"),
        (
            ("MODEL.DETR.HIDDEN_DIM", 34, "MODEL.DETR.NHEADS", 2),
            "HIDDEN_DIM must be divisible by 4, got 34",
        ),
        (("MODEL.DETR.NHEADS", 5), r"HIDDEN_DIM \(32\) must be divisible by .*NHEADS \(5\)"),
        (("MODEL.DETR.DEC_LAYERS", 0), "DEC_LAYERS must be 1 or more"),
        (("MODEL.MASK_ON", True), "MASK_ON needs backbone maps finer than res4"),
        (
            ("MODEL.DETR.NUM_CLASSES", 0, "DATASETS.TRAIN", (), "DATASETS.TEST", ()),
            "NUM_CLASSES is 0 .* set the key",
        ),
    ],
)
def test_wrong_configs_are_refused_in_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        build_model(tiny_cfg(*options))


@pytest.mark.parametrize(("label", "shown"), [(NUM_CLASSES, NUM_CLASSES), (-1, -1)])
def test_classes_that_the_model_does_not_have(label, shown):
    """The first would be taken for "no object" in silence."""
    model = build_model(tiny_cfg()).train()
    inputs = random_inputs(SIZES, [2, 1])
    inputs[1]["instances"].gt_classes[0] = label
    inputs[1]["file_name"] = "b.jpg"
    message = f"b.jpg has an object of class {shown}, .* from 0 to {NUM_CLASSES - 1}"
    with pytest.raises(UserError, match=message):
        model(inputs)


def test_detectron2_counts_its_operations(model):
    """By tracing, in which the sizes of images are tensors."""
    flops = FlopCountAnalysis(model, random_inputs([(64, 96)]))
    assert flops.unsupported_ops_warnings(False).total() > 1e6


def test_a_projects_own_config_keeps_its_keys():
    cfg = get_cfg()
    add_detr_config(cfg)
    assert cfg.INPUT.MASK_FORMAT == get_cfg().INPUT.MASK_FORMAT == "polygon"
    assert get_detr_cfg().INPUT.MASK_FORMAT == "bitmask"
