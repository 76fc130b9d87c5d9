"""Masks: the head, its losses, instance and panoptic results, training on a frozen detector."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances, PolygonMasks
from PIL import Image
from torch import nn

from detr_d2 import get_detr_cfg
from detr_d2.checkpoint.write import write_checkpoint
from detr_d2.engine import DetrTrainer
from detr_d2.errors import UserError
from detr_d2.losses import dice_mask_loss, focal_mask_loss
from detr_d2.modeling import Detr, segmentation
from detr_d2.modeling.mask_head import MaskHead, PixelEmbedding, resize_masks, squared_distance
from detr_d2.modeling.panoptic import PanopticMerger
from detr_d2.modeling.segmentation import to_bitmasks

from .helpers import random_inputs, tiny_cfg
from .training import registered_rectangles, training_cfg

MASKS = ("MODEL.MASK_ON", True, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"])
MASKS += ("MODEL.DETR.IN_FEATURES", ["res4"])
SIZES = [(64, 96), (80, 64)]


def make_model(*options, variant="detr_tiny"):
    torch.manual_seed(0)
    return build_model(tiny_cfg(*MASKS, *options, config=variant))


def inputs_with_masks(sizes=SIZES, counts=(2, 1)):
    """The boxes' insides are the masks."""
    inputs = random_inputs(sizes, counts)
    for x in inputs:
        height, width = x["image"].shape[-2:]
        masks = torch.zeros(len(x["instances"]), height, width, dtype=torch.bool)
        for mask, box in zip(masks, x["instances"].gt_boxes.tensor.round().int(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        x["instances"].gt_masks = BitMasks(masks)
    return inputs


# ------------------------------------------------------------------------------------ the head


def predictions_of(model, inputs):
    return model.predict_all(inputs)


@pytest.mark.parametrize(
    ("variant", "dim", "stride", "widths"),
    [
        ("detr_tiny", 0, 4, [32 + 4, 16, 16, 16]),
        ("detr_tiny", 40, 4, [40 + 4, 20, 16, 16]),
        ("fast_tiny", 0, 4, [32 + 4, 16, 16, 16]),
        ("fast_tiny", 0, 2, [32 + 4, 16, 16, 16]),
    ],
)
@torch.no_grad()
def test_masks_are_those_of_the_convolutions_one_by_one(variant, dim, stride, widths):
    options = ("MODEL.DETR.MASK_DIM", dim, "MODEL.DETR.MASK_STRIDE", stride)
    model = make_model(*options, variant=variant).eval()
    assert [c.out_channels for c in model.mask_head.convs] == widths
    predictions = predictions_of(model, random_inputs(SIZES))
    head, source = model.mask_head, predictions.masks.args[0]
    images, queries = torch.tensor([0, 0, 1]), torch.tensor([2, 5, 0])
    around = variant == "fast_tiny"
    squared = squared_distance(source, images, queries) if around else None
    maps = head.attention_maps(source, images, queries, squared)
    # Over heads and places together, nothing on padding.
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(3))
    assert not maps[:, :, source.memory.padding[images[0]]][:2].any()
    height, width = source.memory.level_shapes[0]
    projected = source.projected.transpose(1, 2).unflatten(-1, (height, width))[images]
    x, bias = [projected, maps.unflatten(-1, (height, width))], 0
    if around:
        x.append(torch.exp(-squared).unflatten(-1, (height, width))[:, None])
        bias = head.content_proj(source.content[images, queries])[..., None, None]
    x = head.norms[0](head.convs[0](torch.cat(x, dim=1)) + bias).relu()
    x = head.norms[1](head.convs[1](x)).relu()
    for name, adapter, convolution, norm in zip(
        ("res3", "res2"), head.adapters, head.convs[2:], head.norms[2:], strict=True
    ):
        finer = adapter(source.features[name])[images]
        x = finer + nn.functional.interpolate(x, size=finer.shape[-2:], mode="nearest")
        x = norm(convolution(x)).relu()
    expected = head.out(x)
    if stride == 4:
        assert head.pixels is None and expected.shape[2:] == source.features["res2"].shape[2:]
        expected = expected[:, 0]
    else:  # 1 + 32 channels: a mask of its own, and what is compared with each pixel
        pixels = head.pixels(source.pixels, source.features["res2"])[images]
        x = nn.functional.interpolate(expected, size=(40, 48), mode="bilinear")
        expected = x[:, 0] + torch.einsum("pchw,pchw->phw", x[:, 1:], pixels)
    torch.testing.assert_close(predictions.masks(images, queries), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gain", [1.0, 100.0])
def test_the_first_convolution_starts_as_the_original_but_for_the_gain(gain):
    """Kaiming's bound with a = 1: (3 / (9 * channels)) ** 0.5."""
    head = make_model("MODEL.DETR.MASK_ATTENTION_GAIN", gain).mask_head
    bound = (3 / (9 * head.convs[0].in_channels)) ** 0.5
    of_image, of_maps = head.convs[0].weight.split((32, head.num_heads), dim=1)
    assert 0.95 * bound < of_image.abs().max() <= bound
    assert 0.95 * gain * bound < of_maps.abs().max() <= gain * bound


@torch.no_grad()
def test_maps_are_heard_beside_the_image_from_the_start():
    """Queries of one image have different masks; with maps of some thousandths they hardly had."""
    model = make_model("MODEL.DETR.MASK_ATTENTION_GAIN", 100.0).eval()
    inputs = random_inputs([(256, 256)])
    predictions = predictions_of(model, inputs)
    head, source = model.mask_head, predictions.masks.args[0]
    queries = torch.arange(source.content.shape[1])
    maps = head.attention_maps(source, torch.zeros_like(queries), queries)
    side = source.memory.level_shapes[0]
    shared, own = head.convs[0].weight.split((source.projected.shape[-1], head.num_heads), dim=1)
    image = source.projected.transpose(1, 2).unflatten(-1, side)
    of_image = nn.functional.conv2d(image, shared, padding=1).std()
    of_maps = nn.functional.conv2d(maps.unflatten(-1, side), own, padding=1).std()
    assert 0.01 < of_maps / of_image < 10


@torch.no_grad()
def test_attention_falls_off_around_boxes():
    """A head of rate r sees exp(-r d²) of a place, d being 1 where an ellipse in the box ends."""
    model, inputs = make_model(variant="fast_tiny").eval(), random_inputs(SIZES)
    predictions = predictions_of(model, inputs)
    head, source = model.mask_head, predictions.masks.args[0]
    images, queries = torch.tensor([0, 1]), torch.tensor([3, 5])
    height, width = source.memory.level_shapes[0]
    squared = squared_distance(source, images, queries)
    near = head.attention_maps(source, images, queries, squared)
    far = head.attention_maps(source, images, queries)
    for pair in range(2):
        image = images[pair]
        cx, cy, w, h = predictions.layers[-1].boxes[image, queries[pair]].tolist()
        image_height, image_width = SIZES[image]
        padded_height, padded_width = (max(s[i] for s in SIZES) for i in (0, 1))
        y = (torch.arange(height) + 0.5)[:, None] / height * padded_height / image_height
        x = (torch.arange(width) + 0.5) / width * padded_width / image_width
        squared = ((x - cx) / (w / 2)) ** 2 + ((y - cy) / (h / 2)) ** 2
        expected = far[pair] * torch.exp(
            -nn.functional.softplus(head.fall_off)[:, None] * squared.flatten()
        )
        torch.testing.assert_close(near[pair], expected / expected.sum(), rtol=1e-3, atol=1e-7)
    assert make_model(variant="detr_tiny").mask_head.fall_off is None


@pytest.mark.parametrize(("stride", "side"), [(4, 24), (3, 32), (2, 48), (1, 96)])
@torch.no_grad()
def test_finer_strides(stride, side):
    model = make_model("MODEL.DETR.MASK_STRIDE", stride).eval()
    predictions = predictions_of(model, random_inputs([(96, 96)]))
    zero = torch.zeros(1, dtype=torch.int64)
    assert predictions.masks(zero, zero).shape == (1, side, side)


@pytest.mark.parametrize(("stride", "size"), [(1, (97, 63)), (2, (49, 32)), (4, (25, 16))])
def test_pixels_of_any_size(stride, size):
    embed = PixelEmbedding(stride, in_channels=7, width=8, dim=5)
    shape = embed(torch.zeros(1, 3, 97, 63), torch.zeros(1, 7, 25, 16)).shape
    assert shape == (1, 5, *size)


@torch.no_grad()
def test_what_queries_share_is_computed_once(monkeypatch):
    model = make_model("MODEL.DETR.MASK_STRIDE", 2, variant="fast_tiny").eval()
    calls = []
    for part in (model.mask_head.adapters[-1], model.mask_head.pixels):
        part.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(segmentation, "CHUNK", 3)
    model(random_inputs(SIZES))
    assert len(calls) == 2


@torch.no_grad()
def test_chunks_change_nothing(monkeypatch):
    model, inputs = make_model().eval(), random_inputs(SIZES)
    whole = model(inputs)
    monkeypatch.setattr(segmentation, "CHUNK", 3)
    for ours, theirs in zip(model(inputs), whole, strict=True):
        assert torch.equal(ours["instances"].pred_masks, theirs["instances"].pred_masks)


def test_the_config_of_the_original_wrapper():
    """Its keys, as its segmentation yaml has them."""
    cfg = get_detr_cfg()
    old = {
        "META_ARCHITECTURE": "Detr",
        "PIXEL_MEAN": [123.675, 116.280, 103.530],
        "PIXEL_STD": [58.395, 57.120, 57.375],
        "MASK_ON": True,
        "MASK_THRESHOLD": 0.5,
        "RESNETS": {
            "DEPTH": 50,
            "STRIDE_IN_1X1": False,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        },
        "DETR": {
            "GIOU_WEIGHT": 2.0,
            "L1_WEIGHT": 5.0,
            "NUM_OBJECT_QUERIES": 100,
            "FROZEN_WEIGHTS": "",
        },
        "DEVICE": "meta",
    }
    solver = {"STEPS": (55440,), "OPTIMIZER": "ADAMW", "BACKBONE_MULTIPLIER": 0.1}
    cfg.merge_from_other_cfg(CfgNode({"MODEL": old, "SOLVER": solver, "VERSION": 2}))
    cfg.MODEL.DETR.NUM_CLASSES = 80
    with torch.device("meta"):
        model = build_model(cfg)
    assert model.neck.in_feature == "res5"
    assert model.mask_head.in_features == ["res4", "res3", "res2"]


def test_the_threshold_is_a_probability():
    """Sigmoids of 0.269, 0.5 and 0.731."""
    logits = torch.tensor([[[-1.0, 0.0, 1.0]]])
    for threshold, expected in (
        (0.2, [1, 1, 1]),
        (0.5, [0, 0, 1]),
        (0.6, [0, 0, 1]),
        (0.8, [0] * 3),
    ):
        masks = resize_masks(logits, (1, 3), (1, 3), (1, 3), threshold)
        assert masks.tolist() == [[[bool(value) for value in expected]]]
    assert make_model("MODEL.MASK_THRESHOLD", 0.3).mask_threshold == 0.3


@torch.no_grad()
def test_a_query_with_several_classes_is_computed_once():
    model, inputs = make_model(variant="fast_tiny").eval(), random_inputs(SIZES)
    predictions = predictions_of(model, inputs)
    results = model.inference(predictions.layers[-1], inputs)
    queries = [result["instances"].pred_queries for result in results]
    assert any(len(q.unique()) < len(q) for q in queries)
    asked = []

    def masks_of(images, queries):
        asked.extend(zip(images.tolist(), queries.tolist(), strict=True))
        return predictions.masks(images, queries)

    segmentation.add_masks(results, masks_of, inputs, predictions.padded_size)
    assert len(asked) == len(set(asked)) == sum(len(q.unique()) for q in queries)
    for index, (result, x) in enumerate(zip(results, inputs, strict=True)):
        logits = predictions.masks(torch.full_like(queries[index], index), queries[index])
        size = x["image"].shape[-2:]
        expected = resize_masks(logits, predictions.padded_size, size, size)
        assert torch.equal(result["instances"].pred_masks, expected)


@torch.no_grad()
def test_masks_have_the_size_that_is_asked_for():
    model, inputs = make_model("TEST.DETECTIONS_PER_IMAGE", 4).eval(), random_inputs(SIZES)
    inputs[0] |= {"height": 200, "width": 300}
    first, second = (result["instances"] for result in model(inputs))
    assert first.pred_masks.shape == (4, 200, 300) and first.pred_masks.dtype == torch.bool
    assert second.pred_masks.shape == (4, 80, 64)
    assert not first.has("pred_queries")


def test_resizing_by_hand():
    """2x2 logits over a padded 8x8 batch, of which the image has the left half."""
    logits = torch.tensor([[[4.0, -4.0], [4.0, -4.0]]])
    masks = resize_masks(logits, (8, 8), (8, 4), (16, 8))
    assert masks.shape == (1, 16, 8) and masks.all()
    masks = resize_masks(logits, (8, 8), (8, 8), (8, 8))
    assert masks[0, :, :4].all() and not masks[0, :, 4:].any()


@torch.no_grad()
def test_memory_does_not_grow_with_the_detections():
    """100 masks of 800x1333 take 107 MB as bytes; the logits of a few at a time come on top, not
    430 MB of them."""
    head = MaskHead(32, 4, ["res3", "res2"], [16, 8]).eval()
    from detr_d2.modeling.mask_head import MaskSource
    from detr_d2.structures import Memory

    height, width = 50, 84
    memory = Memory(
        tokens=torch.randn(1, height * width, 32),
        positions=torch.zeros(1, height * width, 32),
        padding=torch.zeros(1, height * width, dtype=torch.bool),
        level_shapes=((height, width),),
        valid_ratios=torch.ones(1, 1, 2),
    )
    features = {"res3": torch.randn(1, 16, 100, 168), "res2": torch.randn(1, 8, 200, 334)}
    pixels = torch.zeros(1, 3, 800, 1333)
    source = MaskSource(
        memory, memory.tokens, features, pixels, torch.randn(1, 100, 32), torch.rand(1, 100, 4)
    )

    asked = []

    def masks_of(images, queries):
        asked.append(len(queries))
        return head(source, images, queries)

    instances = Instances((800, 1333))
    instances.pred_queries = torch.arange(100)
    inputs = [{"image": pixels[0]}]
    segmentation.add_masks([{"instances": instances}], masks_of, inputs, (800, 1333))
    assert instances.pred_masks.shape == (100, 800, 1333)
    assert max(asked) == segmentation.CHUNK and sum(asked) == 100


# -------------------------------------------------------------------------------------- losses


def test_focal_loss_by_hand():
    """Two pixels at probability 0.9: one is right, the other wrong."""
    logits = torch.full((1, 1, 2), 0.9).logit()
    loss = focal_mask_loss(logits, torch.tensor([[[1.0, 0.0]]]))
    right = -0.25 * 0.1**2 * np.log(0.9)
    wrong = -0.75 * 0.9**2 * np.log(0.1)
    assert loss.item() == pytest.approx((right + wrong) / 2, rel=1e-5)


def test_dice_loss_by_hand():
    logits = torch.full((1, 1, 2), 0.5).logit()
    loss = dice_mask_loss(logits, torch.tensor([[[1.0, 0.0]]]))
    assert loss.item() == pytest.approx(1 - (2 * 0.5 + 1) / (1 + 1 + 1))


def test_losses_of_masks_are_there_once_and_reach_every_parameter():
    model = make_model().train()
    losses = model(inputs_with_masks())
    assert {name for name in losses if "mask" in name or "dice" in name} == {
        "loss_mask",
        "loss_dice",
    }
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.mask_head.q_proj.weight.grad.abs().sum() > 0


def test_masks_are_compared_where_they_are(monkeypatch):
    """A backbone may pad more than the batch needs: 72 to 96 pixels here. Logits that are the truth
    in the image and nothing on padding have no loss."""
    model, inputs = make_model(), inputs_with_masks([(72, 72)], [1])
    monkeypatch.setattr(type(model.backbone), "size_divisibility", 96)
    predictions = model.predict_all(inputs)
    assert predictions.padded_size == (96, 96)
    truth = nn.functional.pad(inputs[0]["instances"].gt_masks.tensor.float(), (0, 24, 0, 24))
    predictions.masks = lambda images, queries: truth * 40 - 20
    losses = model.criterion(predictions, model.prepare_targets(inputs))
    assert losses["loss_mask"] < 1e-3 and losses["loss_dice"] < 1e-3


def test_detectron2s_mapper_gives_no_masks_of_no_object():
    inputs = inputs_with_masks(counts=(2, 0))
    inputs[1]["instances"].remove("gt_masks")
    losses = make_model().train()(inputs)
    assert losses["loss_mask"].isfinite() and losses["loss_mask"] > 0


def test_images_without_objects():
    model = make_model().train()
    losses = model(inputs_with_masks(counts=(0, 0)))
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.mask_head.parameters())


def test_accumulated_batches_are_the_whole_batch():
    """Of images of one size, for a mask's loss is a mean over the padded batch."""
    model = make_model().train()
    model.backbone.eval()
    inputs = inputs_with_masks([(64, 96), (64, 96)])
    whole = model(inputs)
    parts = [model([x], object_counts=[2, 1]) for x in inputs]
    for name in ("loss_mask", "loss_dice"):
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, whole[name], rtol=1e-4, atol=1e-6)


