"""Mixed precision."""

import logging
import math

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from detr_d2.engine import DetrTrainer, Precision
from detr_d2.engine.step import accumulate_gradients
from detr_d2.errors import UserError
from detr_d2.modeling.heads import PredictionHead
from detr_d2.processor import fast_types, has_bfloat16, is_bfloat16_fast

from .helpers import random_inputs, tiny_cfg
from .training import read_metrics, registered_rectangles, training_cfg


def test_bfloat16_trains_on_a_cpu(tmp_path):
    with registered_rectangles(tmp_path / "rectangles") as name:
        mixed = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
        cfg = training_cfg(name, tmp_path / "out", *mixed)
        trainer = DetrTrainer(cfg)
        assert str(trainer.precision) == "bfloat16"
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.train()
    last = read_metrics(tmp_path / "out")[-1]
    assert last["iteration"] == 3
    assert all(math.isfinite(value) for name, value in last.items())
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert new.dtype == torch.float32 and torch.isfinite(new).all()
        assert not torch.equal(old, new)


def test_losses_are_float32():
    """The layers compute in bfloat16, boxes and the criterion do not."""
    model = build_model(tiny_cfg()).train()
    dtypes, of_boxes = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            seen = of_boxes if "box_head" in name else dtypes
            module.register_forward_hook(
                lambda m, inputs, output, seen=seen: seen.add(output.dtype)
            )
    inputs = random_inputs([(64, 64), (64, 80)], [2, 0])
    losses = accumulate_gradients(model, [inputs], Precision("cpu", True, "bfloat16"))
    assert dtypes == {torch.bfloat16} and of_boxes == {torch.float32}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_bfloat16_is_close_to_float32():
    cfg = tiny_cfg("MODEL.DETR.DROPOUT", 0.0, "MODEL.RESNETS.NORM", "FrozenBN")
    model = build_model(cfg).train()
    inputs = random_inputs([(64, 64), (64, 80)], [2, 1])
    losses = [
        accumulate_gradients(model, [inputs], Precision("cpu", enabled, "bfloat16"))
        for enabled in (False, True)
    ]
    for name in ("loss_bbox", "loss_giou", "loss_ce"):
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=0.05)
        assert losses[1][name] != losses[0][name]


def test_disabled():
    precision = Precision("cpu", enabled=False, dtype="bfloat16")
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(2)).dtype == torch.float32
    assert str(precision) == "float32"


def test_choice_of_type():
    assert Precision("cpu").dtype == torch.bfloat16
    assert Precision("cuda").dtype == torch.float16
    assert Precision(torch.device("cuda:1"), dtype="bfloat16").dtype == torch.bfloat16
    cfg = tiny_cfg("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
    assert str(Precision.from_config(cfg)) == "bfloat16"


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_is_what_the_cpu_is_fast_in(is_fast, monkeypatch, caplog):
    monkeypatch.setattr("detr_d2.engine.precision.is_bfloat16_fast", lambda: is_fast)
    caplog.set_level(logging.WARNING)
    precision = Precision("cpu", enabled=True)
    assert str(precision) == ("bfloat16" if is_fast else "float32")
    with precision.autocast():
        dtype = nn.Linear(2, 2)(torch.ones(2)).dtype
    assert dtype == (torch.bfloat16 if is_fast else torch.float32)
    assert ("Training in float32" in caplog.text) == (not is_fast)
    # What is asked for by name is done, and what that costs is said.
    caplog.clear()
    assert str(Precision("cpu", enabled=True, dtype="bfloat16")) == "bfloat16"
    assert ("auto would avoid it" in caplog.text) == (not is_fast)
    # Other processors are not this one.
    caplog.clear()
    assert str(Precision("cuda", enabled=True, dtype="bfloat16")) == "bfloat16"
    Precision("cpu", enabled=False)
    assert not caplog.text


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_auto_is_bfloat16_on_gpus_that_have_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert has_bfloat16("cuda") == (dtype == "bfloat16")
    assert str(Precision("cuda", enabled=True)) == dtype


def test_boxes_are_made_in_float32():
    """Inside an autocast, too: above 0.5 bfloat16 is as coarse as 1/256 of the image."""
    head = PredictionHead(8, 3)
    content = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = head(content).boxes
    with torch.autocast("cpu", torch.bfloat16):
        output = head(content)
    assert output.logits.dtype == torch.bfloat16 and output.boxes.dtype == torch.float32
    torch.testing.assert_close(output.boxes, expected, rtol=0, atol=1e-6)


def test_speed_of_bfloat16_is_what_the_instructions_say():
    if torch.backends.mkldnn.is_available():  # private to PyTorch; without it all would be float32
        assert hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # of newer PyTorch
    known = get_capabilities()
    if known.get("architecture") != "x86_64":
        pytest.skip("what else computes bfloat16 depends on how PyTorch was built")
    fast = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    assert (
        is_bfloat16_fast() == fast and fast_types() == [torch.float32, torch.bfloat16][: 1 + fast]
    )


@pytest.mark.parametrize(
    ("machine", "capabilities", "older", "fast"),
    [
        ("x86_64", {"avx512_bf16": False, "amx_bf16": False}, True, False),  # Cascade Lake
        ("x86_64", {"avx512_bf16": True}, False, True),
        ("AMD64", {"avx512_bf16": False, "amx_bf16": True}, False, True),
        ("x86_64", {}, False, False),
        ("x86_64", {}, True, True),
        ("x86_64", None, None, True),  # a PyTorch that cannot tell
        ("aarch64", {"avx512_bf16": False}, False, True),
    ],
)
def test_emulated_bfloat16_is_not_fast(monkeypatch, machine, capabilities, older, fast):
    """Of processors that oneDNN says yes to, for all of them have AVX512."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr("platform.machine", lambda: machine)
    told = {"get_capabilities": capabilities, "_is_avx512_bf16_supported": older}
    for name, value in told.items():
        if value is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    assert is_bfloat16_fast() == fast


def test_gradients_are_scaled_for_float16_only(monkeypatch):
    assert not Precision("cpu", enabled=True).scaler.is_enabled()
    # Without CUDA, torch's scaler switches itself off whatever it is told.
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: (device, enabled))
    assert Precision("cuda", enabled=True).scaler == ("cuda", True)
    assert Precision("cuda", enabled=True, dtype="bfloat16").scaler == ("cuda", False)
    assert Precision("cuda", enabled=False).scaler == ("cuda", False)


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="SOLVER.AMP.DTYPE float16 needs a GPU"):
        Precision("cpu", enabled=True, dtype="float16")
    assert str(Precision("cpu", enabled=False, dtype="float16")) == "float32"


def test_unknown_type():
    with pytest.raises(UserError, match="SOLVER.AMP.DTYPE is 'fp8'.*bfloat16"):
        Precision("cpu", dtype="fp8")
