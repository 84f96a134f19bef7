"""The fast stem, on a GPU if there is one, else in Triton's interpreter, against the layers it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.stem import Stem, folded_convolution, pooled_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("height", "width", "channels"), [(20, 24, 1), (21, 23, 1), (18, 21, 3)])
def test_a_folded_convolution_gives_the_sums_of_the_plain_one(height, width, channels):
    conv = nn.Conv2d(channels, 6, 7, 2, 3, bias=False).to(DEVICE)
    pages = torch.rand(2, 1, height, width, device=DEVICE)
    plain, folded = conv(pages.expand(-1, channels, -1, -1)), folded_convolution(conv, pages)
    assert torch.allclose(plain, folded, atol=1e-4)
    slopes = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, conv.weight, slopes)[0]
    found = torch.autograd.grad(folded, conv.weight, slopes)[0]
    assert torch.allclose(expected, found, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(6, 10), (7, 9), (3, 1)])
def test_norm_relu_and_pooling_in_one_are_those_three(height, width):
    torch.manual_seed(0)
    norm, reference = (nn.BatchNorm2d(6).to(DEVICE) for _ in range(2))
    nn.init.normal_(norm.weight)  # of either sign: pooling before the norm would be another thing
    nn.init.normal_(norm.bias)
    norm.running_mean.fill_(2.0)
    reference.load_state_dict(norm.state_dict())
    maps = 3 + torch.randn(2, 6, height, width, device=DEVICE)
    maps = maps.to(memory_format=torch.channels_last).requires_grad_()
    found = pooled_norm(norm, maps)
    expected = F.max_pool2d(F.relu(reference(maps)), 3, 2, 1)
    assert torch.allclose(found, expected, atol=1e-5)
    slopes = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, [maps, norm.weight, norm.bias], slopes),
        torch.autograd.grad(expected, [maps, reference.weight, reference.bias], slopes),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-4)
    for name, buffer in reference.named_buffers():
        assert torch.allclose(norm.get_buffer(name).float(), buffer.float(), atol=1e-5), name


def test_the_operators_fit_torch():
    from paragraph_ocr.model import stem_kernels

    maps = torch.randn(2, 3, 4, 6, device=DEVICE).to(memory_format=torch.channels_last)
    values = [torch.rand(3, device=DEVICE, requires_grad=index < 2) for index in range(4)]
    torch.library.opcheck(
        stem_kernels.pooled_norm.default
        if hasattr(stem_kernels.pooled_norm, "default")
        else stem_kernels.pooled_norm,
        (maps.requires_grad_(), *values),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("name", "fits"),
    [("resnet18", True), ("seresnet50", True), ("resnet18d", False), ("test_resnet", False)],
)
def test_only_the_classic_stem_is_taken_over(name, fits):
    assert Stem.fits(Encoder(name, stage=2).net) is fits


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_the_stem_gives_the_maps_of_its_layers(channels, training):
    encoder = Encoder("resnet18", stage=1, in_channels=channels).train(training).to(DEVICE)
    pages = torch.rand(2, 1, 24, 18, device=DEVICE)
    net = encoder.net
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    maps = net.maxpool(net.act1(net.bn1(net.conv1(pages.expand(-1, channels, -1, -1)))))
    for name, buffer in net.named_buffers():
        buffer.copy_(before[name])
    assert torch.allclose(Stem(net)(pages), maps, atol=1e-4)
