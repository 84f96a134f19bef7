"""Who may import whom: what docs/architecture.md promises."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "paragraph_ocr"
MODULES = sorted(PACKAGE.rglob("*.py"))

SITES = {
    "timm": {"model/encoder.py"},
    "h5py": {"data/store.py"},
    "pyarrow": {"data/parquet.py"},
    "defusedxml": {"data/layout.py", "data/iam_forms.py"},
    "mlflow": {"tracking.py", "mlflow_model.py", "reading/served.py"},
    "numba": {"model/cpu_steps.py"},
    "cuda": {"model/cluster_steps.py"},
    "onnxruntime": {"reading/onnx.py"},
    "onnx": set(),  # torch's exporter writes the graphs
    "starlette": {"web/app.py"},
    "uvicorn": {"web/app.py"},
    "scipy": {"data/emnist.py"},
    "hydra": {
        "command.py",
        "config.py",
        "validation.py",
        "sweep.py",
        "targets.py",
        "search/search.py",
        "search/space.py",
        "search/trial.py",
    },
    "optuna": {
        f"search/{name}.py" for name in ("report", "search", "space", "study", "trial", "view")
    },
    "rich": {"console.py", "learning/callbacks.py", "search/view.py"},
    "matplotlib": {"search/report.py", "reading/explain_figures.py"},
    "plotly": {"search/report.py"},
    "torchvision": {"benchmark/reference.py"},
}


def imports(path: Path) -> set[str]:
    """Return the dotted names that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("framework", SITES)
def test_a_framework_has_its_import_sites_and_no_others(framework):
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if any(name.split(".")[0] == framework for name in imports(path))
    }
    assert found == SITES[framework]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("data", ("model", "learning", "config", "validation", "build", "run", "tracking")),
        ("model", ("data", "learning", "config", "validation", "build", "run", "tracking")),
        ("learning", ("data", "config", "validation", "build", "run", "tracking")),
        ("reading", ("data.datamodule", "learning", "validation", "run", "search", "evaluate")),
    ],
)
def test_parts_know_only_what_lies_below_them(folder, forbidden):
    for path in (PACKAGE / folder).rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(tuple(f"paragraph_ocr.{part}" for part in forbidden)), path
