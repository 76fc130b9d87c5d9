"""Every foreign format loads, with the tensors where they belong.

Expected names and values come from the libraries themselves: torch's transformer layers (whose
names the original DETR has), torchvision's and timm's ResNets, and Hugging Face's DETR.
"""

import json
import logging
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch import nn

from detr_d2.checkpoint import convert_checkpoint, load_weights, read_checkpoint, write_checkpoint
from detr_d2.config import get_detr_cfg
from detr_d2.errors import UserError

from .helpers import tiny_cfg

WIDTH, QUERIES, CLASSES = 32, 5, 3


@pytest.fixture(autouse=True)
def log_reaches_caplog(monkeypatch):
    """detectron2's setup_logger, called by another test, would keep the records from it."""
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)


def small_config():
    """A DETR on ResNet-18's widths with one block per stage; the norm layers can be trained."""
    cfg = get_detr_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "Detr"
    cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_backbone"
    cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE = [1, 1, 1, 1]
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    detr = cfg.MODEL.DETR
    detr.NUM_CLASSES, detr.NUM_OBJECT_QUERIES = CLASSES, QUERIES
    detr.HIDDEN_DIM, detr.NHEADS, detr.DIM_FEEDFORWARD = WIDTH, 4, 48
    detr.ENC_LAYERS = detr.DEC_LAYERS = 2
    return cfg


def bottleneck_config(**widths: int):
    """The same on a ResNet-50; `widths` are keys of MODEL.RESNETS."""
    cfg = small_config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
    for key, width in widths.items():
        setattr(cfg.MODEL.RESNETS, key, width)
    return cfg


