"""IAM's descriptions: what is written on each form and where, and which split it belongs to.

The IAM handwriting database 3.0 (Marti and Bunke 2002) describes a form in `xml/<form>.xml`, and again,
with less care for spaces, in `ascii/forms.txt` and `ascii/lines.txt`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError
from xml.sax.saxutils import unescape

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from paragraph_ocr.data.archive import Member, Source
from paragraph_ocr.data.paragraph import SPLITS
from paragraph_ocr.errors import UserError

FORM_ID = re.compile(r"[a-z]\d\d-\d{3}[a-z]?")
LINE_ID = re.compile(r"([a-z]\d\d-\d{3}[a-z]?)-\d\d")

SPLITTINGS = ("reference", "independent", "aachen")

LISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "reference": {
        "train": ("trainset.txt",),
        "val": ("validationset1.txt", "validationset2.txt"),
        "test": ("testset.txt",),
    },
    "aachen": {
        split: tuple(f"{stem}{suffix}" for stem in stems for suffix in (".uttlist", ".lst", ".txt"))
        for split, stems in {
            "train": ("train", "tr"),
            "val": ("validation", "valid", "val", "va"),
            "test": ("test", "te"),
        }.items()
    },
}
"""Names of the files that list the forms or lines of a split; of `aachen`'s, the first found."""

_TABLES = ("forms.txt", "lines.txt")
_NAMED = 5  # ids named in a message


class Box(NamedTuple):
    """Pixels of the scan at full size, right and bottom excluded."""

    left: int
    top: int
    right: int
    bottom: int


def _around(boxes: Sequence[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return Box(min(lefts), min(tops), max(rights), max(bottoms))


@dataclass(frozen=True, slots=True)
class Line:
    id: str
    text: str
    components: tuple[Box, ...]
    """Connected strokes, or the whole line as one; what lies elsewhere belongs to other lines."""

    @property
    def box(self) -> Box:
        return _around(self.components)


@dataclass(frozen=True, slots=True)
class Form:
    """A page as its author wrote it."""

    id: str
    writer: str
    lines: tuple[Line, ...]
    size: tuple[int, int] | None
    """Height and width in pixels at full size, where the description gives them."""

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)

    @property
    def box(self) -> Box:
        """Around all lines."""
        return _around([line.box for line in self.lines])


@dataclass(frozen=True, slots=True)
class Descriptions:
    """What a copy of IAM says of its forms."""

    forms: dict[str, Form]
    """By id, in order of their ids."""
    lists: dict[str, list[str]]
    """Ids of forms or lines, by the name of the file that lists them."""


def read_descriptions(folders: Iterable[Source], *, splitting: str, root: object) -> Descriptions:
    """Return what the XML files, or else the tables, say, and the lists of the splitting.

    A form described in several places (an archive beside its extracted folder) is read once.

    Raises:
        UserError: a description or list that cannot be used, or none at all.
    """
    forms: dict[str, Form] = {}
    tables: dict[str, Member] = {}
    lists: dict[str, list[str]] = {}
    wanted_lists = {name for names in LISTS[_lists_of(splitting)].values() for name in names}

    def wanted(name: PurePosixPath) -> bool:
        lower = name.name.lower()
        return _describes(name) or lower in _TABLES or lower in wanted_lists

    for source in folders:
        here: dict[str, str] = {}
        for member in source.members(wanted):
            name = member.name.name.lower()
            if _describes(member.name):
                form = parse_form(member.data, where=member.where)
                if form.id in here:
                    raise UserError(
                        f"{member.where} describes form {form.id}, and {here[form.id]} does too. "
                        "Leave one."
                    )
                here[form.id] = member.where
                forms.setdefault(form.id, form)
            elif name in _TABLES:
                tables.setdefault(name, member)
            else:
                lists.setdefault(name, list(_listed(member)))
    if not forms and len(tables) == len(_TABLES):
        forms = {form.id: form for form in parse_tables(tables["forms.txt"], tables["lines.txt"])}
    if not forms:
        raise UserError(
            f"datamodule.root={root} describes no forms of IAM. Put xml.tgz there (or ascii.tgz, or a zip "
            "or folder that holds iamdb/xml)."
        )
    return Descriptions(dict(sorted(forms.items())), lists)


def _describes(name: PurePosixPath) -> bool:
    return name.suffix.lower() == ".xml" and FORM_ID.fullmatch(name.stem) is not None


def _lists_of(splitting: str) -> str:
    return "aachen" if splitting == "aachen" else "reference"


def parse_form(data: bytes, *, where: str) -> Form:
    """Return the form that an XML file describes.

    Raises:
        UserError: broken XML, entities in it, or something missing, empty or twice.
    """
    remedy = "Fetch it again."
    try:
        # IAM's files may name a DTD, which is never fetched
        root = fromstring(data, forbid_dtd=False, forbid_entities=True, forbid_external=True)
    except (ParseError, LookupError, ValueError) as error:
        if isinstance(error, DefusedXmlException):
            raise UserError(
                f"{where} declares entities, which are not read. Remove them."
            ) from error
        raise UserError(f"{where} is broken XML: {error}. {remedy}") from error
    try:
        lines = [_parse_line(line) for line in root.findall("handwritten-part/line")]
        size = None
        if "height" in root.attrib and "width" in root.attrib:
            size = int(root.attrib["height"]), int(root.attrib["width"])
        form = Form(root.attrib["id"], root.attrib["writer-id"], tuple(lines), size)
    except KeyError as error:
        raise UserError(f"{where} lacks the attribute {error}. {remedy}") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}. {remedy}") from error
    _check_form(form, where=where)
    return form


