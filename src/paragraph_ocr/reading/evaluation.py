"""How well paragraphs were read, in numbers: rates with intervals, groups, confusions, calibration.

Rates are those of `metrics`. Intervals are the middle 95% of a bootstrap over paragraphs: lines of one page
are not independent, pages are taken to be.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from paragraph_ocr.metrics import (
    character_error_rate,
    character_errors,
    collapse_white_space,
    word_errors,
)

RESAMPLES = 2000
_DRAWN = 2_000_000  # paragraphs drawn together, so that memory does not grow with the split

LENGTHS = (25, 50, 100, 200, 400, 800)
"""Upper ends, in characters, of the groups by length."""

BINS = 10  # of confidence


@dataclass(frozen=True, slots=True)
class Read:
    """A paragraph that was read."""

    row: int
    """In its store."""
    source: str
    writer: str
    truth: str
    reading: str
    confidences: tuple[float, ...]
    """Of each character of the reading."""

    @property
    def cer(self) -> float:
        return character_error_rate([self.reading], [self.truth])

    @property
    def errors(self) -> int:
        return character_errors(self.reading, self.truth)

    @property
    def confidence(self) -> float:
        """Mean over the characters; 1 where none was written."""
        return sum(self.confidences) / len(self.confidences) if self.confidences else 1.0


class Estimate(NamedTuple):
    """A rate with its 95% interval."""

    value: float
    low: float
    high: float


RATES = {
    "cer": ("character_errors", "characters"),
    "wer": ("word_errors", "words"),
    "exact": ("exact", "paragraphs"),
    "cer_collapsed": ("collapsed_errors", "collapsed"),
    "cer_mean": ("own_cer", "paragraphs"),
}
"""Each rate is one sum over another. `cer_mean` gives a short note the weight of a page."""


class Evaluation:
    """What came of reading a split.

    Args:
        seed: of the bootstrap.
    """

    def __init__(self, read: Sequence[Read], *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        if not read:
            raise ValueError("nothing was read")
        self.read, self.seed, self.resamples = list(read), seed, resamples

    def __len__(self) -> int:
        return len(self.read)

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Return what is summed, by name, for each paragraph."""
        rows = [_counts(one) for one in self.read]
        return {name: np.array([row[name] for row in rows], float) for name in rows[0]}

    @cached_property
    def rates(self) -> dict[str, Estimate]:
        """Return each of RATES over the whole split."""
        return self._rates(np.arange(len(self)))

    def groups(self, kind: str) -> dict[str, tuple[int, dict[str, Estimate]]]:
        """Return number of paragraphs and rates of each group, in order.

        Args:
            kind: "lines", "length" or "writer"; no group if no writer is known.
        """
        members: dict[str, list[int]] = {}
        keys = [_GROUPS[kind](one) for one in self.read]
        for _, name in sorted(set(keys)):
            members[name] = []
        for index, (_, name) in enumerate(keys):
            members[name].append(index)
        if set(members) == {_NO_WRITER}:
            return {}
        return {name: (len(rows), self._rates(np.array(rows))) for name, rows in members.items()}

    def _rates(self, rows: np.ndarray) -> dict[str, Estimate]:
        names = sorted({name for pair in RATES.values() for name in pair})
        table = np.stack([self.counts[name][rows] for name in names])
        sums = dict(zip(names, _resampled(table, self.resamples, self.seed), strict=True))
        found = {}
        for rate, (above, below) in RATES.items():
            value = _rate(self.counts[above][rows].sum(), self.counts[below][rows].sum())
            drawn = np.array([_rate(a, b) for a, b in zip(sums[above], sums[below], strict=True)])
            low, high = _middle(drawn)
            found[rate] = Estimate(value, low, high)
        return found

    @cached_property
    def edits(self) -> Counter[tuple[str, str]]:
        """Return how often each (true, written) character occurs that differ.

        A character left out is written "", one too many is true "". Their total is the number of
        character errors.
        """
        edits: Counter[tuple[str, str]] = Counter()
        for one in self.read:
            edits.update(_edits(one))
        return edits

    @property
    def kinds(self) -> dict[str, int]:
        """Return the numbers of substitutions, insertions and deletions; their sum is the errors."""
        kinds = dict.fromkeys(("substitutions", "insertions", "deletions"), 0)
        for (true, written), count in self.edits.items():
            kind = "insertions" if not true else "deletions" if not written else "substitutions"
            kinds[kind] += count
        return kinds

    @cached_property
    def occurrences(self) -> Counter[str]:
        """Return how often each character stands in the truth."""
        return Counter(character for one in self.read for character in one.truth)

    @cached_property
    def calibration(self) -> "Calibration":
        confidences: list[float] = []
        right: list[bool] = []
        for one in self.read:
            confidences += one.confidences
            right += _right(one)
        return Calibration(np.array(confidences, float), np.array(right, bool))

    def review(self, share: float) -> tuple[float, float]:
        """Return which share of all errors stands in the least confident paragraphs, and the CER of the rest.

        Args:
            share: of the paragraphs, that a person looks through; 0 to 1.
        """
        order = np.argsort([one.confidence for one in self.read], kind="stable")
        errors, characters = self.counts["character_errors"], self.counts["characters"]
        seen, rest = np.split(order, [round(share * len(order))])
        total = errors.sum()
        found = float(errors[seen].sum() / total) if total else 0.0
        return found, _rate(errors[rest].sum(), characters[rest].sum())

    def worst(self, count: int) -> list[Read]:
        """Return the paragraphs of the highest CER, of which most errors first."""
        return sorted(self.read, key=lambda one: (-one.cer, -one.errors, one.row))[:count]

    def best(self, count: int) -> list[Read]:
        """Return the paragraphs of the lowest CER, of which the longest first."""
        return sorted(self.read, key=lambda one: (one.cer, -len(one.truth), one.row))[:count]


