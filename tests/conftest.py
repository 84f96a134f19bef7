import os

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def run_experiment(tmp_path):
    """Return a function that runs overrides in this process, under a folder of the test's own."""

    def run_overrides(*overrides: str):
        from paragraph_ocr.run import run
        from paragraph_ocr.validation import compose, validate

        typed = [*overrides, f"outputs={tmp_path}"]
        return run(validate(compose(typed)), overrides=typed)

    return run_overrides
