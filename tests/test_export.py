"""Exported files: the same detections at any size, in batches, through evaluator and predictor."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from time import sleep

import numpy as np
import pytest
import torch
from PIL import Image

from detr_d2 import export_model, get_detr_cfg, load_exported, optimize_for_inference
from detr_d2.deploy import export, load_from_config, runtime
from detr_d2.deploy.exportable import ExportableDetr
from detr_d2.deploy.runtime import ExportedDetr, as_batch, best_of_queries
from detr_d2.engine import DetrPredictor, main
from detr_d2.engine.main import evaluate
from detr_d2.errors import UserError
from detr_d2.modeling.panoptic import PanopticMerger

from .helpers import CONFIGS, VARIANTS, random_inputs, tiny_cfg
from .test_optimize import make_model
from .test_readme import python_blocks

NAMES = ["a", "b", "c", "d", "e"]
SUFFIXES = [".pt2", ".onnx", ".xml"]
# These stand for all: single- and multi-scale, learned and chosen queries, softmax and sigmoid.
QUICK = [("detr_tiny", ".pt2"), ("detr_tiny", ".xml"), ("dino_tiny", ".onnx")]


@pytest.fixture(autouse=True)
def packages():
    for name in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name)


@pytest.mark.parametrize(
    ("variant", "suffix"),
    [
        pytest.param(*both, marks=() if both in QUICK else pytest.mark.slow)
        for both in product(VARIANTS, SUFFIXES)
    ],
)
@torch.no_grad()
def test_files_hold_the_same_detector(tmp_path, variant, suffix):
    model = make_model(variant, "TEST.DETECTIONS_PER_IMAGE", 5)
    path = tmp_path / f"model{suffix}"
    export_model(model, path, NAMES, trials=[(1, 160, 224), (2, 192, 128)], min_size=800)
    described = json.loads((tmp_path / f"model{suffix}.json").read_text())
    assert described["class_names"] == NAMES and described["min_size"] == 800
    assert described["detections_per_image"] == 5
    assert not list(tmp_path.glob("*.onnx")) or suffix == ".onnx"
    exported = load_exported(path)
    # Other sizes and numbers than those it was traced and compared with.
    for sizes in ([(96, 70)], [(64, 96), (130, 128), (200, 65)]):
        inputs = random_inputs(sizes)
        inputs[0] |= {"height": 480, "width": 640}
        for ours, theirs in zip(exported(inputs), model(inputs), strict=True):
            ours, theirs = ours["instances"], theirs["instances"]
            assert ours.image_size == theirs.image_size
            torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-3, atol=1e-4)
            distance = torch.cdist(theirs.pred_boxes.tensor, ours.pred_boxes.tensor)
            assert distance.min(1).values.max() < 0.1


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    sizes = {"min_size": 96, "max_size": 120}
    export_model(make_model("detr_tiny"), path, NAMES, trials=[(1, 160, 224)], **sizes)
    return path


def test_attention_can_be_fused(onnx_file):
    """Runtimes know a sum before the softmax, and nothing after it."""
    onnx = pytest.importorskip("onnx")
    nodes = onnx.load(str(onnx_file)).graph.node
    kinds = {node.output[0]: node.op_type for node in nodes}
    weights = [n for n in nodes if n.op_type == "MatMul" and kinds.get(n.input[0]) == "Softmax"]
    assert len(weights) >= 6 and "IsNaN" not in kinds.values()


def test_a_file_is_used_without_this_package(onnx_file, monkeypatch):
    """The README's example finds what the predictor finds."""
    [example] = [b for b in python_blocks() if "onnxruntime" in b]
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    monkeypatch.chdir(onnx_file.parent)
    Image.fromarray(image).save("image.jpg", quality=100, subsampling=0)
    found = {}
    exec(example.replace("scores[0] > 0.5", "scores[0] > 0"), found)
    cfg = get_detr_cfg()
    cfg.MODEL.WEIGHTS = "model.onnx"
    decoded = np.asarray(Image.open("image.jpg"))
    expected = DetrPredictor(cfg)(decoded[:, :, ::-1])["instances"]
    assert found["names"] == [NAMES[index] for index in expected.pred_classes] != []
    boxes = torch.from_numpy(found["boxes"]).float()
    boxes = boxes.clamp(min=0).minimum(torch.tensor([90.0, 60.0, 90.0, 60.0]))
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, atol=0.3, rtol=0)
    scores = torch.from_numpy(found["scores"][0])
    torch.testing.assert_close(scores, expected.scores, atol=1e-3, rtol=0)


