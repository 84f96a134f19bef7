"""How fast it reads: as many tokens as the reference, pages of a store, and images from their files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paragraph_ocr import build, console
from paragraph_ocr.batch import Batch
from paragraph_ocr.benchmark.options import ReadOptions
from paragraph_ocr.benchmark.reference import (
    PUBLISHED_READING,
    Reference,
    copy_weights,
    published_precision,
    suppress_end,
)
from paragraph_ocr.benchmark.setting import Setting, free
from paragraph_ocr.benchmark.steady import growth_rows, soak_row
from paragraph_ocr.benchmark.table import Report, Row, Spread, announced, judge, rates
from paragraph_ocr.benchmark.timing import in_turn, peak_mib
from paragraph_ocr.build_model import vocabulary_from
from paragraph_ocr.config import Experiment
from paragraph_ocr.data.scan import SUFFIXES
from paragraph_ocr.errors import UserError
from paragraph_ocr.model.generate import Greedy, Reading
from paragraph_ocr.model.transformer import TransformerReader
from paragraph_ocr.reading.read import Recognizer, computes_in_bfloat16

LARGEST_OF_REFERENCE = 64
"""Greater batches have no published figure, and the reference would take minutes for them."""

TOKENS_ON_A_CPU = 64
"""Read by both unless full=true: for 682 the reference takes minutes a page there."""

_TIMES = 3  # that pages and images are read, at most

_PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def benchmark(options: ReadOptions) -> Report:
    if options.image is not None and options.checkpoint is None:
        raise UserError(
            "image= is read by a trained model. Pass checkpoint=outputs/runs/<run> too."
        )
    if options.checkpoint is not None and options.image is None and not options.pages:
        raise UserError("checkpoint= has nothing to read. Pass image=<folder>, or pages=232.")
    setting = Setting(options)
    if options.size == "full" and not (setting.on_gpu or options.full or options.tokens):
        setting.tokens = TOKENS_ON_A_CPU
        console.say(
            f"On a CPU both read {TOKENS_ON_A_CPU} tokens, not {options.sized.tokens}: "
            "full=true reads all, which takes the reference minutes."
        )
    experiment = setting.experiment()
    precision = options.precision
    if precision == "auto":
        precision = "bf16-mixed" if computes_in_bfloat16(setting.device) else "32-true"
    rows = announced(_rows(setting, experiment, precision))
    return Report("read", options, setting.environment(precision), rows)


def _rows(setting: Setting[ReadOptions], experiment: Experiment, precision: str) -> Iterator[Row]:
    options = setting.options
    batches = options.batches or ((1, 16, 64, 256) if setting.on_gpu else (1,))
    pair = Pair(setting, experiment, precision)
    for size in batches:
        yield against_reference(setting, pair, size)
    yield same_tokens(setting, pair, batches[0])
    del pair
    if options.pages:
        yield pages_of_a_store(setting)
    if options.image is not None:
        yield images(setting, Path(options.image))
    if options.growth or options.soak_steps:
        yield from _steadiness(setting, precision, batches[0])


class Pair:
    """Reference and our recognizer with the same weights; neither ever writes the end."""

    def __init__(
        self, setting: Setting[ReadOptions], experiment: Experiment, precision: str
    ) -> None:
        self.experiment, self.device = experiment, setting.device
        self.reference: Reference = setting.reference(experiment).to(self.device).eval()
        suppress_end(self.reference)
        self.ours = fixed_length(setting, experiment)
        assert isinstance(self.ours.model, TransformerReader)
        copy_weights(self.reference, self.ours.model)
        self.precision = precision

    def read(self, batch: Batch, *, precision: str | None = None) -> list[Reading]:
        """Return our readings, under the precision that is timed or another."""
        self.ours.precision = number_type(precision or self.precision)
        return self.ours.readings(batch.images)

    def read_as_published(
        self, batch: Batch, *, precision: str | None = None
    ) -> Int[Tensor, "B L"]:
        """Return the reference's tokens, in fp16 on a GPU as published, or in another precision.

        Without cuDNN's attention, which plans anew for each length of the prefix: minutes, at first.
        """
        half = under(precision or published_precision(self.device), self.device)
        with half, sdpa_kernel(_PLANLESS):
            return self.reference.read(
                batch.images, max_length=self.experiment.datamodule.max_length
            )


def fixed_length(setting: Setting[ReadOptions], experiment: Experiment) -> Recognizer:
    """Return a recognizer with random weights that reads to the last token."""
    recognizer = Recognizer(
        setting.recognizer(experiment),
        vocabulary_from(experiment.vocabulary),
        experiment,
        device=setting.device,
    )
    recognizer.decoding = Greedy(ignore_end=True)
    return recognizer


def number_type(precision: str) -> torch.dtype:
    """Return what a precision computes in; pl.Trainer's names."""
    return _HALVES.get(precision, torch.float32)


