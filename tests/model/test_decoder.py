import math

import pytest
import torch
from torch import nn

from paragraph_ocr.benchmark.reference import Reference, copy_weights
from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.generate import SpecialTokens
from paragraph_ocr.model.positions import sine_code
from paragraph_ocr.model.transformer import TransformerReader


def make_decoder(norm, *, depth=2, width=32, heads=4, feed_forward=48, num_tokens=20):
    torch.manual_seed(0)
    return Decoder(
        num_tokens=num_tokens,
        depth=depth,
        width=width,
        heads=heads,
        feed_forward=feed_forward,
        dropout=0.0,
        norm=norm,
        tied=False,
        max_length=682,
    ).eval()


def torchs_layers(decoder, norm):
    """Return torch's own decoder with the same weights."""
    first = decoder.layers[0]
    width, feed_forward = first.expand.in_features, first.expand.out_features
    layer = nn.TransformerDecoderLayer(
        width,
        first.self_attention.heads,
        feed_forward,
        0.0,
        batch_first=True,
        norm_first=norm == "pre",
    )
    theirs = nn.TransformerDecoder(
        layer, len(decoder.layers), norm=nn.LayerNorm(width) if norm == "pre" else None
    ).eval()
    for ours, torchs in zip(decoder.layers, theirs.layers, strict=True):
        pairs = (
            (ours.self_attention, torchs.self_attn),
            (ours.cross_attention, torchs.multihead_attn),
        )
        for mine, their in pairs:
            their.in_proj_weight.data = torch.cat([mine.query.weight, mine.key_value.weight])
            their.in_proj_bias.data = torch.cat([mine.query.bias, mine.key_value.bias])
            their.out_proj.load_state_dict(mine.out.state_dict())
        torchs.linear1.load_state_dict(ours.expand.state_dict())
        torchs.linear2.load_state_dict(ours.contract.state_dict())
        for index, name in enumerate(("norm1", "norm2", "norm3")):
            getattr(torchs, name).load_state_dict(ours.norms[index].state_dict())
    return theirs


def slow_logits(decoder, theirs, tokens, memory):
    width = decoder.width
    states = decoder.embedding(tokens) * math.sqrt(width) + sine_code(tokens.shape[1], width)
    mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
    states = theirs(states, memory, tgt_mask=mask)
    return states @ decoder.read_out.weight.T + decoder.bias


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_layers_compute_what_torchs_own_decoder_computes(norm):
    decoder = make_decoder(norm)
    tokens, memory = torch.randint(4, 20, (3, 17)), torch.randn(3, 11, 32)
    expected = slow_logits(decoder, torchs_layers(decoder, norm), tokens, memory)
    torch.testing.assert_close(decoder(tokens, memory), expected, atol=1e-5, rtol=1e-5)


def test_model_reference_is_the_published_network_shape_for_shape():
    decoder = make_decoder("post", depth=4, width=256, heads=4, feed_forward=1024, num_tokens=84)
    encoder = Encoder("resnet18", stage=4, in_channels=3)
    ours = TransformerReader(encoder, decoder, special=SpecialTokens(1, 2, 3)).eval()
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 2) == 15.56

    torch.manual_seed(0)
    reference = Reference().eval()
    for module in reference.modules():  # statistics that are not the trivial ones
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    copy_weights(reference, ours)
    page = torch.randint(0, 256, (1, 1, 576, 640), dtype=torch.uint8)
    tokens = torch.randint(4, 84, (1, 40))
    with torch.no_grad():
        assert reference.encode(page).shape == (360, 1, 256)
        expected = reference(page, tokens)
        torch.testing.assert_close(ours(page, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_later_token_changes_no_earlier_logits(norm):
    decoder = make_decoder(norm)
    tokens, memory = torch.randint(4, 20, (2, 12)), torch.randn(2, 7, 32)
    changed = tokens.clone()
    changed[:, 8:] = 4 + (changed[:, 8:] - 3) % 16
    before, after = decoder(tokens, memory), decoder(changed, memory)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_masked_memory_is_as_if_it_were_not_there():
    decoder = make_decoder("pre")
    tokens, memory = torch.randint(4, 20, (2, 9)), torch.randn(2, 10, 32)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 6:] = False
    torch.testing.assert_close(decoder(tokens, memory, mask), decoder(tokens, memory[:, :6]))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_steps_over_the_cache_give_the_logits_of_all_positions_at_once(norm):
    decoder = make_decoder(norm)
    tokens, memory = torch.randint(4, 20, (3, 15)), torch.randn(3, 8, 32)
    mask = torch.rand(3, 8) < 0.7
    mask[:, 0] = True
    cache = decoder.start(memory, mask, max_length=20)
    steps = torch.stack([decoder.step(column, cache) for column in tokens.T], dim=1)
    torch.testing.assert_close(steps, decoder(tokens, memory, mask), atol=1e-5, rtol=1e-5)