@dataclass(frozen=True, slots=True)
class Bin:
    """Characters written with about one confidence."""

    count: int
    confidence: float
    """Mean."""
    right: float
    """Share."""


class Calibration:
    """Whether a character written with confidence 0.9 is right nine times in ten."""

    def __init__(self, confidences: np.ndarray, right: np.ndarray) -> None:
        self._confidences, self._right = confidences, right

    @property
    def bins(self) -> list[Bin]:
        """Return the bins that hold any, from least to most confident; each 1 / BINS wide."""
        places = np.minimum((self._confidences * BINS).astype(int), BINS - 1)
        return [
            Bin(
                int(here.sum()),
                float(self._confidences[here].mean()),
                float(self._right[here].mean()),
            )
            for here in (places == place for place in range(BINS))
            if here.any()
        ]

    @property
    def error(self) -> float:
        """Return the expected calibration error: the mean gap of the bins, weighted by characters."""
        total = len(self._right)
        return sum(b.count * abs(b.confidence - b.right) for b in self.bins) / max(1, total)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same paragraphs: a is the model in question, b the other."""

    rates: Mapping[str, tuple[float, float]]
    differences: Mapping[str, Estimate]
    """a - b: of an error rate, less than 0 says that a reads better."""
    p_value: float
    """Of a difference in CER at least so large, if which model read which did not matter."""
    better: int
    """Paragraphs that a reads with fewer errors."""
    worse: int


def compare(a: Evaluation, b: Evaluation, *, flips: int = 10_000) -> Comparison:
    """Return the paired comparison of two evaluations.

    The test exchanges the two readings of a paragraph or not, at random, paragraph by paragraph, and asks how
    often the pooled CERs then differ as much (a paired permutation test).

    Raises:
        ValueError: they are not of the same paragraphs in the same order.
    """
    if [one.truth for one in a.read] != [one.truth for one in b.read]:
        raise ValueError("the two did not read the same paragraphs")
    generator = np.random.default_rng(a.seed)
    gaps = a.counts["character_errors"] - b.counts["character_errors"]
    seen, as_large = abs(gaps.sum()), 0
    chunk = max(1, _DRAWN // len(gaps))
    for start in range(0, flips, chunk):
        size = (min(chunk, flips - start), len(gaps))
        signs = generator.integers(0, 2, size, dtype=np.int8) * 2 - 1
        as_large += int((np.abs(signs @ gaps) >= seen).sum())
    differences = {}
    for rate, (above, below) in RATES.items():
        pair = np.stack([a.counts[above], b.counts[above], a.counts[below]])
        ours, theirs, totals = _resampled(pair, a.resamples, a.seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            low, high = _middle(np.nan_to_num((ours - theirs) / totals))
        differences[rate] = Estimate(a.rates[rate].value - b.rates[rate].value, low, high)
    return Comparison(
        {rate: (a.rates[rate].value, b.rates[rate].value) for rate in RATES},
        differences,
        (1 + as_large) / (1 + flips),
        int((gaps < 0).sum()),
        int((gaps > 0).sum()),
    )


def _counts(one: Read) -> dict[str, float]:
    flat_reading, flat_truth = collapse_white_space(one.reading), collapse_white_space(one.truth)
    counts = {
        "characters": len(one.truth),
        "character_errors": one.errors,
        "words": len(one.truth.split()),
        "word_errors": word_errors(one.reading, one.truth),
        "collapsed": len(flat_truth),
        "collapsed_errors": character_errors(flat_reading, flat_truth),
        "exact": one.reading == one.truth,
        "own_cer": one.cer,
        "paragraphs": 1,
    }
    return {name: float(count) for name, count in counts.items()}


def _rate(errors: float, total: float) -> float:
    """Return errors / total with the convention of `metrics` for empty truths."""
    if total == 0:
        return float("inf") if errors else 0.0
    return float(errors / total)


def _resampled(table: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return sums "K R" of K columns "K N" over R samples of N paragraphs, drawn with replacement."""
    generator, number = np.random.default_rng(seed), table.shape[1]
    sums, chunk = [], max(1, _DRAWN // number)
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, number, (min(chunk, resamples - start), number))
        sums.append(table[:, drawn].sum(axis=2))
    return np.concatenate(sums, axis=1)


