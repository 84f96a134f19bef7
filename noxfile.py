"""What is run before a change lands: lint, types, tests and smoke, in the environment at hand.

The README's install line has brought everything, so no session installs a second copy of torch.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import nox

PYTHON = (sys.executable, "-m")

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests", "browser", "smoke"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.run(*PYTHON, "ruff", "check", ".")
    session.run(*PYTHON, "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package."""
    session.run(*PYTHON, "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that runs in minutes on a CPU."""
    two = ("-n", "2", "--dist", "worksteal")  # most of it waits for processes that start
    # byte code is kept even where a machine is set against it: dozens of processes would compile anew
    variables = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    session.run(*PYTHON, "pytest", *two, *session.posargs, env=variables)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take long: all 134 encoders."""
    session.run(*PYTHON, "pytest", "-m", "slow", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Runs and searches killed a hundred times, four processes on one study, memory over thirty trials, a
    thousand images read, fuzzing: an hour."""
    session.run(*PYTHON, "pytest", "-m", "soak", "-s", *session.posargs)


@nox.session
def smoke(session: nox.Session) -> None:
    """The README's first command as a person types it: rendering, memorising, reading, MLflow."""
    session.run(*PYTHON, "pytest", "-m", "smoke", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The web page in a headless Chromium: the machine's own, or one that npm carries."""
    # Playwright's own download comes from a host that many machines cannot reach
    getter = "tests/reading/web/browser.py"
    found = session.run(sys.executable, getter, success_codes=[0, 3], silent=True)
    session.log(str(found).strip())
    if "no browser" in str(found):
        session.skip("install Chromium or npm to test the page in a browser")
    session.run(*PYTHON, "pytest", "-m", "browser", "tests/reading/web", *session.posargs)


@nox.session
def lab(session: nox.Session) -> None:
    """The lab's notebook, run from top to bottom in a copy: 2 minutes; nox -s lab -- save keeps it."""
    notebook = Path("docs/lab/transformers_and_paragraphs.ipynb")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(notebook, folder))
        session.run(*PYTHON, "jupyter", "execute", "--inplace", "--timeout=600", str(copy))
        if "save" in session.posargs:
            shutil.copy(copy, notebook)


@nox.session
def ui(session: nox.Session) -> None:
    """The MLflow UI on the runs under outputs, or another folder: nox -s ui -- FOLDER."""
    folder = Path(session.posargs[0] if session.posargs else "outputs").resolve()
    # plain `mlflow ui` starts 15 processes and takes 3 GB, most of it for jobs that nobody asked for
    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
    database = f"sqlite:///{folder / 'mlflow.db'}"
    session.run(
        *PYTHON, "mlflow", "ui", "--workers", "1", "--backend-store-uri", database, env=variables
    )