def under(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context that computes in this precision; pl.Trainer's names."""
    if precision not in _HALVES:
        return nullcontext()
    return torch.autocast(device.type, _HALVES[precision])


def against_reference(setting: Setting[ReadOptions], pair: Pair, size: int) -> Row:
    """Return the seconds of reading a batch to the last token, of both."""
    batch = setting.batch(size, pair.experiment)
    last: dict[str, Any] = {}
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: last.update(ours=pair.read(batch)),
        "theirs": lambda: last.update(theirs=pair.read_as_published(batch)),
    }
    if size > LARGEST_OF_REFERENCE:
        del works["theirs"]
    peak = peak_mib(works["ours"], setting.device)
    with console.progress(f"read, batch {size}", apart=True) as told:
        seconds = in_turn(works, setting.device, repeats=setting.repeats, told=told)
    written = size * (setting.tokens - 1)
    beside = {"characters_per_s": written / Spread.of(seconds["ours"]).median, "peak_mib": peak}
    work = f"batch {size}, {setting.tokens} tokens"
    ours = Spread.of(seconds["ours"])
    if "theirs" not in works:
        note = f"the reference is measured up to a batch of {LARGEST_OF_REFERENCE}"
        return Row("read", work, "s", ours, beside=beside, note=note)
    theirs = Spread.of(seconds["theirs"])
    published = PUBLISHED_READING.get(size) if setting.is_published(pair.experiment) else None
    void, note = judge(theirs.median, published, setting.device_name)
    beside["their_characters_per_s"] = written / theirs.median
    beside["equal_pages"], beside["equal_tokens"] = shares_equal(last["ours"], last["theirs"])
    return Row("read", work, "s", ours, theirs, void=void, note=note, beside=beside)


def same_tokens(setting: Setting[ReadOptions], pair: Pair, size: int) -> Row:
    """Return the share of tokens on which both agree in float32, where they must be equal."""
    batch = setting.batch(size, pair.experiment)
    with _without_tf32():
        ours = pair.read(batch, precision="32-true")
        theirs = pair.read_as_published(batch, precision="32-true")
    pages, tokens = shares_equal(ours, theirs)
    kinds = len({token for reading in ours for token in reading.tokens})
    return Row(
        "same tokens",
        f"float32, batch {size}, {setting.tokens} tokens",
        "of tokens equal",
        Spread.of([tokens]),
        note="equal" if tokens == 1 else "NOT EQUAL",
        beside={"equal_pages": pages, "different_tokens_written": float(kinds)},
    )


