#!/usr/bin/env python
"""Trains every design of configs/DigitScenes for the same time and plots AP against minutes.

    python tools/compare_designs.py --minutes 6 --picture output/designs.png

Trainings of as many minutes that are in the output folder already are not run again.
"""

import argparse
from pathlib import Path

from detr_d2.engine.compare import compare, table
from detr_d2.engine.launch import user_errors
from detr_d2.visualize import draw_designs

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", help="default: configs/DigitScenes/*_tiny.yaml")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, for each design")
    parser.add_argument("--output", default="output/designs", help="folder of the trainings")
    parser.add_argument("--picture", help="where to write the plot")
    args = parser.parse_args()
    configs = args.configs or sorted(map(str, ROOT.glob("configs/DigitScenes/*_tiny.yaml")))
    with user_errors():
        results = compare(
            str(ROOT / "tools" / "train_net.py"), configs, Path(args.output), args.minutes
        )
        print(table(results))
        if args.picture:
            draw_designs(results, args.picture)
