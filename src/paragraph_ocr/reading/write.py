"""Transcripts as files: text, JSON, PAGE XML, ALTO."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import PurePath
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from paragraph_ocr.reading.transcript import Box, Line, Transcript, mean_confidence

JSON_VERSION = 1
"""Of docs/reading.schema.json; raise it if a reader of the old files would read new ones wrongly."""

SOFTWARE = "paragraph-ocr"

_PAGE = "http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"
_ALTO = "http://www.loc.gov/standards/alto/ns-v4#"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_text(transcript: Transcript, *, model: str, created: datetime) -> str:
    return transcript.text + "\n"


def as_json(transcript: Transcript, *, model: str, created: datetime) -> str:
    """Return what docs/reading.schema.json describes."""
    height, width = transcript.size
    tree = {
        "format": "paragraph-ocr reading",
        "version": JSON_VERSION,
        "model": model,
        "created": _utc(created),
        "image": {"name": _name(transcript), "width": width, "height": height},
        "text": transcript.text,
        "confidence": _rounded(transcript.confidence),
        "log_probability": round(transcript.log_probability, 4),
        "lines": [
            {"text": line.text, "confidence": _rounded(line.confidence), "box": list(line.box)}
            for line in transcript.lines
        ],
        "characters": [
            {"character": one.character, "confidence": _rounded(one.confidence)}
            for one in transcript.characters
        ],
    }
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"


def as_page(transcript: Transcript, *, model: str, created: datetime) -> str:
    """Return PAGE XML (2019-07-15): one region, the whole image, with its lines."""
    height, width = transcript.size
    root = _root("PcGts", _PAGE, f"{_PAGE} {_PAGE}/pagecontent.xsd")
    about = SubElement(root, "Metadata")
    _leaf(about, "Creator", f"{SOFTWARE} {version(SOFTWARE)}")
    _leaf(about, "Created", _utc(created))
    _leaf(about, "LastChange", _utc(created))
    _leaf(about, "Comments", f"read by {model}; where lines stand is an estimate")
    page = SubElement(
        root,
        "Page",
        imageFilename=_xml(_name(transcript)),
        imageWidth=str(width),
        imageHeight=str(height),
    )
    region = SubElement(page, "TextRegion", id="paragraph", type="paragraph")
    SubElement(region, "Coords", points=_corners((0, 0, width, height)))
    for number, line in enumerate(transcript.lines, 1):
        marked = SubElement(region, "TextLine", id=f"line_{number}")
        SubElement(marked, "Coords", points=_corners(line.box))
        _page_text(marked, line.text, line.confidence)
    _page_text(region, transcript.text, transcript.confidence)
    return _printed(root)


def _page_text(element: Element, text: str, confidence: float) -> None:
    equivalent = SubElement(element, "TextEquiv", conf=str(_rounded(confidence)))
    _leaf(equivalent, "Unicode", text)


def as_alto(transcript: Transcript, *, model: str, created: datetime) -> str:
    """Return ALTO 4: one block, its lines and words; ALTO has no more than one blank between words."""
    height, width = transcript.size
    root = _root("alto", _ALTO, f"{_ALTO} http://www.loc.gov/standards/alto/v4/alto-4-4.xsd")
    root.set("SCHEMAVERSION", "4.4")
    about = SubElement(root, "Description")
    _leaf(about, "MeasurementUnit", "pixel")
    _leaf(SubElement(about, "sourceImageInformation"), "fileName", _name(transcript))
    step = SubElement(about, "Processing", ID="reading")
    _leaf(step, "processingCategory", "contentGeneration")
    _leaf(step, "processingDateTime", _utc(created))
    _leaf(step, "processingStepSettings", f"read by {model}; where lines stand is an estimate")
    software = SubElement(step, "processingSoftware")
    _leaf(software, "softwareName", SOFTWARE)
    _leaf(software, "softwareVersion", version(SOFTWARE))
    whole = _place((0, 0, width, height))
    layout = SubElement(root, "Layout")
    size = {"WIDTH": str(width), "HEIGHT": str(height)}
    confidence = str(_rounded(transcript.confidence))
    page = SubElement(
        layout, "Page", {"ID": "page", "PHYSICAL_IMG_NR": "1", "PC": confidence, **size}
    )
    space = SubElement(page, "PrintSpace", whole)
    block = SubElement(space, "TextBlock", {"ID": "paragraph", **whole})
    for number, line in enumerate(transcript.lines, 1):
        _alto_line(block, line, f"line_{number}")
    return _printed(root)


def _alto_line(block: Element, line: Line, name: str) -> None:
    element = SubElement(block, "TextLine", {"ID": name, **_place(line.box)})
    words: list[list[Any]] = [[]]
    for one in line.characters:
        if one.character.isspace():
            words.append([])
        else:
            words[-1].append(one)
    # a line must have a String, and a blank must follow one
    written = [word for word in words if word] or [[]]
    for number, word in enumerate(written, 1):
        if number > 1:
            SubElement(element, "SP")
        SubElement(
            element,
            "String",
            ID=f"{name}_word_{number}",
            CONTENT=_xml("".join(one.character for one in word)),
            WC=str(_rounded(mean_confidence(word))),
            # 0 is sure and 9 is not
            CC="".join(str(round(9 * (1 - one.confidence))) for one in word),
        )


FORMATS: dict[str, tuple[str, Callable[..., str]]] = {
    "txt": (".txt", as_text),
    "json": (".json", as_json),
    "page": (".page.xml", as_page),
    "alto": (".alto.xml", as_alto),
}
"""Suffix and writer of each format; a writer takes a transcript, `model` and `created`."""


def _root(name: str, space: str, location: str) -> Element:
    return Element(name, {"xmlns": space, "xmlns:xsi": _XSI, "xsi:schemaLocation": location})


def _leaf(parent: Element, name: str, text: str) -> None:
    SubElement(parent, name).text = _xml(text)


def _xml(text: str) -> str:
    """Return the text with what XML cannot hold replaced."""
    return _NOT_XML.sub("\ufffd", text)


def _printed(root: Element) -> str:
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _corners(box: Box) -> str:
    left, top, right, bottom = box
    return f"{left},{top} {right},{top} {right},{bottom} {left},{bottom}"


def _place(box: Box) -> dict[str, str]:
    left, top, right, bottom = box
    sides = {"HPOS": left, "VPOS": top, "WIDTH": right - left, "HEIGHT": bottom - top}
    return {name: str(value) for name, value in sides.items()}


def _name(transcript: Transcript) -> str:
    return PurePath(transcript.source).name or "image"


def _rounded(confidence: float) -> float:
    return round(confidence, 4)


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
