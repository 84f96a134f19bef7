import time

import pytest
import torch
import torchvision

from paragraph_ocr.errors import UserError
from paragraph_ocr.model.encoder import Encoder, encoder_names


@pytest.fixture
def page():
    torch.manual_seed(0)
    return torch.randint(0, 256, (2, 1, 96, 160), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "stage", "horizontal_stride", "grid"),
    [
        ("resnet18", 4, None, (3, 5)),
        ("resnet18", 4, 8, (3, 20)),
        ("resnet18", 3, 4, (6, 40)),
        ("resnet18", 0, None, (48, 80)),
        ("resnet50d", 4, 8, (3, 20)),  # averages before its shortcut
        ("resnetaa50d", 3, 4, (6, 40)),  # averages after its convolutions
        ("seresnet18", 4, 16, (3, 10)),
        ("test_resnet", 3, 8, (6, 20)),
    ],
)
def test_features_lie_on_the_grid_that_stage_and_stride_say(
    page, name, stage, horizontal_stride, grid
):
    encoder = Encoder(name, stage=stage, horizontal_stride=horizontal_stride)
    features = encoder(page)
    assert features.shape == (2, encoder.channels, *grid)
    assert encoder.grid(96, 160) == grid


def test_the_reference_encoder_is_torchvisions_resnet18():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    for module in theirs.modules():  # statistics that are not the trivial ones
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = Encoder("resnet18", stage=4, in_channels=3).eval()
    wanted = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert wanted.keys() == ours.net.state_dict().keys()
    ours.net.load_state_dict(wanted)
    page = torch.randint(0, 256, (1, 1, 576, 640), dtype=torch.uint8)
    features = torch.nn.Sequential(*list(theirs.children())[:-2])(page.expand(-1, 3, -1, -1) / 255)
    torch.testing.assert_close(ours(page), features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "test_resnet", "resnet10t", "resnet50d"])
@pytest.mark.parametrize("canvas_size", [(128, 192), (107, 150)])
@pytest.mark.parametrize("size", [(65, 77), (64, 96)])
def test_padding_of_the_canvas_is_invisible_to_the_features(name, size, canvas_size):
    torch.manual_seed(0)
    height, width = size
    encoder = Encoder(name, stage=4).eval()
    page = torch.randint(0, 256, (1, 1, height, width), dtype=torch.uint8)
    canvas = torch.full((1, 1, *canvas_size), 99, dtype=torch.uint8)  # no clean paper at all
    canvas[:, :, :height, :width] = page
    alone, padded = encoder(page), encoder(canvas, torch.tensor([size]))
    rows, columns = encoder.grid(height, width)
    torch.testing.assert_close(alone, padded[:, :, :rows, :columns], atol=1e-5, rtol=0)
    mask = encoder.cells(torch.tensor([size]), encoder.grid(*canvas_size))
    assert mask.sum() == rows * columns
    assert mask[0, 0, :rows, :columns].all()


def test_a_frozen_encoder_keeps_weights_and_statistics_while_training(page):
    encoder = Encoder("test_resnet", stage=3, freeze=True).train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    features = encoder(page)
    assert not features.requires_grad
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())


def test_an_encoder_that_is_not_frozen_moves_its_statistics(page):
    encoder = Encoder("test_resnet", stage=3).train()
    before = encoder.net.bn1.running_mean.clone()
    encoder(page)
    assert not torch.equal(before, encoder.net.bn1.running_mean)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "resnt50", "stage": 3}, "nearest: resnet50"),
        ({"name": "resnet18", "stage": 9}, "model.encoder.stage=9"),
        ({"name": "resnet18", "stage": -1}, "one of 0, 1, 2, 3, 4"),
        ({"name": "tresnet_m", "stage": 0}, "one of 1, 2, 3, 4"),
        ({"name": "resnet18", "stage": 3, "horizontal_stride": 5}, "horizontal_stride=5"),
        ({"name": "resnet18", "stage": 3, "horizontal_stride": 32}, "horizontal_stride=32"),
        ({"name": "tresnet_m", "stage": 3, "horizontal_stride": 2}, "cannot be had"),
        (
            {"name": "vit_small_resnet26d_224", "stage": 4, "horizontal_stride": 8},
            "cannot be had",
        ),
        ({"name": "resnet18", "stage": 3, "extra": {"colour": "red"}}, "model.encoder.extra"),
        (
            {"name": "resnet18", "stage": 3, "pretrained": True, "extra": {"colour": "red"}},
            "model.encoder.extra",
        ),
        (
            {
                "name": "resnet18",
                "stage": 3,
                "pretrained": True,
                "extra": {"pretrained_cfg_overlay": {"file": "nowhere.pth"}},
            },
            "nowhere.pth",
        ),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(arguments, said):
    with pytest.raises(UserError, match=said) as refusal:
        Encoder(**arguments)
    assert "\n" not in str(refusal.value)


def test_weights_that_cannot_be_had_are_refused_soon(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"model\.encoder\.pretrained"):
        Encoder("resnet18", stage=3, pretrained=True)
    assert time.perf_counter() - began < 10


def test_weights_from_a_local_file_are_loaded(tmp_path):
    import timm

    torch.manual_seed(3)
    source = timm.create_model("test_resnet", in_chans=3)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder(
        "test_resnet",
        stage=3,
        in_channels=3,
        pretrained=True,
        extra={"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}},
    )
    assert torch.equal(encoder.net.conv1[0].weight, source.conv1[0].weight)


def test_an_encoder_that_pools_the_page_takes_any_canvas():
    Encoder("skresnet18", stage=3, horizontal_stride=8).check_canvas(96, 160)


def test_an_encoder_for_one_size_of_page_says_so():
    with pytest.raises(UserError, match="does not take pages of 96x160"):
        Encoder("vit_small_resnet26d_224", stage=3).check_canvas(96, 160)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", encoder_names())
def test_every_resnet_of_timm_builds(name):
    encoder = Encoder(name, stage=3)
    assert encoder.channels > 0
    assert encoder.stride[0] == encoder.stride[1]


@pytest.mark.slow
def test_timm_has_as_many_resnets_as_we_say():
    assert len(encoder_names()) >= 134
