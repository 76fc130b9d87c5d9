#!/usr/bin/env python
"""Draws predictions beside ground truth for the first images of a data set.

    python tools/visualize.py --config-file configs/DigitScenes/detr_tiny.yaml
    python tools/visualize.py --config-file output/config.yaml --output output/predictions.png \\
        MODEL.WEIGHTS output/model_final.pth
"""

from detr_d2.data import classes_of, load_dataset
from detr_d2.engine import DetrPredictor
from detr_d2.engine.launch import argument_parser, run
from detr_d2.engine.main import load_config, prefer_trained_weights, register_datasets
from detr_d2.errors import UserError
from detr_d2.visualize import draw_comparison


def main(args):
    if args.num_images < 1:
        raise UserError(f"--num-images is {args.num_images}: draw 1 or more.")
    cfg = load_config(args.config_file, args.opts)
    prefer_trained_weights(cfg, args.config_file, args.opts[::2])
    register_datasets(args.register, cfg.DATASETS.TEST, cfg.INPUT.SKIP_UNREADABLE_IMAGES)
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name the data set to draw.")
    name = cfg.DATASETS.TEST[0]
    classes_of([name])  # refuses a name that is not registered
    dataset_dicts = load_dataset(name)[: args.num_images]
    count = draw_comparison(DetrPredictor(cfg), dataset_dicts, name, args.output, args.threshold)
    print(
        f"{count} detections with scores of at least {args.threshold} (left) beside ground truth "
        f"(right): {args.output}"
    )


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--output", default="output/predictions.png", help="the picture")
    parser.add_argument("--num-images", type=int, default=9, help="how many of them")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score that is drawn")
    run(main, parser.parse_args())
