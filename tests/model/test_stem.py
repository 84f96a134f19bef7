"""The fast stem, on a GPU if there is one, else in Triton's interpreter, against the layers it stands for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.stem import Stem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def build(channels, *, training):
    """Return a ResNet's first layers, whose norm knows something, and the same once more."""
    torch.manual_seed(0)
    encoder, same = (
        Encoder("resnet18", stage=1, in_channels=channels).train(training).to(DEVICE)
        for _ in range(2)
    )
    norm = encoder.net.bn1
    nn.init.normal_(norm.weight)  # of either sign: pooling before the norm would be another thing
    nn.init.normal_(norm.bias)
    norm.running_mean.uniform_(-0.1, 0.1)
    norm.running_var.uniform_(0.5, 1.5)
    same.load_state_dict(encoder.state_dict())
    return encoder, same


def make_images(height, width, *, faintest=0):
    return torch.randint(faintest, 256, (2, 1, height, width), dtype=torch.uint8, device=DEVICE)


def plain(encoder, images):
    net = encoder.net
    pages = (images.to(net.conv1.weight.dtype) / 255).expand(-1, encoder.in_channels, -1, -1)
    return net.maxpool(net.act1(net.bn1(net.conv1(pages))))


@pytest.mark.parametrize(
    ("height", "width", "channels", "faintest"),
    [(20, 24, 1, 0), (21, 135, 1, 0), (18, 21, 3, 0), (5, 1, 3, 0), (30, 30, 1, 240)],
)
def test_in_training_maps_gradients_and_statistics_are_those_of_the_layers(
    height, width, channels, faintest
):
    encoder, reference = build(channels, training=True)
    images = make_images(height, width, faintest=faintest)
    found, expected = Stem(encoder.net)(images), plain(reference.double(), images)
    assert near(found, expected)
    slopes = torch.randn_like(expected)
    learnt = [(e.net.conv1.weight, e.net.bn1.weight, e.net.bn1.bias) for e in (encoder, reference)]
    for one, other in zip(
        torch.autograd.grad(found, learnt[0], slopes.float()),
        torch.autograd.grad(expected, learnt[1], slopes),
        strict=True,
    ):
        assert near(one, other)
    for name, buffer in reference.net.bn1.named_buffers():
        assert torch.allclose(encoder.net.bn1.get_buffer(name).double(), buffer.double(), atol=1e-5)


def near(found, expected):
    """Return whether float32 has come as near to the values in double precision as their sums allow."""
    return (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("height", "width", "channels"), [(20, 24, 1), (21, 135, 3)])
def test_in_evaluation_maps_are_those_of_the_layers(height, width, channels):
    encoder, reference = build(channels, training=False)
    images = make_images(height, width)
    with torch.no_grad():
        assert torch.allclose(Stem(encoder.net)(images), plain(reference, images), atol=1e-4)


def test_it_leaves_to_the_layers_what_is_learnt_with_fixed_statistics():
    encoder, _ = build(1, training=False)
    stem = Stem(encoder.net)
    assert not stem.serves
    with torch.no_grad():
        assert stem.serves
    encoder.requires_grad_(False)
    assert stem.serves
    encoder.net.bn1 = nn.SyncBatchNorm(64)
    assert not stem.serves


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_in_mixed_precision_it_stays_as_near_as_the_layers_do(precision):
    encoder, reference = build(1, training=True)
    images = make_images(96, 200)
    exact = plain(reference, images)
    with torch.autocast("cuda", precision):
        found, usual = Stem(encoder.net)(images), plain(reference, images)
    assert found.dtype == precision
    far = (found.float() - exact).abs().max()
    assert far <= 2 * (usual.float() - exact).abs().max()
    slopes = torch.randn_like(exact)
    gradients = [
        torch.autograd.grad(maps, e.net.conv1.weight, slopes.to(maps.dtype))[0]
        for maps, e in ((found, encoder), (usual, reference), (exact, reference))
    ]
    far, usually = ((g - gradients[2]).norm() / gradients[2].norm() for g in gradients[:2])
    assert far <= 1.5 * usually


@pytest.mark.parametrize("name", ["stem_in_training", "stem_in_evaluation"])
def test_the_operators_fit_torch(name):
    from paragraph_ocr.model import stem_kernels

    padded = torch.rand(2, 16, 32, device=DEVICE)
    kernel = torch.rand(64, 3, device=DEVICE, requires_grad=name == "stem_in_training")
    vectors = [torch.rand(3, device=DEVICE) for _ in range(2)]
    more = (*vectors, 4, 6, *([1e-5] if name == "stem_in_training" else []))
    torch.library.opcheck(
        getattr(torch.ops.paragraph_ocr, name).default,
        (padded, kernel, *more),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert hasattr(stem_kernels, name)


@pytest.mark.parametrize(
    ("name", "fits"),
    [("resnet18", True), ("seresnet50", True), ("resnet18d", False), ("test_resnet", False)],
)
def test_only_the_classic_stem_is_taken_over(name, fits):
    assert Stem.fits(Encoder(name, stage=2).net) is fits


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    script = Path(__file__).with_name("compile_stem.py")
    compiled = subprocess.run(
        [sys.executable, script, "75", "90"],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    shared = json.loads(compiled.stdout)
    assert len(shared) == 2 * 9
    assert max(shared.values()) <= 64 * 1024, "the least that a program may have on any of them"
