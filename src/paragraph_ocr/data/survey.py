"""What a store holds, counted for a person: figures of each split, rare characters, an HTML report."""

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from string import Template

import numpy as np
from PIL import Image

from paragraph_ocr.data.paragraph import SPLITS
from paragraph_ocr.data.store import Store
from paragraph_ocr.vocabulary import Vocabulary

RARE = 20
"""Times in training below which a character counts as rare: hardly enough to learn it."""


@dataclass(frozen=True, slots=True)
class Split:
    """One split, its texts as the model is to write them."""

    paragraphs: int
    lines: int
    lengths: np.ndarray
    """Characters of each paragraph, newlines included."""
    sizes: np.ndarray
    """True height and width of each paragraph in pixels, (n, 2)."""
    writers: int
    """Different names of writers; where none is known there are 0."""
    characters: Counter[str]

    def figures(self) -> dict[str, str]:
        """Return what is said of the split, by heading."""
        heights, widths = self.sizes.T if len(self.sizes) else (np.zeros(0), np.zeros(0))
        return {
            "paragraphs": f"{self.paragraphs:,}",
            "lines": f"{self.lines:,}",
            "characters": f"{self.characters.total():,}",
            "different characters": str(len(self.characters)),
            "characters a paragraph": _range(self.lengths),
            "height (px)": _range(heights),
            "width (px)": _range(widths),
            "writers": f"{self.writers:,}" if self.writers else "not known",
        }


def survey(store: Store, vocabulary: Vocabulary) -> dict[str, Split]:
    """Return the figures of each split; empty splits are there too."""
    texts = [vocabulary.prepare(text) for text in store.texts]
    found = {}
    for split in SPLITS:
        rows = store.rows(split)
        chosen = [texts[row] for row in rows]
        found[split] = Split(
            paragraphs=len(rows),
            lines=sum(text.count("\n") + 1 for text in chosen),
            lengths=np.array([len(text) for text in chosen], int),
            sizes=store.sizes[rows].reshape(-1, 2),
            writers=len({store.writers[row] for row in rows} - {""}),
            characters=Counter(character for text in chosen for character in text),
        )
    return found


def rare_characters(splits: Mapping[str, Split], *, fewer_than: int = RARE) -> list[str]:
    """Return the characters of any split that training holds fewer times than that, rarest first."""
    train = splits["train"].characters
    everywhere = set().union(*(split.characters for split in splits.values()))
    return sorted((c for c in everywhere if train[c] < fewer_than), key=lambda c: (train[c], c))


def report(
    title: str,
    splits: Mapping[str, Split],
    *,
    notes: Sequence[str] = (),
    pictures: Sequence[tuple[str, Image.Image]] = (),
) -> str:
    """Return a page of HTML that needs nothing but itself; every text in it is escaped.

    Args:
        notes: lines below the title.
        pictures: heading and image, in order.
    """
    figures = {name: split.figures() for name, split in splits.items()}
    rare = rare_characters(splits)
    counts = [
        (_shown(c), *(f"{splits[name].characters[c]:,}" for name in splits))
        for c in sorted(set().union(*(split.characters for split in splits.values())))
    ]
    return _PAGE.substitute(
        title=html.escape(title),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in notes),
        figures=_table(
            ("", *figures),
            [
                (heading, *(column[heading] for column in figures.values()))
                for heading in next(iter(figures.values()))
            ],
        ),
        lengths="".join(
            f"<figure><figcaption>{html.escape(name)}</figcaption>{_histogram(split.lengths)}</figure>"
            for name, split in splits.items()
        ),
        rare=f"Fewer than {RARE} times in training: "
        + (html.escape(", ".join(map(_shown, rare))) or "none")
        + ".",
        characters=_table(("character", *splits), counts),
        pictures="".join(
            f"<h2>{html.escape(heading)}</h2>"
            f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{_png(picture)}">'
            for heading, picture in pictures
        ),
    )


def _range(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low} to {high}, {values.mean():.0f} in the mean"


def _shown(character: str) -> str:
    return {" ": "space", "\n": "newline"}.get(character, character)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', heads)}{''.join(line('td', row) for row in rows)}</table>"


def _histogram(lengths: np.ndarray, *, bars: int = 30) -> str:
    """Return bars of how many paragraphs have how many characters, as SVG."""
    if not len(lengths):
        return ""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    counts, _ = np.histogram(lengths, bins=min(bars, high - low), range=(low, high))
    broad = 240 / len(counts)
    drawn = "".join(
        f'<rect x="{index * broad:.1f}" y="{60 - 60 * count / counts.max():.1f}" '
        f'width="{max(0.5, broad - 1):.1f}" height="{60 * count / counts.max():.1f}"/>'
        for index, count in enumerate(counts.tolist())
    )
    ends = (
        f'<text x="0" y="74">{low}</text><text x="240" y="74" text-anchor="end">{high - 1}</text>'
    )
    return f'<svg viewBox="0 0 240 78" width="240" height="78">{drawn}{ends}</svg>'


def _png(picture: Image.Image) -> str:
    packed = BytesIO()
    picture.save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode("ascii")


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2rem 0.8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.columns { columns: 18rem; }
.columns table { break-inside: auto; }
figure { display: inline-block; margin: 0 2rem 0 0; }
svg { fill: #456; font-size: 11px; }
img { display: block; max-width: 100%; border: 1px solid #ddd; }
</style>
</head>
<body>
<h1>$title</h1>
$notes
<h2>Splits</h2>
$figures
<h2>Characters a paragraph</h2>
$lengths
$pictures
<h2>Characters</h2>
<p>$rare</p>
<div class="columns">$characters</div>
</body>
</html>
""")
