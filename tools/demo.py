#!/usr/bin/env python
"""Evaluates a trained DETR, teaches it classes for a few minutes, and draws what it finds.

Runs the same commands a user would type, and prints each of them.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/DigitScenes/detr_tiny.yaml"
WEIGHTS = "configs/DigitScenes/detr_tiny.safetensors"
# How one starts on data of one's own: trained weights, no class known yet, a short schedule.
FINE_TUNING = f"MODEL.WEIGHTS {WEIGHTS} MODEL.DETR.NEW_CLASS_HEAD True"
SCHEDULE = "SOLVER.WARMUP_ITERS 20 TEST.EVAL_PERIOD 0 SOLVER.CHECKPOINT_PERIOD 100000"


def step(title: str, command: str) -> float:
    """Runs one command from the repository root; returns the seconds it took."""
    print(f"\n=== {title}\n$ {command}", flush=True)
    start = time.perf_counter()
    arguments = [sys.executable, *shlex.split(command)[1:]]
    status = subprocess.run(arguments, cwd=ROOT).returncode
    if status:
        sys.exit(f"The command above failed with status {status}.")
    return time.perf_counter() - start


def average_precision(output: str) -> float:
    """COCO's AP is the mean of the classes' APs."""
    per_class = json.loads((ROOT / output / "inference" / "per_class_ap.json").read_text())
    return statistics.fmean(figures["AP"] for figures in per_class["bbox"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=600, help="length of the training")
    parser.add_argument("--output", default="output/demo", help="folder for everything written")
    args = parser.parse_args()
    trained, tuned = f"{args.output}/trained", f"{args.output}/fine_tuned"
    drop = round(0.8 * args.iterations)

    seconds = step(
        "A DETR that works: evaluation of the weights in this repository",
        f"python tools/train_net.py --config-file {CONFIG} --eval-only "
        f"MODEL.WEIGHTS {WEIGHTS} OUTPUT_DIR {trained}",
    )
    step(
        "Its detections",
        f"python tools/visualize.py --config-file {CONFIG} --output {trained}/predictions.png "
        f"MODEL.WEIGHTS {WEIGHTS}",
    )
    training_seconds = step(
        "A DETR that learns: the same weights, every class forgotten and trained anew",
        f"python tools/train_net.py --config-file {CONFIG} {FINE_TUNING} OUTPUT_DIR {tuned} "
        f"SOLVER.MAX_ITER {args.iterations} SOLVER.STEPS '({drop},)' {SCHEDULE}",
    )
    step(
        "What it finds now",
        f"python tools/visualize.py --config-file {CONFIG} --output {tuned}/predictions.png "
        f"--threshold 0.3 MODEL.WEIGHTS {tuned}/model_final.pth",
    )
    print(
        f"\nThe trained model reaches AP {average_precision(trained):.1f} on unseen images "
        f"({seconds:.0f} s);\nwith every class learnt anew, AP {average_precision(tuned):.1f} "
        f"({training_seconds:.0f} s, evaluation included).\n"
        f"  AP per class                      {trained}/inference/per_class_ap.json\n"
        f"                                    {tuned}/inference/per_class_ap.json\n"
        f"  predictions beside ground truth   {trained}/predictions.png\n"
        f"                                    {tuned}/predictions.png\n"
        f"  new weights, losses               {tuned}/model_final.pth, metrics.json\n"
        "From nothing this design needs hours, not minutes: README.md shows the curve."
    )


if __name__ == "__main__":
    main()
