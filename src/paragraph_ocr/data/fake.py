"""FakeCorpus: noise under random text, made in a second, for tests of everything but reading."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from paragraph_ocr.data.corpus import digest
from paragraph_ocr.data.generated import GeneratedCorpus, Maker
from paragraph_ocr.data.paragraph import Paragraph

_VERSION = 1  # raise it whenever the same fields give other paragraphs


@dataclass(frozen=True, kw_only=True)
class FakeCorpus(GeneratedCorpus):
    """Images and texts that have nothing to do with one another."""

    def fingerprint(self) -> str:
        identity: dict[str, Any] = {**asdict(self), "fake": _VERSION}
        return digest(identity)

    def maker(self) -> Maker:
        letters = np.array(sorted(set(self.characters) - {" ", "\n"}))

        def make(generator: np.random.Generator, split: str) -> Paragraph:
            # lines of at least one character, and the newlines between them
            length = max(self.length(generator), 2 * self.min_lines - 1)
            most = min(self.max_lines, (length + 1) // 2)
            num_lines = int(generator.integers(self.min_lines, most + 1))
            text = generator.choice(letters, size=length)
            between = np.arange(1, length - 1, 2)
            text[generator.choice(between, size=num_lines - 1, replace=False)] = "\n"
            image = generator.integers(256, size=(self.height, self.width), dtype=np.uint8)
            return Paragraph(image, "".join(text), split, "noise", "nobody")

        return make