def randomised(module: nn.Module) -> nn.Module:
    """Norms and biases too, so that no two tensors of one shape are equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + noise.abs() if name.endswith("running_var") else 0.1 * noise)
    return module.eval()


def torchvision_body() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1])


class OriginalDetr(nn.Module):
    """Parts of torch and torchvision under the names of the original DETR."""

    def __init__(self, body: nn.Module):
        super().__init__()
        joiner = nn.Module()
        joiner.body = body
        joiner.body.fc = nn.Identity()
        self.backbone = nn.ModuleList([joiner])
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 48)
        self.transformer.encoder.norm = None
        self.input_proj = nn.Conv2d(512, WIDTH, 1)
        self.query_embed = nn.Embedding(QUERIES, WIDTH)
        self.class_embed = nn.Linear(WIDTH, CLASSES + 1)
        self.bbox_embed = torchvision.ops.MLP(WIDTH, [WIDTH, WIDTH, 4])
        layers = [m for m in self.bbox_embed if isinstance(m, nn.Linear)]
        self.bbox_embed = nn.Module()
        self.bbox_embed.layers = nn.ModuleList(layers)


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    return randomised(OriginalDetr(torchvision_body())).state_dict()


@pytest.fixture
def model() -> nn.Module:
    return build_model(small_config()).eval()


def save(folder, state, name="weights.pth") -> str:
    torch.save({"model": state}, folder / name)
    return str(folder / name)


def assert_holds_original(model: nn.Module, original: dict[str, torch.Tensor]) -> None:
    """Each pair of names written out once, layer 1 standing for all."""
    ours = model.state_dict()
    encoder, decoder = "transformer.encoder.layers.1.", "transformer.decoder.layers.1."
    pairs = {
        "backbone.stem.conv1.weight": "backbone.0.body.conv1.weight",
        "backbone.stem.conv1.norm.running_var": "backbone.0.body.bn1.running_var",
        "backbone.res3.0.conv2.weight": "backbone.0.body.layer2.0.conv2.weight",
        "backbone.res5.0.conv1.norm.bias": "backbone.0.body.layer4.0.bn1.bias",
        "backbone.res4.0.shortcut.weight": "backbone.0.body.layer3.0.downsample.0.weight",
        "backbone.res4.0.shortcut.norm.weight": "backbone.0.body.layer3.0.downsample.1.weight",
        "neck.projections.0.weight": "input_proj.weight",
        "transformer.queries.position.weight": "query_embed.weight",
        encoder + "self_attn.out_proj.weight": encoder + "self_attn.out_proj.weight",
        encoder + "ffn.linear1.weight": encoder + "linear1.weight",
        encoder + "ffn.linear2.bias": encoder + "linear2.bias",
        encoder + "self_attn_norm.weight": encoder + "norm1.weight",
        encoder + "ffn_norm.weight": encoder + "norm2.weight",
        decoder + "cross_attn.out_proj.bias": decoder + "multihead_attn.out_proj.bias",
        decoder + "self_attn_norm.bias": decoder + "norm1.bias",
        decoder + "cross_attn_norm.bias": decoder + "norm2.bias",
        decoder + "ffn_norm.bias": decoder + "norm3.bias",
        "transformer.decoder.norm.weight": "transformer.decoder.norm.weight",
        "transformer.decoder.heads.0.class_head.weight": "class_embed.weight",
        "transformer.decoder.heads.0.box_head.layers.2.bias": "bbox_embed.layers.2.bias",
    }
    for ours_name, original_name in pairs.items():
        assert torch.equal(ours[ours_name], original[original_name]), ours_name
    fused = original[decoder + "multihead_attn.in_proj_weight"]
    for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        expected = fused[index * WIDTH : (index + 1) * WIDTH]
        assert torch.equal(ours[f"{decoder}cross_attn.{projection}.weight"], expected)


def as_wrapper(original):
    """The wrapper's names: everything below `detr.`, detectron2's ResNet as body."""
    stem = {"conv1.": "stem.conv1.", "bn1.": "stem.conv1.norm."}
    inner = {".bn1.": ".conv1.norm.", ".bn2.": ".conv2.norm.", ".downsample.0.": ".shortcut."}
    inner[".downsample.1."] = ".shortcut.norm."
    state = {"criterion.empty_weight": torch.ones(CLASSES + 1)}
    for name, tensor in original.items():
        body = name.removeprefix("backbone.0.body.")
        if body == name:
            state["detr." + name] = tensor
            continue
        for old, new in stem.items():
            if body.startswith(old):
                body = new + body.removeprefix(old)
        for old, new in inner.items():
            body = body.replace(old, new) if body.startswith("layer") else body
        for stage in range(1, 5):
            body = body.replace(f"layer{stage}.", f"res{stage + 1}.")
        state["detr.backbone.0.backbone." + body] = tensor
    return state


def with_masks(state):
    """The model with a mask head keeps the box model under `detr.`."""
    masks = {
        "mask_head.lay1.weight": torch.zeros(2),
        "bbox_attention.q_linear.bias": torch.zeros(2),
    }
    return {"detr." + name: tensor for name, tensor in state.items()} | masks


def as_wrapper_with_masks(original):
    state = as_wrapper(original)
    weight = {"criterion.empty_weight": state.pop("criterion.empty_weight")}
    masked = with_masks({k.removeprefix("detr."): tensor for k, tensor in state.items()})
    return {"detr." + name: tensor for name, tensor in masked.items()} | weight


@pytest.mark.parametrize(
    "rename",
    [
        lambda state: state,
        lambda state: {"module." + name: tensor for name, tensor in state.items()},
        with_masks,
        as_wrapper,
        as_wrapper_with_masks,
        lambda state: {"module." + name: tensor for name, tensor in as_wrapper(state).items()},
    ],
    ids=["original", "parallel", "with masks", "wrapper", "wrapper with masks", "parallel wrapper"],
)
def test_detr_formats(tmp_path, model, original, rename):
    report, _ = load_weights(model, save(tmp_path, rename(original)))
    assert_holds_original(model, original)
    assert not report.initial and not report.transformer_untrained
    not_ours = ("mask_head", "bbox_attention", "criterion")
    assert all(any(part in name for part in not_ours) for name in report.ignored)


def test_original_training_checkpoint_with_its_command_line(tmp_path, model, original):
    """Checkpoints of the official training script hold an argparse.Namespace."""
    data = {"model": original, "optimizer": {"state": {}}, "args": Namespace(lr=1e-4), "epoch": 3}
    torch.save(data, tmp_path / "checkpoint.pth")
    _, rest = load_weights(model, str(tmp_path / "checkpoint.pth"))
    assert_holds_original(model, original)
    assert rest["epoch"] == 3 and rest["args"].lr == 1e-4


def test_mask_head_is_ignored_and_listed(tmp_path, model, original, caplog):
    report, _ = load_weights(model, save(tmp_path, with_masks(original)))
    assert len(report.ignored) == 2
    assert "mask_head.convs.0.weight, mask_head.q_proj.bias" in caplog.text


@pytest.mark.parametrize("to", ["own", "original", "detectron2-wrapper", "huggingface"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_round_trips_are_exact(tmp_path, model, original, to, ending):
    source = save(tmp_path, {k: v for k, v in original.items() if "num_batches" not in k})
    there, back = str(tmp_path / "new" / f"there.{ending}"), str(tmp_path / f"back.{ending}")
    convert_checkpoint(source, there, to)
    convert_checkpoint(there, back, "original")
    expected, actual = read_checkpoint(source)["model"], read_checkpoint(back)["model"]
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    load_weights(model, there)
    assert_holds_original(model, original)


def test_own_checkpoint_carries_class_names_and_config(tmp_path, model):
    randomised(model)
    for ending in ("pth", "safetensors"):
        path = str(tmp_path / f"own.{ending}")
        write_checkpoint(path, model.state_dict(), class_names=["a", "b", "c"], config="X: 1\n")
        other = build_model(small_config())
        report, rest = load_weights(other, path)
        assert report.exact
        assert rest["class_names"] == ["a", "b", "c"] and rest["config"] == "X: 1\n"
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def as_detectron2_pickle(state, path) -> str:
    """What detectron2's tools/convert-torchvision-to-d2.py writes."""
    wrapper = as_wrapper({"backbone.0.body." + name: tensor for name, tensor in state.items()})
    prefix = "detr.backbone.0.backbone."
    arrays = {k.removeprefix(prefix): v.numpy() for k, v in wrapper.items() if k.startswith(prefix)}
    arrays["stem.fc.weight"] = np.zeros((10, 512), np.float32)
    with open(path, "wb") as file:
        data = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        pickle.dump(data, file)
    return str(path)


