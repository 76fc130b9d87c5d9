"""A model made fast finds what the plain one finds, and leaves that one as it was."""

import copy
import logging
import pickle
import re

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicStem
from torch import nn

from detr_d2.deploy import (
    export_model,
    optimize,
    optimize_for_inference,
    prepare_for_inference,
)
from detr_d2.deploy.exportable import ExportableDetr
from detr_d2.deploy.fold import fold_batch_norms, folded
from detr_d2.deploy.optimize import CachedPositionEmbedding
from detr_d2.deploy.pack import (
    PackedConv2d,
    PackedFeedForward,
    PackedLinear,
    PackedSelfAttention,
    PackedStem,
    is_available,
    pack,
)
from detr_d2.errors import UserError
from detr_d2.modeling.attention import SelfAttention
from detr_d2.modeling.position import SinePositionEmbedding
from detr_d2.modeling.transformer import FeedForward
from detr_d2.processor import is_bfloat16_fast

from .helpers import VARIANTS, random_inputs, tiny_cfg

needs_onednn = pytest.mark.skipif(not is_available(), reason="this PyTorch has no oneDNN")


def make_model(variant, *options):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*options, config=variant)).eval()
    for module in model.modules():  # statistics as after a training
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(0, 0.2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    for parameter in model.transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def assert_same(actual, expected, logits, boxes):
    torch.testing.assert_close(actual.logits.float(), expected.logits, rtol=0, atol=logits)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=0, atol=boxes)


# Images alone and in padded batches, small and large.
BATCHES = [[(64, 96)], [(96, 128), (128, 64)], [(200, 150), (64, 64), (90, 210)]]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_float32_is_equal(variant):
    model = make_model(variant)
    fast = optimize_for_inference(model)
    for sizes in BATCHES:
        inputs = random_inputs(sizes)
        expected, actual = model.predict(inputs), fast.predict(inputs)
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same(ours, theirs, 1e-3, 1e-4)
        for ours, theirs in zip(fast(inputs), model(inputs), strict=True):
            ours, theirs = ours["instances"], theirs["instances"]
            assert ours.image_size == theirs.image_size
            torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bfloat16_is_near(variant):
    """Of models that choose queries the order may differ, of others nothing by much."""
    if not is_bfloat16_fast():
        pytest.skip("this CPU runs float32 in place of bfloat16")
    model = make_model(variant)
    fast = optimize_for_inference(model, "bfloat16")
    inputs = random_inputs(BATCHES[1])
    expected, actual = model.predict(inputs)[-1], fast.predict(inputs)[-1]
    assert actual.boxes.dtype == torch.float32
    if model.transformer.queries.__class__.__name__ == "TopKQueries":
        distance = torch.cdist(actual.boxes, expected.boxes, p=float("inf")).min(-1).values
        assert (distance < 0.05).float().mean() > 0.7
    else:
        assert_same(actual, expected, 0.3, 0.05)
        assert (actual.boxes - expected.boxes).abs().mean() < 5e-3


@pytest.mark.parametrize("variant", ["detr_tiny", "conditional_tiny", "dino_tiny"])
@torch.no_grad()
def test_prediction_heads_are_float32_where_nothing_is_packed(variant, monkeypatch):
    """As on GPUs; reference points, too, are coordinates."""
    monkeypatch.setattr(optimize, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(optimize.pack, "is_available", lambda: False)
    fast = optimize_for_inference(make_model(variant), "bfloat16")
    types = {}
    for name, module in fast.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, x, y, name=name: types.update({name: y.dtype}))
    fast(random_inputs([(64, 64)]))
    is_head = re.compile("class_head|box_head|reference_head").search
    found = {(bool(is_head(name)), dtype) for name, dtype in types.items()}
    assert found == {(True, torch.float32), (False, torch.bfloat16)}