def test_polygons_and_bitmaps_are_the_same_ground_truth():
    polygon = np.array([10.0, 5, 40, 5, 40, 30, 10, 30])
    polygons = Instances((50, 60), gt_masks=PolygonMasks([[polygon], [polygon / 2]]))
    masks = to_bitmasks(polygons, 50, 60)
    assert masks.shape == (2, 50, 60) and masks[0].sum() == 30 * 25
    bitmaps = Instances((50, 60), gt_masks=BitMasks(masks))
    assert torch.equal(to_bitmasks(bitmaps, 50, 60), masks)
    nothing = Instances((50, 60), gt_classes=torch.zeros(0), gt_masks=PolygonMasks([]))
    assert to_bitmasks(nothing, 50, 60).shape == (0, 50, 60)


# ---------------------------------------------------------------------------- a frozen detector


def test_a_frozen_detector_stays_what_it_was():
    """Its boxes to the bit, whatever the training does; nothing of it is kept for gradients."""
    options = ("MODEL.DETR.FROZEN_WEIGHTS", "x.pth", "MODEL.DETR.DROPOUT", 0.3)
    model = make_model(*options)
    before = copy.deepcopy(model.state_dict())
    inputs = inputs_with_masks()
    with torch.no_grad():
        boxes = model.eval().predict(inputs)[-1].boxes
    model.train()
    assert not model.backbone.training and not model.transformer.training
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in model.mask_head.parameters()}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        losses = model(inputs)
        assert losses.keys() == {"loss_mask", "loss_dice"}
        sum(losses.values()).backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.eval().predict(inputs)[-1].boxes, boxes)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(name.startswith("mask_head.") for name in changed)


