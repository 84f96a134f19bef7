"""The pace of a training that Lightning's Trainer runs."""

import time

import pytorch_lightning as pl

from paragraph_ocr.batch import Batch
from paragraph_ocr.benchmark.timing import synchronise


class Pace(pl.Callback):
    """Notes the time of every few training steps, once the device has done them.

    Attributes:
        rates: images a second of each stretch after the warm-up.
        overall: images a second from the warm-up to the end, epochs' ends included.
    """

    def __init__(self, *, warm_up: int, stretch: int) -> None:
        self.warm_up, self.stretch = warm_up, stretch
        self.rates: list[float] = []
        self.overall = float("nan")
        self._steps = self._images = self._all = 0
        self._first = self._last = 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_index: int,
    ) -> None:
        self._steps += 1
        since = self._steps - self.warm_up
        if since > 0:
            self._images += len(batch)
            self._all += len(batch)
        if since < 0 or since % self.stretch:
            return
        synchronise(learner.device)
        now = time.perf_counter()
        if since == 0:
            self._first = now
        else:
            self.rates.append(self._images / (now - self._last))
            self.overall = self._all / (now - self._first)
        self._images, self._last = 0, now
