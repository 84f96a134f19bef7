"""The page as a person uses it, in a real browser: nox -s browser."""

import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from browser import environment, find_browser
from pages import scans
from playwright.sync_api import expect, sync_playwright

from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.store import Store

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.browser

DROP = """async ([name, kind, bytes]) => {
  const carried = new DataTransfer();
  carried.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));
  const event = EVENT === "drop"
    ? new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true })
    : new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "corrections"


@pytest.fixture(scope="module")
def program(run_folder, kept):
    """Start the page by its command; yield its address."""
    command = [sys.executable, "scripts/app.py", f"checkpoint={run_folder}", "port=0"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, f"corrections={kept}"],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        said = running.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found, said
        yield found[0]
        running.terminate()


@pytest.fixture(scope="module")
def chromium():
    path = find_browser()
    assert path is not None, "no Chromium here: nox -s browser gets one, or says why not"
    with sync_playwright() as playwright:
        # of a container's root, the sandbox refuses to start; only our own page is opened
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"], env=environment(path)
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, program):
    """Yield the page, open; what it requests and what goes wrong on it is checked at the end."""
    context = chromium.new_context(viewport={"width": 1180, "height": 860})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    requested, wrong = [], []
    opened.on("request", lambda request: requested.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    opened.goto(program)
    opened.wait_for_selector("#examples button")
    yield opened
    own = (f"{program}/", f"blob:{program}/", "data:")
    assert [url for url in requested if not url.startswith(own)] == []
    assert [line for line in wrong if "status of 4" not in line] == []  # refusals are logged
    context.close()


def text(page):
    """Return the text that the page shows, once it has been read."""
    page.wait_for_selector("#result:not([hidden])")
    expect(page.locator("#status")).to_contain_text("mean confidence")
    spans = page.locator("#text span").all_text_contents()
    return "".join(spans).replace("⏎", "")


def test_an_uploaded_image_is_read_and_its_text_shown(page, recognizer, images):
    path = scans(images)[0]
    page.set_input_files("#file", path)
    own = recognizer.read(path)
    assert text(page) == own.text
    assert page.input_value("#correction") == own.text
    marked = page.locator("#text .unsure, #text .doubt").count()
    assert marked == sum(c.confidence < 0.9 for c in own.characters)
    assert page.locator("#text .doubt").count() == sum(c.confidence < 0.5 for c in own.characters)


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(way, page, recognizer, images):
    path = scans(images)[4]
    script = DROP.replace("EVENT", f'"{way}"')
    page.evaluate(script, [path.name, "image/jpeg", list(path.read_bytes())])
    assert text(page) == recognizer.read(path).text


def test_a_tiff_which_browsers_cannot_show_is_shown_as_the_model_sees_it(page, images):
    page.set_input_files("#file", scans(images)[2])
    text(page)
    expect(page.locator("#image")).to_have_attribute("src", re.compile("^data:image/png"))
    expect(page.locator("#image")).to_have_js_property("complete", True)
    assert page.evaluate("() => document.querySelector('#image').naturalWidth") > 0


def test_pointing_at_a_character_shows_where_the_model_looked(page, images):
    page.set_input_files("#file", scans(images)[1])
    length = len(text(page))
    drawn = "() => document.querySelector('#heat').toDataURL()"
    page.hover("#text span[data-index='0']")
    first = page.evaluate(drawn)
    assert re.search(rf"sure \(1 of {length}\)", page.inner_text("#character"))
    page.hover("#text span[data-index='5']")
    assert page.evaluate(drawn) != first
    page.hover("h1")
    assert page.get_attribute("#heat", "data-index") == ""
    page.focus("#text")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(drawn) == first
    heat, image = (page.locator(name).bounding_box() for name in ("#heat", "#image"))
    assert heat == pytest.approx(image, abs=1)


def test_a_drawing_is_read(page):
    page.click("#pad summary")
    page.click("#read-drawing")
    assert "Nothing is written" in page.inner_text("#status")
    box = page.locator("#drawing").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    for step in range(10):
        page.mouse.move(box["x"] + 50 + 20 * step, box["y"] + 50 + (step % 2) * 60)
    page.mouse.up()
    page.click("#read-drawing")
    text(page)
    expect(page.locator("#image")).to_have_js_property("complete", True)
    dark = page.evaluate(
        """() => { const c = document.createElement('canvas'), i = document.querySelector('#image');
        c.width = i.naturalWidth; c.height = i.naturalHeight; const p = c.getContext('2d');
        p.drawImage(i, 0, 0); const d = p.getImageData(0, 0, c.width, c.height).data;
        let n = 0; for (let k = 0; k < d.length; k += 4) n += d[k] < 128; return n; }"""
    )
    assert dark > 200


def test_an_example_is_read_at_a_click(page):
    assert page.locator("#examples button").count() == 4
    page.click("#examples button >> nth=1")
    text(page)
    assert page.get_attribute("#image", "src").startswith("blob:")


def test_a_refused_file_leaves_no_old_text_behind(page, images, tmp_path):
    page.set_input_files("#file", scans(images)[0])
    text(page)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page.set_input_files("#file", broken)
    page.wait_for_selector("#status.bad")
    assert "no PNG, JPEG, TIFF, WEBP image" in page.inner_text("#status")
    assert page.is_hidden("#result")


def test_a_correction_is_kept_for_training(page, kept, images, tmp_path):
    path = scans(images)[3]
    page.set_input_files("#file", path)
    text(page)
    page.fill("#correction", "we sang\nold songs")
    page.click("#save")
    expect(page.locator("#saved")).to_contain_text("Kept as")
    corpus = FolderCorpus(name="folder", folder=kept, height=64, width=160, split="train")
    store = Store(corpus.prepare(tmp_path, num_workers=0))
    assert store.texts == ["we sang\nold songs"]
    (image,) = kept.glob("*.png")
    assert image.read_bytes() == path.read_bytes()


def test_nothing_listens_beyond_this_machine(program):
    port = int(program.rpartition(":")[2])
    assert urllib.request.urlopen(program, timeout=10).status == 200
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # sends nothing, but says which address would be used
        address = outward.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    with pytest.raises(OSError), socket.create_connection((address, port), timeout=3):
        pass
