#!/usr/bin/env python
"""Trains or evaluates a model from a yaml config; arguments are those of detectron2's script.

    python tools/train_net.py --config-file configs/DigitScenes/detr_tiny.yaml --num-gpus 1
    python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS model.pth
    python tools/train_net.py --config-file ... --register mine_train=train.json:images \\
        --register mine_val=val.json:images \\
        DATASETS.TRAIN "('mine_train',)" DATASETS.TEST "('mine_val',)"
"""

from detr_d2.engine.launch import argument_parser, run
from detr_d2.engine.main import train_or_evaluate

if __name__ == "__main__":
    run(train_or_evaluate, argument_parser(__doc__).parse_args())
