"""Train one experiment, or with -m a sweep of them: compose, validate, run.

    python train.py model=small trainer.overfit_batches=1

Exit status: 0 done, 2 the user's mistake (one line), 1 anything else.
"""

import sys

from paragraph_ocr.help import show_help


def main() -> int:
    if {"--help", "-h"} & set(sys.argv):
        show_help()
        return 0
    from paragraph_ocr.command import run_typed  # Hydra alone takes longer than all of --help

    return run_typed()


if __name__ == "__main__":
    sys.exit(main())
