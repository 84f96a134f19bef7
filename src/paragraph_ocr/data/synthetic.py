"""SyntheticCorpus: running text and random words, drawn in handwriting-like faces."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from paragraph_ocr import console
from paragraph_ocr.data import fonts, text
from paragraph_ocr.data.corpus import Progress, digest, is_prepared
from paragraph_ocr.data.generated import GeneratedCorpus, Maker
from paragraph_ocr.data.paragraph import Paragraph
from paragraph_ocr.data.render import RENDERER_VERSION, render
from paragraph_ocr.data.text import Passages
from paragraph_ocr.errors import UserError

_ATTEMPTS = 100  # to draw a passage that has a word for every line


@dataclass(frozen=True, kw_only=True)
class SyntheticCorpus(GeneratedCorpus):
    """Paragraphs of `texts` in the faces of `fonts`; None stands for what is installed.

    A face counts as the source and as the writer of its paragraphs; every face serves every split.
    """

    fonts: Path | None
    texts: Path | None
    random_share: float

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
            _, left_out = fonts.load_faces(self.fonts, characters=self.characters)
            if left_out:
                console.warn(f"Fonts left out, for they lack characters: {'; '.join(left_out)}.")
        return super().prepare(root, num_workers=num_workers, progress=progress)

    def maker(self) -> Maker:
        faces, _ = fonts.load_faces(self.fonts, characters=self.characters)
        passages = Passages(self.texts, characters=self.characters, random_share=self.random_share)

        def make(generator: np.random.Generator, split: str) -> Paragraph:
            words = self._words(passages.draw, generator, split)
            face = faces[generator.integers(len(faces))]
            drawing = render(
                words,
                face,
                height=self.height,
                width=self.width,
                min_lines=self.min_lines,
                max_lines=self.max_lines,
                generator=generator,
            )
            return Paragraph(drawing.image, drawing.text, split, face.name, face.name)

        return make

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
