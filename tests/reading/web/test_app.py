"""What the page asks for and what it is refused, over HTTP."""

import base64
import io
import json
import struct
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from page_server import serving
from pages import note, scans
from PIL import Image

from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.store import Store
from paragraph_ocr.errors import UserError
from paragraph_ocr.web.app import MAX_BYTES, build_app, serve

BYTES, JSON = "application/octet-stream", "application/json"


def ask(url, body=None, **headers):
    """Return status, headers and body of an answer."""
    request = urllib.request.Request(
        url, body, {k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def refusal(url, body, **headers):
    status, _, answer = ask(url, body, **headers)
    return status, json.loads(answer)["error"]


def mistake(image, text):
    return json.dumps({"image": base64.b64encode(image).decode(), "text": text}).encode()


def picture(text="the rain", suffix="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(note(text)).save(buffer, suffix)
    return buffer.getvalue()


def bomb(width, height):
    """Return the first bytes of a PNG that claims to be large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_an_image_is_read_as_the_recognizer_reads_it(address, recognizer, images):
    for path in scans(images)[:3]:
        status, _, body = ask(f"{address}/read", path.read_bytes(), content_type=BYTES)
        found, own = json.loads(body), recognizer.read(path)
        assert status == 200
        assert found["text"] == own.text
        assert found["characters"] == [[c.character, c.confidence] for c in own.characters]


def test_each_character_has_a_map_of_where_the_model_looked(address, recognizer, images):
    from paragraph_ocr.reading.explain import trace

    path = scans(images)[1]
    found = json.loads(ask(f"{address}/read", path.read_bytes(), content_type=BYTES)[2])
    rows, columns = found["grid"]
    maps = np.frombuffer(base64.b64decode(found["attention"]), np.uint8)
    maps = maps.reshape(len(found["characters"]), rows, columns)
    assert (maps.max(axis=(1, 2)) == 255).all()
    page, size = recognizer.page(path)
    tokens = recognizer.vocabulary.encode(found["text"])
    third = trace(recognizer.model, page, tokens[:3], size=size).looks()[-1]
    expected = (third / third.max() * 255).byte().numpy().astype(int)
    assert np.abs(maps[2].astype(int) - expected).max() <= 1


def test_a_model_without_attention_is_read_too(tmp_path):
    from paragraph_ocr.build_model import build_recognizer, vocabulary_from
    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.validation import compose, validate
    from paragraph_ocr.web.app import build_app

    torch.manual_seed(0)
    experiment = validate(compose(["model=line_cnn", "datamodule=synthetic_lines"]))
    vocabulary = vocabulary_from(experiment.vocabulary)
    line_cnn = Recognizer(build_recognizer(experiment, vocabulary), vocabulary, experiment)
    with serving(build_app(line_cnn, title="lines", corrections=tmp_path)) as address:
        status, _, body = ask(f"{address}/read", picture(), content_type=BYTES)
    assert status == 200
    assert json.loads(body)["attention"] is None
    assert json.loads(body)["text"] == line_cnn.read(note("the rain")).text


def test_corrections_make_a_folder_that_a_data_module_loads(address, corrections, tmp_path):
    sent = {"the rain\ncame late": picture("a"), "dry hills": picture("b", "JPEG")}
    for text, image in sent.items():
        status, _, body = ask(f"{address}/mistake", mistake(image, text), content_type=JSON)
        assert status == 200
        assert f"datamodule.root={corrections}" in json.loads(body)["train"]
    # corrected once more: the later text takes the earlier one's place
    ask(f"{address}/mistake", mistake(sent["dry hills"], "dry hill"), content_type=JSON)
    corpus = FolderCorpus(name="folder", folder=corrections, height=64, width=160, split="train")
    store = Store(corpus.prepare(tmp_path, num_workers=0))
    assert sorted(store.texts) == ["dry hill", "the rain\ncame late"]
    assert {path.suffix for path in corrections.iterdir()} == {".png", ".jpg", ".txt"}


def test_a_correction_that_the_model_cannot_write_says_so(address):
    status, _, body = ask(
        f"{address}/mistake", mistake(picture("n"), "na\u00efve"), content_type=JSON
    )
    assert status == 200
    assert "U+00EF" in json.loads(body)["lacking"]


@pytest.mark.parametrize(
    ("image", "status", "reason"),
    [
        pytest.param(bomb(9000, 9000), 413, "9000 x 9000 px, and 50,000,000", id="bomb"),
        pytest.param(bomb(60_000, 60_000), 413, "50,000,000 px are the most", id="greater bomb"),
        pytest.param(bomb(90, 90), 422, "cannot be read", id="cut off"),
        pytest.param(b"hello", 415, "no PNG, JPEG, TIFF, WEBP", id="text"),
        pytest.param(b"\0" * (MAX_BYTES + 1), 413, "More than 32 MB", id="too many bytes"),
        pytest.param(b"", 400, "Nothing was sent", id="nothing"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused_in_a_line(image, status, reason, address):
    found, said = refusal(f"{address}/read", image, content_type=BYTES)
    assert found == status
    assert reason in said


def test_corrections_without_text_or_image_are_refused(address, corrections):
    before = sorted(corrections.glob("*"))
    url = f"{address}/mistake"
    assert refusal(url, mistake(picture("x"), " \n"), content_type=JSON)[0] == 422
    assert refusal(url, mistake(b"hello", "text"), content_type=JSON)[0] == 415
    assert refusal(url, mistake(bomb(90, 90), "text"), content_type=JSON)[0] == 422
    assert refusal(url, b"[1]", content_type=JSON)[0] == 400
    assert sorted(corrections.glob("*")) == before


def test_pages_of_other_sites_reach_nothing(address):
    image = picture()
    read = f"{address}/read"
    assert ask(read, image, content_type=BYTES, origin=address)[0] == 200
    assert refusal(read, image, content_type=BYTES, origin="http://example.org")[0] == 403
    # the three kinds that a form of another site may send without asking first
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        assert refusal(read, image, content_type=kind)[0] == 415
    assert ask(f"{address}/about", host="example.org")[0] == 400  # DNS rebinding


def test_every_answer_forbids_loading_from_elsewhere(address):
    for path in ("/", "/static/page.js", "/static/page.css", "/examples/0", "/about"):
        status, headers, body = ask(address + path)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        if path != "/examples/0":
            assert b"http://" not in body and b"https://" not in body


def test_a_port_that_is_taken_is_named(address, recognizer, tmp_path):
    taken = int(address.rpartition(":")[2])
    app = build_app(recognizer, title="another", corrections=tmp_path)
    with pytest.raises(UserError, match=f"port={taken}.*Pass port=0"):
        serve(app, port=taken)
