#!/usr/bin/env python
"""Plots loss and AP of a training: python tools/plot_training.py output/metrics.json curve.png"""

import argparse

from detr_d2.engine.launch import user_errors
from detr_d2.visualize import draw_curves

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", help="the metrics.json in the training's OUTPUT_DIR")
    parser.add_argument("picture", help="where to write the picture")
    args = parser.parse_args()
    with user_errors():
        draw_curves(args.metrics, args.picture)
