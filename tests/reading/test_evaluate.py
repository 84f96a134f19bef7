"""Evaluations: of the readings that read.py gives, in the numbers of training, logged and compared."""

import json
import re
import sqlite3
from dataclasses import replace

import pytest
from mlflow import MlflowClient
from pages import scans

from paragraph_ocr.errors import UserError
from paragraph_ocr.evaluate import Options, evaluate
from paragraph_ocr.metrics import ReadingErrors
from paragraph_ocr.reading import Recognizer
from paragraph_ocr.reading.checkpoint import find_checkpoint
from paragraph_ocr.reading.report import marked

ALL = "datamodule.split=test"
FAKE = ["model=tiny", "datamodule=fake", "debug=ci", "tracking.system_metrics=false"]


@pytest.fixture
def here(tmp_path):
    """Return overrides that keep stores and runs in a folder of the test's own."""
    return [f"outputs={tmp_path}"]


@pytest.fixture(scope="session")
def other_run(make_run):
    return make_run(steps=40, seed=1)


def test_it_judges_the_readings_that_read_gives(recognizer, run_folder, images, here):
    outcome = evaluate(Options(str(run_folder), device="cpu"), [ALL, "tracking=off", *here])
    readings = {one.source: one.reading for one in outcome.evaluation.read}
    assert readings == {path.name: recognizer.read(path).text for path in scans(images)}
    truths = {path.name: path.with_suffix(".txt").read_text() for path in scans(images)}
    assert truths == {one.source: one.truth for one in outcome.evaluation.read}

    measured = ReadingErrors()
    measured.update([*readings.values()], [truths[name] for name in readings])
    for name, value in measured.compute().items():
        assert outcome.evaluation.rates[name].value == value
    assert 0 < outcome.evaluation.rates["cer"].value < 0.9
    assert outcome.run_id is None


def test_a_folder_is_normalised_as_an_image_is(make_run, images, here):
    run = make_run("datamodule.normalise=true", steps=0)
    recognizer = Recognizer.load(run, device="cpu")
    words = ["datamodule=folder", f"datamodule.root={images}", ALL, "tracking=off", *here]
    for typed, normalise in (([], True), (["datamodule.normalise=false"], False)):
        recognizer.normalise = normalise
        outcome = evaluate(Options(str(run), device="cpu", limit=4), [*words, *typed])
        readings = [one.reading for one in outcome.evaluation.read]
        assert readings == [recognizer.read(path).text for path in scans(images)[:4]]
        assert ("normalised" in outcome.report.read_text()) is normalise


