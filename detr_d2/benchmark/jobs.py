"""What is measured: each job returns sections of a report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from PIL import Image, ImageFilter
from torch import nn

from ..data import DetrDatasetMapper
from ..data.dataset_mapper import build_augmentation
from ..deploy import optimize_for_inference
from ..engine.optimizer import build_optimizer
from ..engine.trainer import compile_for_training
from ..errors import UserError, require_package
from ..evaluation.coco_metrics import compute_coco_metrics
from ..model_zoo import get_config
from ..modeling import build_criterion
from ..modeling.queries import TopKQueries
from ..processor import fast_types, is_bfloat16_fast
from ..structures import LayerOutput, Predictions
from .memory import memory
from .models import (
    NUM_CLASSES,
    build_foreign,
    build_pair,
    contestants,
    foreign_runner,
    own_runner,
    random_inputs,
    random_targets,
    with_objects,
)
from .timing import Section, fitted_exponent, take_turns

# GFLOP of one image, counted with fvcore at the size that is measured.
WORK = {("DETR R50", 800, 1066): 172.0}


def inference(rounds: int, quick: bool) -> Iterator[Section]:
    cases = [("DETR R50", 1, 800, 1066)]
    if not quick:
        cases += [("DETR R50", 4, 640, 640), ("Deformable DETR R50", 1, 800, 1066)]
        cases += [("DINO R50", 1, 800, 1066)]
    for name, batch, height, width in cases:
        model, foreign = build_pair(name)
        inputs = random_inputs(batch, height, width)
        # TorchInductor writes kernels for deformable attention for more than ten minutes.
        compiled = not quick and name.startswith("DETR")
        runs, notes, missing = contestants(model, foreign, inputs, quick, compiled)
        if foreign is None:  # transformers has no DINO: its nearest relative there
            relative = build_foreign("DeformableDetr")
            name_of_relative = "transformers' Deformable DETR"
            runs = {name_of_relative: foreign_runner(relative, inputs, model), **runs}
            notes[name_of_relative] = "float32"
        timings = take_turns(runs, rounds, warmup=2 if quick else 4, notes=notes)
        work = WORK.get((name, height, width))
        yield Section(
            f"{name}, {batch} x {height}x{width}",
            timings,
            {"work": work * batch if work else None, "per": "images/s", "amount": batch},
            (*(f"{k}: {v}" for k, v in missing.items()), differences(model, foreign, inputs)),
        )


def differences(model: nn.Module, foreign: nn.Module | None, inputs: list[dict]) -> str:
    """Largest differences of logits and boxes from the plain model, and of that from
    transformers."""
    with torch.no_grad():
        plain = model.predict(inputs)[-1]
        parts = []
        for dtype in fast_types():
            fast = optimize_for_inference(model, dtype).predict(inputs)[-1]
            kept, note = slice(None), ""
            if isinstance(model.transformer.queries, TopKQueries):
                kept = in_place(plain, fast)
                note = f" ({(~kept).sum()} of {kept.numel()} queries in another order aside)"
            name = str(dtype).removeprefix("torch.")
            parts.append(
                f"optimised {name}: logits {largest(fast.logits[kept], plain.logits[kept]):.1e}, "
                f"boxes {largest(fast.boxes[kept], plain.boxes[kept]):.1e}{note}"
            )
        if foreign is not None:
            pixels = model.preprocess_image(inputs).tensor
            theirs = foreign(pixel_values=pixels)
            parts.append(
                f"plain from transformers: logits {largest(plain.logits, theirs.logits):.1e}, "
                f"boxes {largest(plain.boxes, theirs.pred_boxes):.1e}"
            )
    return "Largest differences: " + "; ".join(parts) + "."


def in_place(plain: LayerOutput, fast: LayerOutput) -> torch.Tensor:
    """(B, Q) bool: queries that stand for the same proposal. Proposals of nearly equal scores are
    chosen in any order, and get the content that is learned for their place."""
    return (plain.boxes - fast.boxes).abs().amax(-1) < 0.01


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def training(rounds: int, quick: bool) -> list[Section]:
    """A whole step: forward, losses of all layers, backward, clipping, AdamW."""
    model, foreign = build_pair("DETR R50")
    foreign.config.auxiliary_loss = True
    targets = random_targets([7, 7])
    inputs = with_objects(random_inputs(2, 512, 640), targets)
    labels = [{"class_labels": t.classes, "boxes": t.boxes} for t in targets]
    images = torch.stack([x["image"] for x in inputs])
    pixels = (images - model.pixel_mean) / model.pixel_std
    parameters = [p for p in foreign.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def theirs() -> None:
        optimizer.zero_grad()
        foreign(pixel_values=pixels, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()

    cfg = get_config("COCO-Detection/detr_R_50_500ep.yaml")
    cfg.SOLVER.BASE_LR = 1e-6

    def ours(model: nn.Module, dtype: torch.dtype | None) -> Callable:
        own_optimizer = build_optimizer(cfg, model)

        def step() -> None:
            own_optimizer.zero_grad()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                losses = model(inputs)
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            own_optimizer.step()

        return step

    model.train()
    foreign.train()
    runs = {"transformers": theirs, "detr_d2": ours(model, None)}
    notes = {"transformers": "float32", "detr_d2": "float32"}
    half = torch.bfloat16 if is_bfloat16_fast() else None
    suffix = ", bfloat16" if half else ""
    if half:
        runs["detr_d2, bfloat16"] = ours(model, half)
        notes["detr_d2, bfloat16"] = "bfloat16"
    if not quick:
        compiled = deepcopy(model)
        compile_for_training(compiled)
        runs[f"detr_d2, compiled{suffix}"] = ours(compiled, half)
        notes[f"detr_d2, compiled{suffix}"] = "bfloat16" if half else "float32"
    timings = take_turns(runs, rounds, warmup=2, notes=notes)
    return [Section("Training step, DETR R50, 2 x 512x640, 7 objects each", timings)]


def criterion(rounds: int, quick: bool) -> list[Section]:
    """Matching and losses of 6 layers for 16 images of 30 objects, forward and backward."""
    transformers = require_package("transformers", "test")
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    config = transformers.DetrConfig(auxiliary_loss=True, num_labels=NUM_CLASSES)
    targets = random_targets([30] * 16)
    labels = [{"class_labels": t.classes, "boxes": t.boxes} for t in targets]
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(16, 100, NUM_CLASSES + 1, generator=generator) for _ in range(6)]
    boxes = [torch.stack([t.boxes for t in random_targets([100] * 16, seed)]) for seed in range(6)]
    leaves = [tensor.requires_grad_() for tensor in (*logits, *boxes)]
    ours = build_criterion(num_classes=NUM_CLASSES)

    def own() -> float:
        outputs = [LayerOutput(a, b) for a, b in zip(logits, boxes, strict=True)]
        total = sum(ours(Predictions(outputs), targets).values())
        total.backward()
        return total.item()

    def theirs() -> float:
        total, _, _ = ForObjectDetectionLoss(
            logits[-1],
            labels,
            torch.device("cpu"),
            boxes[-1],
            config,
            outputs_class=torch.stack(logits),
            outputs_coord=torch.stack(boxes),
        )
        total.backward()
        return total.item()

    gradients = []
    totals = []
    for work in (theirs, own):
        for leaf in leaves:
            leaf.grad = None
        totals.append(work())
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in leaves]))
    remark = (
        f"Totals {totals[0]:.6f} and {totals[1]:.6f}; largest difference of gradients "
        f"{largest(*gradients):.1e} of {gradients[0].abs().max().item():.1e}."
    )
    timings = take_turns({"transformers": theirs, "detr_d2": own}, 4 * rounds, warmup=2)
    return [Section("Criterion, 16 images x 30 objects x 6 layers", timings, {}, (remark,))]


def data(rounds: int, quick: bool) -> list[Section]:
    """Decoding and DETR's augmentation of 640x480 JPEGs on one core."""
    sizes = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    crop = ("absolute_range", (384, 600))
    resize_and_crop = [T.ResizeShortestEdge([400, 500, 600], sample_style="choice")]
    resize_and_crop.append(T.RandomCrop(*crop))
    theirs = [
        T.RandomFlip(),
        T.RandomApply(T.AugmentationList(resize_and_crop), prob=0.5),
        T.ResizeShortestEdge(sizes, 1333, "choice"),
    ]
    ours_too = build_augmentation(True, min_size=sizes, max_size=1333, crop=crop)
    with tempfile.TemporaryDirectory() as folder:
        records = [
            write_photograph(Path(folder) / f"{i}.jpg", i) for i in range(8 if quick else 24)
        ]
        plain = DatasetMapper(
            is_train=True, augmentations=theirs, image_format="RGB", use_instance_mask=False
        )
        ours = DetrDatasetMapper(True, augmentations=ours_too)

        def run(mapper: Callable) -> Callable:
            def work() -> None:
                np.random.seed(0)
                for record in records:
                    mapper({**record, "annotations": [dict(a) for a in record["annotations"]]})

            return work

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runs = {"detectron2's mapper": run(plain), "detr_d2": run(ours)}
            timings = take_turns(runs, 4 * rounds)
        finally:
            torch.set_num_threads(threads)
    options = {"per": "images/s per core", "amount": len(records)}
    return [Section("Loading 640x480 JPEGs with DETR's augmentation", timings, options)]


