"""scripts/benchmark.py at a size that takes seconds: what it measures, compares, writes and logs."""

import importlib.util
import json
import math
import sqlite3
from pathlib import Path

import pytest
import torch

from paragraph_ocr.benchmark import read
from paragraph_ocr.benchmark.options import ReadOptions, TrainOptions
from paragraph_ocr.benchmark.reference import END, ReferenceTraining, as_ours, copy_weights
from paragraph_ocr.benchmark.setting import Setting
from paragraph_ocr.benchmark.table import Row, Spread, judge
from paragraph_ocr.benchmark.train import Training

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads of torch, on cores that are busy, take twenty times as long for steps this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Return a function that takes the words after scripts/benchmark.py and returns the JSON."""
    path = ROOT / "scripts" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def typed(*words):
        small = ["size=tiny", f"outputs={tmp_path}"]
        monkeypatch.setattr("sys.argv", ["benchmark.py", *words, *small])
        assert module.main() == 0
        (file,) = (tmp_path / "benchmarks").glob(f"{words[0]}-*.json")
        return json.loads(file.read_text())

    return typed


def of_group(found, group):
    return [row for row in found["rows"] if row["group"] == group]


def assert_sound(found):
    """Assert that all figures are positive numbers, and every ratio is what its figures say."""
    assert torch.__version__.startswith(found["environment"]["torch"])
    for row in found["rows"]:
        for side in filter(None, (row["ours"], row["theirs"])):
            assert 0 < side["low"] <= side["high"] < math.inf
            assert 0 < side["median"] < math.inf
        assert all(math.isfinite(figure) for figure in row["beside"].values())
        if row["theirs"] is not None:
            faster = row["ours"]["median"] / row["theirs"]["median"]
            wanted = faster if row["unit"].endswith("/s") else 1 / faster
            assert row["ratio"] == pytest.approx(wanted)


def logged(folder):
    """Return status, tags and metrics of the only MLflow run, and the names of its files."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        ((run, status),) = database.execute("select run_uuid, status from runs").fetchall()
        tags = dict(database.execute("select key, value from tags"))
        metrics = dict(database.execute("select key, value from latest_metrics"))
    files = {path.name for path in (folder / "artifacts" / run / "artifacts").iterdir()}
    return status, tags, metrics, files


def test_training_is_compared_end_to_end_and_watched(benchmark, tmp_path):
    words = ["device=cpu", "batches=2", "fit_steps=4", "num_train=8", "repeats=2"]
    found = benchmark("train", *words, "growth=true", "soak_steps=10")
    assert_sound(found)
    (step,) = of_group(found, "step")
    assert step["against"] == "reference"
    assert step["beside"]["ours_peak_mib"] > 0
    assert "no published figure" in step["note"]
    (whole,) = of_group(found, "end to end")
    assert whole["against"] == "bare step"
    assert whole["beside"]["steps"] == 4
    assert [row["work"] for row in of_group(found, "growth")] == [
        "batch 1",
        "batch 2",
        "12 tokens, batch 1",
        "24 tokens, batch 1",
        "half page 32x64, batch 1",
        "whole page 64x128, batch 1",
    ]
    assert len(of_group(found, "soak")) == 1
    status, tags, metrics, files = logged(tmp_path)
    assert (status, tags["kind"], tags["subject"]) == ("FINISHED", "benchmark", "train")
    assert metrics["step/batch 2/ratio"] == pytest.approx(step["ratio"])
    assert len(files) == 1 and files.pop().startswith("train-")


def test_reading_is_compared_over_pages_and_images_too(benchmark, tmp_path):
    trained = [f"{key}={ROOT / 'tests' / 'line_reader'}" for key in ("checkpoint", "image")]
    found = benchmark("read", "device=cpu", "batches=1,2", "pages=3", *trained, "tracking=off")
    assert_sound(found)
    for row in of_group(found, "read"):
        assert row["theirs"] is not None
        assert row["beside"]["equal_pages"] == 1
    (same,) = of_group(found, "same tokens")
    assert (same["ours"]["median"], same["note"]) == (1, "equal")
    assert same["beside"]["different_tokens_written"] > 1
    assert [row["group"] for row in found["rows"][-2:]] == ["pages", "images"]
    assert found["rows"][-1]["against"] == "model alone"
    assert not (tmp_path / "mlflow.db").exists()


def test_data_is_loaded_read_and_rendered(benchmark):
    found = benchmark("data", "device=cpu", "num_workers=0", "num_train=8", "tracking=off")
    assert_sound(found)
    works = [row["work"] for row in found["rows"]]
    assert "placement disk, 0 workers" in works
    assert len(of_group(found, "store")) == 1
    assert [row["unit"] for row in of_group(found, "renderer")] == ["pages/s", "pages/s"]


