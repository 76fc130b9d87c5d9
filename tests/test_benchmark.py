"""The benchmark's arithmetic, and that its quick jobs run."""

import json
import runpy
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model

from detr_d2.benchmark import jobs, memory
from detr_d2.benchmark.jobs import JOBS, Section
from detr_d2.benchmark.models import contestants, random_inputs
from detr_d2.benchmark.report import draw, machine, print_section, write_json
from detr_d2.benchmark.timing import Timing, fitted_exponent, ratios, table, take_turns
from detr_d2.errors import UserError
from detr_d2.structures import LayerOutput

from .helpers import tiny_cfg
from .training import ROOT


def test_contestants_take_turns(monkeypatch):
    calls, pauses = [], []
    monkeypatch.setattr("time.sleep", pauses.append)
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = take_turns(runs, rounds=2, warmup=1, pause=0.5)
    assert calls == list("ababab") and pauses == [0.5] * 6
    assert [t.name for t in timings] == ["a", "b"] and len(timings[0].seconds) == 2


def test_ratios_are_taken_round_by_round():
    slow, fast = Timing("slow", [2.0, 4.0, 6.0]), Timing("fast", [1.0, 1.0, 2.0])
    assert ratios(fast, slow) == [2.0, 3.0, 4.0]
    assert fast.median == 1.0


def test_table_by_hand():
    slow = Timing("slow", [0.2, 0.2], "float32")
    fast = Timing("fast", [0.1, 0.1], "float32")
    rows = table(
        [slow, fast], work=20.0, ceilings={"float32": 400.0}, per="images/s", amount=2
    ).splitlines()
    assert "times slow" in rows[0] and "of ceiling" in rows[0]
    cells = [cell.strip() for cell in rows[3].split("|")]
    # 0.1 s; two images in it; half of slow's time; 20 GFLOP / 0.1 s of 400 GFLOP/s.
    assert cells[1:6] == ["fast", "100.0 ms", "20.0 images/s", "2.00 (2.00 to 2.00)", "50%"]


def test_exponents_by_hand():
    assert fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert fitted_exponent([10, 1000], [5.0, 5.0]) == pytest.approx(0)


def test_report(tmp_path, capsys):
    sections = [
        Section("One", [Timing("a", [0.2]), Timing("detr_d2", [0.1])], {}, ("a remark",)),
        Section("Growth of cost", [Timing("a", [0.2]), Timing("b", [0.1])]),
    ]
    ceilings = {"float32 convolution": 100.0}
    for section in sections:
        print_section(section, ceilings)
    assert "### One" in (out := capsys.readouterr().out) and "- a remark" in out
    write_json(tmp_path / "out" / "report.json", sections, ceilings)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["sections"][0]["seconds"] == {"a": [0.2], "detr_d2": [0.1]}
    assert content["machine"] == machine() and "threads" in machine()
    draw(tmp_path / "report.png", sections)
    assert (tmp_path / "report.png").stat().st_size > 3000


def test_a_picture_needs_a_contest(tmp_path, monkeypatch, capsys):
    alone = Section("One", [Timing("detr_d2", [0.1])])
    with pytest.raises(UserError, match="no picture .*report.png, for nothing was timed against"):
        draw(tmp_path / "report.png", [alone, Section("Memory", [])])
    monkeypatch.setattr("sys.argv", ["benchmark.py", "memory", "--picture", "x.png"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "benchmark.py"), run_name="__main__")
    assert "memory: no picture shows it, leave --picture out" in capsys.readouterr().err


def test_a_measuring_process_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(memory, "_peak", print)  # sends nothing
    told = []

    def measure():
        try:
            memory._peaks("Title", {"some": ("kind", 1)})
        except UserError as error:
            told.append(str(error))

    thread = threading.Thread(target=measure, daemon=True)  # which may wait for ever
    thread.start()
    thread.join(timeout=60)
    assert told and told[0].startswith("Title: the process of 'some' ended with exit code 0")


def test_one_back_end_alone_is_not_compared(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(jobs, "take_turns", lambda runs, rounds: [run() for run in runs.values()])
    nothing = SimpleNamespace(summary=dict)
    monkeypatch.setattr(jobs, "compute_coco_metrics", lambda *_, **__: nothing)
    (section,) = JOBS["evaluation"](1, True)
    assert section.remarks == ("Only pycocotools is installed: there is nothing to compare.",)


@pytest.mark.parametrize("job", ["criterion", "data", "evaluation"])
def test_quick_jobs(job, monkeypatch):
    for package in ("transformers", "hotcoco"):
        pytest.importorskip(package)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    (section,) = JOBS[job](1, True)
    assert len(section.timings) == 2 and all(t.median > 0 for t in section.timings)
    if job == "criterion":  # the same number from both
        first, second = (word.strip(",;") for word in section.remarks[0].split()[1:4:2])
        assert float(first) == pytest.approx(float(second), rel=1e-4)
    if job == "evaluation":
        assert section.remarks == ("All 12 numbers are equal.",)


def test_exported_contestants_run():
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    model = build_model(tiny_cfg()).eval()
    inputs = random_inputs(1, 96, 128)
    runs, notes, missing = contestants(model, None, inputs, quick=False, compiled=False)
    assert {"detr_d2 on ONNX Runtime", "detr_d2 on OpenVINO"} <= runs.keys() == notes.keys()
    assert not set(missing) - {"bfloat16"}
    scores = [runs[name]()[0]["instances"].scores for name in runs if notes[name] == "float32"]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["inference", "train"])
def test_quick_jobs_against_transformers(job):
    for package in ("transformers", "timm"):
        pytest.importorskip(package)
    for section in JOBS[job](1, True):
        assert section.timings[0].name == "transformers"
        for remark in section.remarks:
            if remark.startswith("Largest differences"):
                assert "plain from transformers" in remark


@pytest.mark.parametrize("kind", ["no masks", "masks", "masks at once", "train encoder"])
def test_every_measurement_of_memory_has_its_model(kind, monkeypatch):
    """Recipes of panoptic models train on a frozen detector, which these do not."""
    monkeypatch.setattr(memory.segmentation, "CHUNK", memory.segmentation.CHUNK)
    assert callable(memory._runner(kind, 64))


def test_queries_in_another_order_are_known():
    boxes = torch.tensor([[[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]]])
    plain, order = LayerOutput(torch.zeros(1, 3, 2), boxes), torch.tensor([1, 0, 2])
    kept = jobs.in_place(plain, LayerOutput(plain.logits, boxes[:, order] + 1e-4))
    assert kept.tolist() == [[False, False, True]]
