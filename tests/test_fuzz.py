"""Whatever is typed, stored or sent: the answer is right, or one clear line.

A few cases here, 19,500 by `nox -s soak`.
"""

import contextlib
import copy
import io
import json
import string
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from paragraph_ocr.config import Experiment
from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.paragraph import Paragraph
from paragraph_ocr.data.store import Store, StoreWriter, pack
from paragraph_ocr.errors import UserError
from paragraph_ocr.metrics import (
    ReadingErrors,
    character_error_rate,
    character_errors,
    word_error_rate,
    word_errors,
)
from paragraph_ocr.stored import CONFIG, experiment_of, read_config, write_config
from paragraph_ocr.validation import compose, validate
from paragraph_ocr.vocabulary import Vocabulary, found_characters, normalise

FEW = 25


def fuzz(many: int):
    """Return a decorator: a test of a few examples, and under `soak` one of `many`."""

    def mark(function):
        quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}

        @pytest.mark.parametrize(
            "size", [FEW, pytest.param(many, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
        )
        def test(size):
            settings(max_examples=size, derandomize=size == FEW, **quiet)(function)()

        test.__name__ = function.__name__
        return test

    return mark


@contextlib.contextmanager
def refusing():
    """Let a clear refusal pass: one line."""
    said = "."
    try:
        yield
    except UserError as refusal:
        said = str(refusal)
    assert said.strip() and "\n" not in said


texts = st.text(max_size=40)
odd_characters = st.characters() | st.sampled_from(
    "\0\r\n\t\u2028\u200d\ud800\udfff\U0001f600\u0301é"
)


@fuzz(3000)
@given(
    characters=st.text(odd_characters, max_size=60) | st.lists(texts, max_size=5),
    text=st.text(odd_characters, max_size=60),
    fold=st.booleans(),
    unknown=st.sampled_from(["error", "drop", "replace"]),
    ids=st.lists(st.integers(0, 70), max_size=30),
)
def test_a_vocabulary_reads_back_what_it_wrote(characters, text, fold, unknown, ids):
    try:
        vocabulary = Vocabulary(characters, fold=fold, unknown=unknown)
    except ValueError:  # the caller's mistake
        assert (
            len({*characters}) < len(characters)
            or {*map(len, characters)} != {1}
            or "?" not in characters
        )
        return
    prepared = vocabulary.prepare(text)
    with refusing():
        assert vocabulary.decode(vocabulary.encode(prepared)) == prepared
        assert not vocabulary.unknown([prepared])
    assert unknown == "error" or not vocabulary.unknown([prepared])
    known = [index for index in ids if index < len(vocabulary)]
    assert {*vocabulary.decode(known)} <= {*vocabulary.characters}
    found = found_characters([text], fold=fold)
    assert Vocabulary(found).encode(normalise(text, fold=fold))


@fuzz(3000)
@given(
    pairs=st.lists(
        st.tuples(st.text(odd_characters, max_size=30), st.text(odd_characters, max_size=30)),
        max_size=6,
    ),
    cut=st.integers(0, 6),
)
def test_metrics_are_rates_whatever_the_texts(pairs, cut):
    readings, truths = [r for r, _ in pairs], [t for _, t in pairs]
    for reading, truth in pairs:
        errors = character_errors(reading, truth)
        assert errors == character_errors(truth, reading)
        assert abs(len(reading) - len(truth)) <= errors <= max(len(reading), len(truth))
        assert (errors == 0) == (reading == truth)
        assert word_errors(reading, truth) <= max(len(reading.split()), len(truth.split()))
    whole, parts = ReadingErrors(), ReadingErrors()
    whole.update(readings, truths)
    parts.update(readings[:cut], truths[:cut])
    parts.update(readings[cut:], truths[cut:])
    rates = whole.compute() if pairs else None
    if rates is not None:
        assert rates == parts.compute()
        assert rates["cer"] == character_error_rate(readings, truths) >= 0
        assert rates["wer"] == word_error_rate(readings, truths) >= 0
        assert 0 <= rates["exact"] <= 1


# --- configs -----------------------------------------------------------------------------------


def keys_of(tree, path=""):
    for key, value in tree.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{path}{key}.")


KEYS = sorted(
    key
    for key in keys_of(OmegaConf.to_container(compose([]), resolve=False))
    if not key.startswith("hydra")
)
GROUPS = ["model", "datamodule", "vocabulary", "regularization", "optimizer", "schedule", "trainer",
          "decoding", "tracking", "experiment", "debug", "model/encoder", "model/decoder"]  # fmt: skip
CHOICES = sorted(
    {p.stem for p in (Path(__file__).parents[1] / "conf").rglob("*.yaml")} - {"study", "train"}
)
values = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.integers(-3, 100).map(str),
    st.floats().map(str),
    st.sampled_from(["true", "false", "null", "???", "[]", "{}", "[1,2]", "{a: 1}", "''", "1e400",
                     ".nan", "${seed}", "${nothing}", "${oc.env:HOME}", "${", "auto", "cpu", "\\"]),
    st.text(string.printable, max_size=12),
    st.text(max_size=8),
)  # fmt: skip
misspelt = st.builds(
    lambda key, place, letter: key[: place % len(key)] + letter + key[place % len(key) + 1 :],
    st.sampled_from(KEYS), st.integers(0, 40), st.text(string.ascii_lowercase + "._", max_size=2),
)  # fmt: skip
overrides = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), values),
    st.builds("{}{}={}".format, st.sampled_from(["+", "++", "~", ""]), misspelt, values),
    st.builds("{}={}".format, st.sampled_from(GROUPS), st.sampled_from(CHOICES)),
    st.builds("~{}".format, st.sampled_from(KEYS)),
    st.builds("+{}.extra.{}={}".format, st.sampled_from(["optimizer", "model.encoder"]),
              st.text(string.ascii_letters, min_size=1, max_size=4), values),
    st.text(string.printable, max_size=20),
)  # fmt: skip