def test_the_files_say_what_was_found(run_folder, here):
    outcome = evaluate(Options(str(run_folder), show=3), [ALL, "tracking=off", *here])
    tree = json.loads(outcome.numbers.read_text())
    rate = outcome.evaluation.rates["cer"]
    assert tree["rates"]["cer"] == {"value": rate.value, "low": rate.low, "high": rate.high}
    assert sum(tree["errors"].values()) == sum(one["count"] for one in tree["confusions"])
    assert sum(tree["errors"].values()) == sum(one["errors"] for one in tree["readings"])
    assert sum(one["paragraphs"] for one in tree["groups"]["lines"]) == 12
    written = sum(len(one["reading"]) for one in tree["readings"])
    assert sum(one["count"] for one in tree["calibration"]["bins"]) == written

    page = outcome.report.read_text()
    assert f"<b>{100 * rate.value:.1f}%</b>" in page
    assert page.count('<section class="paragraph">') == 6
    assert page.count("data:image/png;base64,") == 6
    # nothing is fetched, and nothing could be
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|<script|<link""", page)


def test_a_run_is_logged_below_the_one_that_trained_in_its_own_metrics(run_experiment, tmp_path):
    trained = run_experiment(*FAKE)
    outcome = evaluate(Options(str(trained.folder)), [])
    # both read the same pages with the same weights
    for name in ("cer", "wer", "exact", "cer_collapsed"):
        value = outcome.evaluation.rates[name].value
        assert value == pytest.approx(trained.metrics[f"test/{name}"], rel=1e-6)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = database.execute("select key, value from tags where run_uuid = ?", [outcome.run_id])
        tags = dict(rows.fetchall())
        rows = database.execute(
            "select key, value from latest_metrics where run_uuid = ?", [outcome.run_id]
        )
        metrics = dict(rows.fetchall())
        (status,) = database.execute(
            "select status from runs where run_uuid = ?", [outcome.run_id]
        ).fetchone()
    assert status == "FINISHED"
    assert (tags["kind"], tags["mlflow.parentRunId"]) == ("evaluation", trained.run_id)
    assert metrics["test/cer"] == outcome.evaluation.rates["cer"].value
    assert metrics["test/cer_low"] <= metrics["test/cer"] <= metrics["test/cer_high"]
    logged = tmp_path / "artifacts" / outcome.run_id / "artifacts"
    assert {"report.html", "evaluation.json", "readings.json"} <= {p.name for p in logged.iterdir()}

    by_id = evaluate(Options(trained.run_id), ["tracking=off", f"outputs={tmp_path}"])
    assert by_id.evaluation.rates == outcome.evaluation.rates

    # the folder goes, and then MLflow is found to have a copy of it
    aside = trained.folder.rename(tmp_path / "aside")
    with pytest.raises(UserError, match="keeps no copy"):
        find_checkpoint(trained.run_id, outputs=tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.log_artifact(trained.run_id, str(aside / "best.safetensors"))
    fetched = find_checkpoint(trained.run_id, outputs=tmp_path)
    assert fetched.weights.read_bytes() == (aside / "best.safetensors").read_bytes()
    assert fetched.config.read_bytes() == (aside / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="is no run of"):
        find_checkpoint("0" * 32, outputs=tmp_path)


def test_two_runs_are_compared_paragraph_by_paragraph(run_folder, other_run, here):
    options = Options(str(run_folder), against=str(other_run))
    outcome = evaluate(options, [ALL, "tracking=off", *here])
    compared = outcome.comparison
    alone = evaluate(Options(str(other_run)), [ALL, "tracking=off", *here]).evaluation
    assert compared.rates["cer"] == (
        outcome.evaluation.rates["cer"].value,
        alone.rates["cer"].value,
    )
    assert compared.better > compared.worse
    assert compared.p_value < 0.05
    assert json.loads(outcome.numbers.read_text())["comparison"]["p_value"] == compared.p_value
    assert "Against another model" in outcome.report.read_text()


def test_pages_that_depend_on_the_canvas_are_not_compared(make_run, here):
    small = make_run("datamodule=fake", "datamodule.root=null", "datamodule.max_length=64", steps=0)
    large = make_run("datamodule=fake", "datamodule.root=null", "datamodule.width=192",
                     "datamodule.max_length=64", steps=0)  # fmt: skip
    options = Options(str(small), against=str(large))
    with pytest.raises(UserError, match="Pass datamodule=fake"):
        evaluate(options, ["tracking=off", *here])
    evaluate(options, ["tracking=off", "datamodule=fake", "datamodule.width=160", *here])


def test_characters_that_the_model_cannot_write_count_as_errors(run_folder, images, here, tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    path = scans(images)[0]
    (pages / path.name).write_bytes(path.read_bytes())
    (pages / path.with_suffix(".txt").name).write_text("§ir the", encoding="utf-8")
    typed = ["datamodule=folder", f"datamodule.root={pages}", ALL, "tracking=off", *here]
    outcome = evaluate(Options(str(run_folder)), typed)
    (one,) = outcome.evaluation.read
    assert one.truth == "§ir the"
    assert one.errors >= 1
    assert "The model cannot write &#x27;§&#x27;" in outcome.report.read_text()


def test_texts_longer_than_the_model_can_write_are_judged_too(run_folder, images, here, tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    path = scans(images)[0]
    (pages / path.name).write_bytes(path.read_bytes())
    (pages / path.with_suffix(".txt").name).write_text("x" * 300)
    typed = ["datamodule=folder", f"datamodule.root={pages}", ALL, "tracking=off", *here]
    outcome = evaluate(Options(str(run_folder)), typed)
    assert outcome.evaluation.rates["cer"].value > 0.8
    assert "more than the 46 characters" in outcome.report.read_text()


def test_a_split_can_be_cut_short(run_folder, here):
    outcome = evaluate(Options(str(run_folder), limit=5), [ALL, "tracking=off", *here])
    assert len(outcome.evaluation) == 5


@pytest.mark.parametrize(
    ("change", "overrides", "said"),
    [
        ({"limit": 0}, [], "limit=0 must be 1 or more"),
        ({"split": "val"}, [ALL], "has no paragraph in it"),
        ({"checkpoint": "nowhere"}, [], "Pass checkpoint=outputs/runs"),
        ({"against": "nowhere"}, [ALL], "Pass checkpoint=outputs/runs"),
        ({}, ["datamodule.rot=x"], "nearest: datamodule.root"),
        ({}, ["datamodule.root=/nowhere"], "is not a folder"),
        ({}, ["datamodule=foldr"], "Pass datamodule=folder"),
        ({}, ["decoding=beam", "decoding.beam_width=lots"], "must be a whole number"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_read(run_folder, here, change, overrides, said):
    options = replace(Options(str(run_folder)), **change)
    with pytest.raises(UserError, match=said) as refused:
        evaluate(options, [*overrides, "tracking=off", *here])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("reading", "truth", "shown"),
    [
        ("abc", "abc", ("abc", "abc")),
        ("axc", "abc", ('a<mark class="was">b</mark>c', 'a<mark class="now">x</mark>c')),
        ("ac", "abc", ('a<mark class="was">b</mark>c', 'a<mark class="gap"></mark>c')),
        ("abxc", "abc", ("abc", 'ab<mark class="now">x</mark>c')),
        ("<b>", "<b>", ("&lt;b&gt;", "&lt;b&gt;")),
        ("a", "a\n", ('a<mark class="was">⏎\n</mark>', 'a<mark class="gap"></mark>')),
        ("a ", "a", ("a", 'a<mark class="now">␣</mark>')),
    ],
)
def test_differences_are_marked_in_both(reading, truth, shown):
    assert marked(reading, truth) == shown