def write_photograph(path: Path, seed: int) -> dict[str, Any]:
    """A JPEG with detail at all scales, as photographs have, and an annotation."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((480, 640, 3))
    for radius in (1, 4, 16, 64):
        noise = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
        blurred = np.asarray(noise.filter(ImageFilter.GaussianBlur(radius)), float) - 127.5
        pixels += blurred / blurred.std() * radius**0.5 * 8
    Image.fromarray((pixels + 127.5).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    box = {"bbox": [100.0, 80.0, 400.0, 350.0], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}
    return {"file_name": str(path), "height": 480, "width": 640, "annotations": [box]}


def evaluation(rounds: int, quick: bool) -> list[Section]:
    """COCO's box metrics of 100 detections per image."""
    count = 100 if quick else 500
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(count):
        for _ in range(7):
            box = [*rng.uniform(0, 400, 2), *rng.uniform(20, 200, 2)]
            category = int(rng.integers(1, 81))
            annotations.append({"image_id": image, "category_id": category, "bbox": box})
            shifted = [v + rng.normal(0, 5) for v in box]
            detections.append((image, category, shifted, rng.uniform(0.5, 1)))
        for _ in range(93):
            box = [*rng.uniform(0, 400, 2), *rng.uniform(20, 200, 2)]
            detections.append((image, int(rng.integers(1, 81)), box, rng.uniform(0, 0.5)))
    truth = {
        "images": [{"id": i, "width": 640, "height": 640} for i in range(count)],
        "annotations": [
            {**a, "id": i + 1, "area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0}
            for i, a in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": str(i)} for i in range(1, 81)],
    }
    names = ("image_id", "category_id", "bbox", "score")
    found = [dict(zip(names, detection, strict=True)) for detection in detections]
    runs, summaries = {}, {}
    for backend in ("pycocotools", "hotcoco"):
        try:
            require_package(backend, "fast")
        except UserError:
            continue

        def work(backend: str = backend) -> None:
            summaries[backend] = compute_coco_metrics(truth, found, backend=backend).summary()

        runs[backend] = work
    timings = take_turns(runs, min(rounds, 3))
    if len(summaries) == 1:
        remark = f"Only {next(iter(summaries))} is installed: there is nothing to compare."
    else:
        same = len({str(summary) for summary in summaries.values()}) == 1
        remark = f"All 12 numbers are {'equal' if same else 'NOT EQUAL'}."
    return [Section(f"Evaluation of {count} images x 100 detections", timings, {}, (remark,))]


def growth(rounds: int, quick: bool) -> list[Section]:
    """How the time grows with image side, batch, queries and objects."""
    model = optimize_for_inference(build_pair("DETR R50")[0])
    remarks, timings = [], []

    def study(title: str, sizes: list[int], work: Callable[[int], Callable]) -> None:
        runs = {f"{title} {size}": work(size) for size in sizes}
        measured = take_turns(runs, min(rounds, 3))
        exponent = fitted_exponent(sizes, [t.median for t in measured])
        remarks.append(f"{title}: time grows with exponent {exponent:.2f}.")
        timings.extend(measured)

    sides = [320, 480] if quick else [320, 480, 640, 960]
    study("image side", sides, lambda side: own_runner(model, random_inputs(1, side, side)))
    batches = [1, 2] if quick else [1, 2, 4, 8]
    study("batch of 320x320", batches, lambda n: own_runner(model, random_inputs(n, 320, 320)))
    ours = build_criterion(num_classes=NUM_CLASSES)

    def losses(queries: int, objects: int) -> Callable:
        generator = torch.Generator().manual_seed(0)
        targets = random_targets([objects] * 8)
        outputs = [
            LayerOutput(
                torch.randn(8, queries, NUM_CLASSES + 1, generator=generator),
                torch.stack([t.boxes for t in random_targets([queries] * 8, layer)]),
            )
            for layer in range(6)
        ]
        return lambda: ours(Predictions(outputs), targets)

    study("criterion, queries", [100, 300, 900], lambda n: losses(n, 20))
    study("criterion, objects", [5, 20, 80], lambda n: losses(300, n))
    return [Section("Growth of cost", timings, {}, tuple(remarks))]


# Their sections are no contest of one with another, which is what the picture shows.
WITHOUT_PICTURE = ("memory", "growth")

JOBS: dict[str, Callable[[int, bool], Iterable[Section]]] = {
    "inference": inference,
    "train": training,
    "criterion": criterion,
    "data": data,
    "evaluation": evaluation,
    "memory": memory,
    "growth": growth,
}
