"""Epochs as iterations, by hand."""

import pytest

from detr_d2 import get_detr_cfg
from detr_d2.engine import resolve_epochs
from detr_d2.engine.schedule import prefer_periods
from detr_d2.errors import UserError


def make_cfg(*options):
    cfg = get_detr_cfg()
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 16, *options])
    cfg.freeze()
    return cfg


def test_epochs_become_iterations():
    """1,000 images in batches of 16 are 62.5 iterations per epoch."""
    cfg = make_cfg(
        *("SOLVER.EPOCHS", 10.0, "SOLVER.STEP_EPOCHS", [6, 8.0], "TEST.EVAL_EPOCHS", 0.5),
        *("SOLVER.CHECKPOINT_EPOCHS", 2),
    )
    resolved = resolve_epochs(cfg, num_images=1000)
    assert (resolved.SOLVER.CHECKPOINT_PERIOD, resolved.SOLVER.CHECKPOINT_EPOCHS) == (125, None)
    assert resolved.SOLVER.MAX_ITER == 625
    assert tuple(resolved.SOLVER.STEPS) == (375, 500)
    assert resolved.TEST.EVAL_PERIOD == 31
    assert (resolved.SOLVER.EPOCHS, resolved.SOLVER.STEP_EPOCHS) == (None, [])
    assert resolved.TEST.EVAL_EPOCHS is None
    assert resolved.is_frozen()
    assert cfg.SOLVER.EPOCHS == 10.0  # the given config stays as it is
    assert resolve_epochs(resolved, num_images=7) == resolved


def test_coco_schedule_of_the_paper():
    """500 epochs of 118,287 images in batches of 64: 1848.2 iterations each."""
    cfg = make_cfg(
        *("SOLVER.IMS_PER_BATCH", 64, "SOLVER.EPOCHS", 500.0, "SOLVER.STEP_EPOCHS", [400]),
    )
    resolved = resolve_epochs(cfg, num_images=118287)
    assert resolved.SOLVER.MAX_ITER == 924117
    assert tuple(resolved.SOLVER.STEPS) == (739294,)


def test_epochs_without_drops_leave_the_default_drops_out():
    resolved = resolve_epochs(make_cfg("SOLVER.EPOCHS", 1.0), num_images=160)
    assert (resolved.SOLVER.MAX_ITER, tuple(resolved.SOLVER.STEPS)) == (10, ())


def test_periods_in_iterations_come_before_epochs():
    """Of a config of one's own that is based on one of the zoo's."""
    epochs = ("SOLVER.CHECKPOINT_EPOCHS", 1, "TEST.EVAL_EPOCHS", 1)
    periods = ("SOLVER.CHECKPOINT_PERIOD", 33, "TEST.EVAL_PERIOD", 44)
    cfg = make_cfg(*epochs, *periods)
    resolved = resolve_epochs(prefer_periods(cfg), num_images=160)
    assert (resolved.SOLVER.CHECKPOINT_PERIOD, resolved.TEST.EVAL_PERIOD) == (33, 44)
    assert resolved.is_frozen() and cfg.SOLVER.CHECKPOINT_EPOCHS == 1
    resolved = resolve_epochs(prefer_periods(make_cfg(*epochs)), num_images=160)
    assert (resolved.SOLVER.CHECKPOINT_PERIOD, resolved.TEST.EVAL_PERIOD) == (10, 10)


def test_a_length_in_both_is_refused():
    """As where a script sets MAX_ITER of a config whose file counts epochs."""
    cfg = make_cfg("SOLVER.EPOCHS", 500, "SOLVER.MAX_ITER", 300)
    with pytest.raises(UserError, match="SOLVER.EPOCHS 500 and SOLVER.MAX_ITER 300: to count"):
        prefer_periods(cfg)
    assert prefer_periods(make_cfg("SOLVER.MAX_ITER", 300)).SOLVER.MAX_ITER == 300


def test_checkpoints_of_a_loader_that_does_not_count():
    resolved = resolve_epochs(make_cfg("SOLVER.CHECKPOINT_EPOCHS", 1), num_images=None)
    assert (resolved.SOLVER.CHECKPOINT_PERIOD, resolved.SOLVER.CHECKPOINT_EPOCHS) == (5000, None)


def test_no_evaluation_is_none_or_0():
    for off in (0, None):
        cfg = make_cfg("SOLVER.EPOCHS", 1.0, "TEST.EVAL_EPOCHS", off, "TEST.EVAL_PERIOD", 0)
        assert resolve_epochs(cfg, num_images=160).TEST.EVAL_PERIOD == 0


def test_never_less_than_one_iteration():
    cfg = make_cfg("SOLVER.EPOCHS", 1.0, "TEST.EVAL_EPOCHS", 0.01)
    resolved = resolve_epochs(cfg, num_images=4)
    assert (resolved.SOLVER.MAX_ITER, resolved.TEST.EVAL_PERIOD) == (1, 1)


def test_evaluation_in_epochs_of_a_training_in_iterations():
    cfg = make_cfg("SOLVER.MAX_ITER", 77, "SOLVER.STEPS", (50,), "TEST.EVAL_EPOCHS", 2.0)
    resolved = resolve_epochs(cfg, num_images=160)
    assert (resolved.SOLVER.MAX_ITER, tuple(resolved.SOLVER.STEPS)) == (77, (50,))
    assert resolved.TEST.EVAL_PERIOD == 20


def test_iterations_stay():
    cfg = make_cfg("SOLVER.MAX_ITER", 77)
    assert resolve_epochs(cfg, num_images=160) is cfg


def test_drops_in_epochs_need_a_length_in_epochs():
    with pytest.raises(UserError, match="STEP_EPOCHS needs SOLVER.EPOCHS"):
        resolve_epochs(make_cfg("SOLVER.STEP_EPOCHS", [3]), num_images=160)


def test_a_drop_after_the_end_is_refused():
    with pytest.raises(UserError, match=r"STEP_EPOCHS \[3\] must come before.*EPOCHS 3"):
        resolve_epochs(make_cfg("SOLVER.EPOCHS", 3, "SOLVER.STEP_EPOCHS", [3]), num_images=160)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.EPOCHS", "abc", "EPOCHS is 'abc'; it must be a number"),
        ("SOLVER.EPOCHS", -1, "EPOCHS is -1; it must be a number"),
        ("SOLVER.EPOCHS", 0, "EPOCHS is 0; it must be a number of epochs, more than 0"),
        ("SOLVER.CHECKPOINT_EPOCHS", "x", "CHECKPOINT_EPOCHS is 'x'"),
        ("TEST.EVAL_EPOCHS", float("nan"), "EVAL_EPOCHS is nan"),
        ("SOLVER.STEP_EPOCHS", [1, "b"], "STEP_EPOCHS is 'b'"),
    ],
)
def test_what_is_no_number_of_epochs_is_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        resolve_epochs(make_cfg(key, value), num_images=160)
