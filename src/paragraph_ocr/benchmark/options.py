"""What `scripts/benchmark.py` takes, and the sizes of work; imports nothing heavy."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from paragraph_ocr.errors import UserError


@dataclass(frozen=True, slots=True)
class Size:
    """How much work a benchmark is where no option says it."""

    height: int
    width: int
    tokens: int
    num_train: int
    min_characters: int
    mean_characters: int
    steps: int
    repeats: int
    growth_batches: tuple[int, ...]
    growth_lengths: tuple[int, ...]
    growth_batch: int
    """Where the length or the size of the pages changes."""
    overrides: tuple[str, ...]


OUTPUTS = Path("outputs")

SIZES = {
    "full": Size(
        height=576,
        width=640,
        tokens=682,
        num_train=2560,
        min_characters=60,
        mean_characters=380,
        steps=10,
        repeats=10,
        growth_batches=(1, 4, 16, 64),
        growth_lengths=(128, 256, 512, 682),
        growth_batch=16,
        overrides=("datamodule=synthetic_paragraphs",),
    ),
    "tiny": Size(
        height=64,
        width=128,
        tokens=24,
        num_train=16,
        min_characters=8,
        mean_characters=14,
        steps=1,
        repeats=3,
        growth_batches=(1, 2),
        growth_lengths=(12, 24),
        growth_batch=1,
        overrides=(
            "datamodule=synthetic_notes",
            "datamodule.min_lines=1",
            "datamodule.max_lines=2",
            "datamodule.num_workers=0",
            "model.decoder.depth=2",
            "model.decoder.width=32",
            "model.decoder.feed_forward=64",
        ),
    ),
}


_MAY_BE_NONE = {"seed", "pages", "soak_steps", "num_workers"}


def _option(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every subject takes."""

    outputs: Path = field(
        default=OUTPUTS, metadata={"help": "folder of results, stores and MLflow's database"}
    )
    tracking: Literal["mlflow", "off"] = _option("mlflow", "mlflow or off")
    repeats: int | None = _option(None, "measurements of each row; null is by size")
    size: Literal["full", "tiny"] = _option("full", "full: 576x640 px, 682 tokens; tiny: seconds")

    def __post_init__(self) -> None:
        """Check that every number counts something.

        Raises:
            UserError: one is too small.
        """
        for option in fields(self):
            value = getattr(self, option.name)
            least = 0 if option.name in _MAY_BE_NONE else 1
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and not isinstance(number, bool) and number < least:
                    raise UserError(
                        f"{option.name}={number} must be {least} or more. "
                        f"Pass {option.name}={max(1, least)}."
                    )

    @property
    def sized(self) -> Size:
        return SIZES[self.size]


@dataclass(frozen=True, kw_only=True)
class WorkOptions(Options):
    """What subjects take that compute on pages."""

    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto, cpu or cuda")
    height: int | None = _option(None, "px of the pages; null is by size")
    width: int | None = _option(None, "px of the pages; null is by size")
    tokens: int | None = _option(None, "tokens of a text with start and end; null is by size")
    override: tuple[str, ...] = _option((), "overrides of train.py, parted by commas")
    seed: int = _option(0, "of weights, pages and labels")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(WorkOptions):
    batches: tuple[int, ...] = _option((), "batch sizes; none is 64,16 on a GPU and 2 on a CPU")
    steps: int | None = _option(None, "steps timed together; null is by size")
    end_to_end: bool = _option(True, "train from a store through the Trainer too")
    num_train: int | None = _option(None, "paragraphs of that store; null is by size")
    fit_steps: int | None = _option(None, "steps of that training; null is 20 times steps")
    growth: bool = _option(False, "time against batch, length and page size")
    soak_steps: int = _option(0, "steps in which nothing may grow, such as 1000; 0 is none")


@dataclass(frozen=True, kw_only=True)
class ReadOptions(WorkOptions):
    batches: tuple[int, ...] = _option((), "batch sizes; none is 1,16,64,256, on a CPU 1")
    full: bool = _option(False, "on a CPU, read all tokens: minutes for the reference")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = _option(
        "auto", "of our side: auto (what reading takes), 32-true, bf16-mixed or 16-mixed"
    )
    pages: int = _option(0, "pages of a store to read free-running, such as 232; 0 is none")
    page_batch: int = _option(16, "pages and images read together")
    checkpoint: str | None = _option(None, "run folder, MLflow run id, or released model")
    image: str | None = _option(None, "folder of images for the checkpoint to read")
    growth: bool = _option(False, "time against batch, length and page size")
    soak_steps: int = _option(0, "readings in which nothing may grow, such as 1000; 0 is none")


@dataclass(frozen=True, kw_only=True)
class DataOptions(WorkOptions):
    batch_size: int | None = _option(None, "paragraphs in a batch; null is 64, tiny 2")
    num_workers: tuple[int, ...] = _option((0, 2, 8), "numbers of loader processes, with commas")
    num_train: int | None = _option(None, "paragraphs of the store; null is by size")
    passes: int = _option(3, "epochs loaded, the first of them unmeasured")
    reads: int | None = _option(None, "pages read from the store; null is num_train")
    render: int | None = _option(None, "pages rendered; null is 200, tiny 4")


@dataclass(frozen=True, kw_only=True)
class StartOptions(Options):
    cold: bool = _option(True, "also once with nothing of the packages in the system's memory")
    override: tuple[str, ...] = _option((), "overrides of train.py, parted by commas")
