"""What is written of a reading: valid by its schema, and found again by the folder data module."""

import json
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
import xmlschema

from paragraph_ocr.data.layout import read_layout
from paragraph_ocr.reading.transcript import Character, Line, Transcript
from paragraph_ocr.reading.write import FORMATS

HERE = Path(__file__).parent
READING_SCHEMA = json.loads((HERE.parents[1] / "docs" / "reading.schema.json").read_text())
CREATED = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)

TEXTS = [
    "Dear Sir,\nyours of the 5th",
    "",
    "\n",
    "one\n\nthree",
    "  spaces   between  \n & <tags> \"quoted\" 'too'",
    "Ünïcödé \u201cquotes\u201d \u2014 and a \ufffe that XML cannot hold \x07",
    "x" * 600,
]


def transcript(text, *, source="scans/a & b.png"):
    """Return a reading of an image of 400x300 px with lines one below the other."""
    characters = tuple(Character(c, 1 - index % 11 / 10) for index, c in enumerate(text))
    lines, start = [], 0
    for number, line in enumerate(text.split("\n") if text else []):
        box = (5, 20 * number, 395, 20 * number + 18)
        lines.append(Line(characters[start : start + len(line)], box))
        start += len(line) + 1
    return Transcript(source, (300, 400), characters, -1.5, tuple(lines))


def written(form, text):
    return FORMATS[form][1](transcript(text), model="outputs/runs/<x>", created=CREATED)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("form", ["page", "alto"])
def test_xml_is_valid_by_its_schema(form, text, tmp_path):
    path = tmp_path / "reading.xml"
    path.write_text(written(form, text), encoding="utf-8")
    xmlschema.validate(path, HERE / f"{form}.xsd")


@pytest.mark.parametrize("form", ["page", "alto"])
def test_the_schema_is_one_that_refuses(form, tmp_path):
    path = tmp_path / "reading.xml"
    whole = written(form, TEXTS[0])
    for old, new in [("TextLine", "Line"), ("paragraph", "para graph"), ('"0.', '"7.')]:
        assert old in whole
        path.write_text(whole.replace(old, new), encoding="utf-8")
        with pytest.raises(xmlschema.XMLSchemaException):
            xmlschema.validate(path, HERE / f"{form}.xsd")


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[5][:24], "one two"])
@pytest.mark.parametrize("form", ["page", "alto"])
def test_the_folder_data_module_finds_the_text_again(form, text, tmp_path):
    path = tmp_path / "reading.xml"
    path.write_text(written(form, text), encoding="utf-8")
    (region,) = read_layout(path, path.read_bytes())
    assert (region.image, region.text) == ("a & b.png", text)
    assert region.polygon == ((0, 0), (400, 0), (400, 300), (0, 300))


@pytest.mark.parametrize("text", TEXTS)
def test_json_is_valid_and_says_everything(text):
    tree = json.loads(written("json", text))
    jsonschema.Draft202012Validator(READING_SCHEMA).validate(tree)
    assert tree["text"] == text
    assert "".join(one["character"] for one in tree["characters"]) == text
    assert "\n".join(line["text"] for line in tree["lines"]) == text
    assert tree["image"] == {"name": "a & b.png", "width": 400, "height": 300}
    assert tree["created"] == "2026-05-04T03:02:01Z"


def test_the_json_schema_refuses_a_confidence_above_one():
    tree = json.loads(written("json", "ab"))
    tree["characters"][0]["confidence"] = 1.2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, READING_SCHEMA)


def test_a_text_file_holds_the_text():
    assert written("txt", TEXTS[0]) == TEXTS[0] + "\n"


def test_alto_says_how_sure_each_character_is():
    assert 'CONTENT="abc" WC="0.9" CC="012"' in written("alto", "abc")
