"""Fonts and texts that npm brings, where there is npm and a registry."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paragraph_ocr.data.fonts import Face, likeness, load_faces

SCRIPT = Path(__file__).parents[2] / "scripts/fetch.py"


def fetch(*words, path=None):
    environment = {**os.environ, **({} if path is None else {"PATH": str(path)})}
    return subprocess.run(
        [sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True
    )


def test_without_npm_one_line_says_what_to_install(tmp_path):
    done = fetch("fonts", f"folder={tmp_path / 'fonts'}", path=tmp_path)
    assert done.returncode == 2
    assert "Install Node.js" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_families_come_with_their_licence_and_draw_every_character(tmp_path, notes):
    done = fetch("fonts", f"folder={tmp_path}", "families=handlee,homemade-apple")
    if "npm pack" in done.stderr:
        pytest.skip("npm reaches no registry")
    assert done.returncode == 0, done.stderr
    for family in ("handlee", "homemade-apple"):
        assert (tmp_path / f"{family}.LICENSE").stat().st_size > 1000
    faces, left_out = load_faces(tmp_path, characters=notes.characters)
    assert {"handlee", "homemade-apple", "Zeyada"} <= {face.name for face in faces}
    assert not left_out
    again = fetch("fonts", f"folder={tmp_path}", "families=handlee,homemade-apple")
    assert "0 families fetched, 0 installed faces copied" in " ".join(again.stdout.split())
    unknown = fetch(
        "fonts", f"folder={tmp_path}", "families=no-such-family-of-fonts", "installed=false"
    )
    assert unknown.returncode == 2
    assert len(unknown.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_texts_come_as_documents_without_tags(tmp_path):
    done = fetch("texts", f"folder={tmp_path}")
    if "npm pack" in done.stderr:
        pytest.skip("npm reaches no registry")
    assert done.returncode == 0, done.stderr
    documents = sorted(tmp_path.glob("*.txt"))
    assert len(documents) == 500
    text = documents[0].read_text()
    assert text.startswith("The Fulton County Grand Jury said Friday an investigation of Atlanta's")
    assert 'produced "no evidence" that any irregularities took place.' in text


def test_text_is_put_together_as_it_was_written():
    script = importlib.util.spec_from_file_location("fetch", SCRIPT)
    fetched = importlib.util.module_from_spec(script)
    sys.modules["fetch"] = fetched
    script.loader.exec_module(fetched)
    tagged = "``/`` Well/uh ,/, he/pps said/vbd ?/. ?/. ''/'' (/( It/pps cost/vbd $/nn 5/cd ;/. ;/."
    tagged += " 1/2/cd more/ap )/) ./."
    assert fetched.untagged(tagged) == '"Well, he said?" (It cost $5; 1/2 more).\n'


def test_a_face_is_most_like_its_own_copy(tmp_path, notes):
    faces, _ = load_faces(None, characters=notes.characters)
    copy = tmp_path / "copy.ttf"
    copy.write_bytes(faces[0].path.read_bytes())
    alike = likeness([*faces, Face(copy, faces[0].weights)])
    assert (alike == alike.T).all() and (alike < 1.001).all()
    assert alike[-1].argmax() == 0 and alike[-1, 0] > 0.999
    assert np.median(alike[:-1, :-1].max(axis=1)) < 0.95