@pytest.mark.parametrize("suffix", [".pt2", ".xml"])
@torch.no_grad()
def test_tiny_and_narrow_images(tmp_path, suffix):
    """Also as the first that a network sees, and without harm to the next."""
    variant = "detr_tiny" if suffix == ".pt2" else "fast_tiny"
    model = make_model(variant, "TEST.DETECTIONS_PER_IMAGE", 5)
    export_model(model, tmp_path / f"model{suffix}", trials=[(1, 160, 224)])
    exported = load_exported(tmp_path / f"model{suffix}")
    for size in ((1, 1), (96, 128), (4, 200), (64, 96)):
        inputs = random_inputs([size])
        ours, theirs = exported(inputs)[0]["instances"], model(inputs)[0]["instances"]
        number = len(theirs)  # a map of one token has one proposal
        # Sides that a .pt2 file cannot take are padded, which convolutions of a few pixels see.
        tolerance = 1e-4 if suffix == ".xml" or min(size) > 16 else 5e-2
        assert (ours.scores[:number] - theirs.scores).abs().max() < tolerance
        distance = torch.cdist(theirs.pred_boxes.tensor, ours.pred_boxes.tensor)
        assert distance.min(1).values.max() < 100 * tolerance + 0.1


def test_openvino_takes_turns(onnx_file, monkeypatch):
    """A network has one place for its outputs: two calls at once would mix up their images. The
    first it sees is a large one: after a few pixels, larger models found nothing right any more."""
    openvino = pytest.importorskip("openvino")
    compile_model, running, most, seen = openvino.Core.compile_model, [], [], []

    def recorded(self, network, *arguments):
        compiled = compile_model(self, network, *arguments)

        def call(inputs):
            running.append(1)
            sleep(0.02)
            most.append(len(running))
            seen.append(inputs[0].shape)
            result = compiled(inputs)
            running.pop()
            return result

        return call

    monkeypatch.setattr(openvino.Core, "compile_model", recorded)
    run = runtime._open_openvino(onnx_file, torch.float32)
    images, sizes = torch.zeros(1, 3, 64, 96), torch.tensor([[64, 96]])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run(images, sizes), range(8)))
    assert max(most) == 1
    assert seen == [(1, 3, 512, 512)] + [(1, 3, 64, 96)] * 8


@torch.no_grad()
def test_padding_is_handled_inside():
    """The same image alone and in a batch, whatever lies beside it."""
    exportable = ExportableDetr(make_model("conditional_tiny"))
    image = 255 * torch.rand(1, 3, 64, 96)
    boxes, scores, classes = exportable(image, torch.tensor([[64, 96]]))
    batch = 1e3 * torch.rand(2, 3, 96, 128)
    batch[0, :, :64, :96] = image[0]
    # The backbone sees zeros beyond the image in either case.
    together = exportable(batch, torch.tensor([[64, 96], [96, 128]]))
    torch.testing.assert_close(together[1][:1], scores, rtol=0, atol=0.05)
    other = batch.clone()
    other[0, :, 64:] = other[0, :, :, 96:] = -77.0
    again = exportable(other, torch.tensor([[64, 96], [96, 128]]))
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))


FPN = (
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.DETR.IN_FEATURES", ["p4"]),
)


