"""Several designs under one budget: what is run, and what is told of it."""

import json
from pathlib import Path

import pytest

from detr_d2.engine.compare import Result, compare, read_metrics, table, train
from detr_d2.errors import UserError
from detr_d2.visualize import draw_designs

# Stands in for tools/train_net.py: a step takes as long as the config's name says, in hundredths of
# a second of work, and AP grows with the share of the training that is done. Starting takes half a
# second; sleeping is no work.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = Path(arguments["--config-file"]).stem
if name == "broken":
    sys.exit("no such thing")
folder = Path(arguments["OUTPUT_DIR"])
folder.mkdir(parents=True, exist_ok=True)
print("Built Detr with 2.5 M trainable parameters.")
iterations, period = int(arguments["SOLVER.MAX_ITER"]), int(arguments["TEST.EVAL_PERIOD"])
assert os.environ["OMP_NUM_THREADS"] == "1"
if not period:
    time.sleep(iterations / 100)
    end = time.process_time() + 0.3 + iterations * int(name[1:]) / 100
    while time.process_time() < end:
        pass
lines = []
evaluated = [i - 1 for i in range(period, iterations, period)] if period else []
if period:
    evaluated.append(iterations)  # after the training, when detectron2 counts one more
for iteration in evaluated:
    share = min(iteration + 1, iterations) / iterations
    lines.append({"iteration": iteration, "bbox/AP": 40.0 * share, "bbox/AP50": 60.0 * share})
lines.append({"iteration": iterations - 1})
with open(folder / "metrics.json", "a") as metrics:
    metrics.writelines(json.dumps(line) + chr(10) for line in lines)
(folder / "arguments.json").write_text(json.dumps(arguments))
"""


@pytest.fixture
def train_net(tmp_path):
    path = tmp_path / "train_net.py"
    path.write_text(SCRIPT)
    return str(path)


def test_every_design_has_the_same_time(train_net, tmp_path):
    """A hundredth of a second per step or three: in two minutes 12,000 or 4,000 steps."""
    results = compare(train_net, ["x/s1.yaml", "x/s3.yaml"], tmp_path / "out", minutes=2.0)
    assert [r.iterations for r in results] == pytest.approx([12000, 4000], rel=0.3)
    for result in results:
        assert result.minutes == pytest.approx([0.5, 1.0, 1.5, 2.0], rel=0.01)
        per_iteration = result.minutes[0] / -(-result.iterations // 4)
        assert result.minutes[-1] == pytest.approx(result.iterations * per_iteration, rel=1e-6)
        assert result.ap == pytest.approx([10, 20, 30, 40], rel=0.01) and result.ap50[
            -1
        ] == pytest.approx(60, rel=0.01)
        assert result.parameters == 2.5
    arguments = json.loads((tmp_path / "out" / "s1" / "arguments.json").read_text())
    assert arguments["SOLVER.LR_SCHEDULER_NAME"] == "WarmupCosineLR"
    assert "DATASETS.TEST" not in arguments
    probe = json.loads((tmp_path / "out" / "s1" / "probe" / "long" / "arguments.json").read_text())
    assert probe["DATASETS.TEST"] == "()"


def test_known_results_are_not_made_again(train_net, tmp_path):
    first = compare(train_net, ["x/s1.yaml"], tmp_path / "out", minutes=2.0)
    Path(train_net).write_text("import sys; sys.exit(1)")
    assert compare(train_net, ["x/s1.yaml"], tmp_path / "out", minutes=2.0) == first
    assert [r["name"] for r in json.loads((tmp_path / "out" / "results.json").read_text())] == [
        "s1"
    ]


def test_an_interrupted_training_leaves_no_trace(train_net, tmp_path):
    """Nor does it count what it had reached."""
    for _ in range(2):
        train(train_net, "x/s1.yaml", tmp_path, 100, 50)
    assert [m.get("bbox/AP") for m in read_metrics(tmp_path)] == [20.0, 40.0, None]


def test_a_failure_is_told_with_its_last_line(train_net, tmp_path):
    with pytest.raises(UserError, match="training of x/broken.yaml .*status 1: no such thing"):
        train(train_net, "x/broken.yaml", tmp_path / "out", 100, 0)


def test_table_and_picture(tmp_path):
    results = [
        Result("better", 2.0, 100, [1.0, 2.0], [20.0, 41.25], [30.0, 61.0]),
        Result("worse", 2.25, 80, [1.0, 2.0], [2.0, 4.0], [3.0, 6.0]),
    ]
    rows = table(results).splitlines()
    assert "design" in rows[0] and "worse" in rows[2] and "better" in rows[3] and "41.2" in rows[3]
    draw_designs(results, tmp_path / "docs" / "plot.png")
    assert (tmp_path / "docs" / "plot.png").stat().st_size > 5000


def test_another_budget_is_trained_anew(train_net, tmp_path):
    first = compare(train_net, ["x/s1.yaml"], tmp_path / "out", minutes=2.0)
    second = compare(train_net, ["x/s1.yaml"], tmp_path / "out", minutes=1.0)
    assert second[0].iterations == pytest.approx(first[0].iterations / 2, rel=0.3)


def test_configs_of_one_name_are_refused(train_net, tmp_path):
    with pytest.raises(UserError, match="Two configs are called 's1'"):
        compare(train_net, ["x/s1.yaml", "y/s1.yaml"], tmp_path / "out", minutes=2.0)
