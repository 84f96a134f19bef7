"""`python train.py --help`: every config group with its choices, read from the files themselves."""

from collections.abc import Iterator
from pathlib import Path

from paragraph_ocr.console import console, say

CONF = Path(__file__).resolve().parents[2] / "conf"

_USAGE = """\
Train a paragraph reader.

  python train.py [group=choice ...] [key=value ...]
  python train.py model=small trainer.overfit_batches=1     memorise one batch
  python train.py -m model=tiny,small optimizer.lr=1e-3,3e-4    a sweep: every combination

  --cfg job        print the whole config        -m              run a sweep
  --info defaults  where each part comes from    --hydra-help    more flags
  eval "$(python train.py -sc install=bash)"     shell completion
"""


def show_help() -> None:
    """Print usage, then each group's choices with the line that says why each exists."""
    console.print(_USAGE, markup=False, highlight=False)
    rows = [
        (group if index == 0 else "", file.stem, purpose(file))
        for group, files in groups(CONF)
        for index, file in enumerate(files)
    ]
    widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)]
    for group, choice, meaning in rows:
        say(f"{group:{widths[0]}}{choice:{widths[1]}}{meaning}")
    say(
        "\nKeys and their values: python train.py --cfg job; what they mean: the comments in conf/."
    )


def groups(conf: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield each config group with its files, by name."""
    for folder in sorted(path for path in conf.rglob("*") if path.is_dir()):
        files = sorted(folder.glob("*.yaml"))
        if files:
            yield folder.relative_to(conf).as_posix(), files


def purpose(file: Path) -> str:
    """Return the first comment of a config file that is not a directive for Hydra."""
    for line in file.read_text().splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""