@torch.no_grad()
def test_images_are_padded_to_what_the_backbone_can_divide():
    model = make_model("detr_tiny", *FPN)
    assert model.backbone.size_divisibility == 32
    exportable = ExportableDetr(model)
    inputs = random_inputs([(70, 101)])
    boxes, scores, _ = exportable(inputs[0]["image"][None].float(), torch.tensor([[70, 101]]))
    expected = model(inputs)[0]["instances"]
    torch.testing.assert_close(scores[0], expected.scores, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(boxes[0], expected.pred_boxes.tensor, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_masks_of_padded_images():
    """They cover the padding, too."""
    model = make_model("detr_tiny", *FPN, *MASKS[:2], "MODEL.DETR.IN_FEATURES", ["p5"])
    described = export.describe(model, None, 32)
    exportable = ExportableDetr(model)
    run = flawed(exportable, lambda outputs: None)
    inputs = random_inputs([(70, 101)])
    fields = {k: described[k] for k in ("mask_threshold", "size_divisibility")}
    ours, theirs = ExportedDetr(run, **fields)(inputs), model(inputs)
    assert torch.equal(ours[0]["instances"].pred_masks, theirs[0]["instances"].pred_masks)


def test_squares_are_refused(monkeypatch):
    model = make_model("detr_tiny")
    constraints = property(lambda self: {"square_size": 64})
    monkeypatch.setattr(type(model.backbone), "padding_constraints", constraints)
    with pytest.raises(UserError, match="ResNet wants images padded to 64 pixels square"):
        ExportableDetr(model)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_as_a_backend_of_optimize_for_inference(backend, monkeypatch):
    monkeypatch.setattr(export, "TRIALS", ((1, 160, 224),))
    model = make_model("detr_tiny")
    fast = optimize_for_inference(model, backend=backend)
    inputs = random_inputs([(64, 96), (80, 64)])
    for ours, theirs in zip(fast(inputs), model(inputs), strict=True):
        scores = ours["instances"].scores, theirs["instances"].scores
        torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    def wrong(path, dtype=torch.float32):
        return lambda images, sizes: (
            torch.zeros(len(images), 7, 4),
            torch.zeros(len(images), 7),
            torch.zeros(len(images), 7, dtype=torch.int64),
        )

    monkeypatch.setattr(export, "open_model", wrong)
    monkeypatch.setattr(export, "write", lambda exportable, path: path.write_text(""))
    with pytest.raises(UserError, match="model.onnx' is not written: its scores differ"):
        export_model(make_model("detr_tiny"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_files_come_into_place_in_one_move(tmp_path, monkeypatch):
    """A program that has the earlier file open keeps it; nothing of others is overwritten."""
    monkeypatch.setattr(export, "open_model", lambda path: None)
    monkeypatch.setattr(export, "largest_differences", lambda *_: (0.0, 0.0, 0.0))
    model = make_model("detr_tiny")
    for number, suffix in enumerate((".onnx", ".onnx", ".pt2")):
        text = str(number)
        monkeypatch.setattr(export, "write", lambda _, path, text=text: path.write_text(text))
        export_model(model, tmp_path / f"train{suffix}", [*NAMES[1:], text])
        if number == 0:
            opened = open(tmp_path / "train.onnx")  # noqa: SIM115
    (tmp_path / "train.json").write_text("annotations of somebody's")
    with opened:
        assert opened.read() == "0" and (tmp_path / "train.onnx").read_text() == "1"
    described = [json.loads((tmp_path / f"train{s}.json").read_text()) for s in (".onnx", ".pt2")]
    assert [each["class_names"][-1] for each in described] == ["1", "2"]
    (tmp_path / "pytorch_model.bin").write_text("weights of somebody's")
    with pytest.raises(UserError, match="would overwrite '.*pytorch_model.bin': choose another"):
        export_model(model, tmp_path / "pytorch_model.xml")
    assert len(list(tmp_path.iterdir())) == 6


def test_segments_need_all_queries(tmp_path):
    model = model_with_masks("detr_tiny")
    model.detections_per_image = 3
    with pytest.raises(UserError, match="DETECTIONS_PER_IMAGE is 3, and segments are merged of"):
        export_model(model, tmp_path / "model.onnx")


def test_what_the_file_decides_is_said(onnx_file, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    cfg = tiny_cfg("MODEL.WEIGHTS", str(onnx_file))
    load_from_config(cfg)
    assert not caplog.text
    cfg.MODEL.INFERENCE.BACKEND = "openvino"
    load_from_config(cfg)
    assert "runs on onnxruntime: MODEL.INFERENCE.BACKEND openvino" in caplog.text
    with pytest.raises(UserError, match="Inference runs in float32, .*, not in float8"):
        load_exported(onnx_file, "float8")


def sure_of_nothing(*options):
    """A model as it is after a training: in noise there is no object."""
    model = make_model("detr_tiny", *options)
    model.transformer.decoder.heads[-1].class_head.bias.data[-1] += 15
    return model


def flawed(exportable, change):
    """What a runtime would be that makes a mistake."""

    @torch.no_grad()
    def run(images, sizes):
        outputs = [output.clone() for output in exportable(images, sizes)]
        change(outputs)
        return tuple(outputs)

    return run


def shift(outputs):
    outputs[0][:, :1] += 50


def confuse(outputs):
    outputs[2][:] = (outputs[2] + 1) % 5


def raise_scores(outputs):
    outputs[1][:] *= 1.1


def invert_masks(outputs):
    outputs[4][:, :1] *= -1


@pytest.mark.parametrize("limit", [1, 5])
def test_boxes_scores_and_classes_are_compared_however_low_the_scores(limit):
    exportable = ExportableDetr(sure_of_nothing("TEST.DETECTIONS_PER_IMAGE", limit))

    def differences(change):
        return export.largest_differences(exportable, flawed(exportable, change), [(1, 96, 70)])

    assert differences(lambda outputs: None) == (0, 0, 0)
    assert differences(shift)[1] > export.PIXEL_TOLERANCE
    assert max(differences(confuse)[:2]) > export.PIXEL_TOLERANCE
    assert differences(raise_scores)[0] > export.SCORE_TOLERANCE


def test_masks_are_compared_however_low_the_scores():
    model = sure_of_nothing(*MASKS)
    exportable = ExportableDetr(model)

    def difference(change):
        run = flawed(exportable, change)
        return export.largest_differences(exportable, run, [(1, 96, 70)])[2]

    assert difference(lambda outputs: None) == 0
    assert difference(invert_masks) > export.MASK_TOLERANCE
    assert difference(shift) < export.MASK_TOLERANCE  # of the others
    assert difference(lambda outputs: outputs[1].fill_(0.5)) == float("inf")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_none_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(UserError, match="no exported model at"):
        load_exported(path)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"model{suffix}' cannot be opened as an exported model"):
        load_exported(path)


def test_refusals(tmp_path, monkeypatch):
    model = make_model("detr_tiny")
    with pytest.raises(UserError, match="must end in one of .pt2, .onnx, .xml"):
        export_model(model, tmp_path / "model.pth")
    with pytest.raises(UserError, match="The model has 5 classes, and 4 names are given"):
        export_model(model, tmp_path / "model.onnx", NAMES[1:])
    with pytest.raises(UserError, match="TEST.DETECTIONS_PER_IMAGE is 0"):
        export_model(make_model("detr_tiny", "TEST.DETECTIONS_PER_IMAGE", 0), tmp_path / "m.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/m.pt2' cannot be written: "):
        export_model(model, tmp_path / "file" / "m.pt2")
    with pytest.raises(UserError, match="'tensorrt'; it must be one of torch, onnxruntime"):
        optimize_for_inference(model, backend="tensorrt")
    with pytest.raises(UserError, match="only OpenVINO's files"):
        (tmp_path / "model.onnx").write_bytes(b"")
        load_exported(tmp_path / "model.onnx", torch.bfloat16)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match="'onnxscript' is needed here .* pip install onnxscript"):
        export_model(model, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("weights", "message"),
    [("", "MODEL.WEIGHTS is empty"), ("model.pt2", "'model.pt2', which is exported already")],
)
def test_what_is_not_exported(tmp_path, weights, message):
    arguments = str(CONFIGS / "DigitScenes" / "dino_tiny.yaml"), str(tmp_path / "new.onnx")
    with pytest.raises(UserError, match=message):
        main.export(*arguments, ["MODEL.WEIGHTS", weights])


MASKS = ("MODEL.MASK_ON", True, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"])
MASKS += ("MODEL.DETR.IN_FEATURES", ["res4"], "TEST.DETECTIONS_PER_IMAGE", 12)


def model_with_masks(variant):
    """Whose class 1 is stuff."""
    model = make_model(variant, *MASKS)
    model.panoptic = PanopticMerger([0, 2, 3], score_threshold=0.01)
    return model


@pytest.mark.parametrize(
    ("variant", "suffix"),
    [
        ("detr_tiny", ".onnx"),
        ("fast_tiny", ".pt2"),
        pytest.param("detr_tiny", ".pt2", marks=pytest.mark.slow),
        pytest.param("detr_tiny", ".xml", marks=pytest.mark.slow),
        pytest.param("fast_tiny", ".onnx", marks=pytest.mark.slow),
        pytest.param("fast_tiny", ".xml", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_files_hold_the_same_masks(tmp_path, variant, suffix):
    model, path = model_with_masks(variant), tmp_path / f"model{suffix}"
    export_model(model, path, trials=[(1, 160, 224), (2, 192, 128)])
    exported = load_exported(path)
    for sizes in ([(96, 70)], [(64, 96), (130, 128), (200, 65)]):
        inputs = random_inputs(sizes)
        inputs[0] |= {"height": 120, "width": 140}
        for ours, theirs in zip(exported(inputs), model(inputs), strict=True):
            expected, segments = theirs["panoptic_seg"]
            segmented, found = ours["panoptic_seg"]
            assert len(segments) > 1 and expected.shape == segmented.shape
            assert [(s["category_id"], s["isthing"]) for s in found] == [
                (s["category_id"], s["isthing"]) for s in segments
            ]
            assert (segmented == expected).float().mean() > 0.99
            ours, theirs = ours["instances"], theirs["instances"]
            nearest = torch.cdist(theirs.pred_boxes.tensor, ours.pred_boxes.tensor).argmin(1)
            masks = ours.pred_masks[nearest]
            assert masks.shape == theirs.pred_masks.shape and masks.any()
            assert (masks == theirs.pred_masks).float().mean() > 0.99


def test_best_of_queries():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2]])
    classes = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
    queries = torch.tensor([[2, 2, 0, 2], [1, 0, 1, 0]])
    best_scores, best_classes = best_of_queries(scores, classes, queries)
    torch.testing.assert_close(best_scores, torch.tensor([[0.7, 0.0, 0.9], [0.4, 0.5, 0.0]]))
    assert best_classes[best_scores > 0].tolist() == [5, 3, 8, 7]


def test_files_without_masks_are_not_evaluated_for_masks(tmp_path):
    export_model(make_model("detr_tiny"), tmp_path / "model.pt2", trials=[(1, 160, 224)])
    options = ("MODEL.WEIGHTS", str(tmp_path / "model.pt2"))
    with pytest.raises(UserError, match="model.pt2' has no masks: set MODEL.MASK_ON False"):
        evaluate(tiny_cfg(*options, *MASKS))


def test_sizes_that_come_again_have_networks_of_their_own(tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")
    model = make_model("detr_tiny")
    export_model(model, tmp_path / "model.xml")
    made = []
    compile_model = openvino.Core.compile_model

    def recorded(self, network, *arguments):
        made.append([dimension.is_static for dimension in network.input(0).partial_shape])
        return compile_model(self, network, *arguments)

    monkeypatch.setattr(openvino.Core, "compile_model", recorded)
    monkeypatch.setattr(runtime, "MOST_SPECIALISED", 2)
    fast = load_exported(tmp_path / "model.xml")
    # The third size comes too late.
    for sizes in ([(64, 96)], [(80, 64), (64, 96)], [(96, 64)]) * 5:
        inputs = random_inputs(sizes)
        with torch.no_grad():
            expected = [result["instances"] for result in model(inputs)]
        for ours, theirs in zip(fast(inputs), expected, strict=True):
            torch.testing.assert_close(ours["instances"].scores, theirs.scores, atol=1e-4, rtol=0)
            boxes = ours["instances"].pred_boxes.tensor
            torch.testing.assert_close(boxes, theirs.pred_boxes.tensor, atol=1e-2, rtol=0)
    assert made == [[False, True, False, False], [True] * 4, [True] * 4]


def test_batches_are_padded_with_zeros_and_single_images_not_copied():
    small, large = np.full((3, 2, 5), 7, np.uint8), np.full((3, 4, 3), 9, np.float32)
    batch = as_batch([small, large])
    assert batch.dtype == np.float32 and batch.shape == (2, 3, 4, 5)
    assert (batch[0, :, :2] == 7).all() and (batch[1, :, :, :3] == 9).all()
    assert batch.sum() == small.sum() + large.sum()
    assert as_batch([small]).dtype == np.float32 and (as_batch([small])[0] == small).all()
    assert np.shares_memory(as_batch([large]), large)
    turned = large.transpose(0, 2, 1)
    assert as_batch([turned]).flags.c_contiguous and (as_batch([turned])[0] == turned).all()
