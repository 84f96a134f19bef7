"""Fonts that npm brings, where there is npm and a registry."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paragraph_ocr.data.fonts import load_faces

SCRIPT = Path(__file__).parents[2] / "scripts/fetch_fonts.py"


def fetch(*words, path=None):
    environment = {**os.environ, **({} if path is None else {"PATH": str(path)})}
    return subprocess.run(
        [sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True
    )


def test_without_npm_one_line_says_what_to_install(tmp_path):
    done = fetch(f"folder={tmp_path / 'fonts'}", path=tmp_path)
    assert done.returncode == 2
    assert "Install Node.js" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_families_come_with_their_licence_and_draw_every_character(tmp_path, notes):
    done = fetch(f"folder={tmp_path}", "families=handlee,homemade-apple")
    if "npm pack" in done.stderr:
        pytest.skip("npm reaches no registry")
    assert done.returncode == 0, done.stderr
    for family in ("handlee", "homemade-apple"):
        assert (tmp_path / f"{family}.LICENSE").stat().st_size > 1000
    faces, left_out = load_faces(tmp_path, characters=notes.characters)
    assert {"handlee", "homemade-apple", "Zeyada"} <= {face.name for face in faces}
    assert not left_out
    again = fetch(f"folder={tmp_path}", "families=handlee,homemade-apple")
    assert "0 families fetched, 0 installed faces copied" in " ".join(again.stdout.split())
    unknown = fetch(f"folder={tmp_path}", "families=no-such-family-of-fonts", "installed=false")
    assert unknown.returncode == 2
    assert len(unknown.stderr.strip().splitlines()) == 1
