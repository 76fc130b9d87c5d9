"""Peak memory of forward passes, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model

from ..deploy import optimize_for_inference
from ..model_zoo import get_config
from ..modeling import segmentation
from .models import NUM_CLASSES, build_foreign, build_pair, own_runner, random_inputs
from .timing import Section


def memory(rounds: int, quick: bool) -> list[Section]:
    """Peak memory of one forward pass, each in a process of its own."""
    side = 640 if quick else 1333
    runs = {
        "transformers, eager attention": ("eager", side),
        "transformers": ("sdpa", side),
        "detr_d2": ("plain", side),
        "detr_d2, optimised": ("fast", side),
        "detr_d2, optimised, bfloat16": ("bfloat16", side),
    }
    title = f"Peak memory beyond the loaded model, DETR R50-DC5, 1 x {side}x{side}"
    masks = {
        "all masks at once": ("masks at once", side),
        f"detr_d2, {segmentation.CHUNK} at a time": ("masks", side),
        "without masks": ("no masks", side),
    }
    title_of_masks = f"Peak memory beyond the loaded model, 100 masks, DETR R50, 1 x 800x{side}"
    return [_peaks(title, runs), _peaks(title_of_masks, masks)]


def _peaks(title: str, runs: dict[str, tuple[str, int]]) -> Section:
    context = multiprocessing.get_context("spawn")
    lines = []
    for name, arguments in runs.items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_peak, args=(*arguments, sender))
        process.start()
        peak = receiver.recv()
        process.join()
        lines.append((name, peak))
    first = lines[0][1]
    remarks = tuple(f"{name}: {peak:.0f} MiB, {peak / first:.0%}" for name, peak in lines)
    return Section(title, [], {}, remarks)


def _peak(kind: str, side: int, sender: Any) -> None:
    inputs = random_inputs(1, side, side)
    if kind in ("eager", "sdpa"):
        model = build_foreign("Detr", dilation=True, attn_implementation=kind)
        pixels = torch.stack([x["image"] for x in inputs]).float() / 255

        def run() -> Any:
            with torch.no_grad():
                return model(pixel_values=pixels)
    elif "masks" in kind:
        if kind == "masks at once":
            segmentation.CHUNK = 1000
        cfg = get_config("COCO-PanopticSegmentation/detr_R_50.yaml")
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.DETR.NUM_CLASSES = "cpu", "", NUM_CLASSES
        cfg.MODEL.DETR.PANOPTIC.ENABLED, cfg.MODEL.MASK_ON = False, kind != "no masks"
        inputs = random_inputs(1, 800, side)
        run = own_runner(build_model(cfg).eval(), inputs)
    else:
        ours, _ = build_pair("DETR R50-DC5")
        if kind != "plain":
            ours = optimize_for_inference(ours, "bfloat16" if kind == "bfloat16" else "float32")
        run = own_runner(ours, inputs)
    # Loading may have taken more than there is now.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _maximum()
    run()
    sender.send(_maximum() - before)


def _maximum() -> float:
    """MiB that this process ever held."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