@pytest.mark.parametrize("frozen", ["", "x.pth"])
def test_mixed_precision(frozen):
    """The losses ask for masks outside of autocast, which are in its precision nevertheless."""
    model = make_model("MODEL.DETR.FROZEN_WEIGHTS", frozen, variant="fast_tiny").train()
    inputs = inputs_with_masks()
    torch.manual_seed(1)
    expected = model(inputs)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(inputs)
    assert losses.keys() == expected.keys()
    for name in ("loss_mask", "loss_dice"):
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=0.05), name
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.mask_head.parameters())


def test_two_images_masks_are_learnt_by_heart():
    model = make_model("MODEL.DETR.MASK_STRIDE", 2).train()
    inputs = inputs_with_masks([(64, 96), (64, 96)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        losses = model(inputs)
        history.append((losses["loss_mask"] + losses["loss_dice"]).item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize(
    ("options", "variant", "message"),
    [
        ((), "deformable_tiny", "MASK_ON needs MODEL.DETR.NECK single_scale"),
        (("MODEL.DETR.MASK_STRIDE", 8), "detr_tiny", "MASK_STRIDE is 8; it must be 1 to 4"),
        (("MODEL.DETR.PANOPTIC.ENABLED", True), "detr_tiny", "is panoptic, with metadata"),
        (
            ("MODEL.MASK_ON", False, "MODEL.DETR.FROZEN_WEIGHTS", "x.pth"),
            "detr_tiny",
            "FROZEN_WEIGHTS freezes the detector to train masks",
        ),
        (
            ("MODEL.MASK_ON", False, "MODEL.DETR.PANOPTIC.ENABLED", True),
            "detr_tiny",
            "PANOPTIC needs MODEL.MASK_ON",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, variant, message):
    with pytest.raises(UserError, match=message):
        make_model(*options, variant=variant)


@pytest.mark.parametrize("variant", ["conditional_tiny", "dn_tiny", "fast_tiny"])
def test_any_design_with_one_level_has_masks(variant):
    options = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"], "MODEL.DETR.IN_FEATURES", ["res3"])
    model = make_model(*options, variant=variant).train()
    losses = model(inputs_with_masks())
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0
    with torch.no_grad():
        assert model.eval()(random_inputs(SIZES))[0]["instances"].pred_masks.any()


# ------------------------------------------------------------------------------------ panoptic


def test_merging_by_hand():
    """Things 0 and 1, stuff 2. Two queries of stuff are one segment, a tiny one vanishes, a weak
    one is not asked."""
    merger = PanopticMerger([0, 1], score_threshold=0.5, min_area=1)
    logits = torch.full((5, 4, 4), -5.0)
    logits[0, :, 0] = 9.0  # a thing in the first column
    logits[1, :, 1:3] = 5.0  # stuff in the next two
    logits[1, :, 3] = 4.0
    logits[2, :, 3] = 5.0  # the same stuff in the last, where the first of it is second best
    logits[3, 0, 3] = 9.0  # a thing of one pixel
    logits[4] = 20.0
    scores = torch.tensor([0.9, 0.8, 0.7, 0.9, 0.4])
    kept = merger.candidates(scores)
    assert kept.tolist() == [0, 1, 2, 3]
    classes = torch.tensor([0, 2, 2, 1, 1])
    segments, info = merger(logits[kept], scores[kept], classes[kept], (4, 4))
    assert [(s["category_id"], s["isthing"], s["area"]) for s in info][0] == (0, True, 4)
    assert [(s["category_id"], s["area"]) for s in info] == [(0, 4), (2, 12)]
    assert sum(s["area"] for s in info) == 16
    assert (segments[:, 0] == info[0]["id"]).all()
    for segment in info:
        assert (segments == segment["id"]).sum() == segment["area"]


@pytest.mark.parametrize("size", [(48, 64), (80, 107), (96, 33), (13, 200)])
def test_decisions_are_resized_as_by_pillow(size):
    """Which the original does; in PyTorch's "nearest" they would move by half a pixel."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, 53, generator=generator)
    merger = PanopticMerger(range(6), min_area=0)
    segments, info = merger(logits, torch.ones(6), torch.arange(6), size)
    picture = Image.fromarray(logits.argmax(0).numpy().astype(np.uint8))
    expected = np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST))
    classes = torch.tensor([0, *(s["category_id"] for s in info)])
    assert (classes[segments.long()].numpy() == expected).all()


def test_nothing_is_found():
    segments, info = PanopticMerger([0])(
        torch.zeros(0, 4, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), (6, 8)
    )
    assert segments.shape == (6, 8) and not segments.any() and info == []


def test_no_mask_is_made_where_nothing_is_found():
    def masks_of(images, queries):
        raise AssertionError("asked for masks of no query")

    results = [{}]
    inputs = [{"image": torch.zeros(3, 8, 8), "height": 6, "width": 4}]
    scores, classes = torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int64)
    merger = PanopticMerger([0])
    segmentation.add_panoptic(results, scores, classes, masks_of, merger, inputs, (8, 8))
    segments, info = results[0]["panoptic_seg"]
    assert segments.shape == (6, 4) and info == []


@pytest.mark.parametrize("variant", ["detr_tiny", "fast_tiny"])
@torch.no_grad()
def test_panoptic_results_of_a_model(variant):
    names = ["a", "b", "sky"]
    MetadataCatalog.get("panoptic_test").set(
        thing_classes=names,
        stuff_classes=names,
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
        stuff_dataset_id_to_contiguous_id={3: 2},
    )
    options = ("DATASETS.TEST", ("panoptic_test",), "DATASETS.TRAIN", ("panoptic_test",))
    options += ("MODEL.DETR.PANOPTIC.ENABLED", True, "MODEL.DETR.NUM_CLASSES", 3)
    options += ("MODEL.DETR.PANOPTIC.SCORE_THRESHOLD", 0.001)
    if variant == "fast_tiny":
        options += ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"])
        options += ("MODEL.DETR.IN_FEATURES", ["res3"])
    model = make_model(*options, variant=variant).eval()
    inputs = random_inputs(SIZES)
    inputs[0] |= {"height": 100, "width": 150}
    results = model(inputs)
    segments, info = results[0]["panoptic_seg"]
    assert segments.shape == (100, 150) and results[1]["panoptic_seg"][0].shape == (80, 64)
    assert sum(s["area"] for s in info) == 100 * 150
    assert {s["isthing"] for s in info} <= {True, False}
    assert all(s["isthing"] == (s["category_id"] < 2) for s in info)


def test_segments_of_padded_images():
    """Masks are enlarged to the padded batch and cut to the image; queries below the threshold keep
    their places among those that are asked for."""
    masks = torch.full((1, 4, 4, 4), -9.0)
    masks[0, 1, :, 0] = 9.0  # query 1: the left quarter of the padded 16x16
    masks[0, 3, :, 1:] = 9.0  # query 3: the rest
    results, inputs = [{}], [{"image": torch.zeros(3, 16, 8), "height": 16, "width": 8}]
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8]])
    classes = torch.tensor([[5, 6, 7, 8]])
    merger = PanopticMerger([6, 8], score_threshold=0.5, min_area=0)

    def masks_of(images, queries):
        return masks[images, queries]

    segmentation.add_panoptic(results, scores, classes, masks_of, merger, inputs, (16, 16))
    segments, info = results[0]["panoptic_seg"]
    assert segments.shape == (16, 8)
    assert [(s["category_id"], s["area"]) for s in info] == [(6, 64), (8, 64)]
    assert (segments[:, :4] == info[0]["id"]).all() and (segments[:, 4:] == info[1]["id"]).all()


def test_training_on_a_frozen_detector_starts_from_its_weights(tmp_path):
    """By key, through the trainer; weights that are not all of the detector's are refused."""
    torch.manual_seed(1)
    detector = build_model(tiny_cfg(*MASKS[2:], "MODEL.DETR.NUM_CLASSES", 3))
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    write_checkpoint(str(tmp_path / "detector.pth"), detector.state_dict())
    with registered_rectangles(tmp_path / "data", polygons=True) as name:
        path = str(tmp_path / "detector.pth")
        options = (*MASKS, "MODEL.DETR.FROZEN_WEIGHTS", path, "SOLVER.MAX_ITER", 2)
        trainer = DetrTrainer(training_cfg(name, tmp_path / "out", *options))
        trainer.resume_or_load(resume=False)
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        for key, value in detector.state_dict().items():
            assert torch.equal(before[key], value), key
        state = detector.state_dict()
        del state["neck.projections.0.weight"]
        write_checkpoint(path, state)
        with pytest.raises(UserError, match="leaves 1 tensors of the frozen detector untrained"):
            trainer.resume_or_load(resume=False)


def test_a_frozen_detector_needs_a_mask_head():
    model = build_model(tiny_cfg())
    parts = ("backbone", "neck", "transformer", "criterion", "pixel_mean", "pixel_std")
    given = {part: getattr(model, part) for part in parts[:4]} | dict.fromkeys(parts[4:], [1.0] * 3)
    with pytest.raises(UserError, match="frozen_detector=True, but no mask_head"):
        Detr(**given, frozen_detector=True)


def test_masks_move_no_box():
    """Of a head that works around boxes: they say where to look, and have losses of their own."""
    options = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"], "MODEL.DETR.IN_FEATURES", ["res3"])
    model = make_model(*options, variant="fast_tiny").train()
    predictions = model.predict_all(random_inputs(SIZES))
    source = predictions.masks.args[0]
    assert source.boxes.requires_grad
    first = torch.zeros(1, dtype=torch.int64)
    assert not squared_distance(source, first, first).requires_grad
