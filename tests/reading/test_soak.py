"""A thousand images in a folder: one bad image stops nothing, memory stays flat, nothing slows it down."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from pages import SENTENCE, note
from PIL import Image

from paragraph_ocr import console
from paragraph_ocr.reading import Refusal

ROOT = Path(__file__).parents[2]
NUMBER = 1000
SLACK = 1.10  # times what the model alone needs
GROWTH_MB = 40  # of memory, from the 200th image to the last
BATCH = 16


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """Return a folder of 1,000 notes of a few hundred pixels, of which number 500 is no image."""
    folder, words = tmp_path_factory.mktemp("thousand"), SENTENCE.split()
    for number in range(NUMBER):
        text = " ".join(words[number % 13 : number % 13 + 3]) + f"\nno {number}"
        page = note(text, height=200 + number % 50, width=480 + number % 90)
        Image.fromarray(page).save(folder / f"{number:04d}.jpg")
    (folder / "0500.jpg").write_bytes(b"no image")
    return folder


def bare_loop(recognizer, paths):
    """Return texts as a bare loop reads them, and the seconds of it and of the model in it."""
    texts, began, model = [], time.perf_counter(), 0.0
    for start in range(0, len(paths), BATCH):
        pages = [recognizer.page(path) for path in paths[start : start + BATCH]]
        images = torch.stack([canvas for canvas, _ in pages])
        sizes = torch.tensor([size for _, size in pages])
        before = time.perf_counter()
        readings = recognizer.model.read(
            images, sizes, decoding=recognizer.decoding, max_length=recognizer.max_length
        )
        model += time.perf_counter() - before
        texts += [recognizer.vocabulary.decode(reading.tokens) for reading in readings]
    return texts, time.perf_counter() - began, model


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_images_are_read_at_the_speed_of_the_model_in_flat_memory(recognizer, thousand):
    paths = sorted(thousand.iterdir())
    good = [path for path in paths if path.name != "0500.jpg"]
    list(recognizer.read_all(good[:64]))  # the first batches are slower, for either
    process, memory, results = psutil.Process(), [], []
    began = time.perf_counter()
    for result in recognizer.read_all(paths, batch_size=BATCH):
        results.append(result if isinstance(result, Refusal) else result.text)
        if len(results) % 50 == 0:
            memory.append(process.memory_info().rss / 1e6)
    seconds = time.perf_counter() - began
    texts, bare, model = bare_loop(recognizer, good)
    growth = memory[-1] - memory[3]
    console.say(
        f"\n{NUMBER} images: {seconds:.1f} s ({NUMBER / seconds:.0f} a second); a bare loop "
        f"{bare:.1f} s, the model alone {model:.1f} s; memory {memory[3]:.0f} MB after 200 images, "
        f"{memory[-1]:.0f} MB after {NUMBER} ({growth:+.1f} MB), {max(memory):.0f} MB at most"
    )
    refused = results.pop(500)
    assert isinstance(refused, Refusal) and "0500.jpg" in refused.reason
    assert results == texts
    assert seconds <= SLACK * bare
    assert growth <= GROWTH_MB


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_command_reads_a_thousand_images_and_writes_their_files(run_folder, thousand, tmp_path):
    command = [sys.executable, "scripts/read.py", f"checkpoint={run_folder}", f"image={thousand}"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "write=txt,json,page,alto", f"into={tmp_path}", "device=cpu"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    console.say(
        f"\n{done.stdout.splitlines()[-2]}; {time.perf_counter() - began:.1f} s from start to end"
    )
    assert done.returncode == 2
    assert "0500.jpg is no" in done.stderr
    for suffix in (".txt", ".json", ".page.xml", ".alto.xml"):
        assert len(list(tmp_path.glob(f"*{suffix}"))) == NUMBER - 1
    assert "999 of 1,000 images read" in done.stdout
