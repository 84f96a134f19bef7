"""A curriculum: stages of training pages, each a mix of corpora, each left once it is learnt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Stage:
    """What is trained on for a while."""

    shares: Mapping[str, float]
    """Of each corpus among the batches; they need not add up to 1."""
    batch_size: int
    below: float | None
    """The stage is over once the mean loss of its batches since the last look is below this."""
    max_steps: int | None
    """Or after so many steps; the last stage has neither."""


class Draw(NamedTuple):
    """Where a batch comes from."""

    stage: int
    corpus: str


@dataclass(frozen=True)
class Curriculum:
    """Stages, and how a batch of each is drawn: seed, look and step alone decide.

    Args:
        look_every: steps between two looks at whether a stage is over; Lightning's epochs.
        replay: share of the batches that come from earlier stages, all alike.
        wait: whether a stage that is over is left at once, and training waits for the pages of the next.
            If not, the stage goes on until they are there; how long that is hangs on the machine.
    """

    stages: Sequence[Stage]
    look_every: int
    replay: float
    seed: int
    wait: bool = True

    def draw(self, stage: int, look: int, step: int) -> tuple[Draw, np.random.Generator]:
        """Return what the batch of a step is drawn from, and what draws it."""
        generator = np.random.default_rng([self.seed, look, step])
        if stage and generator.random() < self.replay:
            stage = int(generator.integers(stage))
        names = list(self.stages[stage].shares)
        shares = np.array([*self.stages[stage].shares.values()])
        return Draw(stage, names[generator.choice(len(names), p=shares / shares.sum())]), generator

    def is_over(self, stage: int, *, loss: float | None, steps: int) -> bool:
        """Return whether to go on to the next stage.

        Args:
            loss: mean of the stage's batches since the last look; None if there were none.
            steps: since the stage began.
        """
        asked = self.stages[stage]
        learnt = asked.below is not None and loss is not None and loss < asked.below
        return learnt or (asked.max_steps is not None and steps >= asked.max_steps)


@dataclass
class Reached:
    """How far a training has come; what it follows and what it trains on share one."""

    stage: int = 0
