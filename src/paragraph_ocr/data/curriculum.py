"""The pages of a curriculum: prepared beside training, drawn stage by stage."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from paragraph_ocr import console
from paragraph_ocr.batch import Batch
from paragraph_ocr.curriculum import Curriculum, Reached, Stage
from paragraph_ocr.data.corpus import Corpus, store_path
from paragraph_ocr.data.datamodule import ParagraphDataModule
from paragraph_ocr.data.parallel import cores
from paragraph_ocr.errors import UserError


class CurriculumDataModule(pl.LightningDataModule):
    """Training batches of a curriculum; validation and test are those of the pages themselves.

    The pages and the first stage are prepared before training, the other stages by a process beside
    it, in their order. An epoch is `look_every` steps.

    Args:
        pages: the corpus that the model is for.
        corpora: by the names that the stages use, `pages` among them.
    """

    def __init__(
        self,
        pages: ParagraphDataModule,
        corpora: Mapping[str, ParagraphDataModule],
        curriculum: Curriculum,
    ) -> None:
        super().__init__()
        self.pages, self.corpora, self.curriculum = pages, corpora, curriculum
        self.reached = Reached()
        self._ready: dict[str, Dataset[Batch]] = {}
        self._ahead: _Ahead | None = None
        self._beside: subprocess.Popen[bytes] | None = None
        self._start = (0, 0)  # look, and steps done since

    def prepare_data(self) -> None:
        """Make the stores that training begins with, and begin to make the others."""
        for name in self.curriculum.stages[0].shares:
            self.corpora[name].prepare_data()
        self.pages.prepare_data()
        needed = dict.fromkeys(name for stage in self.curriculum.stages for name in stage.shares)
        later = [
            self.corpora[name].corpus
            for name in needed
            if not store_path(*self._store(name)).exists()
        ]
        if later and self._beside is None:
            self._beside = prepare_beside(later, self.pages.root)

    def _store(self, name: str) -> tuple[Corpus, Path]:
        return self.corpora[name].corpus, self.corpora[name].root

    def setup(self, stage: str | None = None) -> None:
        self.pages.trainer = self.trainer
        self.pages.setup(stage)

    def teardown(self, stage: str) -> None:
        if self._ahead is not None:
            self._ahead.give_up()
            self._ahead = None
        if self._beside is not None and stage == "fit":
            self._beside.terminate()
            self._beside.wait()
            self._beside = None

    def train_dataloader(self) -> DataLoader[Batch]:
        mixed = MixedDataset(self._ready)
        placed = self.pages.placement != "disk"
        return DataLoader(
            mixed,
            batch_size=None,  # the dataset makes whole batches
            sampler=CurriculumOrder(self),
            # started anew at each look, which sees the corpora of a new stage
            num_workers=0 if placed else self.pages.num_workers,
            pin_memory=not placed and self.pages.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.curriculum.seed),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.pages.val_dataloader()

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.pages.test_dataloader()

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return self.pages.transfer_batch_to_device(batch, device, dataloader_idx)

    def lengths(self) -> dict[str, int]:
        """Return how many paragraphs each corpus of the stages so far has, made ready if need be."""
        stages = self.curriculum.stages
        if self._ahead is None and self.pages.placement != "disk":
            later = [name for name in self._names(len(stages)) if name not in self._ready]
            self._ahead = _Ahead(later, self._open_once_there, device=self.pages.device)
        for name in self._names(self.reached.stage + 1):
            if name not in self._ready:
                self._make_ready(name)
        return {name: len(self.corpora[name].train) for name in self._ready}

    def _names(self, num_stages: int) -> list[str]:
        """Return the corpora of the first stages."""
        stages = self.curriculum.stages[:num_stages]
        return list(dict.fromkeys(name for stage in stages for name in stage.shares))

    def _make_ready(self, name: str) -> None:
        """Have a corpus to train on, opened ahead or now, once its store is there."""
        began = time.monotonic()
        corpus = self._ahead.take(name) if self._ahead is not None else None
        if corpus is None:
            while not self._is_there(name) and self._is_being_made():
                time.sleep(0.05)
            if not self._is_there(name):
                # the process beside has failed; here its reason is seen
                self.corpora[name].prepare_data()
            corpus = self._open(name)
        self._ready[name] = corpus
        if (waited := time.monotonic() - began) > 1:
            console.warn(f"curriculum: training has waited {waited:.0f} s for the pages of {name}.")

    def may_begin(self, stage: int) -> bool:
        """Return whether to begin a stage: its pages are there, or else are waited for."""
        shares = self.curriculum.stages[stage].shares
        return self.curriculum.wait or all(self._needs_no_waiting(name) for name in shares)

    def _needs_no_waiting(self, name: str) -> bool:
        if name in self._ready:
            return True
        if self._ahead is not None:  # which gives up if they cannot be made, as will be told
            return self._ahead.is_done(name)
        return self._is_there(name) or not self._is_being_made()

    def _is_there(self, name: str) -> bool:
        return store_path(*self._store(name)).exists()

    def _is_being_made(self) -> bool:
        return self._beside is not None and self._beside.poll() is None

    def _open(self, name: str) -> Dataset[Batch]:
        module = self.corpora[name]
        module.trainer = self.trainer
        module.setup("fit")
        return module.batches("train")

    def _open_once_there(self, name: str, unwanted: threading.Event) -> Dataset[Batch] | None:
        """Return a corpus as soon as its store is there; None if it will not be, or is unwanted."""
        while not self._is_there(name):
            if not self._is_being_made() or unwanted.wait(0.1):
                return None
        return None if unwanted.is_set() else self._open(name)

    def state_dict(self) -> dict[str, Any]:
        """Return where in the curriculum the training stands, and in what."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()
        per_look = max(1, int(self.trainer.num_training_batches))
        look, step = divmod(progress["processed"], per_look)
        texts = {name: self.corpora[name].train.store.digest() for name in self._ready}
        return {"look": look, "step": step, "stage": self.reached.stage, "texts": texts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the training stood.

        Raises:
            UserError: a store holds other paragraphs than then.
        """
        self.reached.stage = state_dict["stage"]
        self._start = state_dict["look"], state_dict["step"]
        self.lengths()
        for name, digest in state_dict["texts"].items():
            store = self.corpora[name].train.store
            if store.digest() != digest:
                raise UserError(
                    f"{store.path} holds other paragraphs than when this run began. Bring back the "
                    "data, or start a new run with model.weights=<run folder>."
                )

    def start_of(self, look: int) -> int:
        """Return how many of a look's steps are done: those before a resumed run."""
        return self._start[1] if look == self._start[0] else 0

    @property
    def first_look(self) -> int:
        return self._start[0]

    def __repr__(self) -> str:
        stages = "\n".join(
            f"stage {number}: {', '.join(stage.shares)}, {stage.batch_size} together, "
            + (", ".join(_ends(stage)) or "to the end")
            for number, stage in enumerate(self.curriculum.stages)
        )
        return f"{self.pages!r}\n{stages}"


def _ends(stage: Stage) -> Iterator[str]:
    if stage.below is not None:
        yield f"until train/loss is below {stage.below:g}"
    if stage.max_steps is not None:
        yield f"for {stage.max_steps:,} steps at most"


class _Ahead:
    """A thread that opens corpora one after the other, while others are trained on.

    Pages on a card are copied on a stream of the thread's own: the training's is full of steps.
    """

    def __init__(
        self,
        names: Sequence[str],
        open_once_there: Callable[[str, threading.Event], Dataset[Batch] | None],
        *,
        device: torch.device,
    ) -> None:
        self._open_once_there = open_once_there
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._unwanted = threading.Event()
        self._corpora: dict[str, Future[Dataset[Batch] | None]] = {n: Future() for n in names}
        # of a training that fails nobody waits for it
        self._thread = threading.Thread(target=self._work, args=[dict(self._corpora)], daemon=True)
        self._thread.start()

    def _work(self, asked: Mapping[str, "Future[Dataset[Batch] | None]"]) -> None:
        with torch.cuda.stream(self._stream):
            for name, future in asked.items():
                try:
                    corpus = self._open_once_there(name, self._unwanted)
                    if self._stream is not None:
                        self._stream.synchronize()
                except Exception as error:  # told where the corpus is opened then
                    future.set_exception(error)
                else:
                    future.set_result(corpus)

    def is_done(self, name: str) -> bool:
        """Return whether a corpus would be taken at once."""
        return name not in self._corpora or self._corpora[name].done()

    def take(self, name: str) -> Dataset[Batch] | None:
        """Return a corpus once it is open; None if it was not asked for, or could not be opened."""
        asked = self._corpora.pop(name, None)
        return asked.result() if asked is not None and asked.exception() is None else None

    def give_up(self) -> None:
        self._unwanted.set()
        self._thread.join()


class MixedDataset(Dataset[Batch]):
    """Batches of several datasets, each asked for by its name and positions."""

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        self.datasets = datasets

    def __getitem__(self, asked: tuple[str, list[int]]) -> Batch:
        name, positions = asked
        return self.datasets[name][positions]


class CurriculumOrder(DistributedSampler[tuple[str, list[int]]]):
    """The corpus and positions of each step of a look, at the stage that is reached when it begins.

    By type a DistributedSampler, because Lightning would wrap any other.
    """

    def __init__(self, module: CurriculumDataModule) -> None:
        self.module = module
        self.epoch = module.first_look  # the first iterator is made before Lightning sets it

    def __len__(self) -> int:
        return self.module.curriculum.look_every

    def __iter__(self) -> Iterator[tuple[str, list[int]]]:
        lengths = self.module.lengths()
        steps = range(self.module.start_of(self.epoch), len(self))
        return iter([self._step(step, lengths) for step in steps])

    def _step(self, step: int, lengths: Mapping[str, int]) -> tuple[str, list[int]]:
        curriculum = self.module.curriculum
        draw, generator = curriculum.draw(self.module.reached.stage, self.epoch, step)
        length = lengths[draw.corpus]
        size = min(curriculum.stages[draw.stage].batch_size, length)
        positions = generator.choice(length, size=size, replace=False)
        # a position beyond the length is the same paragraph, augmented or stacked anew
        return draw.corpus, (positions + self.epoch * length).tolist()


def prepare_beside(corpora: Sequence[Corpus], root: Path) -> "subprocess.Popen[bytes]":
    """Start a process that prepares the corpora one after the other, and ends with this one."""
    program = "from paragraph_ocr.data.curriculum import _prepare_all; _prepare_all()"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # of what goes wrong, training tells where it needs the pages
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps((corpora, root, os.getpid())))
    process.stdin.close()
    return process


def _prepare_all() -> None:
    """Prepare the corpora that the parent process has written, politely."""
    corpora, root, parent = pickle.load(sys.stdin.buffer)  # from this package, not from a file
    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # and no half of a store stays

    def watch(done: int, total: int) -> None:
        if os.getppid() != parent:
            sys.exit()

    for corpus in corpora:
        corpus.prepare(root, num_workers=max(1, cores() - 1), progress=watch)