@fuzz(1500)
@given(typed=st.lists(overrides, min_size=1, max_size=4))
def test_what_is_typed_is_an_experiment_or_refused(typed):
    typed = [each for each in typed if "hydra" not in each]
    with refusing():
        experiment = validate(compose(typed))
        assert isinstance(experiment, Experiment)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(odd_characters, max_size=9)
    | st.sampled_from(["???", "${seed}", "os.system", "transformer", "line_cnn", "auto"])
    | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6) | st.integers() | st.none(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def whole(tmp_path_factory):
    """Write a whole config and a whole store for all cases to spoil."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(validate(compose(["+optimizer.extra.a=[1]"])), folder)
    WHOLE["config"] = (folder / CONFIG).read_bytes()
    with StoreWriter(folder / "a.h5", fingerprint="abc") as writer:
        for n in range(4):
            page = np.full((20, 30 + 4 * (n % 2)), n * 50, np.uint8)
            split = ("train", "val", "test")[n % 3]
            writer.add(pack(Paragraph(page, f"text {n}\né", split, f"source {n}", f"writer {n}")))
    WHOLE["store"] = (folder / "a.h5").read_bytes()


WHOLE: dict[str, bytes] = {}


def places(tree, path=()):
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*path, key))


@fuzz(3000)
@given(data=st.data())
def test_a_stored_config_that_was_changed_is_an_experiment_or_refused(data):
    tree = yaml.safe_load(WHOLE["config"])
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from([*places(tree)]))
        if not path:
            continue
        node = tree
        for key in path[:-1]:
            node = node[key]
        match data.draw(st.sampled_from(["change", "remove", "add"])):
            case "change":
                node[path[-1]] = copy.deepcopy(data.draw(plain))
            case "remove":
                del node[path[-1]]
            case "add":
                node[data.draw(st.text(max_size=6))] = data.draw(plain)
    with refusing():
        assert isinstance(experiment_of(tree, source="x"), Experiment)


def mutated(data, content: bytes) -> bytes:
    """Return bytes with some changed, cut out, put in or repeated."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, max(0, len(changed) - 1)))
        match data.draw(st.sampled_from(["flip", "set", "cut", "put", "end", "repeat"])):
            case "flip" if changed:
                changed[place] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                new = data.draw(
                    st.sampled_from([b"\0" * 4, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x80"])
                )
                changed[place : place + len(new)] = new
            case "cut":
                del changed[place : place + data.draw(st.integers(1, 64))]
            case "put":
                changed[place:place] = data.draw(st.binary(max_size=16))
            case "end":
                del changed[place:]
            case "repeat":
                changed[place:place] = changed[place : place + 32]
    return bytes(changed)


@fuzz(2000)
@given(data=st.data())
def test_the_text_of_a_stored_config_may_be_anything(data):
    with tempfile.TemporaryDirectory() as folder, refusing():
        (Path(folder) / CONFIG).write_bytes(mutated(data, WHOLE["config"]))
        assert isinstance(read_config(Path(folder)), Experiment)


# --- stores ------------------------------------------------------------------------------------


def look_through(path: Path) -> None:
    with refusing():
        store = Store(path)
        try:
            for row in range(len(store)):
                assert store.image(row).shape == store.canvas(row)
                assert store.texts[row] is not None
        finally:
            store.close()


@fuzz(3000)
@given(data=st.data())
def test_a_store_of_changed_bytes_is_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        path.write_bytes(mutated(data, WHOLE["store"]))
        look_through(path)


NAMES = ["canvas", "place", "size", "text", "split", "source", "writer", "images/20x30", "images"]
arrays = st.one_of(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=4, max_size=4).map(lambda v: np.array(v, "i4")),
    st.lists(st.integers(0, 3), min_size=8, max_size=8).map(lambda v: np.array(v).reshape(4, 2)),
    st.lists(st.binary(max_size=6).filter(lambda b: b"\0" not in b), min_size=4, max_size=4),
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
             min_size=4, max_size=4),
    st.lists(st.floats(), max_size=5).map(np.array),
    st.integers(0, 10).map(lambda n: np.zeros((n, 20, 30), np.uint8)),
)  # fmt: skip


@fuzz(1500)
@given(data=st.data())
def test_a_store_of_changed_structure_is_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        path.write_bytes(WHOLE["store"])
        with h5py.File(path, "a") as file:
            for _ in range(data.draw(st.integers(1, 3))):
                name = data.draw(st.sampled_from(NAMES))
                what = data.draw(st.sampled_from(["drop", "replace", "attribute", "cell"]))
                if what == "attribute":
                    key = data.draw(
                        st.sampled_from(["canvases", "version", "format", "fingerprint"])
                    )
                    file.attrs[key] = data.draw(arrays)
                elif what == "cell" and name in file and isinstance(file[name], h5py.Dataset):
                    cell = data.draw(
                        st.integers(-(2**31), 2**31 - 1) | st.text("abc\xe9", max_size=5)
                    )
                    with contextlib.suppress(
                        TypeError, ValueError, OverflowError, IndexError, OSError
                    ):
                        file[name][0] = cell
                elif name in file:
                    del file[name]
                    if what == "replace":
                        made = data.draw(arrays)
                        kind = h5py.string_dtype() if isinstance(made, list) else None
                        file.create_dataset(name, data=made, dtype=kind)
        look_through(path)


# --- folders -----------------------------------------------------------------------------------

file_names = st.sampled_from(
    ["p.png", "q.jpg", "p.txt", "q.txt", "a/p.png", "a/p.txt", "p.xml", "page/p.xml", "manifest.csv",
     "manifest.jsonl", "x.webp", "x.txt", "x.tif", "\u00e9 \u2028.png", "\u00e9 \u2028.txt"]
)  # fmt: skip


def encoded(kind: str, width: int, height: int, mode: str) -> bytes:
    file = io.BytesIO()
    with contextlib.suppress(OSError, ValueError, KeyError):
        Image.new(mode, (width, height)).save(file, kind)
    return file.getvalue()


pictures = st.builds(
    encoded,
    st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "GIF"]),
    st.integers(1, 90), st.integers(1, 90),
    st.sampled_from(["L", "RGB", "RGBA", "P", "1", "I;16", "F", "CMYK", "LA"]),
)  # fmt: skip
odd_values = st.none() | st.text(odd_characters, max_size=8) | st.sampled_from(
    ["p.png", "a/p.png", "../p.png", "/etc/passwd", "", ".", "train", "val", "q" * 300]
) | st.integers() | st.lists(st.integers(), max_size=2)  # fmt: skip
fields = st.dictionaries(
    st.sampled_from(["image", "text", "split", "writer", "other"]), odd_values, max_size=5
)
json_lines = st.lists(fields | plain.filter(lambda v: not isinstance(v, bytes)), max_size=4).map(
    lambda rows: "\n".join(json.dumps(row, default=str, skipkeys=True) for row in rows).encode()
)
table_rows = st.lists(
    st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["p.png,a", '"', "p.png,\"a\nb\""]),
    max_size=4,
).map(lambda rows: ("image,text\n" + "\n".join(rows)).encode())  # fmt: skip
numbers = st.integers(-50, 120) | st.sampled_from([10**9, -(10**9), 10**30])
layouts = st.builds(
    '<PcGts><Page imageFilename="{}"><TextRegion id="{}"><Coords points="{}"/>'
    "<TextEquiv><Unicode>{}</Unicode></TextEquiv></TextRegion></Page></PcGts>".format,
    st.sampled_from(["p.png", "../p.png", "", "a/p.png", "/etc/passwd"]),
    st.text("ab", max_size=2),
    st.lists(st.builds("{},{}".format, numbers, numbers), max_size=5).map(" ".join)
    | st.text("0123456789,. einf-", max_size=15),
    st.text("ab \n", max_size=6),
).map(str.encode)


@fuzz(2500)
@given(data=st.data())
def test_a_folder_of_anything_is_prepared_or_refused(data):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "mine"
        folder.mkdir()
        for name in data.draw(st.lists(file_names, min_size=1, max_size=5, unique=True)):
            content = {
                ".txt": st.text(max_size=20).map(lambda t: t.encode(errors="replace")),
                ".csv": table_rows,
                ".jsonl": json_lines,
                ".xml": layouts,
            }.get(Path(name).suffix, pictures)
            made = data.draw(content)
            if data.draw(st.integers(0, 4)) == 0:
                made = mutated(data, made)
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(made)
        stores = Path(parent) / "stores"
        corpus = FolderCorpus(name="mine", folder=folder, height=64, width=64)
        with refusing():
            store = Store(corpus.prepare(stores, num_workers=0))
            assert len(store) and all(text.strip() for text in store.texts)
            look_through(store.path)
        assert not [*stores.glob(".*")], "something was left behind"
