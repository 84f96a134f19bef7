"""How fast it trains: a step against the reference's, and training from a store against the bare step."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from paragraph_ocr import build, console
from paragraph_ocr.batch import Batch
from paragraph_ocr.benchmark.options import TrainOptions
from paragraph_ocr.benchmark.pace import Pace
from paragraph_ocr.benchmark.reference import PUBLISHED_TRAINING, ReferenceTraining
from paragraph_ocr.benchmark.setting import Setting, free, placements
from paragraph_ocr.benchmark.steady import growth_rows, soak_row
from paragraph_ocr.benchmark.table import Report, Row, Spread, announced, judge, rates
from paragraph_ocr.benchmark.timing import in_turn, peak_mib, seconds_of
from paragraph_ocr.config import AugmentationConfig, Experiment
from paragraph_ocr.learning.callbacks import Measure, TrainingProgress
from paragraph_ocr.learning.learner import Learner
from paragraph_ocr.run import quiet_lightning

WARM_UP = 3
"""Steps before measuring: the first compiles, the second may find that sizes vary."""


def benchmark(options: TrainOptions) -> Report:
    quiet_lightning()
    setting = Setting(options)
    precision = build.precision(setting.experiment().trainer)
    return Report("train", options, setting.environment(precision), announced(_rows(setting)))


def _rows(setting: Setting[TrainOptions]) -> Iterator[Row]:
    options = setting.options
    batches = options.batches or ((64, 16) if setting.on_gpu else (2,))
    for size in batches:
        yield against_reference(setting, size)
    if options.end_to_end:
        yield end_to_end(setting, batches[0])
    if options.growth:
        yield from growth_rows(setting, partial(_step, setting))
    if options.soak_steps:
        step = _step(setting, batches[0])
        yield soak_row(step, setting, steps=options.soak_steps, name=f"batch {batches[0]}")


class Training:
    """Our training step outside Lightning's loop: the parts that the Trainer calls, in its order.

    The learner's loss under the Trainer's precision, backward, clipping as configured, the optimizer.
    Not in it: loading, augmentation, logging, schedule and averaged weights.
    """

    def __init__(self, experiment: Experiment, setting: Setting[TrainOptions]) -> None:
        experiment = copy.deepcopy(experiment)
        experiment.regularization.augmentation = AugmentationConfig()
        recognizer = setting.recognizer(experiment)
        vocabulary = build.build_vocabulary(experiment)
        self.learner: Learner = build.build_learner(experiment, recognizer, vocabulary)
        self.learner.to(setting.device).train()
        self.clip = experiment.regularization.gradient_clip
        self.fabric = Fabric(
            accelerator=setting.device.type,
            devices=1,
            precision=build.precision(experiment.trainer),  # type: ignore[arg-type]
        )
        self.optimizer: Any = self.fabric.setup_optimizers(self.learner.optimizer)

    def step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch that lies on the device, and learn from it."""
        with self.fabric.autocast():
            loss, sums = self.learner.training_loss(batch)
        loss = loss / sums.tokens
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        if self.clip:
            self.fabric.clip_gradients(
                self.learner, self.optimizer, max_norm=self.clip, error_if_nonfinite=False
            )
        self.optimizer.step()
        return loss


def _step(setting: Setting[TrainOptions], size: int, **changed: int) -> Callable[[], object]:
    """Return our step on a batch of this many paragraphs, with height, width or tokens changed."""
    experiment = setting.experiment(**changed)
    training, batch = Training(experiment, setting), setting.batch(size, experiment)
    return lambda: training.step(batch)


def against_reference(setting: Setting[TrainOptions], size: int) -> Row:
    """Return images a second of our step and of the reference's, on one batch of the longest texts."""
    experiment, device = setting.experiment(), setting.device
    batch = setting.batch(size, experiment)
    theirs = ReferenceTraining(setting.reference(experiment), device)
    ours = Training(experiment, setting)
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.step(batch),
        "theirs": lambda: theirs.step(batch.images, batch.tokens),
    }
    peaks = {
        f"{name}_peak_mib": peak_mib(work, device, first=WARM_UP) for name, work in works.items()
    }
    with console.progress(f"train, batch {size}", apart=True) as told:
        seconds = in_turn(
            works,
            device,
            repeats=setting.repeats,
            warm_up=0,
            steps=setting.options.steps or setting.options.sized.steps,
            told=told,
        )
    published = PUBLISHED_TRAINING.get(size) if setting.is_published(experiment) else None
    measured = Spread.of(seconds["theirs"]).median
    void, note = judge(measured, size / published if published else None, setting.device_name)
    del works, ours, theirs
    free(device)
    return Row(
        "step",
        f"batch {size}",
        "images/s",
        rates(seconds["ours"], size),
        rates(seconds["theirs"], size),
        void=void,
        note=note,
        beside=peaks,
    )


