"""Small models that the tests of this folder read with."""

import pytest
import torch

from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.generate import SpecialTokens
from paragraph_ocr.model.transformer import TransformerReader

SPECIAL = SpecialTokens(start=1, end=2, pad=3)


@pytest.fixture
def make_recognizer():
    """Return a function that makes a small model with random weights, in evaluation mode."""

    def make(*, seed=0, norm="pre", tied=True, num_tokens=20, dropout=0.0, freeze=False):
        torch.manual_seed(seed)
        encoder = Encoder("test_resnet", stage=3, freeze=freeze)
        decoder = Decoder(
            num_tokens=num_tokens,
            depth=2,
            width=32,
            heads=4,
            feed_forward=64,
            dropout=dropout,
            norm=norm,
            tied=tied,
            max_length=64,
        )
        recognizer = TransformerReader(encoder, decoder, special=SPECIAL).eval()
        # large weights, so that what is written depends on the page and rows end raggedly
        for parameter in decoder.layers.parameters():
            if parameter.ndim == 2:
                parameter.data *= 3
        recognizer.project.weight.data *= 30
        return recognizer

    return make


@pytest.fixture
def pages():
    torch.manual_seed(1)
    return torch.randint(0, 256, (6, 1, 48, 80), dtype=torch.uint8)
