"""How fast pages come: from the store onto the device, out of the store at random, from the renderer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar

from paragraph_ocr import build, console
from paragraph_ocr.batch import Batch
from paragraph_ocr.benchmark.options import DataOptions
from paragraph_ocr.benchmark.pace import Pace
from paragraph_ocr.benchmark.setting import Setting, placements
from paragraph_ocr.benchmark.table import Report, Row, Spread, announced, rates
from paragraph_ocr.benchmark.timing import in_turn
from paragraph_ocr.config import Experiment
from paragraph_ocr.data.augment import Augment
from paragraph_ocr.data.datamodule import ParagraphDataModule
from paragraph_ocr.data.generated import GeneratedCorpus
from paragraph_ocr.data.store import Store, pack
from paragraph_ocr.errors import UserError
from paragraph_ocr.run import quiet_lightning

BATCH_SIZE = {"full": 64, "tiny": 2}
RENDERED = {"full": 200, "tiny": 4}


def benchmark(options: DataOptions) -> Report:
    if options.passes < 2:
        raise UserError(f"passes={options.passes} must be 2 or more: the first is not measured.")
    quiet_lightning()
    setting = Setting(options)
    experiment = _experiment(setting)
    vocabulary = build.build_vocabulary(experiment)
    with console.progress("prepare", apart=True) as told:
        datamodule = build.build_pages(experiment, vocabulary, progress=told)
        datamodule.prepare_data()
    rows = announced(_rows(setting, datamodule))
    return Report("data", options, setting.environment(), rows)


def _rows(setting: Setting[DataOptions], datamodule: ParagraphDataModule) -> Iterator[Row]:
    options = setting.options
    for placement in placements() or ("disk",):
        if placement == "gpu" and not setting.on_gpu:
            continue
        # pages that lie on the GPU are not brought by any worker
        for workers in (0,) if placement == "gpu" else options.num_workers:
            yield loaded(setting, placement, workers)
    store = Store(datamodule.corpus.prepare(datamodule.root, num_workers=0))
    yield random_reads(setting, store)
    if isinstance(datamodule.corpus, GeneratedCorpus):
        yield from rendered(setting, datamodule.corpus)


def _experiment(setting: Setting[DataOptions], *more: str) -> Experiment:
    options = setting.options
    return setting.experiment(
        "regularization=standard",
        "regularization.gradient_clip=0",  # there are no gradients
        f"datamodule.batch_size={options.batch_size or BATCH_SIZE[options.size]}",
        f"datamodule.num_train={options.num_train or options.sized.num_train}",
        "trainer.compile=false",
        f"trainer.max_epochs={options.passes}",
        "trainer.limit_val_batches=0",
        *more,
    )


class Loading(pl.LightningModule):
    """Takes batches as a learner does, augments them on the device, and learns nothing."""

    def __init__(self, augment: Augment) -> None:
        super().__init__()
        self.augment = augment

    def training_step(self, batch: Batch, batch_index: int) -> None:
        self.augment(batch.images, batch.sizes)

    def configure_optimizers(self) -> None:
        return None


def loaded(setting: Setting[DataOptions], placement: str, workers: int) -> Row:
    """Return images a second from the store to an augmented batch on the device, epoch by epoch."""
    more = [f"datamodule.placement={placement}"] if placements() else []
    experiment = _experiment(setting, f"datamodule.num_workers={workers}", *more)
    datamodule = build.build_pages(experiment, build.build_vocabulary(experiment))
    pl.seed_everything(experiment.seed, workers=True, verbose=False)
    datamodule.prepare_data()
    datamodule.setup("fit")
    an_epoch = len(datamodule.train_dataloader())
    pace = Pace(warm_up=an_epoch, stretch=an_epoch)
    trainer = build.build_trainer(
        experiment,
        folder=setting.options.outputs / "benchmarks",
        logger=None,
        callbacks=[pace, ProgressBar()],  # Lightning's base of all bars shows nothing
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(no optimizer|returned .?None|no `validation_step`).*")
        trainer.fit(Loading(build.build_augment(experiment)), datamodule=datamodule)
    spread = Spread.of(pace.rates)
    return Row(
        "store to augmented batch",
        f"placement {placement}, {workers} workers",
        "images/s",
        Spread(pace.overall, spread.low, spread.high),
        beside={"batch": float(experiment.datamodule.batch_size)},
    )


def random_reads(setting: Setting[DataOptions], store: Store) -> Row:
    """Return pages a second that one core reads from the store in random order."""
    count = setting.options.reads or min(1000, len(store))
    order = np.random.default_rng(setting.options.seed).integers(len(store), size=count)

    def read() -> None:
        for row in order:
            store.image(int(row))

    (seconds,) = in_turn({"read": read}, setting.device, repeats=setting.repeats).values()
    height, width = store.canvases[0]
    return Row(
        "store",
        f"random reads of {height}x{width} px, one core",
        "images/s",
        rates(seconds, count),
        note="from the system's cache",
    )


def rendered(setting: Setting[DataOptions], corpus: GeneratedCorpus) -> list[Row]:
    """Return pages a second that one core renders, and renders and packs as into a store."""
    count = setting.options.render or RENDERED[setting.options.size]
    make = corpus.maker()
    drawn = 0

    def paragraphs() -> Iterator:
        nonlocal drawn
        for _ in range(count):
            drawn += 1
            yield make(np.random.default_rng([setting.options.seed, drawn]), "train")

    works = {
        "rendered": lambda: [None for _ in paragraphs()],
        "rendered and packed": lambda: [None for paragraph in paragraphs() if pack(paragraph)],
    }
    with _one_thread():
        seconds = in_turn(works, setting.device, repeats=min(3, setting.repeats))
    size = f"{corpus.height}x{corpus.width} px, one core"
    return [
        Row("renderer", f"{name}, {size}", "pages/s", rates(seconds[name], count)) for name in works
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep OpenCV to one core while the block runs, as in a process that prepares a store."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
