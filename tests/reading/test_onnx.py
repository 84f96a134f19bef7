"""onnxruntime reads what torch reads, without torch."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from pages import scans

from commands import run_command
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading.onnx import OnnxRecognizer

pytest.importorskip("onnxscript", reason="needs pip install -e '.[onnx]'")


@pytest.fixture(scope="module")
def paths(images):
    return scans(images)


@pytest.fixture(scope="module")
def export(run_folder, images, tmp_path_factory):
    """Return the folder of the model as graphs, and what the command said."""
    folder = tmp_path_factory.mktemp("onnx")
    typed = [f"checkpoint={run_folder}", f"folder={folder}", f"images={images}"]
    ran = run_command("scripts/export.py", *typed, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout


@pytest.fixture(scope="module")
def exported(export):
    return export[0]


@pytest.fixture(scope="module")
def onnx(exported):
    return OnnxRecognizer.load(exported)


def test_the_command_writes_the_graphs_and_compares_them_with_torch(export):
    folder, said = export
    names = {"encoder.onnx", "decoder_step.onnx", "config.yaml"}
    assert {path.name for path in folder.iterdir()} == names
    assert re.search(r"1 at once: torch \d+ ms, onnxruntime \d+ ms, .*1 of 1 texts the same", said)
    assert "8 of 8 texts the same" in said


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_onnxruntime_gives_the_text_and_confidences_of_torch(
    batch_size, onnx, recognizer, paths, monkeypatch
):
    batch = paths[:batch_size]
    monkeypatch.setattr(recognizer, "precision", torch.float32)
    expected = recognizer.read_batch(batch)
    assert len({len(transcript.text) for transcript in expected}) > 1 or batch_size == 1
    for own, theirs in zip(expected, onnx.read_batch(batch), strict=True):
        assert (theirs.text, theirs.size, theirs.source) == (own.text, own.size, own.source)
        assert [line.box for line in theirs.lines] == [line.box for line in own.lines]
        assert theirs.log_probability == pytest.approx(own.log_probability, abs=1e-3)
        confidences = [character.confidence for character in own.characters]
        assert [c.confidence for c in theirs.characters] == pytest.approx(confidences, abs=1e-4)


def test_a_text_without_an_end_stops_at_the_last_position(onnx, recognizer):
    noise = np.random.default_rng(0).integers(0, 255, (64, 160), dtype=np.uint8)
    own, theirs = recognizer.read(noise), onnx.read(noise)
    assert len(own.characters) == recognizer.max_length - 1  # else this page tests nothing
    assert theirs.text == own.text


def test_what_reads_with_onnxruntime_does_not_load_torch(exported, onnx, paths):
    path = paths[0]
    code = (
        "import sys\n"
        "from paragraph_ocr.reading.onnx import OnnxRecognizer\n"
        "print(OnnxRecognizer.load(sys.argv[1]).read(sys.argv[2]).text, end='')\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, exported, path], capture_output=True, text=True, check=True
    )
    assert ran.stdout == onnx.read(path).text


def test_a_config_that_asks_for_more_tokens_than_there_are_positions_is_refused(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "changed")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["datamodule"]["max_length"] += 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="max_length=49.* positions for 48 tokens"):
        OnnxRecognizer.load(folder)


def test_a_damaged_or_missing_graph_is_refused_by_name(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "damaged")
    graph = folder / "encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"encoder\.onnx is no graph"):
        OnnxRecognizer.load(folder)
    graph.unlink()
    with pytest.raises(UserError, match=r"holds no encoder\.onnx"):
        OnnxRecognizer.load(folder)


def test_a_line_cnn_is_refused(tmp_path):
    from paragraph_ocr.build_model import build_recognizer, vocabulary_from
    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.reading.export import export_onnx
    from paragraph_ocr.validation import compose, validate

    experiment = validate(compose(["model=line_cnn", "datamodule=synthetic_lines"]))
    vocabulary = vocabulary_from(experiment.vocabulary)
    line_cnn = Recognizer(build_recognizer(experiment, vocabulary), vocabulary, experiment)
    with pytest.raises(UserError, match=r"model=line_cnn.*to=mlflow"):
        export_onnx(line_cnn, tmp_path)
    assert not list(tmp_path.iterdir())
