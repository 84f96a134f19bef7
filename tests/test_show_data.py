"""scripts/show_data.py: sheets and report of every data module, logged to MLflow as a run of its own."""

import importlib.util
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def show_data():
    spec = importlib.util.spec_from_file_location("show_data", ROOT / "scripts" / "show_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAIN = "regularization=none"
FEW = ["datamodule.num_train=6", "datamodule.num_val=3", "datamodule.num_test=3"]


def test_sheets_and_a_report_are_written_and_logged(show_data, tmp_path):
    assert show_data.main(["datamodule=fake", *FEW, f"outputs={tmp_path}"]) == 0
    assert "<h2>Splits</h2>" in (tmp_path / "show_data" / "report.html").read_text()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        ((run, status),) = database.execute("select run_uuid, status from runs").fetchall()
        tags = dict(database.execute("select key, value from tags"))
        metrics = dict(database.execute("select key, value from latest_metrics"))
    assert (status, tags["kind"]) == ("FINISHED", "data")
    assert metrics["train_paragraphs"] == 6
    logged = tmp_path / "artifacts" / run / "artifacts"
    assert {path.name for path in logged.iterdir()} == {
        "data.png", "augmented.png", "levels.png", "report.html",
    }  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["datamodule=fake", *FEW, "vocabulary=from_data", "vocabulary.unknown=drop", PLAIN],
        ["datamodule=synthetic_lines", *FEW, "regularization.augment_on=workers"],
        ["datamodule=emnist", *FEW],
        ["datamodule=emnist_lines", *FEW, "vocabulary=ascii"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_data_module_can_be_looked_at(show_data, emnist, tmp_path, overrides):
    if "emnist" in overrides[0]:
        overrides = [*overrides, f"datamodule.root={emnist['gzips']}"]
    assert show_data.main([*overrides, "tracking=off", f"outputs={tmp_path}"]) == 0
    folder = tmp_path / "show_data"
    plain, seen = (np.asarray(Image.open(folder / f"{n}.png")) for n in ("data", "augmented"))
    assert plain.shape == seen.shape
    assert np.array_equal(plain, seen) == (PLAIN in overrides)
    assert Image.open(folder / "levels.png").size[0] > 100
    assert "<h2>Splits</h2>" in (folder / "report.html").read_text()


def test_a_folder_with_one_split_is_shown_too(show_data, tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    for index in range(2):
        Image.new("L", (60, 40), 255).save(pages / f"{index}.png")
        (pages / f"{index}.txt").write_text("<b>", encoding="utf-8")
    typed = ["datamodule=folder", f"datamodule.root={pages}", "datamodule.split=test"]
    outputs = f"outputs={tmp_path}"
    assert show_data.main([*typed, "vocabulary=ascii", "tracking=off", outputs]) == 0
    assert not (tmp_path / "mlflow.db").exists()


def test_a_mistake_is_one_line(show_data, capsys):
    assert show_data.main(["datamodule=fak"]) == 2
    assert "Pass datamodule=fake" in capsys.readouterr().err
