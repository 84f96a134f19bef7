"""The error a person can mend, and the nearest names to what they typed."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of the user's: one line that gives key=value, what is allowed and what to type.

    `train.py` and the scripts print it without a traceback and exit with status 2. A caller's bug
    is a ValueError instead.
    """


class Stopped(Exception):
    """Work ended before its aim for a reason that a person can mend; shown without a traceback."""


class Diverged(Stopped, FloatingPointError):
    """A loss, a gradient or a metric is no number any more."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Return at most `count` known names that resemble `name`, the most similar first."""
    return get_close_matches(name, sorted(known), n=count, cutoff=0.5)
