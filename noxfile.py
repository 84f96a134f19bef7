"""What is run before a change lands: lint, types, tests and smoke, in the environment at hand.

The README's install line has brought everything, so no session installs a second copy of torch.
"""

import os

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests", "smoke"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package."""
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that runs in minutes on a CPU."""
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take long: all 134 encoders."""
    session.run("python", "-m", "pytest", "-m", "slow", *session.posargs)


@nox.session
def smoke(session: nox.Session) -> None:
    """The README's first command as a person types it: rendering, memorising, reading, MLflow."""
    session.run("python", "-m", "pytest", "-m", "smoke", *session.posargs)


@nox.session
def ui(session: nox.Session) -> None:
    """The MLflow UI on the runs under outputs, without the job workers that take 2.6 GB."""
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    database = "sqlite:///outputs/mlflow.db"
    session.run("mlflow", "ui", "--workers", "1", "--backend-store-uri", database, external=True)