@pytest.mark.parametrize("kind", ["torchvision", "pickle"])
def test_backbone_only(tmp_path, model, caplog, kind):
    body = randomised(torchvision_body())
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("transformer.")}
    if kind == "torchvision":
        path = str(tmp_path / "resnet.pth")
        torch.save(body.state_dict(), path)
    else:
        path = as_detectron2_pickle(body.state_dict(), tmp_path / "R.pkl")
    report, _ = load_weights(model, path)

    image = torch.rand(1, 3, 64, 64)
    layers = [body.conv1, body.bn1, body.relu, body.maxpool]
    layers += [body.layer1, body.layer2, body.layer3, body.layer4]
    expected = nn.Sequential(*layers)(image)
    torch.testing.assert_close(model.backbone.eval()(image)["res5"], expected)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert report.transformer_untrained and "THE TRANSFORMER IS UNTRAINED" in caplog.text
    assert any("fc.weight" in name for name in report.ignored)


def test_torchvision_bottlenecks(tmp_path):
    body = randomised(torchvision.models.resnet50(weights=None))
    torch.save(body.state_dict(), tmp_path / "resnet50.pth")
    model = build_model(bottleneck_config())
    report, _ = load_weights(model, str(tmp_path / "resnet50.pth"))
    assert not [name for name in report.initial if name.startswith("backbone.")]
    body.avgpool = body.fc = nn.Identity()
    image = torch.rand(1, 3, 64, 64)
    actual = model.backbone.eval()(image)["res5"].flatten(1)
    torch.testing.assert_close(actual, body(image))


def test_backbone_with_a_tensor_more(tmp_path, model):
    """As forks of a classifier have them."""
    state = torchvision_body().state_dict() | {"projector.weight": torch.zeros(1)}
    report, _ = load_weights(model, save(tmp_path, state))
    assert report.transformer_untrained and "projector.weight" in report.ignored


def timm_config(name: str):
    cfg = small_config()
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    cfg.MODEL.TIMM.NAME = name
    return cfg


