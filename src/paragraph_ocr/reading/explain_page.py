"""All that can be shown of one reading: pictures, an animation, and one page with all of them."""

import base64
import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import torch
from jaxtyping import UInt8

from paragraph_ocr.errors import UserError
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.transformer import TransformerReader
from paragraph_ocr.reading import explain_figures as draw
from paragraph_ocr.reading.explain import (
    Circuit,
    Trace,
    circuits,
    feature_maps,
    layers_of,
    logit_lens,
    require_transformer,
    trace,
    trace_free,
)
from paragraph_ocr.reading.read import Picture, Recognizer
from paragraph_ocr.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Explanation:
    """One page, and what the model did with it."""

    model: TransformerReader
    vocabulary: Vocabulary
    canvas: UInt8[np.ndarray, "H W"]
    size: tuple[int, int]
    """Height and width of the page on its canvas."""
    truth: str | None
    told: Trace
    """Fed with the true text; where that is not known, with the model's own."""
    free: Trace

    @property
    def page(self) -> UInt8[np.ndarray, "h w"]:
        return self.canvas[: self.size[0], : self.size[1]]

    def read(self, seen: Trace) -> list[str]:
        """Return the tokens that the positions of a trace have read."""
        return [self.vocabulary.tokens[token] for token in seen.tokens.tolist()]

    def written(self, seen: Trace) -> list[str]:
        """Return the likeliest token after each position of a trace."""
        return [self.vocabulary.tokens[token] for token in seen.logits.argmax(dim=-1).tolist()]

    @property
    def targets(self) -> list[str]:
        """What each position of `told` should write; the likeliest where the truth is not known."""
        if self.truth is None:
            return self.written(self.told)
        return [*self.truth, self.vocabulary.tokens[self.vocabulary.end]]


@dataclass(frozen=True, slots=True)
class Plate:
    """A picture of the explanation."""

    file: str
    heading: str
    caption: str
    data: bytes


def explain_image(
    recognizer: Recognizer, image: Picture, *, text: str | None = None
) -> Explanation:
    """Return what the model does with an image, fed with the text if it is known.

    Raises:
        UserError: the model has no attention, the image cannot be read, or the text is too long or
            has unknown characters.
    """
    model, vocabulary = require_transformer(recognizer.model), recognizer.vocabulary
    canvas, size = recognizer.page(image)
    (height,) = recognizer.lowest(canvas[None])
    canvas, size = canvas[:, :height], (min(height, size[0]), size[1])
    covered = None if size == tuple(canvas.shape[1:]) else size
    free = trace_free(model, canvas, size=covered, max_length=recognizer.max_length)
    told = free
    if text is not None:
        text = vocabulary.prepare(text)
        fed = vocabulary.encode(text)[:-1]
        if len(fed) >= recognizer.max_length:
            raise UserError(
                f"text: {len(text)} characters are more than the model's {recognizer.max_length - 2}. "
                "Pass the text of this image, or an image of fewer lines."
            )
        told = trace(model, canvas, fed, size=covered)
    return Explanation(model, vocabulary, canvas[0].numpy(), size, text, told, free)


def plates(told: Explanation) -> Iterator[Plate]:
    """Yield every picture, in the order in which they explain one another."""
    model, seen, targets = told.model, told.told, told.targets
    decoder, encoder = model.decoder, model.encoder
    assert isinstance(encoder, Encoder)
    read = told.read(seen)
    covered = None if told.size == told.canvas.shape else told.size
    maps = feature_maps(encoder, _tensor(told.canvas), size=covered)
    looks = seen.looks()
    middle = _middle(targets)
    sheet = draw.attention_by_character(told.page, looks, targets, cell_px=seen.cell_px)
    by_head = draw.attention_by_head(told.page, seen, middle, targets[middle])
    lens = draw.lens(
        logit_lens(decoder, seen.streams), seen.stages, targets, told.vocabulary.tokens
    )
    labels = {"teacher-forced": targets, "free-running": told.written(told.free)}
    traces = {"teacher-forced": seen, "free-running": told.free}
    if told.truth is None:
        labels.pop("teacher-forced"), traces.pop("teacher-forced")
    figures = {
        "readings": draw.readings(
            seen,
            told.free,
            targets,
            told.vocabulary.tokens,
            name="true text" if told.truth is not None else "own reading",
        ),
        "entropy": draw.entropies(traces, labels),
        "features": draw.features(told.page, maps),
        "attention": sheet,
        "attention_path": draw.attention_path(seen, targets),
        "attention_average": draw.attention_averages(told.page, seen),
        "attention_heads": by_head,
        "causal_mask": draw.causal(seen, read),
        "positions": draw.positions(
            decoder, length=len(read), grid=(looks.shape[1], looks.shape[2])
        ),
        "embeddings": draw.embeddings(seen, decoder, read),
        "logit_lens": lens,
        "circuits": draw.spectra(_circuits(model), width=decoder.width),
    }
    for name, figure in figures.items():
        yield Plate(f"{name}.png", *_WORDS[name], draw.png(figure))
        if name == "attention":
            frames = draw.animate(told.page, looks, targets, cell_px=seen.cell_px)
            yield Plate("attention.gif", *_WORDS["animation"], draw.gif(frames))


