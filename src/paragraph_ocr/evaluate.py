"""One evaluation from start to finish: a trained model, a split of any data, a report, a run in MLflow."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from paragraph_ocr import build, console
from paragraph_ocr.config import Experiment, GeneratedData
from paragraph_ocr.data.parallel import cores
from paragraph_ocr.data.store import Store
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading.checkpoint import DEFAULT, Checkpoint, find_checkpoint
from paragraph_ocr.reading.evaluation import RESAMPLES, Comparison, Evaluation, Read, compare
from paragraph_ocr.reading.read import Recognizer
from paragraph_ocr.reading.report import Side, report
from paragraph_ocr.stored import read_config
from paragraph_ocr.tracking import TrackedRun, run_of_folder
from paragraph_ocr.validation import overridden
from paragraph_ocr.vocabulary import listed, normalise

JSON_VERSION = 1

_ANY_LENGTH = 100_000  # tokens: another corpus may hold longer texts than the model can write

_READINGS = 500  # at most, in the table that MLflow compares


@dataclass(frozen=True)
class Options:
    checkpoint: str = field(
        default=DEFAULT, metadata={"help": "run folder, MLflow run id, or released model"}
    )
    split: Literal["train", "val", "test"] = field(
        default="test", metadata={"help": "train, val or test"}
    )
    against: str | None = field(
        default=None, metadata={"help": "another checkpoint, compared paragraph by paragraph"}
    )
    limit: int | None = field(
        default=None, metadata={"help": "first paragraphs of the split; null takes all"}
    )
    show: int = field(default=12, metadata={"help": "worst and best paragraphs in the report"})
    into: Path | None = field(
        default=None, metadata={"help": "folder; null is outputs/evaluations/<run>/<data>_<split>"}
    )
    batch_size: int = field(default=16, metadata={"help": "paragraphs read together"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:<n>"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation leaves."""

    evaluation: Evaluation
    comparison: Comparison | None
    report: Path
    numbers: Path
    run_id: str | None


@dataclass(frozen=True, slots=True)
class _Model:
    """A model and the paragraphs that it is to read."""

    checkpoint: Checkpoint
    recognizer: Recognizer
    experiment: Experiment
    store: Store
    rows: list[int]

    @property
    def name(self) -> str:
        weights = self.checkpoint.weights
        folder = weights.parent.resolve().name
        return folder if weights.name == "best.safetensors" else f"{folder}/{weights.stem}"