# One with an ordinary stem, one with names no ResNet has, one whose containers timm flattens.
@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "test_convnext"])
def test_timm_file_into_timm_backbone(tmp_path, name):
    timm = pytest.importorskip("timm")
    classifier = randomised(timm.create_model(name, pretrained=False))
    path = str(tmp_path / "timm.pth")
    torch.save(classifier.state_dict(), path)
    model = build_model(timm_config(name))
    report, _ = load_weights(model, path)

    assert not [name for name in report.initial if name.startswith("backbone.")]
    image = torch.rand(1, 3, 64, 64)
    expected = classifier.forward_features(image)
    actual = list(model.backbone.eval()(image).values())[-1]
    if name != "test_efficientnet":  # its features end before the last convolution
        torch.testing.assert_close(actual, expected)
    assert torch.equal(next(model.backbone.body.parameters()), next(classifier.parameters()))


def test_original_into_timm_backbone_and_back(tmp_path):
    pytest.importorskip("timm")
    body = torchvision.models.resnet18(weights=None)
    original = randomised(OriginalDetr(body)).state_dict()
    model = build_model(timm_config("resnet18"))
    report, _ = load_weights(model, save(tmp_path, original))
    assert not report.initial and not report.ignored
    ours = model.state_dict()
    name = "layer3.1.bn2.running_mean"
    assert torch.equal(ours["backbone.body." + name], original["backbone.0.body." + name])

    write_checkpoint(str(tmp_path / "own.pth"), ours)
    convert_checkpoint(str(tmp_path / "own.pth"), str(tmp_path / "back.pth"), "original")
    back = read_checkpoint(str(tmp_path / "back.pth"))["model"]
    expected = {k: v for k, v in original.items() if "num_batches" not in k}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------- Hugging Face


def huggingface_body(**config):
    transformers = pytest.importorskip("transformers")
    body = transformers.ResNetConfig(out_features=["stage4"], **config)
    return {"backbone_config": body, "use_timm_backbone": False, "backbone": None}


def huggingface_model(**backbone):
    transformers = pytest.importorskip("transformers")
    config = transformers.DetrConfig(
        use_pretrained_backbone=False,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=QUERIES,
        id2label={0: "zero", 1: "one", 2: "two"},
        **backbone,
    )
    return randomised(transformers.DetrForObjectDetection(config))


def predictions(model, images):
    """Logits and boxes of our model and of Hugging Face's for images of several sizes."""
    with torch.no_grad():
        if hasattr(model, "predict"):
            output = model.predict([{"image": image} for image in images])[-1]
            return output.logits, output.boxes
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        pixels = torch.zeros(len(images), 3, height, width)
        mask = torch.zeros(len(images), height, width, dtype=torch.int64)
        for i, image in enumerate(images):
            pixels[i, :, : image.shape[1], : image.shape[2]] = image
            mask[i, : image.shape[1], : image.shape[2]] = 1
        output = model(pixel_values=pixels, pixel_mask=mask)
        return output.logits, output.pred_boxes


def assert_same_predictions(model, foreign):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 96), (80, 64))]
    pairs = zip(predictions(model, images), predictions(foreign, images), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_huggingface_bottlenecks(tmp_path):
    body = {"embedding_size": 8, "hidden_sizes": [16, 32, 64, 128], "depths": [3, 4, 6, 3]}
    foreign = huggingface_model(**huggingface_body(layer_type="bottleneck", **body))
    foreign.save_pretrained(tmp_path)
    cfg = bottleneck_config(STEM_OUT_CHANNELS=8, RES2_OUT_CHANNELS=16, WIDTH_PER_GROUP=4)
    model = build_model(cfg).eval()
    report, _ = load_weights(model, str(tmp_path))
    assert report.exact
    assert_same_predictions(model, foreign)


@pytest.mark.parametrize("kind", ["directory", "file", "in memory", "sharded", "bin"])
def test_huggingface_predictions_are_equal(tmp_path, model, kind):
    body = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [1, 1, 1, 1]}
    foreign = huggingface_model(**huggingface_body(layer_type="basic", **body))
    if kind == "in memory":  # newer versions name modules differently from what they save
        path = save(tmp_path, foreign.state_dict())
    else:
        foreign.save_pretrained(tmp_path, max_shard_size="1MB" if kind == "sharded" else "1GB")
        path = str(tmp_path / "model.safetensors" if kind == "file" else tmp_path)
        assert (tmp_path / "model.safetensors.index.json").exists() == (kind == "sharded")
    if kind == "bin":
        state = read_checkpoint(path)["model"]
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    report, rest = load_weights(model, path)
    assert not report.initial and not report.ignored
    assert_same_predictions(model, foreign)
    if kind != "in memory":
        assert rest["class_names"] == ["zero", "one", "two"]