def end_to_end(setting: Setting[TrainOptions], size: int) -> Row:
    """Return images a second of training as `train.py` does it, compared with the bare step.

    The bare step learns from the same labels, on batches that lie on the device, unaugmented; it is
    measured before and after.
    """
    options, device = setting.options, setting.device
    stretch = options.steps or options.sized.steps
    steps = options.fit_steps or 20 * stretch
    stretch = min(stretch, steps)
    num_train = options.num_train or options.sized.num_train
    # a GPU's steps are recorded when a length is seen for the second time
    warm_up = 3 * -(-num_train // size) if setting.on_gpu else max(WARM_UP, steps // 4)
    everywhere = {
        placement: _from_store(
            setting, size, steps=warm_up + steps, num_train=num_train, placement=placement
        )
        for placement in ("gpu" if setting.on_gpu else "disk", "disk")
    }
    experiment = next(iter(everywhere.values()))
    vocabulary = build.build_vocabulary(experiment)
    with console.progress("prepare", apart=True) as told:
        datamodule = build.build_pages(experiment, vocabulary, progress=told)
        datamodule.prepare_data()
    batches = _epoch_on_device(everywhere["disk"], device)
    images, endless = sum(map(len, batches)) / len(batches), cycle(batches)
    count = len(batches) * max(1, steps // len(batches))  # whole epochs, so that lengths are alike
    bare = Training(experiment, setting)

    def measure_bare() -> list[float]:
        # on a GPU a whole epoch, for code is compiled anew where lengths ask for it
        for _ in range(max(WARM_UP, len(batches)) if setting.on_gpu else WARM_UP):
            bare.step(next(endless))
        return [seconds_of(lambda: bare.step(next(endless)), device, steps=count) for _ in range(2)]

    seconds = measure_bare()
    pace = Pace(warm_up=warm_up, stretch=stretch)
    recognizer = setting.recognizer(experiment)
    trainer = build.build_trainer(
        experiment,
        folder=options.outputs / "benchmarks",
        logger=None,
        callbacks=[pace, Measure(), TrainingProgress()],
    )
    trainer.fit(build.build_learner(experiment, recognizer, vocabulary), datamodule=datamodule)
    del recognizer, trainer
    seconds += measure_bare()
    spread = Spread.of(pace.rates)
    bare_rates = rates(seconds, images)
    del bare, batches, endless, measure_bare
    free(device)
    return Row(
        "end to end",
        f"from a store, augmented, batch {size}",
        "images/s",
        Spread(pace.overall, spread.low, spread.high),
        bare_rates,
        against="bare step",
        note="the ratio is the share of the step's speed that training reaches; 0.90 is wanted",
        beside={"steps": float(steps)},
    )


def _from_store(
    setting: Setting[TrainOptions], size: int, *, steps: int, num_train: int, placement: str
) -> Experiment:
    """Return the experiment that trains from a store, augmented, for this many steps."""
    return setting.experiment(
        "regularization=standard",
        f"datamodule.batch_size={size}",
        f"datamodule.num_train={num_train}",
        *([f"datamodule.placement={placement}"] if placement in placements() else []),
        f"trainer.max_steps={steps}",
        "trainer.max_epochs=100000",
        "trainer.limit_val_batches=0",
    )


def _epoch_on_device(experiment: Experiment, device: torch.device) -> list[Batch]:
    """Return the training batches of an epoch, as the data module makes them."""
    datamodule = build.build_pages(experiment, build.build_vocabulary(experiment))
    datamodule.setup("fit")
    return [batch.to(device) for batch in datamodule.train_dataloader()]
