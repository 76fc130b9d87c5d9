"""Weights inside installed packages."""

import importlib
import json
import sys

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from detr_d2.checkpoint import load_weights
from detr_d2.errors import UserError
from detr_d2.model_zoo import config_folder

from .helpers import tiny_cfg


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must not be imported, with a file in it."""
    folder = tmp_path / "some_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "models" / "file.json").write_text("[1, 2]")
    (tmp_path / "secret").write_text("outside")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return folder


def test_files_are_found_without_importing_the_package(package):
    path = "package://some_weights/models/file.json"
    assert PathManager.get_local_path(path) == str(package / "models" / "file.json")
    with PathManager.open(path) as file:
        assert json.load(file) == [1, 2]
    assert "some_weights" not in sys.modules


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package://not_there/a.pth", "'not_there', which is not installed: pip install not-there"),
        ("package://some_weights/b.pth", "has no file 'b.pth'"),
        ("package://some_weights/../secret", "has no file '../secret'"),
        ("package://", "which is not installed"),
    ],
)
def test_what_is_not_there_is_named(package, path, message):
    with pytest.raises(UserError, match=message):
        load_weights(torch.nn.Linear(1, 1), path)


def test_files_of_the_zoo():
    path = "detr_d2://DigitScenes/detr_tiny.safetensors"
    assert PathManager.get_local_path(path) == str(
        (config_folder() / "DigitScenes/detr_tiny.safetensors").resolve()
    )
    with pytest.raises(UserError, match="has no file '../setup.py'"):
        PathManager.get_local_path("detr_d2://../setup.py")


def test_packages_are_not_written_to(package):
    with pytest.raises(UserError, match="only read"):
        PathManager.open("package://some_weights/models/file.json", "w")


def test_efficientnet_lite0_in_its_first_names(tmp_path):
    """The file's tensors are timm's, in the same order under other names."""
    timm = pytest.importorskip("timm")
    cfg = tiny_cfg(
        *("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.OUT_INDICES", [2, 3]),
        *("MODEL.TIMM.NAME", "tf_efficientnet_lite0"),
    )
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = classifier.state_dict()
    torch.save({first_name(name): tensor for name, tensor in state.items()}, tmp_path / "lite0.pth")
    model = build_model(cfg)
    report, _ = load_weights(model, str(tmp_path / "lite0.pth"))
    assert report.title == "EfficientNet-Lite0 (backbone only)"
    assert not [name for name in report.initial if name.startswith("backbone.")]
    # The two maps end before the last stages, which stand with the classifier.
    last_used = "blocks.4.2.bn3.weight"
    for name, tensor in model.backbone.body.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert last_used in model.backbone.body.state_dict()


def first_name(name: str) -> str:
    """timm's name -> that of the file, written out independently of the table."""
    depths = (1, 2, 2, 3, 3, 4, 1)
    if name.startswith("blocks."):
        _, stage, index, part, kind = name.split(".")
        block = sum(depths[: int(stage)]) + int(index)
        first = {
            "conv_pw": "_expand_conv",
            "conv_dw": "_depthwise_conv",
            "conv_pwl": "_project_conv",
        }
        norms = {"bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"}
        if stage == "0":  # nothing to expand there
            first, norms = (
                {"conv_dw": "_depthwise_conv", "conv_pw": "_project_conv"},
                {"bn1": "_bn1", "bn2": "_bn2"},
            )
        return f"_blocks.{block}.{(first | norms)[part]}.{kind}"
    stems = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    part, _, kind = name.partition(".")
    return f"{(stems | {'classifier': '_fc'})[part]}.{kind}"