def test_written_for_huggingface(tmp_path):
    """Original weights, written by us and loaded by transformers, give what our model gives."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    body = torchvision.models.resnet18(weights=None)
    original = randomised(OriginalDetr(body)).state_dict()
    source = save(tmp_path, original)
    foreign = huggingface_model(use_timm_backbone=True, backbone="resnet18")
    foreign.config.save_pretrained(tmp_path / "hf")
    convert_checkpoint(source, str(tmp_path / "hf" / "model.safetensors"), "huggingface")
    loaded, info = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]

    cfg = small_config()
    cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE = [2, 2, 2, 2]
    model = build_model(cfg).eval()
    load_weights(model, source)
    assert_same_predictions(model, loaded.eval())


# ------------------------------------------------------------------------------- refusals


def test_another_model_is_refused(tmp_path, model, original):
    stranger = {name.replace("self_attn", "sa_content"): t for name, t in original.items()}
    with pytest.raises(UserError, match="weights.pth.*checkpoint of another model.*sa_content"):
        load_weights(model, save(tmp_path, stranger))


def test_unknown_names_are_refused(tmp_path, model):
    path = save(tmp_path, {"roi_heads.box_head.fc1.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="weights.pth.*roi_heads.*no known format"):
        load_weights(model, path)


def test_another_width_is_refused_with_the_key(tmp_path, model):
    cfg = small_config()
    cfg.MODEL.DETR.HIDDEN_DIM, cfg.MODEL.DETR.NUM_CLASSES = 64, 80
    path = save(tmp_path, build_model(cfg).state_dict())
    with pytest.raises(UserError, match="64.*32.*MODEL.DETR.HIDDEN_DIM"):
        load_weights(model, path)


def test_another_backbone_is_refused_with_the_key(tmp_path, model):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "r50.pth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="r50.pth.*MODEL.RESNETS"):
        load_weights(model, str(tmp_path / "r50.pth"))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_fewer_layers_in_the_model(tmp_path, model):
    cfg = small_config()
    cfg.MODEL.DETR.DEC_LAYERS = 4
    report, _ = load_weights(model, save(tmp_path, build_model(cfg).state_dict()))
    assert not report.initial
    assert {name.split(".")[3] for name in report.ignored} == {"2", "3"}


def test_class_names_of_huggingface_config(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"d_model": 32, "id2label": {"1": "dog", "0": "cat"}})
    )
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert read_checkpoint(str(tmp_path))["class_names"] == ["cat", "dog"]


def test_half_the_size(tmp_path):
    model = build_model(tiny_cfg())
    full, half = str(tmp_path / "full.safetensors"), str(tmp_path / "half.safetensors")
    write_checkpoint(full, model.state_dict())
    convert_checkpoint(full, half, "own", half=True)
    assert Path(half).stat().st_size < 0.56 * Path(full).stat().st_size
    other = build_model(tiny_cfg())
    load_weights(other, half)
    for (name, ours), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert theirs.dtype == ours.dtype
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-6, msg=name)
        assert ours.ndim >= 2 or torch.equal(theirs, ours)


@pytest.mark.parametrize("to", ["original", "detectron2-wrapper", "huggingface"])
def test_models_with_masks_are_written_and_read_again(tmp_path, to):
    """Their detector stands below `detr.`; detectron2's wrapper has all of that below another."""
    cfg = small_config()
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    model = randomised(build_model(cfg))
    own, there = str(tmp_path / "own.pth"), str(tmp_path / "there.pth")
    write_checkpoint(own, model.state_dict())
    convert_checkpoint(own, there, to)
    names = read_checkpoint(there)["model"]
    outer = "detr." if to == "detectron2-wrapper" else ""
    of_masks = (f"{outer}mask_head.", f"{outer}bbox_attention.")
    assert any(name.startswith(of_masks) for name in names)
    assert all(name.startswith((*of_masks, f"{outer}detr.")) for name in names)
    other = build_model(cfg)
    report, _ = load_weights(other, there)
    assert not report.initial and not report.ignored
    for name, tensor in model.state_dict().items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(other.state_dict()[name], tensor)
