"""Paragraphs as transcription programs mark them: regions of PAGE XML and blocks of ALTO.

PAGE (PRImA, 2013 to 2019) gives polygons, ALTO (Library of Congress, 2 to 4) boxes or polygons. Name
spaces differ from version to version, so elements are known by their local names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from paragraph_ocr.errors import UserError

_FARTHEST_PX = 1_000_000

Polygon = tuple[tuple[int, int], ...]
"""Corners (x, y) in pixels of the scan."""


@dataclass(frozen=True, slots=True)
class Region:
    """A paragraph on a scan."""

    image: str
    """File name of the scan, as the file gives it."""
    id: str
    text: str
    polygon: Polygon


def read_layout(path: Path, content: bytes) -> list[Region]:
    """Return the regions that have text, in the order of the file; lines are parted by newlines.

    Raises:
        UserError: broken XML, entities or a DTD in it, neither PAGE nor ALTO, or no corners.
    """
    try:
        root = fromstring(content, forbid_dtd=True)
    except (ParseError, LookupError) as error:
        raise UserError(f"{path} is broken XML: {error}. Export it again.") from error
    except DefusedXmlException as error:
        raise UserError(
            f"{path} declares a DTD or entities, which are not read. Remove them."
        ) from error
    except ValueError as error:  # an encoding that the parser does not know
        raise UserError(f"{path} is broken XML: {error}. Export it again.") from error
    kind = _name(root)
    try:
        if kind == "PcGts":
            return list(_page(root))
        if kind == "alto":
            return list(_alto(root))
    except (KeyError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} lacks what a {kind} file needs: {error}. Export it again."
        ) from error
    raise UserError(f"{path} is neither PAGE XML nor ALTO: its root is {kind}. Take it out.")


def _page(root: Element) -> Iterator[Region]:
    for page in _children(root, "Page"):
        for region in _all(page, "TextRegion"):
            lines = [_unicode(line) for line in _children(region, "TextLine")]
            # a region may be transcribed as a whole, without lines
            text = "\n".join(line for line in lines if line) or _unicode(region)
            if text:
                corners = next(_children(region, "Coords"), None)
                if corners is None:
                    raise ValueError(f"no Coords of region {region.get('id')}")
                polygon = _points(corners.attrib["points"])
                yield Region(page.attrib["imageFilename"], region.attrib["id"], text, polygon)


def _unicode(element: Element) -> str:
    """Return the text of an element's own TextEquiv, of the lowest index if there are several."""
    equivalents = sorted(_children(element, "TextEquiv"), key=lambda e: int(e.get("index", "0")))
    for equivalent in equivalents:
        for unicode in _children(equivalent, "Unicode"):
            return (unicode.text or "").strip()
    return ""


def _alto(root: Element) -> Iterator[Region]:
    files = [(element.text or "").strip() for element in _all(root, "fileName")]
    if not files:
        raise ValueError("no fileName of the scan")
    for block in _all(root, "TextBlock"):
        lines = [_words(line) for line in _children(block, "TextLine")]
        text = "\n".join(line for line in lines if line)
        if text:
            yield Region(files[0], block.attrib["ID"], text, _outline(block))


def _words(line: Element) -> str:
    """Return the text of an ALTO line: String is a word, SP a blank, HYP the hyphen at the end."""
    text = ""
    for child in line:
        kind = _name(child)
        if kind == "String":
            # programs that leave SP out mean a blank between words all the same
            text += (" " if text and not text.endswith(" ") else "") + child.attrib["CONTENT"]
        elif kind == "SP":
            text += " "
        elif kind == "HYP":
            text += child.get("CONTENT", "-")
    return text.strip()


def _outline(block: Element) -> Polygon:
    for polygon in _all(block, "Polygon"):
        if polygon.attrib["POINTS"]:
            return _points(polygon.attrib["POINTS"])
    x, y, width, height = (
        round(float(block.attrib[key])) for key in ("HPOS", "VPOS", "WIDTH", "HEIGHT")
    )
    if max(map(abs, (x, y, width, height))) > _FARTHEST_PX:
        raise ValueError("a block lies farther off than any page is wide")
    return ((x, y), (x + width, y), (x + width, y + height), (x, y + height))


def _points(text: str) -> Polygon:
    """Return corners from "x,y x,y" or "x y x y"."""
    numbers = [round(float(number)) for number in text.replace(",", " ").split()]
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"{text[:80]!r} is no polygon")
    if max(map(abs, numbers)) > _FARTHEST_PX:
        raise ValueError("a corner lies farther off than any page is wide")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _children(element: Element, name: str) -> Iterator[Element]:
    return (child for child in element if _name(child) == name)


def _all(element: Element, name: str) -> Iterator[Element]:
    return (child for child in element.iter() if _name(child) == name)
