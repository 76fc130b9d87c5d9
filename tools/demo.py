#!/usr/bin/env python
"""Evaluates a trained DETR, trains one from nothing for a few minutes, and draws what both find.

Runs the same commands a user would type, and prints each of them.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/DigitScenes/detr_tiny.yaml"
WEIGHTS = "configs/DigitScenes/detr_tiny.safetensors"
# Warm-up and a short schedule in place of the config's long one; the picture shows weak detections
# too, for after minutes there are no others.
SHORT_SCHEDULE = (
    "SOLVER.WARMUP_ITERS 100 SOLVER.STEPS '()' TEST.EVAL_PERIOD 0 "
    "DATALOADER.NUM_WORKERS 2 SOLVER.CHECKPOINT_PERIOD 100000"
)


def step(title: str, command: str) -> float:
    """Runs one command from the repository root; returns the seconds it took."""
    print(f"\n=== {title}\n$ {command}", flush=True)
    start = time.perf_counter()
    arguments = [sys.executable, *shlex.split(command)[1:]]
    status = subprocess.run(arguments, cwd=ROOT).returncode
    if status:
        sys.exit(f"The command above failed with status {status}.")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=600, help="length of the training")
    parser.add_argument("--output", default="output/demo", help="folder for everything written")
    args = parser.parse_args()
    trained, learned = f"{args.output}/trained", f"{args.output}/from_nothing"

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
        "A DETR that learns: the same model from nothing",
        f"python tools/train_net.py --config-file {CONFIG} OUTPUT_DIR {learned} "
        f"SOLVER.MAX_ITER {args.iterations} {SHORT_SCHEDULE}",
    )
    step(
        "What it finds so far",
        f"python tools/visualize.py --config-file {CONFIG} --output {learned}/predictions.png "
        f"--threshold 0.1 MODEL.WEIGHTS {learned}/model_final.pth",
    )
    print(
        f"\nEvaluation of the trained model took {seconds:.0f} s, training from nothing "
        f"{training_seconds:.0f} s.\n"
        f"  predictions beside ground truth   {trained}/predictions.png\n"
        f"                                    {learned}/predictions.png\n"
        f"  AP per class                      {trained}/inference/per_class_ap.json\n"
        f"  weights, log and curves           {learned}/model_final.pth, log.txt, metrics.json\n"
        f"  data set                          datasets/digit_scenes_v1\n"
        "A DETR needs hours, not minutes: README.md shows the curve of the trained model."
    )


if __name__ == "__main__":
    main()
