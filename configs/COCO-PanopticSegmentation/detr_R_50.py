# PQ 43.4, box AP 38.8, mask AP 31.1 on COCO val2017 (https://github.com/facebookresearch/detr#model-zoo)
# The model and recipe of detr_R_50.yaml as a LazyConfig: masks on the frozen detector that
# detr_R_50_boxes.yaml trains. All at once: model.frozen_detector=False and other weights.
from detectron2.config import LazyCall as L

from detr_d2.modeling.mask_head import MaskHead
from detr_d2.modeling.panoptic import PanopticMerger

from ..common.detr import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.out_features = ["res2", "res3", "res4", "res5"]
model.transformer.num_logits = 134
model.criterion.num_classes = 133
model.mask_head = L(MaskHead)(
    hidden_dim="${..transformer.hidden_dim}",
    num_heads="${..transformer.num_heads}",
    in_features=["res4", "res3", "res2"],
    in_channels=[1024, 512, 256],
)
model.frozen_detector = True
model.panoptic = L(PanopticMerger.from_datasets)(names=["coco_2017_val_panoptic"])

dataloader.train.dataset.names = ["coco_2017_train_panoptic"]
dataloader.train.dataset.masks = True
dataloader.train.mapper.use_instance_mask = "${dataloader.train.dataset.masks}"
dataloader.test.dataset.names = "${model.panoptic.names}"
dataloader.evaluator.update(
    dataset_name="${model.panoptic.names[0]}",
    masks="${dataloader.train.dataset.masks}",
    panoptic=True,
)

# 25 epochs of 118,287 images, 16 at a time; the learning rate drops after 15.
dataloader.train.total_batch_size = 16
lr_multiplier.scheduler.milestones = [110894, 184823]

train.update(
    init_checkpoint="./output/panoptic_boxes_R_50/model_final.pth",
    max_iter=184823,
    checkpointer=dict(period=7393, max_to_keep=5),
    eval_period=36965,
    best_metric="panoptic_seg/PQ",
)