def _without_tf32() -> AbstractContextManager[Any]:
    """Return a context in which float32 is float32: convolutions would round to TF32 on a GPU."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def shares_equal(ours: Sequence[Reading], theirs: Int[Tensor, "B L"]) -> tuple[float, float]:
    """Return the shares of pages and of tokens on which both agree, the start left out."""
    written = torch.tensor([reading.tokens for reading in ours])
    same = written == theirs[:, 1:].cpu()
    return float(same.all(dim=1).float().mean()), float(same.float().mean())


def pages_of_a_store(setting: Setting[ReadOptions]) -> Row:
    """Return the seconds to read the test pages of a store, each to its own end, loading included."""
    options = setting.options
    changed = {}
    if options.checkpoint is not None:
        recognizer = Recognizer.load(options.checkpoint, device=setting.device.type)
        (changed["height"], changed["width"]) = recognizer.canvas
        changed["tokens"] = recognizer.max_length
    experiment = setting.experiment(
        f"datamodule.num_test={options.pages}",
        "datamodule.num_train=1",
        f"datamodule.batch_size={options.page_batch}",
        **changed,
    )
    if options.checkpoint is None:
        vocabulary = vocabulary_from(experiment.vocabulary)
        model = setting.recognizer(experiment)
        recognizer = Recognizer(model, vocabulary, experiment, device=setting.device)
    with console.progress("prepare", apart=True) as told:
        datamodule = build.build_pages(experiment, recognizer.vocabulary, progress=told)
        datamodule.prepare_data()
    datamodule.setup("test")
    lengths: list[int] = []

    def read() -> None:
        lengths.clear()
        for batch in datamodule.test_dataloader():
            read = recognizer.read_pages(batch.images, batch.sizes)
            lengths.extend(len(transcript.text) for transcript in read)

    (seconds,) = in_turn({"": read}, setting.device, repeats=_times(setting)).values()
    untrained = "random weights hardly ever end: this is the slowest case"
    return Row(
        "pages",
        f"{options.pages} pages of a store, {options.page_batch} together",
        "s",
        Spread.of(seconds),
        note=untrained if options.checkpoint is None else "",
        beside={
            "pages_per_s": options.pages / Spread.of(seconds).median,
            "characters_a_page": sum(lengths) / len(lengths),
        },
    )


def images(setting: Setting[ReadOptions], folder: Path) -> Row:
    """Return images a second from their files to text, compared with the model alone.

    The model alone reads the same pages in the same batches, prepared before.

    Raises:
        UserError: the folder holds no image that can be read.
    """
    options = setting.options
    assert options.checkpoint is not None
    recognizer = Recognizer.load(options.checkpoint, device=setting.device.type)
    paths, pages, sizes = [], [], []
    for path in sorted(one for one in folder.rglob("*") if one.suffix.lower() in SUFFIXES):
        try:
            page, size = recognizer.page(path)
        except UserError as error:
            console.warn(f"{path} is left out: {error}")
            continue
        paths.append(path)
        pages.append(page)
        sizes.append(size)
    if not paths:
        raise UserError(f"image={folder} holds no image that can be read. Pass a folder of them.")
    count = options.page_batch

    def alone() -> None:
        for start in range(0, len(pages), count):
            covered = sizes[start : start + count]
            filled = all(size == recognizer.canvas for size in covered)
            recognizer.readings(
                torch.stack(pages[start : start + count]), None if filled else torch.tensor(covered)
            )

    def whole() -> None:
        for _ in recognizer.read_all(paths, batch_size=count):
            pass

    with console.progress("images", apart=True) as told:
        seconds = in_turn(
            {"whole": whole, "alone": alone}, setting.device, repeats=_times(setting), told=told
        )
    return Row(
        "images",
        f"{len(paths)} images from their files, {count} together",
        "images/s",
        rates(seconds["whole"], len(paths)),
        rates(seconds["alone"], len(paths)),
        against="model alone",
        note="the ratio is the share of the model's speed that is left",
    )


def _times(setting: Setting[ReadOptions]) -> int:
    return min(_TIMES, setting.repeats)


def _steadiness(setting: Setting[ReadOptions], precision: str, size: int) -> list[Row]:
    """Return rows of growth and of the soak, as asked for; our side alone."""
    options, rows = setting.options, []

    def make(size: int, **changed: int) -> Callable[[], object]:
        experiment = setting.experiment(**changed)
        recognizer = fixed_length(setting, experiment)
        batch = setting.batch(size, experiment)

        def work() -> None:
            recognizer.precision = number_type(precision)
            recognizer.readings(batch.images)

        return work

    if options.growth:
        largest = (256,) if options.size == "full" else ()
        rows += growth_rows(setting, make, batches=(*options.sized.growth_batches, *largest))
    if options.soak_steps:
        name = f"reading, batch {size}"
        rows.append(soak_row(make(size), setting, steps=options.soak_steps, name=name))
        free(setting.device)
    return rows