def _middle(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the middle 95%; an infinite value is one that was drawn."""
    low, high = np.quantile(values, (0.025, 0.975), method="nearest")
    return float(low), float(high)


_NO_WRITER = "not known"

_Key = tuple[tuple[int, str], str]  # place in the order, name


def _by_lines(one: Read) -> _Key:
    count = one.truth.count("\n") + 1
    return (count, ""), f"{count} line{'s' if count > 1 else ''}"


def _by_length(one: Read) -> _Key:
    low = 0
    for high in LENGTHS:
        if len(one.truth) <= high:
            return (
                low,
                "",
            ), f"{low + 1} to {high} characters" if low else f"up to {high} characters"
        low = high
    return (low, ""), f"over {low} characters"


def _by_writer(one: Read) -> _Key:
    return (0, one.writer), one.writer or _NO_WRITER


_GROUPS: dict[str, Callable[[Read], _Key]] = {
    "lines": _by_lines,
    "length": _by_length,
    "writer": _by_writer,
}


def _edits(one: Read) -> Iterator[tuple[str, str]]:
    for edit in Levenshtein.editops(one.truth, one.reading):
        true = "" if edit.tag == "insert" else one.truth[edit.src_pos]
        yield true, "" if edit.tag == "delete" else one.reading[edit.dest_pos]


def _right(one: Read) -> list[bool]:
    """Return of each character of the reading whether it is right where it stands."""
    right = [True] * len(one.reading)
    for edit in Levenshtein.editops(one.truth, one.reading):
        if edit.tag != "delete":
            right[edit.dest_pos] = False
    return right