@torch.no_grad()
def test_the_model_stays_as_it_was():
    model = make_model("dino_tiny").train()
    before = copy.deepcopy(model.state_dict())
    modules = [type(m) for m in model.modules()]
    fast = optimize_for_inference(model, "bfloat16")
    fast(random_inputs([(64, 96)]))
    assert model.training and not fast.training
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.transformer.parameters())


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [True, False])
def test_an_optimised_copy_takes_and_gives_no_weights(is_packed, monkeypatch, tmp_path):
    """Folded and packed weights are not those of a checkpoint, though some names are the same."""
    monkeypatch.setattr("detr_d2.deploy.pack.is_available", lambda: is_packed)
    model = build_model(tiny_cfg()).eval()
    fast = optimize_for_inference(model)
    refused = [lambda: fast.load_state_dict(model.state_dict()), fast.state_dict]
    if is_packed:
        refused += [lambda: copy.deepcopy(fast), lambda: pickle.dumps(fast)]
        refused += [lambda: export_model(fast, tmp_path / "m.onnx")]
        refused += [lambda: optimize_for_inference(fast)]
    for attempt in refused:
        with pytest.raises(UserError, match="an optimised copy.* optimise that again"):
            attempt()
    model.load_state_dict(model.state_dict())


@torch.no_grad()
def test_a_copy_of_an_unpacked_one_is_on_its_own(monkeypatch):
    """As on GPUs: whose copies compute with their own weights, in the type that was asked for."""
    monkeypatch.setattr(optimize, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(optimize.pack, "is_available", lambda: False)
    inputs = random_inputs([(64, 96)])
    fast = optimize_for_inference(make_model("detr_tiny"), "bfloat16")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    before, other = fast.predict(inputs)[-1], copied.predict(inputs)[-1]
    assert torch.equal(before.logits, other.logits)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied.predict(inputs)[-1].logits.any()
    assert torch.equal(fast.predict(inputs)[-1].logits, before.logits)


@torch.no_grad()
def test_slow_bfloat16_is_float32(monkeypatch, caplog):
    monkeypatch.setattr(optimize, "has_bfloat16", lambda device: False)
    model, inputs = make_model("detr_tiny"), random_inputs([(64, 96)])
    fast = optimize_for_inference(model, "bfloat16")
    assert "the model runs in float32" in caplog.text
    assert torch.equal(
        fast.predict(inputs)[-1].logits, optimize_for_inference(model).predict(inputs)[-1].logits
    )
    caplog.clear()
    optimize_for_inference(model)
    assert not caplog.text


def test_other_types_are_refused():
    with pytest.raises(UserError, match="float16 is for GPUs, the model is on 'cpu'"):
        optimize_for_inference(make_model("detr_tiny"), torch.float16)
    with pytest.raises(UserError, match="float32, bfloat16, float16, not in torch.float64"):
        optimize_for_inference(make_model("detr_tiny"), torch.float64)


def test_what_a_backend_does_not_do_is_refused():
    model = make_model("detr_tiny")
    with pytest.raises(UserError, match="onnxruntime is not compiled by PyTorch: set MODEL.INF"):
        optimize_for_inference(model, compile=True, backend="onnxruntime")
    for key, value in (("DTYPE", "bfloat16"), ("COMPILE", True)):
        cfg = tiny_cfg("MODEL.INFERENCE.BACKEND", "none", f"MODEL.INFERENCE.{key}", value)
        with pytest.raises(UserError, match=f"BACKEND none runs .*{key}.* {value}"):
            prepare_for_inference(cfg, model)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@torch.no_grad()
def test_batch_norms_of_detectron2_are_folded(norm):
    backbone = make_model("detr_tiny", "MODEL.RESNETS.NORM", norm).backbone
    image = torch.randn(2, 3, 64, 96)
    expected = backbone(image)["res4"]
    norms = sum(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in backbone.modules())
    assert fold_batch_norms(backbone, image[:1]) == norms > 5
    assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in backbone.modules())
    torch.testing.assert_close(backbone(image)["res4"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "test_resnet"])
