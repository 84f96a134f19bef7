"""Evaluate a trained model on a split of any data: a report in HTML, its figures as JSON, a run in MLflow.

    python scripts/evaluate.py datamodule=folder datamodule.root=letters datamodule.split=test
    python scripts/evaluate.py checkpoint=outputs/runs/<run>
    python scripts/evaluate.py checkpoint=outputs/runs/<run> datamodule=folder datamodule.root=pages split=val
    python scripts/evaluate.py checkpoint=outputs/runs/<run> against=outputs/runs/<another>

Without checkpoint= the released model is judged, without datamodule= on the model's own data. The overrides
datamodule, decoding, tracking, seed and outputs are those of train.py; the options are
"""

import sys
from dataclasses import fields
from typing import TYPE_CHECKING

from paragraph_ocr import arguments, console
from paragraph_ocr.errors import UserError, nearest

if TYPE_CHECKING:
    from paragraph_ocr.evaluate import Outcome

OVERRIDES = ("datamodule", "decoding", "tracking", "seed", "outputs")


def main(words: list[str]) -> int:
    # torch and Lightning take seconds to import: not before the words can be told apart
    from paragraph_ocr.evaluate import Options, evaluate

    if {"--help", "-h"} & set(words):
        console.say(f"{(__doc__ or '').strip()}\n\n{arguments.described(Options)}")
        return 0
    try:
        own, overrides = parted(words, [option.name for option in fields(Options)])
        show(evaluate(arguments.parse(Options, own), overrides))
    except UserError as error:
        console.error(str(error))
        return 2
    except KeyboardInterrupt:
        return 1
    return 0


def parted(words: list[str], options: list[str]) -> tuple[list[str], list[str]]:
    """Return the script's own words and those of train.py.

    Raises:
        UserError: a key is neither.
    """
    own, overrides = [], []
    for word in words:
        key = word.partition("=")[0]
        if key.partition(".")[0] in OVERRIDES:
            overrides.append(word)
        elif key in options or "=" not in word:
            own.append(word)
        else:
            close = nearest(key, [*options, *OVERRIDES])
            wanted = (
                f"nearest: {', '.join(close)}" if close else f"{', '.join([*options, *OVERRIDES])}"
            )
            raise UserError(
                f"{word} is no option here ({wanted}). Pass {close[0] if close else 'split'}=<value>."
            )
    return own, overrides


def show(outcome: "Outcome") -> None:
    """Print rates and where the report lies."""
    from paragraph_ocr.reading.report import RATE_NAMES

    console.say(f"{len(outcome.evaluation):,} paragraphs")
    for name, (value, low, high) in outcome.evaluation.rates.items():
        console.say(
            f"{100 * value:6.2f}%  ({100 * low:.2f} to {100 * high:.2f})  {RATE_NAMES[name]}"
        )
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in outcome.evaluation.kinds.items())
    console.say(f"{kinds}; calibration error {100 * outcome.evaluation.calibration.error:.1f}%")
    if (compared := outcome.comparison) is not None:
        value, low, high = compared.differences["cer"]
        console.say(
            f"{100 * value:+6.2f} points of character errors against the other "
            f"({100 * low:+.2f} to {100 * high:+.2f}), p = {compared.p_value:.4f}"
        )
    console.say(f"report {outcome.report}")
    if outcome.run_id:
        console.say(f"logged to MLflow as run {outcome.run_id}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
