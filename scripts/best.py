"""Train the best trial of a search again, in full.

    python scripts/best.py outputs/studies/learning_rate trainer.max_epochs=50
    python scripts/best.py outputs/studies/smallest_model --trial 150 trainer.max_epochs=1000

Runs train.py with the search's overrides, the trial's parameters and whatever else is typed, which wins.
"""

import argparse
import os
import sys
from pathlib import Path

import optuna

from paragraph_ocr import console
from paragraph_ocr.errors import UserError
from paragraph_ocr.search.study import best_trial, open_storage, overrides_to_repeat

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", type=Path, help="folder of the study, outputs/studies/<name>")
    parser.add_argument(
        "--trial", type=int, help="its number; without it the best by the first objective"
    )
    parser.add_argument("--storage", help="where the study is kept, if not in its folder")
    options, further = parser.parse_known_args()
    try:
        typed = _typed(options.study, options.storage, options.trial, further)
    except UserError as error:
        console.error(str(error))
        sys.exit(2)
    console.say("python train.py " + " ".join(f"'{part}'" for part in typed))
    os.execv(sys.executable, [sys.executable, str(TRAIN), *typed])


def _typed(folder: Path, url: str | None, number: int | None, further: list[str]) -> list[str]:
    if url is None and not (folder / "journal.log").exists():
        raise UserError(
            f"{folder} holds no study. Pass outputs/studies/<name>, or --storage with its URL."
        )
    storage = open_storage(url or f"journal:///{folder.resolve() / 'journal.log'}")
    try:
        study = optuna.load_study(study_name=folder.name, storage=storage)
    except KeyError as error:
        raise UserError(f"{folder.name} is no study of that storage. Pass its folder.") from error
    return overrides_to_repeat(study, best_trial(study, number), further)


if __name__ == "__main__":
    main()