@pytest.mark.parametrize("freeze", [False, True])
@torch.no_grad()
def test_batch_norms_of_timm_are_folded(name, freeze):
    pytest.importorskip("timm")
    options = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name)
    model = make_model("detr_tiny", *options, "MODEL.TIMM.FREEZE_NORM", freeze)
    backbone, image = model.backbone, torch.randn(2, 3, 64, 96)
    expected = backbone(image)
    norms = [n for n, m in backbone.named_modules() if hasattr(m, "running_mean")]
    assert fold_batch_norms(backbone, image[:1]) == len(norms) > 5
    assert not any(hasattr(m, "running_mean") for m in backbone.modules())
    for level, tensor in backbone(image).items():
        torch.testing.assert_close(tensor, expected[level], rtol=1e-3, atol=1e-3)
    fast = optimize_for_inference(model)
    inputs = random_inputs([(64, 96)])
    plain = build_model_like(model, options, freeze).predict(inputs)[-1]
    assert_same(fast.predict(inputs)[-1], plain, 1e-3, 1e-4)


def build_model_like(model, options, freeze):
    return make_model("detr_tiny", *options, "MODEL.TIMM.FREEZE_NORM", freeze)


class Shared(nn.Module):
    """A convolution whose output goes to two norms, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
        )
        self.twice, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        x = self.first(x) + self.second(x)
        return self.norm(self.twice(self.twice(x)))


@torch.no_grad()
def test_what_is_not_a_pair_is_not_folded():
    torch.manual_seed(0)
    module, image = Shared().eval(), torch.randn(1, 3, 8, 8)
    for norm in (module.first, module.second, module.norm):
        norm.running_mean.normal_()
    expected = module(image)
    assert fold_batch_norms(module, image) == 0
    torch.testing.assert_close(module(image), expected)


class Peeking(nn.Module):
    """What a convolution says before its norm is used, too."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.weight, 2, 3)
        self.between = nn.Sequential(self.convolution, self.norm)

    def forward(self, x):
        return {"before": self.convolution.weight.sum() * x, "after": self.between(x)}


@torch.no_grad()
def test_a_backbone_that_folding_changes_is_left_as_it_is(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    backbone = Peeking().eval()
    assert folded(backbone, torch.device("cpu"), 3) is backbone
    assert "The batch norms of Peeking are not folded" in caplog.text


@needs_onednn
@pytest.mark.parametrize("tokens", [1, 7, 300, 2000])
@torch.no_grad()
def test_packed_linear(tokens):
    linear, x = nn.Linear(24, 40), torch.randn(2, tokens, 24)
    torch.testing.assert_close(
        PackedLinear(linear, torch.float32)(x), linear(x), rtol=1e-4, atol=1e-5
    )
    relu = PackedLinear(linear, torch.float32, "relu")
    torch.testing.assert_close(relu(x), linear(x).relu(), rtol=1e-4, atol=1e-5)
    if is_bfloat16_fast():
        assert PackedLinear(linear, torch.bfloat16)(x).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("tokens", [1, 511, 512, 513, 1100])
@torch.no_grad()
def test_blocks_of_a_feed_forward(tokens):
    """As all tokens at once, and what is between its layers is never larger than a block."""
    layer, x = FeedForward(16, 40, dropout=0.0), torch.randn(2, tokens, 16)
    packed, between = PackedFeedForward(layer, torch.float32), []
    packed.linear1.register_forward_hook(lambda m, inputs, y: between.append(y.shape[1]))
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-5)
    assert sum(between) == tokens and max(between) <= 512


@needs_onednn
@pytest.mark.parametrize("height", [1, 9, 31, 32, 33, 66, 130])
@torch.no_grad()
def test_strips_of_the_stem(height, monkeypatch):
    """As the whole image, whatever is left for the last strip."""
    monkeypatch.setattr(PackedStem, "rows", 8)
    stem, x = BasicStem(3, 16, norm=""), torch.randn(2, 3, height, 37)
    stem.conv1.bias = nn.Parameter(torch.randn(16))
    actual = PackedStem(stem, torch.float32)(x)
    torch.testing.assert_close(actual, stem(x), rtol=1e-4, atol=1e-4)


