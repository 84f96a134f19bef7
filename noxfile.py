"""What is run before a change lands: lint, types, tests and smoke, in the environment at hand.

The README's install line has brought everything, so no session installs a second copy of torch.
"""

import sys
from pathlib import Path

import nox

PYTHON = (sys.executable, "-m")

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests", "smoke"]


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
    session.run(*PYTHON, "pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take long: all 134 encoders."""
    session.run(*PYTHON, "pytest", "-m", "slow", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Searches killed, shared and watched for memory, and fuzzing: 20 minutes."""
    session.run(*PYTHON, "pytest", "-m", "soak", "-s", *session.posargs)


@nox.session
def smoke(session: nox.Session) -> None:
    """The README's first command as a person types it: rendering, memorising, reading, MLflow."""
    session.run(*PYTHON, "pytest", "-m", "smoke", *session.posargs)


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
