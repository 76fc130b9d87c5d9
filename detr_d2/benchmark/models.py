"""The contestants: this package's models and transformers', with the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..box_ops import cxcywh_to_xyxy
from ..checkpoint import load_weights
from ..deploy import ExportedDetr, optimize_for_inference
from ..deploy.export import write
from ..deploy.exportable import ExportableDetr
from ..deploy.runtime import open_model
from ..errors import UserError, require_package
from ..model_zoo import get_config
from ..modeling.meta_arch import Detr
from ..processor import fast_types, is_bfloat16_fast
from ..structures import Target

# name -> config, class of transformers, its options
PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DETR R50": ("detr_R_50_500ep", "Detr", {}),
    "DETR R50-DC5": ("detr_R_50_DC5_500ep", "Detr", {"dilation": True}),
    "Deformable DETR R50": ("deformable_detr_R_50_50ep", "DeformableDetr", {}),
    "DINO R50": ("dino_4scale_R_50_12ep", "", {}),
}
NUM_CLASSES = 91


def build_pair(name: str, device: str = "cpu") -> tuple[Detr, nn.Module | None]:
    """Our model and transformers' with its random weights; None where it has no such model."""
    config, foreign_name, options = PAIRS[name]
    cfg = get_config(f"COCO-Detection/{config}.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.DETR.NUM_CLASSES = device, "", NUM_CLASSES
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if not foreign_name:
        return model, None
    foreign = build_foreign(foreign_name, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(foreign.state_dict(), path)
        report, _ = load_weights(model, str(path))
    if report.initial:
        raise RuntimeError(f"not loaded from transformers: {report.initial[:3]}")
    return model, foreign.to(device)


def build_foreign(name: str, **options: Any) -> nn.Module:
    """transformers' detector with its default settings on timm's ResNet-50."""
    transformers = require_package("transformers", "test")
    require_package("timm", "timm")
    config = getattr(transformers, f"{name}Config")(
        use_timm_backbone=True,
        backbone="resnet50",
        use_pretrained_backbone=False,
        num_labels=NUM_CLASSES,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    for module in model.modules():  # as after a training
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
    return model


def random_inputs(batch: int, height: int, width: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    size = (3, height, width)
    return [
        {"image": torch.randint(256, size, generator=generator, dtype=torch.uint8)}
        for _ in range(batch)
    ]


def random_targets(counts: list[int], seed: int = 0) -> list[Target]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        size = 0.1 + 0.4 * torch.rand(count, 2, generator=generator)
        centre = size / 2 + (1 - size) * torch.rand(count, 2, generator=generator)
        classes = torch.randint(NUM_CLASSES, (count,), generator=generator)
        targets.append(Target(classes, torch.cat((centre, size), 1)))
    return targets


def with_objects(
    inputs: Sequence[dict[str, Any]], targets: Sequence[Target]
) -> list[dict[str, Any]]:
    """Images with ground truth in detectron2's format."""
    results = []
    for x, target in zip(inputs, targets, strict=True):
        height, width = x["image"].shape[-2:]
        instances = Instances((height, width))
        corners = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
        instances.gt_boxes, instances.gt_classes = Boxes(corners), target.classes
        results.append({**x, "instances": instances})
    return results


def foreign_runner(model: nn.Module, inputs: list[dict[str, Tensor]], like: Detr) -> Callable:
    """transformers' forward pass on the same pixels, normalised beforehand as it asks for."""
    images = torch.stack([x["image"] for x in inputs])
    pixels = (images - like.pixel_mean) / like.pixel_std
    mask = torch.ones(len(images), *images.shape[2:], dtype=torch.long)

    def run() -> Any:
        with torch.no_grad():
            return model(pixel_values=pixels, pixel_mask=mask)

    return run


def own_runner(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Callable:
    def run() -> Any:
        with torch.no_grad():
            return model(inputs)

    return run


def contestants(
    model: Detr,
    foreign: nn.Module | None,
    inputs: list[dict[str, Tensor]],
    quick: bool,
    compiled: bool,
) -> tuple[dict[str, Callable], dict[str, str], dict[str, str]]:
    """What runs on these inputs, a note on the arithmetic of each, and why others do not run."""
    runs, notes, missing = {}, {}, {}
    if foreign is not None:
        runs["transformers"] = foreign_runner(foreign, inputs, model)
        notes["transformers"] = "float32"
    runs["detr_d2"] = own_runner(model, inputs)
    runs["detr_d2, optimised"] = own_runner(optimize_for_inference(model), inputs)
    notes |= {"detr_d2": "float32", "detr_d2, optimised": "float32"}
    if is_bfloat16_fast():
        half = optimize_for_inference(model, "bfloat16")
        runs["detr_d2, optimised, bfloat16"] = own_runner(half, inputs)
        notes["detr_d2, optimised, bfloat16"] = "bfloat16"
    else:
        missing["bfloat16"] = "slower than float32 on this CPU"
    if quick:
        return runs, notes, {"others": "not with --quick"}
    if compiled:
        runs["detr_d2, compiled"] = own_runner(optimize_for_inference(model, compile=True), inputs)
        notes["detr_d2, compiled"] = "float32"
    with exported(model, missing) as paths:
        for name, path, dtype in paths:
            runs[name] = own_runner(ExportedDetr(open_model(path, dtype)), inputs)
            notes[name] = str(dtype).removeprefix("torch.")
        if foreign is not None and any(path.suffix == ".xml" for _, path, _ in paths):
            for dtype in fast_types():
                name = "transformers on OpenVINO" + ", bfloat16" * (dtype == torch.bfloat16)
                runs[name] = foreign_openvino(foreign, inputs, model, dtype)
                notes[name] = str(dtype).removeprefix("torch.")
    return runs, notes, missing


@contextmanager
def exported(model: Detr, missing: dict[str, str]) -> Iterator[list[tuple[str, Path, torch.dtype]]]:
    """Files for the runtimes that are installed; the others go to `missing`, with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        exportable = ExportableDetr(model)
        found = []
        for runtime, package, suffix, dtypes in (
            ("ONNX Runtime", "onnxruntime", ".onnx", [torch.float32]),
            ("OpenVINO", "openvino", ".xml", fast_types()),
        ):
            try:
                require_package(package, "export")
                path = Path(folder) / f"{package}{suffix}"
                write(exportable, path)
            except UserError as error:
                missing[runtime] = str(error)
                continue
            for dtype in dtypes:
                half = ", bfloat16" * (dtype == torch.bfloat16)
                found.append((f"detr_d2 on {runtime}{half}", path, dtype))
        yield found


def foreign_openvino(
    foreign: nn.Module, inputs: list[dict[str, Tensor]], like: Detr, dtype: torch.dtype
) -> Callable:
    """transformers' model as OpenVINO converts it, at the one size of these inputs."""
    openvino = require_package("openvino", "export")
    images = torch.stack([x["image"] for x in inputs])
    pixels = (images - like.pixel_mean) / like.pixel_std

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = foreign

        def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self.model(pixel_values=pixel_values)
            return outputs.logits, outputs.pred_boxes

    converted = openvino.convert_model(Logits(), example_input=pixels, input=list(pixels.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    array = pixels.numpy()
    return lambda: compiled([array])
