"""Twelve images with their texts, and a small model that has half learnt them."""

import pytest
import torch
from pages import SENTENCE, note, scans
from PIL import Image
from safetensors.torch import save_file

CANVAS = ["datamodule.height=64", "datamodule.width=160"]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, images):
    """Return a function that makes the run folder of a model which has half learnt the images by heart."""

    def make(*overrides, steps=70, seed=0):
        from paragraph_ocr.build_model import build_recognizer, vocabulary_from
        from paragraph_ocr.data.scan import fit, read_scan
        from paragraph_ocr.stored import write_config
        from paragraph_ocr.validation import compose, validate

        folder = tmp_path_factory.mktemp("run")
        root = f"datamodule.root={images}"
        typed = ["model=tiny", "datamodule=folder", root, *CANVAS, "datamodule.max_length=48"]
        experiment = validate(compose([*typed, f"outputs={folder / 'outputs'}", *overrides]))
        vocabulary = vocabulary_from(experiment.vocabulary)
        torch.manual_seed(seed)
        model = build_recognizer(experiment, vocabulary)
        pages = torch.zeros(12, 1, 64, 160, dtype=torch.uint8)
        sizes, rows = [], []
        for page, path in zip(pages, scans(images), strict=True):
            seen = fit(read_scan(path), height=64, width=160)
            page[0, : seen.shape[0], : seen.shape[1]] = torch.from_numpy(seen)
            sizes.append(seen.shape)
            rows.append(torch.tensor(vocabulary.encode(path.with_suffix(".txt").read_text())))
        tokens = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=vocabulary.pad
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(steps):
            logits = model(pages, tokens[:, :-1], torch.tensor(sizes))
            loss, count = model.loss(logits, tokens[:, 1:], label_smoothing=0.0)
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
        write_config(experiment, folder)
        save_file(model.weights(), folder / "best.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def run_folder(make_run):
    return make_run()


@pytest.fixture(scope="session")
def recognizer(run_folder):
    from paragraph_ocr.reading import Recognizer

    return Recognizer.load(run_folder, device="cpu")


@pytest.fixture
def no_release(tmp_path, monkeypatch):
    """Put the place of released models, and the working directory, where there are none; return the place."""
    from paragraph_ocr.reading import checkpoint

    monkeypatch.setattr(checkpoint, "RELEASED", tmp_path / "repository" / "models")
    monkeypatch.chdir(tmp_path)
    return checkpoint.RELEASED


@pytest.fixture
def released(no_release, recognizer):
    """Put a small model where the released one is looked for; return it as it reads."""
    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.reading.release import release

    release(recognizer, no_release / "paragraphs", metrics={"test/cer": 0.25})
    return Recognizer.load(no_release / "paragraphs", device="cpu")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Return a folder of 12 images of several sizes and kinds, with .txt files beside them."""
    folder, words = tmp_path_factory.mktemp("images"), SENTENCE.split()
    for index in range(12):
        text = " ".join(words[index : index + 2])
        if index % 3:
            text += "\n" + " ".join(words[index + 4 : index + 6])
        page = note(text, height=90 + 9 * index, width=220 + 13 * index)
        page = 255 - page if index % 4 == 3 else page
        suffix = (".png", ".jpg", ".tif")[index % 3]
        Image.fromarray(page).save(folder / f"{index:02d}{suffix}")
        (folder / f"{index:02d}.txt").write_text(text)
    return folder
