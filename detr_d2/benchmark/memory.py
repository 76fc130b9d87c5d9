"""Peak memory of forward passes and training steps, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.modeling import build_model

from ..deploy import optimize_for_inference
from ..errors import UserError
from ..model_zoo import get_config
from ..modeling import segmentation
from ..processor import is_bfloat16_fast
from .models import (
    NUM_CLASSES,
    build_foreign,
    build_pair,
    foreign_runner,
    own_runner,
    random_inputs,
    random_targets,
    with_objects,
)
from .timing import Section


def memory(rounds: int, quick: bool) -> list[Section]:
    """Beyond the loaded model: a forward pass, masks, a training step."""
    side = 640 if quick else 1333
    runs = {
        "transformers, eager attention": ("eager", side),
        "transformers": ("sdpa", side),
        "detr_d2": ("plain", side),
        "detr_d2, optimised": ("fast", side),
    }
    if is_bfloat16_fast():
        runs["detr_d2, optimised, bfloat16"] = ("bfloat16", side)
    title = f"Peak memory beyond the loaded model, DETR R50-DC5, 1 x {side}x{side}"
    masks = {
        "all masks at once": ("masks at once", side),
        f"detr_d2, {segmentation.CHUNK} at a time": ("masks", side),
        "without masks": ("no masks", side),
    }
    title_of_masks = f"Peak memory beyond the loaded model, 100 masks, DETR R50, 1 x 800x{side}"
    training = {
        "everything is kept": ("train", side),
        "ACTIVATION_CHECKPOINTING [encoder]": ("train encoder", side),
        "ACTIVATION_CHECKPOINTING [backbone]": ("train backbone", side),
        "ACTIVATION_CHECKPOINTING [backbone, encoder]": ("train backbone encoder", side),
    }
    title_of_training = f"Peak memory beyond the loaded model, training, DETR R50, 1 x 800x{side}"
    return [
        _peaks(title, runs),
        _peaks(title_of_masks, masks),
        _peaks(title_of_training, training),
    ]


def _peaks(title: str, runs: dict[str, tuple[str, int]]) -> Section:
    context = multiprocessing.get_context("spawn")
    lines = []
    for name, arguments in runs.items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_peak, args=(*arguments, sender))
        process.start()
        sender.close()  # or this process's own copy would keep recv waiting for a child that died
        try:
            lines.append((name, receiver.recv()))
        except EOFError:
            process.join()
            raise UserError(
                f"{title}: the process of '{name}' ended with exit code {process.exitcode} before "
                "it had measured anything; its own message is above, and -9 is a lack of memory."
            ) from None
        process.join()
    first = lines[0][1]
    remarks = tuple(f"{name}: {peak:.0f} MiB, {peak / first:.0%}" for name, peak in lines)
    return Section(title, [], {}, remarks)


def _peak(kind: str, side: int, sender: Any) -> None:
    run = _runner(kind, side)
    # Loading may have taken more than there is now.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _maximum()
    run()
    sender.send(_maximum() - before)


def _runner(kind: str, side: int) -> Callable:
    if kind in ("eager", "sdpa"):
        model = build_foreign("Detr", dilation=True, attn_implementation=kind)
        ours, _ = build_pair("DETR R50-DC5")
        return foreign_runner(model, random_inputs(1, side, side), ours)
    if kind in ("plain", "fast", "bfloat16"):
        ours, _ = build_pair("DETR R50-DC5")
        if kind != "plain":
            ours = optimize_for_inference(ours, "bfloat16" if kind == "bfloat16" else "float32")
        return own_runner(ours, random_inputs(1, side, side))
    name, *parts = kind.split()
    is_training = name == "train"
    config = "Detection/detr_R_50_500ep" if is_training else "PanopticSegmentation/detr_R_50"
    cfg = get_config(f"COCO-{config}.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.DETR.NUM_CLASSES = "cpu", "", NUM_CLASSES
    inputs = random_inputs(1, 800, side)
    if is_training:
        cfg.MODEL.ACTIVATION_CHECKPOINTING = parts
        model = build_model(cfg).train()
        inputs = with_objects(inputs, random_targets([7]))
        return lambda: sum(model(inputs).values()).backward()
    segmentation.CHUNK = 1000 if kind == "masks at once" else segmentation.CHUNK
    cfg.MODEL.DETR.PANOPTIC.ENABLED, cfg.MODEL.MASK_ON = False, kind != "no masks"
    cfg.MODEL.DETR.FROZEN_WEIGHTS = ""  # of its training
    return own_runner(build_model(cfg).eval(), inputs)


def _maximum() -> float:
    """MiB that this process ever held."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