def evaluate(options: Options, overrides: Sequence[str]) -> Outcome:
    """Read a split, write report.html and evaluation.json, log both to MLflow.

    Args:
        overrides: of `train.py`, for the data module, decoding, tracking, seed and outputs.

    Raises:
        UserError: a mistake, before anything has been read.
    """
    for key in ("limit", "show", "batch_size"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise UserError(f"{key}={value} must be 1 or more. Pass {key}=1.")
    model = _model(options.checkpoint, options, overrides)
    other = None if options.against is None else _model(options.against, options, overrides)
    if other is not None:
        _check_pair(model, other)
    data = model.experiment.datamodule
    into = options.into or (
        Path(model.experiment.outputs) / "evaluations" / model.name / f"{data.name}_{options.split}"
    )
    tracked = _track(model, other, options, overrides)
    if tracked is None:
        return _evaluate(model, other, options, into, None)
    with tracked.ending():
        return _evaluate(model, other, options, into, tracked)


def _evaluate(
    model: _Model, other: _Model | None, options: Options, into: Path, tracked: TrackedRun | None
) -> Outcome:
    seed = model.experiment.seed
    evaluation = Evaluation(_read(model, options.batch_size, model), seed=seed)
    comparison, against = None, None
    if other is not None:
        against = Evaluation(_read(other, options.batch_size, model), seed=seed)
        comparison = compare(evaluation, against)
    about = _about(model, other, options)
    tree = numbers(evaluation, comparison) | {"about": about}
    into.mkdir(parents=True, exist_ok=True)
    page, figures = into / "report.html", into / "evaluation.json"
    sides = [Side(model.name, evaluation)]
    if other is not None and against is not None:
        sides.append(Side(other.name, against))
    html = report(
        sides,
        comparison,
        about=about,
        notes=_notes(model, evaluation),
        image=lambda row: _page(model.store, row),
        show=options.show,
    )
    page.write_text(html, encoding="utf-8")
    figures.write_text(json.dumps(tree, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if tracked:
        tracked.log_metrics(_metrics(evaluation, comparison, options.split), step=0)
        pairs = [(one.truth, one.reading) for one in evaluation.read[:_READINGS]]
        tracked.log_readings(pairs, name="readings")
        for file in (page, figures):
            tracked.log_file(file)
    return Outcome(evaluation, comparison, page, figures, tracked.run_id if tracked else None)


def numbers(evaluation: Evaluation, comparison: Comparison | None) -> dict[str, Any]:
    """Return all figures of an evaluation as plain values; infinity is null."""
    groups = {
        kind: [
            {"name": name, "paragraphs": count, "rates": _plain(rates)}
            for name, (count, rates) in evaluation.groups(kind).items()
        ]
        for kind in ("lines", "length", "writer")
    }
    calibration = evaluation.calibration
    tree: dict[str, Any] = {
        "format": "paragraph-ocr evaluation",
        "version": JSON_VERSION,
        "paragraphs": len(evaluation),
        "characters": int(evaluation.counts["characters"].sum()),
        "resamples": RESAMPLES,
        "rates": _plain(evaluation.rates),
        "groups": groups,
        "errors": evaluation.kinds,
        "confusions": [
            {"true": true, "written": written, "count": count}
            for (true, written), count in evaluation.edits.most_common()
        ],
        "calibration": {
            "error": calibration.error,
            "bins": [asdict(found) for found in calibration.bins],
        },
        "readings": [
            {
                "row": one.row,
                "source": one.source,
                "writer": one.writer,
                "truth": one.truth,
                "reading": one.reading,
                "errors": one.errors,
                "cer": _finite(one.cer),
                "confidence": round(one.confidence, 4),
            }
            for one in evaluation.read
        ],
    }
    if comparison is not None:
        tree["comparison"] = {
            "rates": {rate: list(map(_finite, pair)) for rate, pair in comparison.rates.items()},
            "differences": _plain(comparison.differences),
            "p_value": comparison.p_value,
            "better": comparison.better,
            "worse": comparison.worse,
        }
    return tree


def _plain(rates: Any) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: _finite(value) for key, value in estimate._asdict().items()}
        for name, estimate in rates.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _model(named: str, options: Options, overrides: Sequence[str]) -> _Model:
    """Return a model and its paragraphs, whose store is prepared if need be."""
    typed = dict(word.partition("=")[::2] for word in overrides)
    checkpoint = find_checkpoint(named, outputs=Path(typed.get("outputs", "outputs")))
    stored = read_config(checkpoint.config)
    stored.model.weights = None  # where it started from is of no matter
    if not Path(stored.outputs).is_dir():  # those of another machine
        stored.outputs = "outputs"
    words = list(overrides)
    if any(word.startswith("datamodule=") for word in words):
        data = stored.datamodule
        own = {
            "height": data.height,
            "width": data.width,
            "normalise": data.normalise,
            "max_length": _ANY_LENGTH,
        }
        words = [*(f"datamodule.{key}={value}" for key, value in own.items()), *words]
    experiment = overridden(stored, words)
    recognizer = Recognizer.load(checkpoint.weights, device=options.device)
    recognizer.decoding = build.build_decoding(experiment, recognizer.vocabulary)
    characters = build.writable(stored, recognizer.vocabulary)
    corpus = build.build_corpus(experiment.datamodule, characters, seed=experiment.seed)
    root = Path(experiment.outputs) / "data"
    with console.progress("prepare") as progress:
        store = Store(corpus.prepare(root, num_workers=cores(), progress=progress))
    # lines that training stacks to paragraphs lie in the same store, on a canvas of their own
    canvas_of_data = (experiment.datamodule.height, experiment.datamodule.width)
    rows = store.rows(options.split)
    if len(store.canvases) > 1:
        rows = [row for row in rows if store.canvas(row) == canvas_of_data]
    if not rows:
        raise UserError(
            f"split={options.split}: datamodule={experiment.datamodule.name} has no paragraph in it. "
            "Pass split=<another>, or datamodule.split."
        )
    return _Model(checkpoint, recognizer, experiment, store, rows[: options.limit])


def _check_pair(model: _Model, other: _Model) -> None:
    """Check that both read the same paragraphs.

    Raises:
        UserError: generated pages depend on the canvas, and the canvases differ.
    """
    texts, others = ([m.store.texts[row] for row in m.rows] for m in (model, other))
    if texts == others:
        same_store = model.store.fingerprint == other.store.fingerprint
        if same_store or not isinstance(model.experiment.datamodule, GeneratedData):
            return
    data = model.experiment.datamodule
    raise UserError(
        f"against={other.name} would read other pages than {model.name}: their own data or canvases "
        f"differ. Pass datamodule={data.name} datamodule.height={data.height} "
        f"datamodule.width={data.width} and what else makes the data, such as seed={model.experiment.seed}."
    )


def _read(model: _Model, batch_size: int, judge: _Model) -> list[Read]:
    """Return the reading of each paragraph beside its truth, both folded as `judge`'s vocabulary says."""
    store, fold, read = model.store, judge.recognizer.vocabulary.fold, []
    with console.progress("read") as progress:
        for start in range(0, len(model.rows), batch_size):
            rows = model.rows[start : start + batch_size]
            pages = torch.from_numpy(np.stack([store.image(row) for row in rows]))[:, None]
            sizes = torch.from_numpy(store.sizes[rows].astype(np.int64))
            filled = bool((sizes == torch.tensor(pages.shape[2:])).all())
            transcripts = model.recognizer.read_pages(pages, None if filled else sizes)
            for row, transcript in zip(rows, transcripts, strict=True):
                text = transcript.text if model is judge else normalise(transcript.text, fold=fold)
                read.append(
                    Read(
                        row,
                        store.sources[row],
                        store.writers[row],
                        normalise(store.texts[row], fold=fold),
                        text,
                        tuple(one.confidence for one in transcript.characters),
                    )
                )
            progress(len(read), len(model.rows))
    return read


def _page(store: Store, row: int) -> np.ndarray:
    """Return the true page of a row, uint8 (H, W): 0 is paper."""
    height, width = store.sizes[row]
    return store.image(row)[:height, :width]


def _about(model: _Model, other: _Model | None, options: Options) -> dict[str, str]:
    data, decoding = model.experiment.datamodule, model.experiment.decoding
    shown = {
        "checkpoint": str(model.checkpoint.weights),
        "data": data.name + (f" in {data.root}" if data.root else ""),
        "split": options.split + (f", its first {len(model.rows)}" if options.limit else ""),
        "canvas": f"{data.height}x{data.width} px" + (", normalised" if data.normalise else ""),
        "decoding": decoding.name
        + (f", {decoding.beam_width} beams" if decoding.name == "beam" else "")
        + (f" of {decoding.readings} readings" if decoding.views else "")
        + (f", words of {decoding.lexicon}" if decoding.lexicon else ""),
        "store": model.store.path.name,
    }
    if other is not None:
        shown["against"] = str(other.checkpoint.weights)
    return shown


def _notes(model: _Model, evaluation: Evaluation) -> list[str]:
    """Return what a reader of the report has to know of this data and model."""
    notes = []
    vocabulary, longest = model.recognizer.vocabulary, model.recognizer.max_length - 2
    if unknown := vocabulary.unknown(one.truth for one in evaluation.read):
        notes.append(
            f"The model cannot write {listed(unknown)}: each counts as an error "
            f"({unknown.total():,} of the characters)."
        )
    if over := sum(len(one.truth) > longest for one in evaluation.read):
        notes.append(
            f"{over} paragraphs have more than the {longest} characters that the model can write."
        )
    if vocabulary.fold:
        notes.append("Typographic quotes and dashes of the truth are folded, as in training.")
    return notes


def _track(
    model: _Model, other: _Model | None, options: Options, overrides: Sequence[str]
) -> TrackedRun | None:
    """Return a run for this evaluation, below the run that trained the model if MLflow knows it."""
    experiment = model.experiment
    tracking, outputs = experiment.tracking, Path(experiment.outputs)
    if tracking.name == "off":
        return None
    place = {"experiment_name": tracking.experiment_name, "uri": tracking.uri}
    parent = run_of_folder(model.checkpoint.weights.parent, outputs=outputs, **place)  # type: ignore[arg-type]
    parameters = {
        "checkpoint": model.name,
        "split": options.split,
        "limit": options.limit,
        "against": None if other is None else other.name,
        **{f"datamodule.{key}": value for key, value in asdict(experiment.datamodule).items()},
        **{f"decoding.{key}": value for key, value in asdict(experiment.decoding).items()},
    }
    return TrackedRun(
        outputs,
        name=f"evaluate {model.name} on {experiment.datamodule.name}/{options.split}",
        parameters=parameters,
        tags={"kind": "evaluation", "checkpoint": str(model.checkpoint.weights)},
        parent=parent,
        **place,  # type: ignore[arg-type]
    )


def _metrics(evaluation: Evaluation, comparison: Comparison | None, split: str) -> dict[str, float]:
    """Return metrics under the names of training, so that the UI puts them into the same columns."""
    metrics: dict[str, float] = {}
    for name, (value, low, high) in evaluation.rates.items():
        metrics |= {
            f"{split}/{name}": value,
            f"{split}/{name}_low": low,
            f"{split}/{name}_high": high,
        }
    for name, count in evaluation.kinds.items():
        metrics[f"{split}/{name}"] = float(count)
    metrics[f"{split}/calibration_error"] = evaluation.calibration.error
    if comparison is not None:
        difference = comparison.differences["cer"]
        metrics |= {
            f"{split}/cer_difference": difference.value,
            f"{split}/cer_difference_low": difference.low,
            f"{split}/cer_difference_high": difference.high,
            f"{split}/p_value": comparison.p_value,
        }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
