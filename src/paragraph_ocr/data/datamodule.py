"""A corpus as Lightning loads it: prepared once, shuffled reproducibly, or held to a few batches."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from paragraph_ocr import console
from paragraph_ocr.batch import Batch
from paragraph_ocr.data.augment import Strengths
from paragraph_ocr.data.corpus import Corpus
from paragraph_ocr.data.dataset import BatchDataset, HeldDataset, LabelPadding, ParagraphDataset
from paragraph_ocr.data.parallel import cores
from paragraph_ocr.data.placed import PlacedDataset, require_room
from paragraph_ocr.data.stacked import StackedDataset, Stacking
from paragraph_ocr.data.store import Store
from paragraph_ocr.data.text import SPLITS
from paragraph_ocr.errors import UserError
from paragraph_ocr.vocabulary import Vocabulary, listed, normalise

_NAMED = 20  # paragraphs named in a message


class Order(DistributedSampler[list[int]]):
    """One process's batches of the positions 0 to `length`, in an order that seed and epoch decide.

    In each step all processes together take what one process would with a batch as large as theirs.
    Each epoch's positions go on where those of the epoch before end, so that a position tells a
    worker, which lives on from epoch to epoch, also the epoch.

    By type a DistributedSampler, because Lightning would wrap any other in one that keeps the order
    of the first epoch.

    Args:
        seed: None keeps positions in order.
        in_step: whether every process must have as many batches (training needs that, and a score must
            not have it): where shares differ by a batch, positions are repeated, fewer than there are
            processes.
        start: epoch, and batches of this process that are done in it: where a resumed run goes on.
        label_lengths: of the positions; within windows of `buckets` steps of the shuffled order, those of
            like length come together, and then the steps are shuffled. None, or a single step: they do not.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        in_step: bool = False,
        start: tuple[int, int] = (0, 0),
        label_lengths: np.ndarray | None = None,
        buckets: int = 0,
    ) -> None:
        self.length, self.batch_size, self.order_seed = length, batch_size, seed
        self.rank, self.num_replicas, self.in_step = rank, world_size, in_step
        self.start = start
        self.label_lengths, self.buckets = label_lengths, buckets
        self.epoch = start[0]  # the first iterator is made before Lightning calls `set_epoch`

    def __len__(self) -> int:
        share = len(range(self.rank, self._total(), self.num_replicas))
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        mine = self._order()[self.rank :: self.num_replicas] + self.epoch * self.length
        done = self.start[1] if self.epoch == self.start[0] else 0
        begins = range(done * self.batch_size, len(mine), self.batch_size)
        return iter([mine[begin : begin + self.batch_size].tolist() for begin in begins])

    def _order(self) -> np.ndarray:
        """Return the positions of all processes: process r takes each `world_size`th from r on."""
        if self.order_seed is None:
            return np.resize(np.arange(self.length), self._total())
        generator = np.random.default_rng([self.order_seed, self.epoch])
        order = np.resize(generator.permutation(self.length), self._total())
        if self.label_lengths is None or self.buckets < 2:
            return order
        return self._bucketed(order, self.label_lengths, generator)

    def _bucketed(
        self, order: np.ndarray, lengths: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """Return the order with like lengths in a step; its last step, if it is not full, as it is."""
        step = self.batch_size * self.num_replicas
        full = len(order) - len(order) % step
        for begin in range(0, full, self.buckets * step):
            window = order[begin : min(begin + self.buckets * step, full)]
            window[:] = window[np.argsort(lengths[window], kind="stable")]
        steps = order[:full].reshape(-1, step)
        return np.concatenate([generator.permutation(steps).ravel(), order[full:]])

    def _total(self) -> int:
        most, fewest = -(-self.length // self.num_replicas), self.length // self.num_replicas
        if not self.in_step or -(-most // self.batch_size) == -(-fewest // self.batch_size):
            return self.length
        return most * self.num_replicas


class ParagraphDataModule(pl.LightningDataModule):
    """Train, validation and test batches of a corpus.

    Args:
        root: folder of the stores.
        max_length: tokens that a transcription may have, start and end included.
        too_long: what to do with a longer one: "error", or "skip" it.
        stacking: makes training paragraphs from the lines in the store.
        overfit_batches: a number of batches, or (a float) a share of them, that are all there is:
            unshuffled, the same in training, validation and test. 0 uses all data properly.
        strengths: of the augmentation that the loader's workers do to training pages; None is none.
        placement: where pages are while a run goes on. "disk": in the store, and the workers unpack what
            a batch needs. "host", "gpu": unpacked in the memory of this host or of the trainer's device,
            and nothing is done to them on the way to a batch. Batches are the same in all three.
        length_buckets: steps among which training paragraphs of like length come together; 0 mixes them.
        pad_to_multiple: labels are padded to a multiple of this, up to `max_length`; 1 pads them to the
            longest of a batch.
        progress: told (done, total) while a store is being prepared.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        root: Path,
        vocabulary: Vocabulary,
        batch_size: int,
        num_workers: int,
        max_length: int,
        too_long: str = "error",
        stacking: Stacking | None = None,
        overfit_batches: int | float = 0,
        strengths: Strengths | None = None,
        placement: str = "disk",
        length_buckets: int = 0,
        pad_to_multiple: int = 1,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        if placement != "disk" and (stacking or (strengths or Strengths()).work):
            raise ValueError(f"placement {placement!r} keeps pages as they are in the store")
        if stacking and length_buckets:
            raise ValueError("the lengths of stacked paragraphs are known only once they are made")
        self.corpus, self.root, self.vocabulary = corpus, root, vocabulary
        self.batch_size, self.num_workers = batch_size, num_workers
        self.max_length, self.overfit_batches, self.seed = max_length, overfit_batches, seed
        self.too_long, self.stacking = too_long, stacking
        self.strengths, self.placement = strengths or Strengths(), placement
        self.length_buckets = length_buckets
        self._padding = LabelPadding(multiple=pad_to_multiple, most=max_length)
        self._progress = progress
        self._datasets: dict[str, ParagraphDataset | StackedDataset | HeldDataset] = {}
        self._placed: dict[str, PlacedDataset] = {}
        self._start = (0, 0)  # epoch, batches done in it

    def prepare_data(self) -> None:
        """Make the store, on all cores, unless it is there."""
        # a worker of somebody's pool (Hydra's joblib launcher) cannot start workers of its own
        alone = multiprocessing.parent_process() is not None
        workers = 0 if alone else cores()
        self.corpus.prepare(self.root, num_workers=workers, progress=self._progress)

    def setup(self, stage: str | None = None) -> None:
        """Open the store and check its transcriptions.

        Raises:
            UserError: a transcription is too long, or holds unknown characters; or a split has no
                paragraph, or none left.
        """
        if self._datasets:
            return
        store = Store(self.corpus.prepare(self.root, num_workers=0))
        self.vocabulary.require([self.vocabulary.prepare(text) for text in store.texts])
        self._tell_unknown(store.texts)
        augmentation = (self.strengths, self.seed) if any(asdict(self.strengths).values()) else None
        rows = {split: store.rows(split) for split in SPLITS}
        lines: list[int] = []
        if self.stacking is not None:
            lines = [row for row in rows["train"] if store.canvas(row) != self.stacking.canvas]
            rows["train"] = sorted(set(rows["train"]) - set(lines)) * self.stacking.originals
        too_long = self._too_long(store, sorted({row for found in rows.values() for row in found}))
        for split, found in rows.items():
            kept = [row for row in found if row not in too_long]
            if found and not kept:
                raise UserError(
                    f"datamodule.max_length={self.max_length} leaves no paragraph of {split}. "
                    f"Pass datamodule.max_length={max(too_long.values())}."
                )
            self._datasets[split] = ParagraphDataset(
                store,
                kept,
                self.vocabulary,
                augmentation=augmentation if split == "train" else None,
            )
        if self.stacking is not None:
            self._datasets["train"] = StackedDataset(
                store,
                self.vocabulary,
                self.stacking,
                originals=self._datasets["train"].rows,
                lines=lines,
                max_length=self.max_length,
                seed=self.seed,
                augmentation=augmentation,
            )
        if self.overfit_batches:
            train = self._datasets["train"]
            same = HeldDataset(train, self._num_overfit_batches(len(train)) * self.batch_size)
            self._datasets = dict.fromkeys(SPLITS, same)

    def _too_long(self, store: Store, rows: Sequence[int]) -> dict[int, int]:
        """Return the tokens of each row that has more than `max_length`, having said how many.

        Raises:
            UserError: there are any, and they are not to be skipped.
        """
        lengths = {row: len(self.vocabulary.prepare(store.texts[row])) + 2 for row in rows}
        too_long = {row: length for row, length in lengths.items() if length > self.max_length}
        if not too_long:
            return {}
        named = ", ".join(store.sources[row] for row in [*too_long][:_NAMED])
        more = f" and {len(too_long) - _NAMED} more" if len(too_long) > _NAMED else ""
        found = (
            f"datamodule.max_length={self.max_length} is too short for {len(too_long)} of "
            f"{len(rows)} transcriptions ({named}{more})"
        )
        if self.too_long == "skip":
            console.warn(f"{found}, which are left out.")
            return too_long
        raise UserError(
            f"{found}. Pass datamodule.max_length={max(too_long.values())} or more, or "
            "datamodule.too_long=skip to leave them out."
        )

    def _tell_unknown(self, texts: Sequence[str]) -> None:
        """Say which characters are dropped or replaced, and how often."""
        plain = (normalise(text, fold=self.vocabulary.fold) for text in texts)
        if unknown := self.vocabulary.unknown(plain):
            console.warn(
                f"vocabulary.unknown={self.vocabulary.treatment} changes {listed(unknown)}."
            )

    def _num_overfit_batches(self, length: int) -> int:
        if isinstance(self.overfit_batches, int):
            return self.overfit_batches
        batches = -(-length // self.batch_size)
        return max(1, round(self.overfit_batches * batches))

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", seed=None if self.overfit_batches else self.seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("val", seed=None)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test", seed=None)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        # Lightning copies what is no plain tensor while the GPU waits
        return batch.to(device, non_blocking=device.type == "cuda")

    def state_dict(self) -> dict[str, Any]:
        """Return where in its order the training stands, and in what; Lightning keeps it in checkpoints."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()
        epoch, batch = divmod(progress["processed"], max(1, int(self.trainer.num_training_batches)))
        store = self._datasets["train"].store
        return {"epoch": epoch, "batch": batch, "texts": store.digest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the training stood.

        Raises:
            UserError: the store holds other paragraphs than then.
        """
        store = self._datasets["train"].store
        if state_dict["texts"] != store.digest():
            raise UserError(
                f"{store.path} holds other paragraphs than when this run began. Bring back the data, "
                "or start a new run with model.weights=<run folder>."
            )
        self._start = state_dict["epoch"], state_dict["batch"]

    def _loader(self, split: str, *, seed: int | None) -> DataLoader[Batch]:
        dataset = self._datasets[split]
        world_size = self.trainer.world_size if self.trainer else 1
        if split != "train" and world_size > max(1, len(dataset)):
            raise UserError(  # a process without a paragraph has nothing to add to the score
                f"trainer.devices={world_size} are more than the {len(dataset)} paragraphs of {split}. "
                f"Pass trainer.devices={max(1, len(dataset))}."
            )
        order = Order(
            len(dataset),
            batch_size=self.batch_size,
            seed=seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=world_size,
            in_step=split == "train",
            start=self._start if split == "train" else (0, 0),
            label_lengths=self._label_lengths(dataset) if self.length_buckets else None,
            buckets=self.length_buckets,
        )
        placed = self._is_placed(split)
        # starting workers takes longer than reading a few batches does
        few = len(dataset) <= 4 * self.batch_size
        workers = 0 if placed or few else self.num_workers
        return DataLoader(
            self.batches(split),
            batch_size=None,  # the dataset makes whole batches
            sampler=order,
            num_workers=workers,
            pin_memory=not placed and self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_one_thread,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _label_lengths(
        self, dataset: ParagraphDataset | StackedDataset | HeldDataset
    ) -> np.ndarray:
        texts = dataset.store.texts
        return np.array([len(self.vocabulary.prepare(texts[row])) for row in dataset.rows])

    @property
    def train(self) -> ParagraphDataset | StackedDataset | HeldDataset:
        return self._datasets["train"]

    def batches(self, split: str) -> Dataset[Batch]:
        """Return the batches of a split, each asked for by a list of positions."""
        if self._is_placed(split):
            return self._place(split)
        return BatchDataset(self._datasets[split], padding=self._padding)

    def _is_placed(self, split: str) -> bool:
        return self.placement != "disk" and len(self._datasets[split]) > 0

    @property
    def device(self) -> torch.device:
        """Where the training is; without a trainer, the CPU."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _place(self, split: str) -> PlacedDataset:
        """Return a split in memory. The first call reads all splits, lest a test find no room at its end.

        Raises:
            UserError: there is no room for them.
        """
        if not self._placed:
            on_host = self.placement == "host"
            device = None if on_host else self.device
            processes = self.trainer.world_size if self.trainer else 1
            # overfitting has one for all splits
            distinct = {
                id(dataset): dataset
                for dataset in self._datasets.values()
                if not isinstance(dataset, StackedDataset) and len(dataset)
            }
            require_room(
                distinct.values(), device=device, placement=self.placement, processes=processes
            )
            pinned = on_host and self.device.type == "cuda"
            placed = {
                key: PlacedDataset(dataset, device=device, pinned=pinned, padding=self._padding)
                for key, dataset in distinct.items()
            }
            self._placed = {
                name: placed[id(dataset)]
                for name, dataset in self._datasets.items()
                if len(dataset)
            }
            if self.trainer is None or self.trainer.is_global_zero:
                sizes = [each.num_bytes for each in placed.values()]
                console.say(
                    f"datamodule.placement={self.placement}: {sum(sizes) / 1e9:.2f} GB of pages."
                )
        return self._placed[split]

    def __repr__(self) -> str:
        if not self._datasets:
            return f"{self.corpus.name}: not set up"
        train = self._datasets["train"]
        store = train.store
        counts = ", ".join(f"{len(d):,} {split}" for split, d in self._datasets.items())
        if self.overfit_batches:
            counts = f"the same {len(train)} paragraphs to train, validate and test"
        elif isinstance(train, StackedDataset):
            counts += (
                f" ({train.stacking.num_paragraphs:,} of train stacked anew in every epoch from "
                f"{len(train.lines):,} lines)"
            )
        canvases = ", ".join(f"{height}x{width}" for height, width in store.canvases)
        described = f"{self.corpus.name}: {counts}; {canvases} px; "
        if lengths := [
            len(store.texts[row]) for row in self._rows()
        ]:  # stacked ones are in no store
            described += f"{np.mean(lengths):.0f} characters in the mean, {max(lengths)} at most; "
        return described + str(store.path)

    def _rows(self) -> Sequence[int]:
        return sorted({row for dataset in self._datasets.values() for row in dataset.rows})


def _one_thread(worker: int) -> None:
    """Keep OpenCV in a worker to its one thread, as torch is; a pool of threads does not outlive a fork."""
    cv2.setNumThreads(0)
