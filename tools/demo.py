#!/usr/bin/env python
"""Evaluates a trained DETR, trains one from nothing, and draws what both find.

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
TRAINED = "configs/DigitScenes/fast_small.yaml"
NEW = "configs/DigitScenes/fast_tiny.yaml"


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
    parser.add_argument(
        "--iterations", type=int, help="iterations of the training; default: the config's"
    )
    parser.add_argument("--output", default="output/demo", help="folder for everything written")
    args = parser.parse_args()
    length = f"SOLVER.MAX_ITER {args.iterations}" if args.iterations else ""
    trained, new = f"{args.output}/trained", f"{args.output}/new"
    to_trained, to_new = shlex.quote(trained), shlex.quote(new)

    seconds = step(
        "A DETR that works: evaluation of the weights in this repository",
        f"python tools/train_net.py --config-file {TRAINED} --eval-only OUTPUT_DIR {to_trained}",
    )
    step(
        "Its detections",
        f"python tools/visualize.py --config-file {TRAINED} --output {to_trained}/predictions.png",
    )
    training_seconds = step(
        "A DETR that learns, from nothing",
        f"python tools/train_net.py --config-file {NEW} OUTPUT_DIR {to_new} "
        f"SOLVER.CHECKPOINT_PERIOD 100000 {length}",
    )
    step(
        "What it finds now",
        f"python tools/visualize.py --config-file {NEW} --output {to_new}/predictions.png "
        f"--threshold 0.3 MODEL.WEIGHTS {to_new}/model_final.pth",
    )
    print(
        f"\nThe trained model reaches AP {average_precision(trained):.1f} on unseen images "
        f"({seconds:.0f} s);\na smaller one, trained from nothing, AP {average_precision(new):.1f} "
        f"({training_seconds:.0f} s, evaluation included).\n"
        f"  AP per class                      {trained}/inference/per_class_ap.json\n"
        f"                                    {new}/inference/per_class_ap.json\n"
        f"  predictions beside ground truth   {trained}/predictions.png\n"
        f"                                    {new}/predictions.png\n"
        f"  new weights, losses               {new}/model_final.pth, metrics.json"
    )


if __name__ == "__main__":
    main()