def _parse_line(element: Element) -> Line:
    identity = element.attrib["id"]
    of_words = [
        [_box(component) for component in word.iterfind("cmp")] for word in element.iterfind("word")
    ]
    boxes = tuple(box for word in of_words for box in word)
    if not boxes:
        raise ValueError(f"line {identity} has no components, and so no place")
    if not all(of_words):  # where a word could not be segmented, its strokes are in no component
        boxes = (_around(boxes),)
    return Line(identity, _plain(element.attrib["text"]), boxes)


def _box(element: Element) -> Box:
    left, top, width, height = (int(element.attrib[key]) for key in ("x", "y", "width", "height"))
    return Box(left, top, left + width, top + height)


def _plain(text: str) -> str:
    """Return the text with what is left of escaped characters: IAM escapes some of them twice."""
    return " ".join(unescape(text, {"&quot;": '"', "&apos;": "'"}).split())


def _check_form(form: Form, *, where: str) -> None:
    if not form.lines:
        raise UserError(f"{where}: form {form.id} has no handwritten lines. Take it out.")
    for identity, count in Counter(line.id for line in form.lines).items():
        if count > 1:
            raise UserError(f"{where}: line {identity} is there twice. Fetch the file again.")
    for line in form.lines:
        if not line.text:
            raise UserError(f"{where}: line {line.id} has an empty transcription. Give its text.")
        if (
            line.box.left < 0
            or line.box.top < 0
            or not (line.box.left < line.box.right and line.box.top < line.box.bottom)
        ):
            raise UserError(f"{where}: line {line.id} has no area: {tuple(line.box)}. Mend it.")


def parse_tables(forms: Member, lines: Member) -> list[Form]:
    """Return the forms of ascii/forms.txt with the lines of ascii/lines.txt.

    Raises:
        UserError: a row that cannot be read, or a line of no form.
    """
    writers: dict[str, str] = {}
    for where, fields in _rows(forms, columns=2):
        if fields[0] in writers:
            raise UserError(f"{where}: form {fields[0]} is there twice. Fetch the file again.")
        writers[fields[0]] = fields[1]
    written: dict[str, list[Line]] = {}
    # id, segmentation, grey level, components, x, y, width, height, words
    for where, fields in _rows(lines, columns=9):
        found = LINE_ID.fullmatch(fields[0])
        if found is None or found[1] not in writers:
            raise UserError(f"{where}: {fields[0]} is no line of a form. Fetch the file again.")
        try:
            left, top, width, height = map(int, fields[4:8])
        except ValueError as error:
            raise UserError(f"{where}: {error}. Fetch the file again.") from error
        box = Box(left, top, left + width, top + height)
        text = join_tokens(" ".join(fields[8:]).split("|"))
        written.setdefault(found[1], []).append(Line(fields[0], text, (box,)))
    found_forms = [
        Form(identity, writers[identity], tuple(found), None) for identity, found in written.items()
    ]
    for form in found_forms:
        _check_form(form, where=lines.where)
    return found_forms


def _rows(table: Member, *, columns: int) -> Iterator[tuple[str, list[str]]]:
    text = table.data.decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split()
        where = f"{table.where} line {number}"
        if len(fields) < columns:
            raise UserError(f"{where} has fewer than {columns} columns. Fetch the file again.")
        yield where, fields


def join_tokens(tokens: Iterable[str]) -> str:
    """Return words and signs as a line; the tables part all of them, and do not say where it was blank.

    Stops follow their word, brackets and quotation marks hold what they enclose, and what begins with
    an apostrophe (or is n't) goes on with its word. The XML files leave nothing to guess.
    """
    text, glued, quoted = "", True, False
    for token in tokens:
        opens = token == "(" or (token == '"' and not quoted)
        follows = (
            token in {".", ",", ";", ":", "!", "?", ")", "...", "n't"}
            or (token == '"' and quoted)
            or (token.startswith("'") and len(token) > 1)
        )
        text += ("" if glued or follows else " ") + token
        glued = opens
        quoted ^= token == '"'
    return text


def _listed(member: Member) -> Iterator[str]:
    """Yield the ids in a list: one a line, maybe as the path of an image."""
    text = member.data.decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        identity = PurePosixPath(entry.split()[0]).name.partition(".")[0]
        if not (FORM_ID.fullmatch(identity) or LINE_ID.fullmatch(identity)):
            raise UserError(
                f"{member.where} line {number}: {entry[:40]!r} is no id of a form (a01-000u) or line "
                "(a01-000u-00). Mend that line."
            )
        yield identity


