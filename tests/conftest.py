import os

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


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