@needs_onednn
@torch.no_grad()
def test_queries_and_keys_are_one_product():
    fast = optimize_for_inference(build_model(tiny_cfg()))
    attentions = [m for m in fast.modules() if hasattr(m, "qk_proj")]
    layers = [*fast.transformer.encoder.layers, *fast.transformer.decoder.layers]
    assert len(attentions) == len(layers)
    attention, x = SelfAttention(32, 4), torch.randn(2, 9, 32)
    nn.init.normal_(attention.q_proj.bias)
    nn.init.normal_(attention.k_proj.bias)
    allowed = torch.rand(2, 1, 9, 9) > 0.3
    allowed |= torch.eye(9, dtype=torch.bool)
    packed = PackedSelfAttention(attention, torch.float32)
    for position in (None, torch.randn(2, 9, 32)):
        expected = attention(x, position, allowed)
        torch.testing.assert_close(packed(x, position, allowed), expected, rtol=1e-4, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"),
    [(1, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 1), (3, 1, 1, 4)],
)
@torch.no_grad()
def test_packed_convolution(kernel, stride, dilation, groups):
    convolution = nn.Conv2d(
        8, 12, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation, groups=groups
    )
    packed = PackedConv2d(convolution, torch.float32, "relu")
    for size in [(5, 7), (30, 20), (64, 64), (90, 130), (5, 7)]:
        x = torch.randn(2, 8, *size)
        expected = convolution(x)
        torch.testing.assert_close(packed(x), expected.relu(), rtol=1e-4, atol=1e-5)
        summand = torch.randn_like(expected).contiguous(memory_format=torch.channels_last)
        total = (expected + summand).relu()
        torch.testing.assert_close(packed(x, summand), total, rtol=1e-4, atol=1e-5)
    assert len(packed._packed) <= packed.capacity


def test_positions_are_remembered_for_unpadded_maps_only():
    position = SinePositionEmbedding(16)
    remembered = CachedPositionEmbedding(position)
    none, some = torch.zeros(2, 3, 4, dtype=torch.bool), torch.zeros(2, 3, 4, dtype=torch.bool)
    some[1, 2:] = True
    for padding in (none, some, none):
        assert torch.equal(remembered(padding), position(padding))
    assert len(remembered._known) == 1
    assert remembered(none).data_ptr() == remembered(none).data_ptr()
    for width in range(1, 100):
        remembered(torch.zeros(1, 2, width, dtype=torch.bool))
    assert len(remembered._known) == remembered.capacity


@needs_onednn
@torch.no_grad()
def test_linear_layers_of_other_kinds_are_left_alone():
    """Parts of one's own: a parent that reads the weights, a layer that does more."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.twice = Twice(8, 8)
            self.same = nn.Conv2d(8, 8, 3, padding="same")
            self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.plain = nn.Linear(8, 8)

        def forward(self, x):
            x = self.plain(self.twice(self.attention(x, x, x)[0]))
            return self.mirrored(self.same(x.transpose(1, 2)[:, :, None]).expand(-1, -1, 3, -1))

    torch.manual_seed(0)
    part, x = Part().eval(), torch.randn(2, 5, 8)
    expected = part(x)
    pack(part, torch.float32)
    assert isinstance(part.plain, PackedLinear)
    torch.testing.assert_close(part(x), expected)


@needs_onednn
@torch.no_grad()
def test_what_is_not_packed_computes_in_the_type_of_its_weights():
    """Between layers in bfloat16, as timm's convolutions that pad by the input."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 2, 3, padding="same"))
    x = torch.randn(1, 3, 8, 8).bfloat16()
    expected = layers(x.float())
    pack(layers, torch.bfloat16)
    torch.testing.assert_close(layers(x), expected)


@torch.no_grad()
def test_grey_images():
    """detectron2 builds backbones of as many channels as there are pixel means."""
    options = ("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [127.0], "MODEL.PIXEL_STD", [58.0])
    model = make_model("detr_tiny", *options, "MODEL.RESNETS.NORM", "FrozenBN")
    inputs = [{"image": x["image"][:1]} for x in random_inputs([(64, 96)])]
    expected = model.predict(inputs)[-1]
    assert_same(optimize_for_inference(model).predict(inputs)[-1], expected, 1e-4, 1e-5)
    image = inputs[0]["image"][None].float()
    boxes, *_ = ExportableDetr(model)(image, torch.tensor([[64, 96]]))
    [result] = model(inputs)
    torch.testing.assert_close(boxes[0], result["instances"].pred_boxes.tensor, rtol=0, atol=0.1)
