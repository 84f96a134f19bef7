"""Following a curriculum: looking at the loss, and going on to the next stage."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from paragraph_ocr import console
from paragraph_ocr.batch import Batch
from paragraph_ocr.curriculum import Curriculum, Reached


class FollowCurriculum(pl.Callback):
    """At the end of each epoch, go on to the next stage if this one is over, and log which it is.

    Args:
        may_begin: whether a stage's pages are there, or are to be waited for.
    """

    def __init__(
        self, curriculum: Curriculum, reached: Reached, may_begin: Callable[[int], bool]
    ) -> None:
        self.curriculum, self.reached, self._may_begin = curriculum, reached, may_begin
        self._losses: list[Tensor] = []  # of the stage's own batches since the last look
        self._steps = 0  # since the stage began

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_index: int,
    ) -> None:
        self._steps += 1
        stage = self.reached.stage
        drawn, _ = self.curriculum.draw(stage, trainer.current_epoch, batch_index)
        if drawn.stage == stage and outputs is not None:
            self._losses.append(outputs["train/loss"])

    def on_train_epoch_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        reached = self.reached
        loss = sum(map(float, self._losses)) / len(self._losses) if self._losses else None
        self._losses.clear()
        learner.log("curriculum/stage", float(reached.stage))
        if loss is not None:
            learner.log("curriculum/loss", loss)
        over = self.curriculum.is_over(reached.stage, loss=loss, steps=self._steps)
        if over and self._may_begin(reached.stage + 1):
            reached.stage += 1
            self._steps = 0
            console.say(f"step {trainer.global_step:,}: stage {reached.stage} of the curriculum")

    def state_dict(self) -> dict[str, Any]:
        return {"losses": [float(loss) for loss in self._losses], "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = [Tensor([loss])[0] for loss in state_dict["losses"]]
        self._steps = state_dict["steps"]
