"""Data loaders whose random choices depend only on the seed and the place in the stream.

detectron2's own training loader starts its stream anew when a training is resumed. This one can
start anywhere in it: batch n is the same, with the same augmentation, whether or not the training
was interrupted before and however many workers load it.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, build_detection_test_loader
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .annotations import check_annotations
from .classes import resolve_num_classes
from .dataset_mapper import DetrDatasetMapper

logger = logging.getLogger(__name__)


def derive_seed(*numbers: int) -> int:
    """An independent 63-bit seed for each tuple of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeededDataset(Dataset):
    """Maps dataset dictionaries with random numbers that depend only on (seed, position)."""

    def __init__(self, dataset: Sequence[dict], mapper: Callable[[dict], Any], seed: int):
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Any]:
        """(index in the data set, position in the stream of all processes) -> model input.

        Raises:
            UserError: the mapper refused a hundred images in a row.
        """
        index, position = sample
        seed = derive_seed(self.seed, position)
        # In the main process (no workers) the model's own random numbers must not be disturbed.
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            try:
                for _ in range(100):
                    mapped = self.mapper(self.dataset[index])
                    if mapped is not None:
                        return mapped
                    index = random.randrange(len(self.dataset))
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
        raise UserError("100 images in a row could not be used: check the data set's image folder.")


class ResumableBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (index, position in the stream), from batch `start_batch` on."""

    def __init__(self, indices: Iterable[int], batch_size: int, groups: Sequence[int]):
        """
        Args:
            indices: this process's endless, reproducible stream of data set indices.
            groups: one number per data set entry; a batch has images of one group only.
        """
        self.indices = indices
        self.batch_size = batch_size
        self.groups = groups
        self.start_batch = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return islice(self._batches(), self.start_batch, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        waiting = defaultdict(list)
        for step, index in enumerate(self.indices):
            batch = waiting[self.groups[index]]
            batch.append((index, step * world_size + rank))
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()


def build_train_loader(
    cfg: CfgNode, seed: int, mapper: Callable[[dict], Any] | None = None
) -> DataLoader:
    """The training loader of a config; one item is the batch of one forward pass.

    Args:
        seed: the same on all processes.
        mapper: dataset dictionary -> model input; `DetrDatasetMapper` by default.

    Raises:
        UserError: the data set is empty, or the batch cannot be divided as the config asks.
    """
    dataset_dicts = get_training_dicts(cfg)
    sampler_name = cfg.DATALOADER.SAMPLER_TRAIN
    if sampler_name == "TrainingSampler":
        indices = TrainingSampler(len(dataset_dicts), seed=seed)
    elif sampler_name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset_dicts, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        indices = RepeatFactorTrainingSampler(factors, seed=seed)
    else:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {sampler_name!r}; it must be TrainingSampler or "
            "RepeatFactorTrainingSampler."
        )
    by_aspect = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    groups = [int(by_aspect and d["width"] > d["height"]) for d in dataset_dicts]
    return DataLoader(
        SeededDataset(
            DatasetFromList(dataset_dicts, copy=False),
            mapper or DetrDatasetMapper(cfg, is_train=True),
            seed,
        ),
        batch_sampler=ResumableBatchSampler(indices, images_per_forward(cfg), groups),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Iterable:
    """detectron2's evaluation loader with this package's mapper."""
    return build_detection_test_loader(
        cfg, dataset_name, mapper=DetrDatasetMapper(cfg, is_train=False)
    )


def get_training_dicts(cfg: CfgNode) -> list[dict]:
    """Dataset dictionaries of `DATASETS.TRAIN`, with their annotations checked.

    Raises:
        UserError: nothing to train on, or annotations that cannot be used.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name at least one data set to train on.")
    num_classes = resolve_num_classes(cfg)
    dataset_dicts = []
    for name in cfg.DATASETS.TRAIN:
        dataset_dicts += check_annotations(
            DatasetCatalog.get(name),
            cfg.INPUT.FAULTY_ANNOTATIONS,
            name,
            num_classes=num_classes,
            masks=cfg.MODEL.MASK_ON,
        )
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dataset_dicts = filter_images_with_only_crowd_annotations(dataset_dicts)
    if not dataset_dicts:
        names = ", ".join(cfg.DATASETS.TRAIN)
        raise UserError(f"DATASETS.TRAIN ({names}) has no image to train on.")
    warn_of_few_queries(dataset_dicts, cfg.MODEL.DETR.NUM_OBJECT_QUERIES)
    return dataset_dicts


def warn_of_few_queries(dataset_dicts: Sequence[dict], num_queries: int) -> None:
    """Objects beyond the number of queries can never be detected."""
    counts = [
        sum(not annotation.get("iscrowd", 0) for annotation in d.get("annotations", ()))
        for d in dataset_dicts
    ]
    crowded = sum(count > num_queries for count in counts)
    if crowded:
        logger.warning(
            f"{crowded} of {len(counts)} images have more objects (up to {max(counts)}) than the "
            f"model has queries: raise MODEL.DETR.NUM_OBJECT_QUERIES, now {num_queries}."
        )


def images_per_forward(cfg: CfgNode) -> int:
    """Images of one process in one forward pass.

    Raises:
        UserError: `SOLVER.IMS_PER_BATCH` does not divide evenly.
    """
    world_size, steps = comm.get_world_size(), cfg.SOLVER.ACCUMULATION_STEPS
    images, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, world_size * steps)
    if rest or not images:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a multiple of the number "
            f"of processes ({world_size}) times SOLVER.ACCUMULATION_STEPS ({steps})."
        )
    return images
