#!/usr/bin/env python
"""Trains or evaluates a model from a LazyConfig; arguments are those of detectron2's script.

python tools/lazyconfig_train_net.py --config-file configs/DigitScenes/detr_tiny.py
python tools/lazyconfig_train_net.py --config-file ... --eval-only train.init_checkpoint=x.pth
"""

from detr_d2.engine.launch import argument_parser, run
from detr_d2.engine.lazy import train_or_evaluate

if __name__ == "__main__":
    run(train_or_evaluate, argument_parser(__doc__).parse_args())
