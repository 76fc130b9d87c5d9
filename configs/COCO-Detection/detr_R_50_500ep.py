# AP 42.0, AP50 62.4 on COCO val2017 (https://github.com/facebookresearch/detr#model-zoo)
from ..common.detr import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401