def test_a_start_is_timed_whole_and_by_its_phases(benchmark):
    found = benchmark("start", "cold=false", "repeats=1", "tracking=off")
    assert_sound(found)
    assert len(of_group(found, "help")) == 1
    whole, *phases = of_group(found, "first step")
    assert len(phases) == 5
    total = sum(phase["ours"]["median"] for phase in phases)
    assert whole["ours"]["median"] == pytest.approx(total)


def row(unit, ours, theirs, **more):
    spreads = [Spread.of([median]) for median in (ours, theirs)]
    return Row("group", "work", unit, *spreads, **more)


def test_a_ratio_says_how_many_times_as_fast_we_are():
    assert row("s", 0.5, 4.0).ratio == 8
    assert row("ms", 0.5, 4.0).ratio == 8
    assert row("images/s", 300.0, 100.0).ratio == 3
    assert row("s", 0.5, 4.0, void="why").ratio is None
    assert Row("group", "work", "s", Spread.of([1.0])).ratio is None


def test_a_reference_slower_than_published_voids_the_ratio_on_an_h100():
    h100 = "NVIDIA H100 80GB HBM3"
    assert "slower" in judge(1.11, 1.0, h100)[0]
    for seconds in (1.09, 1.0, 0.1):
        void, note = judge(seconds, 1.0, h100)
        assert not void and "published 1 s" in note
    for published, device in ((None, h100), (1.0, "CPU"), (1.0, "NVIDIA H200")):
        void, note = judge(9.0, published, device)
        assert not void and "no published figure" in note


def test_a_void_ratio_is_shown_with_its_reason(monkeypatch, capsys, benchmark):
    monkeypatch.setattr(Setting, "device_name", "NVIDIA H100")
    monkeypatch.setattr(Setting, "is_published", lambda self, experiment: True)
    monkeypatch.setattr(read, "PUBLISHED_READING", {1: 1e-6})
    found = benchmark("read", "device=cpu", "repeats=1", "tracking=off")
    (void,) = of_group(found, "read")
    assert void["ratio"] is None
    assert "published 1e-06 s: over 10% slower here" in void["void"]
    assert "void" in capsys.readouterr().out


def test_both_learn_alike_from_one_batch():
    options = TrainOptions(device="cpu", size="tiny", override=("regularization.dropout=0",))
    setting = Setting(options)
    experiment = setting.experiment()
    ours, batch = Training(experiment, setting), setting.batch(3, experiment)
    theirs = ReferenceTraining(setting.reference(experiment), setting.device)
    copy_weights(theirs.model, ours.learner.recognizer)
    # in float64: rounding that puts a ReLU to the other side of zero moves gradients by a percent
    for model, looks in (
        (theirs.model, theirs.model.resnet.conv1),
        (ours.learner, ours.learner.recognizer.encoder.net),
    ):
        model.double()
        looks.register_forward_pre_hook(lambda layer, inputs: inputs[0].double())
    batch.tokens[0, 10:] = 3  # pad counts on neither side
    expected, loss = theirs.step(batch.images, batch.tokens), ours.step(batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    gradients = as_ours({name: p.grad for name, p in theirs.model.named_parameters()})
    found = {name: p.grad for name, p in ours.learner.recognizer.named_parameters()}
    assert found.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)
    assert largest > 1e-3


def test_the_reference_reads_until_every_row_has_ended():
    setting = Setting(ReadOptions(device="cpu", size="tiny"))
    experiment = setting.experiment()
    reference = setting.reference(experiment).eval()
    images = setting.batch(2, experiment).images
    reference.read_out.bias.data[END] = 1e4
    assert reference.read(images, max_length=24)[:, :3].tolist() == [[1, END, 3], [1, END, 3]]
    reference.read_out.bias.data[END] = -1e4
    whole = reference.read(images, max_length=24)
    assert whole.shape == (2, 24)
    assert not (whole[:, 1:] == END).any()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Pass train before the options"),
        (["read", "image=scans"], "Pass checkpoint="),
        (["read", "checkpoint=run"], "Pass image=<folder>, or pages=232"),
        (["train", "override=model=base"], "the reference is a ResNet-18"),
        (["data", "passes=1"], "must be 2 or more"),
        (["train", "batch=4"], "Pass batches="),
        (["train", "batches=16,0"], "batches=0 must be 1 or more"),
        (["start", "repeats=0"], "Pass repeats=1"),
    ],
)
def test_a_mistake_is_one_line(benchmark, monkeypatch, capsys, words, said):
    with pytest.raises(AssertionError, match="2 == 0"):
        benchmark(*words)
    shown = capsys.readouterr().err.strip()
    assert said in shown
    assert "\n" not in shown