def write_explanation(told: Explanation, folder: Path, *, title: str) -> Path:
    """Write every picture and the page that shows them all; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for plate in plates(told):
        (folder / plate.file).write_bytes(plate.data)
        made.append(plate)
    path = folder / "explain.html"
    path.write_text(page(told, made, title=title), encoding="utf-8")
    return path


def page(told: Explanation, made: list[Plate], *, title: str) -> str:
    """Return a page of HTML that needs nothing but itself; every text in it is escaped."""
    texts = {"free-running": "".join(told.read(told.free)[1:])}
    if told.truth is not None:
        texts = {
            "true text": told.truth,
            "teacher-forced": "".join(told.written(told.told)),
        } | texts
    return _PAGE.substitute(
        title=html.escape(title),
        texts="".join(
            f"<tr><th>{html.escape(name)}</th><td><pre>{html.escape(text)}</pre></td></tr>"
            for name, text in texts.items()
        ),
        untaught="" if told.truth is not None else f"<p>{_UNTAUGHT}</p>",
        plates="".join(
            f"<h2>{html.escape(plate.heading)}</h2><p>{html.escape(plate.caption)}</p>"
            f'<img alt="{html.escape(plate.heading)}" src="data:image/{plate.file[-3:]};base64,'
            f'{base64.b64encode(plate.data).decode("ascii")}">'
            for plate in made
        ),
        most=draw.MOST_LABELS,
    )


def _circuits(model: TransformerReader) -> dict[str, list[Circuit]]:
    """Return the circuits of every attention, named by layer."""
    found = {}
    for number, layer in enumerate(layers_of(model.decoder), start=1):
        for kind, attention in (("self", layer.self_attention), ("cross", layer.cross_attention)):
            for name, heads in circuits(attention).items():
                found[f"layer {number}, {kind}-attention, {name}"] = heads
    return found


def _middle(targets: list[str]) -> int:
    """Return the position nearest to the middle that writes no white space."""
    middle = len(targets) // 2
    inked = [i for i, text in enumerate(targets) if not text.isspace()] or [middle]
    return min(inked, key=lambda i: abs(i - middle))


def _tensor(canvas: UInt8[np.ndarray, "H W"]) -> UInt8[torch.Tensor, "1 H W"]:
    return torch.from_numpy(canvas)[None]


_UNTAUGHT = (
    "The true text of this image was not given, so the model was fed its own reading: what should be "
    "written and what is written are the same below. Put the text into a .txt file beside the image, or "
    "pass text=FILE, to see teacher forcing and mistakes."
)

_WORDS = {
    "readings": (
        "Fed the truth, and fed its own words",
        "In training the decoder is fed the true characters and has only to name the next one "
        "(teacher forcing). When it reads, it is fed what it has written itself (free-running), so that "
        "one mistake can lead to others. Blue: how sure it was. Red: not what stands at that place.",
    ),
    "entropy": (
        "How undecided it was",
        "The entropy of each distribution over the vocabulary. 0 bits: one character is "
        "certain; the most is reached where all are alike, as in a model that has learnt nothing. Look "
        "for peaks at letters that look alike, at the beginnings of words and at the end of the text.",
    ),
    "features": (
        "What the ResNet hands on",
        "A row for each resolution: the mean size of all channels, then the four channels that vary "
        "most over the page. Strokes become edges, edges become parts of letters; the last row is what "
        "the decoder can look at, a cell a vector.",
    ),
    "attention": (
        "Where it looks for each character",
        "Cross-attention of the last layer, averaged over its heads: how much of each cell goes into the "
        "character above the picture. A model that reads looks at the character it is writing; one that "
        "only guesses from the text so far looks everywhere.",
    ),
    "animation": (
        "The same along the text",
        "The eye of the model, moving over the page while it writes.",
    ),
    "attention_path": (
        "The path of the eye",
        "The same attention summed over the columns of the page (above) and over its rows (below). Reading "
        "is a staircase down the rows, and for each line a stroke from left to right.",
    ),
    "attention_average": (
        "Attention averaged over the text",
        "What each layer looked at in all, averaged over heads and characters.",
    ),
    "attention_heads": (
        "Heads and layers apart",
        "Every head of every layer, for one character in the middle of the text. Heads divide the "
        "work: some look at the character itself, others at what comes before or after, or at the paper.",
    ),
    "causal_mask": (
        "No looking ahead",
        "All characters are learnt at once, so each position must be kept from seeing those after it: the "
        "mask. Beside it, how self-attention spreads over what may be seen.",
    ),
    "positions": (
        "Where things stand",
        "Attention does not know order. So a code of sines is added to each character for its position "
        "in the text, and to each cell for its row and column on the page. Near cells have like codes.",
    ),
    "embeddings": (
        "Characters with and without their positions",
        "Without positions every e is the same vector, a chequered pattern on the right. With them "
        "each stands apart, and neighbours are a little alike.",
    ),
    "logit_lens": (
        "The residual stream, read too early",
        "Each block adds to a stream of vectors, and the read-out turns the last into characters. Reading "
        "the stream after every block shows where the answer arises: what is read from the page appears "
        "with a cross-attention. Before it the stream says where to look rather than what to write. The "
        "top row is what is written.",
    ),
    "circuits": (
        "Low rank",
        "Each head works through two products of matrices: QK decides what looks at what, OV what is carried "
        "over. Both have at most the rank of the head's width. The steeper the curve falls against that of "
        "random matrices of the same shape, the fewer directions the head uses; the effective rank counts "
        "them.",
    ),
}
"""Heading and caption of each picture."""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
p { max-width: 46rem; }
th { text-align: left; vertical-align: top; padding-right: 1rem; }
pre { margin: 0 0 0.5rem; }
img { max-width: 100%; }
</style>
</head>
<body>
<h1>$title</h1>
<table>$texts</table>
$untaught
<p>Figures of single characters show the first $most.</p>
$plates
</body>
</html>
""")
