"""Character and word error rates and exact matches, pooled over a split.

Rates are errors over ground-truth lengths, both summed over all paragraphs first, so that a short
note does not weigh as much as a page. Case, punctuation and newlines count. A split whose texts are
all empty has rate 0 if the readings are empty too, else infinity.
"""

from collections.abc import Sequence

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torchmetrics import Metric


def character_errors(reading: str, truth: str) -> int:
    """Return the fewest insertions, deletions and substitutions that turn one text into the other."""
    return Levenshtein.distance(reading, truth)


def word_errors(reading: str, truth: str) -> int:
    """Return the same distance in words: what white space, newlines included, separates."""
    return Levenshtein.distance(reading.split(), truth.split())


def collapse_white_space(text: str) -> str:
    """Return the text in one line, each run of white space as one blank."""
    return " ".join(text.split())


def character_error_rate(readings: Sequence[str], truths: Sequence[str]) -> float:
    """Return the pooled CER; see the module for empty texts."""
    errors = sum(map(character_errors, readings, truths))
    return _rate(errors, sum(map(len, truths)))


def word_error_rate(readings: Sequence[str], truths: Sequence[str]) -> float:
    """Return the pooled WER; see the module for empty texts."""
    errors = sum(map(word_errors, readings, truths))
    return _rate(errors, sum(len(truth.split()) for truth in truths))


def _rate(errors: int, total: int) -> float:
    if total == 0:
        return float("inf") if errors else 0.0
    return errors / total


class ReadingErrors(Metric):
    """`cer`, `wer`, `exact` and `cer_collapsed` (white space collapsed) over a split.

    Holds sums of integers alone, so that processes add up theirs without rounding.
    """

    full_state_update = False
    _counts = (
        "characters",
        "character_errors",
        "words",
        "word_errors",
        "collapsed",
        "collapsed_errors",
        "exact",
        "paragraphs",
    )

    def __init__(self) -> None:
        super().__init__()
        for name in self._counts:
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, readings: Sequence[str], truths: Sequence[str]) -> None:
        for reading, truth in zip(readings, truths, strict=True):
            flat_reading, flat_truth = collapse_white_space(reading), collapse_white_space(truth)
            self.characters += len(truth)
            self.character_errors += character_errors(reading, truth)
            self.words += len(truth.split())
            self.word_errors += word_errors(reading, truth)
            self.collapsed += len(flat_truth)
            self.collapsed_errors += character_errors(flat_reading, flat_truth)
            self.exact += reading == truth
            self.paragraphs += 1

    def compute(self) -> dict[str, float]:
        count = {name: int(getattr(self, name)) for name in self._counts}
        return {
            "cer": _rate(count["character_errors"], count["characters"]),
            "wer": _rate(count["word_errors"], count["words"]),
            "exact": _rate(count["exact"], count["paragraphs"]),
            "cer_collapsed": _rate(count["collapsed_errors"], count["collapsed"]),
        }


class TokenLoss(Metric):
    """The loss of a split: the mean over its tokens, in whatever batches and processes they came.

    Lightning's own mean, weighted by tokens, rounds half their number down when it adds up processes.
    """

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, total: Tensor, tokens: Tensor) -> None:
        """Add a batch: its loss summed over tokens, and their number."""
        self.total += total.float()
        self.tokens += tokens

    def compute(self) -> Tensor:
        return self.total / self.tokens