@dataclass(frozen=True, slots=True)
class Splits:
    """Which split each form, and each line if lines were listed, belongs to."""

    forms: dict[str, str]
    lines: dict[str, str] | None
    remarks: tuple[str, ...]
    """What a person should know, a sentence each."""


def deal(descriptions: Descriptions, *, splitting: str, root: object) -> Splits:
    """Return the split of each form.

    "reference" is the reference's: testset.txt to test, validationset1.txt and validationset2.txt to
    val, every other form to train, all lines of a form with it. "independent" leaves out those other
    forms whose writers stand in val or test. "aachen" takes forms or lines as its three lists say.

    Raises:
        UserError: a list is missing or names no form that is here, or a form or a writer of the lists
            stands in two splits.
    """
    kind = _lists_of(splitting)
    listed: dict[str, set[str]] = {}
    homes: dict[str, str] = {}  # of forms and lines
    unknown: set[str] = set()
    for split in SPLITS:
        names = [name for name in LISTS[kind][split] if name in descriptions.lists]
        if kind == "aachen":
            names = names[:1]
        elif split == "val" and len(names) == 1:
            names = []
        if not names and not (kind == "reference" and split == "train"):
            raise UserError(_no_list(kind, split, root))
        ids = {identity for name in names for identity in descriptions.lists[name]}
        for identity in sorted(ids):
            if homes.setdefault(identity, split) != split:
                raise UserError(
                    f"datamodule.root={root}: the lists put {identity} into {homes[identity]} and "
                    f"{split}. Take it out of one."
                )
        forms = {identity[:-3] if LINE_ID.fullmatch(identity) else identity for identity in ids}
        unknown |= forms - descriptions.forms.keys()
        listed[split] = forms & descriptions.forms.keys()
        if names and not listed[split]:
            raise UserError(
                f"datamodule.root={root}: {' and '.join(names)} name no form that is described here "
                f"({_some(forms)}). Add the forms, or pass another datamodule.split."
            )
    dealt: dict[str, str] = {}
    for split, forms in listed.items():
        for identity in sorted(forms):
            if dealt.setdefault(identity, split) != split:
                raise UserError(
                    f"datamodule.root={root}: the lists put lines of form {identity} into "
                    f"{dealt[identity]} and {split}. Keep a form together."
                )
    writers = _writers(descriptions, dealt, root=root)
    remarks = []
    if unknown:
        remarks.append(
            f"{_count(len(unknown), 'listed form')} not described here ({_some(unknown)})"
        )
    rest = [identity for identity in descriptions.forms if identity not in dealt]
    if kind == "aachen":
        if rest:
            remarks.append(f"{_count(len(rest), 'form')} in none of the lists, left out")
    else:
        leaking = [i for i in rest if writers.get(descriptions.forms[i].writer, "train") != "train"]
        if leaking:
            done = "left out of training" if splitting == "independent" else "kept in training"
            remarks.append(
                f"{_count(len(leaking), 'form')} in none of the lists but by writers of val or test "
                f"({_some(leaking)}), {done}"
                + (
                    ""
                    if splitting == "independent"
                    else ": datamodule.split=independent leaves them out"
                )
            )
        if splitting == "independent":
            rest = sorted(set(rest) - set(leaking))
        dealt |= dict.fromkeys(rest, "train")
    of_lines = {i: split for i, split in homes.items() if LINE_ID.fullmatch(i)}
    return Splits(dealt, of_lines if kind == "aachen" and of_lines else None, tuple(remarks))


def _no_list(kind: str, split: str, root: object) -> str:
    if kind == "aachen":
        return (
            f"datamodule.split=aachen finds no list of {split} in datamodule.root={root}. Put "
            f"{', '.join(LISTS[kind][split][:2])} or {LISTS[kind][split][2]} there, an id of a form or "
            "line in each line."
        )
    return (
        f"datamodule.root={root} lacks {' or '.join(LISTS[kind][split])}. Put the split files of IAM's Large "
        "Writer Independent Text Line Recognition Task there (the zip or its folder)."
    )


def _writers(descriptions: Descriptions, dealt: dict[str, str], *, root: object) -> dict[str, str]:
    """Return the split of each writer of the listed forms.

    Raises:
        UserError: one stands in two.
    """
    homes: dict[str, tuple[str, str]] = {}
    for identity, split in dealt.items():
        writer = descriptions.forms[identity].writer
        other, first = homes.setdefault(writer, (split, identity))
        if other != split:
            raise UserError(
                f"datamodule.root={root}: writer {writer} stands in {other} (form {first}) and in {split} "
                f"(form {identity}) of the lists. Take one of them out."
            )
    return {writer: split for writer, (split, _) in homes.items()}


def _some(ids: Iterable[str]) -> str:
    ordered = sorted(ids)
    return ", ".join(ordered[:_NAMED]) + (", ..." if len(ordered) > _NAMED else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
