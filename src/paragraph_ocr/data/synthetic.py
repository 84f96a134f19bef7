"""SyntheticCorpus: running text and random words, drawn in handwriting-like faces."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from paragraph_ocr import console
from paragraph_ocr.data import fonts, text
from paragraph_ocr.data.corpus import Progress, digest, is_prepared
from paragraph_ocr.data.cut_out import cut_out
from paragraph_ocr.data.fonts import Face
from paragraph_ocr.data.generated import GeneratedCorpus, Maker
from paragraph_ocr.data.mixed_face import MixedFace, drawn_mix
from paragraph_ocr.data.paragraph import Paragraph
from paragraph_ocr.data.render import RENDERER_VERSION, render
from paragraph_ocr.data.text import Passages
from paragraph_ocr.errors import UserError, nearest

_ATTEMPTS = 100  # to draw a passage that has a word for every line


@dataclass(frozen=True, kw_only=True)
class SyntheticCorpus(GeneratedCorpus):
    """Paragraphs of `texts` in the faces of `fonts`; None stands for what is installed.

    A face counts as the source and as the writer of its paragraphs. Every face serves every split, unless
    some are held out: they serve validation and test, and the others training.

    Raises:
        UserError: a face that is held out is not there, or none is left to train on.
    """

    fonts: Path | None
    texts: Path | None
    random_share: float
    test_random_share: float | None = None
    """Of validation and test; None stands for `random_share`."""
    held_out: tuple[str, ...] = ()
    jitter: float = 0.0
    """How much each letter differs from others of its kind; 1 is a careless hand."""
    pressure: float = 0.0
    """Share of the ink that comes and goes along a page."""
    joined: float = 0.0
    """Share of neighbouring lower-case letters that a stroke joins; a hand joins most or few."""
    word_slant_deg: float = 0.0
    """Standard deviation of each word's own slant."""
    crossed_out: float = 0.0
    """Share of paragraphs in which one or two words more are written, and crossed out."""
    baseline_wave: float = 0.0
    """Em by which a line may drift either way from level."""
    uneven_lines: float = 0.0
    """Share of paragraphs whose lines stand far apart, at uneven distances, some short and indented."""
    mixed_faces: float = 0.0
    """Share of training paragraphs of which some letters are those of another face."""
    stretch: float = 0.0
    """Standard deviation of the logarithm of how much wider letters are than their face's, in training."""
    reach: float = 0.0
    """The same of how much farther they reach above the height of x and below the line; never less."""
    spread: float = 0.0
    """Most em by which letters stand farther apart and are joined, on half of the training paragraphs."""
    lean_deg: float = 0.0
    """Most by which half of the hands lean farther to the right, in training."""
    line_slope_deg: float = 0.0
    """Standard deviation of how far lines are from level, in training."""
    long_bars: float = 0.0
    """Most heights of x by which half of the hands cross a t farther than it is wide, in training."""
    underlined: float = 0.0
    """Share of training paragraphs in which one or two words are underlined."""
    cut_out: float = 0.0
    """Share of training paragraphs that are cut out of a page, through neighbouring lines or close by."""
    forms: float = 0.0
    """Heights of x by which a hand bends each kind of letter out of its face's form, in training."""

    def fingerprint(self) -> str:
        identity = {
            **asdict(self),
            "fonts": fonts.digest_fonts(fonts.find_faces(self.fonts)),
            "texts": text.text_identity(self.texts),
            "text": text.TEXT_VERSION,
            "renderer": RENDERER_VERSION,
        }
        return digest(identity)

    def prepare(self, root: Path, *, num_workers: int, progress: Progress | None = None) -> Path:
        if not is_prepared(self, root):
            self._faces()  # whose mistakes are told better here than by a worker
            _, left_out = fonts.load_faces(self.fonts, characters=self.characters)
            if left_out:
                console.warn(f"Fonts left out, for they lack characters: {'; '.join(left_out)}.")
        return super().prepare(root, num_workers=num_workers, progress=progress)

    def maker(self) -> Maker:
        faces_of = self._faces()
        passages = Passages(
            self.texts,
            characters=self.characters,
            random_share=self.random_share,
            test_random_share=self.test_random_share,
        )

        # validation and test are to tell of faces as they are
        trained = {
            "stretch": self.stretch,
            "reach": self.reach,
            "spread": self.spread,
            "lean_deg": self.lean_deg,
            "line_slope_deg": self.line_slope_deg,
            "long_bars": self.long_bars,
            "underlined": self.underlined,
            "forms": self.forms,
        }

        def make(generator: np.random.Generator, split: str) -> Paragraph:
            words = self._words(passages.draw, generator, split)
            faces = faces_of[split]
            own = faces[generator.integers(len(faces))]
            face: Face | MixedFace = own
            if split == "train" and self.mixed_faces:
                (extra,) = generator.spawn(1)
                if extra.random() < self.mixed_faces:
                    face = drawn_mix(own, faces, self.characters, extra)
            drawing = render(
                words,
                face,
                height=self.height,
                width=self.width,
                min_lines=self.min_lines,
                max_lines=self.max_lines,
                jitter=self.jitter,
                pressure=self.pressure,
                joined=self.joined,
                word_slant_deg=self.word_slant_deg,
                crossed_out=self.crossed_out,
                baseline_wave=self.baseline_wave,
                uneven_lines=self.uneven_lines,
                generator=generator,
                **(trained if split == "train" else {}),
            )
            if split == "train" and self.cut_out:
                (extra,) = generator.spawn(1)
                if extra.random() < self.cut_out:
                    drawing = cut_out(drawing, extra)
            middles = (drawing.letters[:, :2] + drawing.letters[:, 2:]) // 2
            return Paragraph(drawing.image, drawing.text, split, face.name, face.name, middles)

        return make

    def _faces(self) -> dict[str, list[Face]]:
        """Return the faces of each split."""
        faces, _ = fonts.load_faces(self.fonts, characters=self.characters)
        names = [face.name for face in faces]
        for name in self.held_out:
            if name not in names:
                close = nearest(name, names)
                raise UserError(
                    f"datamodule.held_out={name} is none of the {len(names)} faces (nearest: "
                    f"{', '.join(close) or 'none'}). Pass names of font files without their endings."
                )
        held = [face for face in faces if face.name in self.held_out]
        rest = [face for face in faces if face.name not in self.held_out]
        if not rest:
            raise UserError("datamodule.held_out leaves no face to train on. Hold out fewer.")
        return {"train": rest, "val": held or rest, "test": held or rest}

    def _words(
        self, draw: Callable[..., list[str]], generator: np.random.Generator, split: str
    ) -> list[str]:
        """Return the words of a passage, at least one for each of `min_lines`."""
        for _ in range(_ATTEMPTS):
            words = draw(
                generator,
                split,
                length=self.length(generator),
                minimum=self.min_characters,
                maximum=self.max_characters,
            )
            if len(words) >= self.min_lines:
                return words
        raise UserError(
            f"datamodule.min_lines={self.min_lines} needs as many words, more than datamodule."
            f"min_characters={self.min_characters} gives. Pass a greater datamodule.min_characters."
        )
