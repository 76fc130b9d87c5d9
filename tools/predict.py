#!/usr/bin/env python
"""Finds objects in images of one's own, which nobody has labelled.

    python tools/predict.py --config-file output/config.yaml --input photos/ one.jpg \\
        --output output/found MODEL.WEIGHTS output/model_final.pth

Writes each image with what was found drawn into it, and all detections as `detections.json`.
"""

import argparse

from detr_d2.engine import DetrPredictor
from detr_d2.engine.launch import argument_parser, run
from detr_d2.engine.main import load_config, prefer_trained_weights, register_datasets
from detr_d2.predict import image_files, predict_files


def main(args: argparse.Namespace) -> None:
    files = image_files(args.input)
    cfg = load_config(args.config_file, args.opts)
    prefer_trained_weights(cfg, args.config_file, args.opts[::2])
    if args.threshold is not None:
        cfg.TEST.SCORE_THRESHOLD = args.threshold
    elif not cfg.TEST.SCORE_THRESHOLD and "TEST.SCORE_THRESHOLD" not in args.opts[::2]:
        cfg.TEST.SCORE_THRESHOLD = 0.5
    register_datasets(args.register, cfg.DATASETS.TEST, cfg.INPUT.SKIP_UNREADABLE_IMAGES)
    found = predict_files(DetrPredictor(cfg), files, args.output)
    print(
        f"{found} detections with scores of at least {cfg.TEST.SCORE_THRESHOLD} in {len(files)} "
        f"images: {args.output}"
    )


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="image files, or folders of them")
    parser.add_argument("--output", default="output/found", help="folder of what is written")
    parser.add_argument(
        "--threshold", type=float, help="least score; default: TEST.SCORE_THRESHOLD, or 0.5"
    )
    run(main, parser.parse_args())
