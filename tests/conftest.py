import os
import sys
from pathlib import Path

import pytest
import torch

# of iam_corpus.py, for all tests; of commands.py, which a process that is forked imports as well
sys.path += [str(Path(__file__).parent / "data"), str(Path(__file__).parent)]
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton


@pytest.fixture(scope="session")
def emnist_halves():
    """Return eight images of each character to train on, and three to test, drawn in fonts."""
    from emnist_files import draw_half

    return {"train": draw_half(8, seed=0), "test": draw_half(3, seed=1)}


@pytest.fixture(scope="session")
def emnist(emnist_halves, tmp_path_factory):
    """Return a folder for each format that EMNIST comes in, with the same images."""
    from emnist_files import FORMATS

    root = tmp_path_factory.mktemp("emnist")
    for name, write in FORMATS.items():
        write(root / name.replace(" ", "_"), emnist_halves)
    return {name: root / name.replace(" ", "_") for name in FORMATS}


@pytest.fixture
def run_experiment(tmp_path):
    """Return a function that runs overrides in this process, under a folder of the test's own."""

    def run_overrides(*overrides: str):
        from paragraph_ocr.run import run
        from paragraph_ocr.validation import compose, validate

        typed = [*overrides, f"outputs={tmp_path}"]
        return run(validate(compose(typed)), overrides=typed)

    return run_overrides


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """Return the outputs of killing.QUICK, run without a break."""
    import killing

    outputs = tmp_path_factory.mktemp("unbroken")
    assert killing.run([*killing.QUICK, f"outputs={outputs}"]) == 0
    return outputs


@pytest.fixture(scope="session")
def curriculum_stores(tmp_path_factory):
    """Return a folder of the stores of SMALL_CURRICULUM.

    To be copied as the `data` of outputs, where a process beside that renders them would only be
    waited for.
    """
    from paragraph_ocr import build
    from paragraph_ocr.validation import compose, validate
    from small_curriculum import SMALL_CURRICULUM

    outputs = tmp_path_factory.mktemp("curriculum")
    experiment = validate(compose([*SMALL_CURRICULUM, "model=tiny", f"outputs={outputs}"]))
    module = build.build_datamodule(experiment, build.build_vocabulary(experiment))
    for pages in module.corpora.values():
        pages.prepare_data()
    return outputs / "data"


@pytest.fixture(scope="session")
def iam_pages():
    """Return 20 forms like IAM's, a quarter of their size."""
    import iam_corpus

    return list(iam_corpus.make_pages(20, scale=0.25))


@pytest.fixture(scope="session")
def iam_copies(iam_pages, tmp_path_factory):
    """Return a folder that holds each layout of the same forms in a folder of its own."""
    import iam_corpus

    root = tmp_path_factory.mktemp("iam")
    for layout in iam_corpus.LAYOUTS:
        iam_corpus.write(root / layout, iam_pages, layout)
    return root
