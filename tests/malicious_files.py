"""Files such as nobody should send: each case writes some into a folder, and says how they are read.

All are made here; nothing is fetched. A payload, if anything ever ran it, would make a marker file; what
lies in the secret files beside the folder must never be read.
"""

import gzip
import io
import json
import os
import pickle
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.torch
import scipy.io
import torch
import yaml
from PIL import Image

from paragraph_ocr.data.paragraph import Paragraph
from paragraph_ocr.data.store import StoreWriter, pack
from paragraph_ocr.stored import CONFIG, write_config
from paragraph_ocr.validation import compose, validate

SECRET = "TOP SECRET 7f3a"


@dataclass(frozen=True)
class Place:
    """Where a case writes: `folder` is given to the reader, the rest lies outside of it."""

    folder: Path
    secret: Path
    """A text file whose content must never be seen."""
    picture: Path
    """An image that must never be read."""
    marker: Path
    """Made by a payload that runs."""

    @property
    def command(self) -> str:
        return f"touch {self.marker}"


@dataclass(frozen=True)
class Case:
    reader: str
    write: Callable[[Place], object]
    said: str | None
    """What the refusal says; None: the file is harmless, and read without effect."""
    most_mib: int = 300


class Payload:
    """Makes the marker when it is unpickled."""

    def __init__(self, place: Place) -> None:
        self.command = place.command

    def __reduce__(self):
        return os.system, (self.command,)


def pickled(place: Place) -> bytes:
    return pickle.dumps(Payload(place))


# --- a run's config --------------------------------------------------------------------------------


def config(change: Callable[[dict, Place], object]) -> Callable[[Place], object]:
    def write(place: Place) -> None:
        write_config(validate(compose([])), place.folder)
        tree = yaml.safe_load((place.folder / CONFIG).read_text())
        change(tree, place)
        (place.folder / CONFIG).write_text(yaml.safe_dump(tree))

    return write


def config_text(text: str | Callable[[Place], str]) -> Callable[[Place], object]:
    return lambda place: (place.folder / CONFIG).write_text(
        text if isinstance(text, str) else text(place)
    )


LAUGHING_YAML = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

CONFIGS = {
    "python tag": config_text(lambda p: f"!!python/object/apply:os.system ['{p.command}']"),
    "python tag in a value": config_text(
        lambda p: f"seed: !!python/object/apply:os.system ['{p.command}']"
    ),
    "python name": config_text("model: !!python/name:os.system"),
    "aliases": config_text(LAUGHING_YAML),
    "merge keys": config_text("a: &a {b: 1}\nc: {<<: *a}"),
    "deep": config_text("a: " + "[" * 100_000),
    "endless number": config_text("seed: " + "9" * 10_000),
    "impossible date": config_text("seed: 2001-99-99"),
    "huge": config_text("a" * 2_000_000),
    "no text": lambda p: (p.folder / CONFIG).write_bytes(b"\xff\xfe\x00\x01"),
    "endless device": lambda p: (p.folder / CONFIG).symlink_to("/dev/zero"),
    "pipe": lambda p: os.mkfifo(p.folder / CONFIG),
    "target": config(lambda t, p: t["model"].update(_target_="os.system")),
    "target at the top": config(lambda t, p: t.update(_target_="os.system", command=p.command)),
    "environment": config(lambda t, p: t.update(name="${oc.env:HOME}")),
    "environment in an open node": config(
        lambda t, p: t["model"]["encoder"].update(extra={"x": ["${oc.env:HOME}"]})
    ),
    "class for a schema": config(lambda t, p: t["schema"].update(model="os.system")),
    "list for a schema": config(lambda t, p: t["schema"].update(model=["transformer"])),
    "layers without end": config(lambda t, p: t["model"]["decoder"].update(depth=10**9)),
    "heads that do not divide": config(lambda t, p: t["model"]["decoder"].update(heads=7)),
    "not a number": config(lambda t, p: t["optimizer"].update(lr=float("nan"))),
}
CONFIG_CASES = {
    f"config: {name}": Case("config", write, {"pipe": "no file", "endless device": "no file"}.get(name, ""))
    for name, write in CONFIGS.items()
}  # fmt: skip

# --- weights ---------------------------------------------------------------------------------------


def header(tree: object, *, length: int | None = None, data: bytes = b"") -> Callable:
    def write(place: Place) -> None:
        text = json.dumps(tree).encode()
        size = len(text) if length is None else length
        (place.folder / "best.safetensors").write_bytes(struct.pack("<Q", size) + text + data)

    return write


def torch_file(name: str) -> Callable[[Place], object]:
    return lambda place: torch.save({"state_dict": Payload(place)}, place.folder / name)


def whole_but(change: Callable[[dict], object]) -> Callable[[Place], object]:
    """Write weights of some model that are not those wanted."""

    def write(place: Place) -> None:
        tensors = {"encoder.weight": torch.zeros(3)}
        change(tensors)
        safetensors.torch.save_file(tensors, place.folder / "best.safetensors")

    return write


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WEIGHTS = {
    "pickle": torch_file("best.safetensors"),
    "old pickle": lambda p: (p.folder / "best.safetensors").write_bytes(pickled(p)),
    "checkpoint": torch_file("model.ckpt"),
    "torch file": torch_file("model.pt"),
    "short header": lambda p: (p.folder / "best.safetensors").write_bytes(b"\x10\0\0"),
    "endless header": header({"a": TENSOR}, length=2**62),
    "header beyond the file": header({"a": TENSOR}, length=1000),
    "no json": lambda p: (p.folder / "best.safetensors").write_bytes(
        struct.pack("<Q", 8) + b"notjson!"
    ),
    "tensor beyond the file": header({"a": {**TENSOR, "data_offsets": [0, 2**40]}}, data=b"1234"),
    "shape of terabytes": header({"a": {**TENSOR, "shape": [2**20, 2**20]}}, data=b"1234"),
    "shape that overflows": header({"a": {**TENSOR, "shape": [2**63, 2**63]}}, data=b"1234"),
    "overlapping tensors": header({"a": TENSOR, "b": TENSOR}, data=b"1234"),
    "unknown type": header({"a": {**TENSOR, "dtype": "PY"}}, data=b"1234"),
    "another model": whole_but(lambda t: None),
    "no weights": lambda p: (p.folder / "notes.txt").write_text("nothing"),
    "endless device": lambda p: (p.folder / "best.safetensors").symlink_to("/dev/zero"),
    "pipe": lambda p: os.mkfifo(p.folder / "best.safetensors"),
    "link to a secret": lambda p: (p.folder / "best.safetensors").symlink_to(p.secret),
}
WEIGHT_CASES = {
    f"weights: {name}": Case("weights", write, "model.weights=") for name, write in WEIGHTS.items()
}
ENCODER_CASES = {
    "encoder: pickled weights": Case(
        "encoder", torch_file("resnet.pth"), "model.encoder.pretrained=true"
    ),
    "encoder: a checkpoint path": Case("checkpoint_path", torch_file("resnet.pth"), "is not read"),
}

# --- stores ----------------------------------------------------------------------------------------

ROWS = 3


def store(place: Place) -> Path:
    path = place.folder / "a.h5"
    with StoreWriter(path, fingerprint="abc") as writer:
        for n in range(ROWS):
            image = np.full((20, 30), n, np.uint8)
            writer.add(pack(Paragraph(image, f"text {n}", "train", "", "")))
    return path


def spoilt(change: Callable[[h5py.File, Place], object]) -> Callable[[Place], object]:
    def write(place: Place) -> None:
        with h5py.File(store(place), "a") as file:
            change(file, place)

    return write


def replaced(name: str, make: Callable[[h5py.File, Place], object]) -> Callable[[Place], object]:
    def change(file: h5py.File, place: Place) -> None:
        del file[name]
        made = make(file, place)
        if made is not None:
            file[name] = made

    return spoilt(change)


def other_store(place: Place) -> str:
    path = place.secret.parent / "other.h5"
    with h5py.File(path, "w") as file:
        file["text"] = [SECRET] * ROWS
        file["place"] = np.zeros(ROWS, "i4")
    return str(path)


def virtual(file: h5py.File, place: Place) -> None:
    layout = h5py.VirtualLayout((ROWS,), "i4")
    layout[:] = h5py.VirtualSource(other_store(place), "place", (ROWS,))
    file.create_virtual_dataset("place", layout)


def virtual_images(file: h5py.File, place: Place) -> None:
    layout = h5py.VirtualLayout((ROWS, 20, 30), "u1")
    layout[:] = h5py.VirtualSource(other_store(place), "images", (ROWS, 20, 30))
    file.create_virtual_dataset("images/20x30", layout)


def claimed(name: str, shape: tuple[int, ...], dtype: object = "i4") -> Callable[[Place], object]:
    """Replace a column by one that claims a shape and holds nothing."""
    chunks = tuple(min(side, 1024) for side in shape)
    return replaced(
        name,
        lambda file, place: (
            file.create_dataset(name, shape, dtype, chunks=chunks, compression="gzip") and None
        ),
    )


def shared_text(file: h5py.File, place: Place) -> None:
    """Have a hundred thousand rows name one text of ten megabytes."""
    rows = 100_000
    for name, width in (("canvas", ()), ("place", ()), ("size", (2,))):
        del file[name]
        file.create_dataset(name, data=np.ones((rows, *width), "i4"), compression="gzip")
    file["canvas"][:] = 0
    for name in ("text", "split", "source", "writer"):
        del file[name]
        file.create_dataset(
            name, (rows,), h5py.string_dtype(), fillvalue="x" * 10_000_000, chunks=(1000,)
        )


def swelling_page(file: h5py.File, place: Place) -> None:
    packed = zlib.compress(bytes(2**27), 1)
    file["images/20x30"].id.write_direct_chunk((0, 0, 0), packed)


def swelling_chunk(file: h5py.File, place: Place) -> None:
    shape = (ROWS, 20, 30)
    chunk = (2**20, 20, 30)
    file.create_dataset(
        "images/20x30", shape, "u1", maxshape=(None, 20, 30), chunks=chunk, compression="gzip"
    )
    file["images/20x30"][0] = 1


def raw_images(file: h5py.File, place: Place) -> None:
    file.create_dataset(
        "images/20x30", (ROWS, 20, 30), "u1", external=[(str(place.secret), 0, h5py.h5f.UNLIMITED)]
    )


def pickled_attribute(file: h5py.File, place: Place) -> None:
    file.attrs["fingerprint"] = np.void(pickled(place))
    file.attrs["format"] = np.void(pickled(place))


def objects(file: h5py.File, place: Place) -> None:
    kind = np.dtype([("a", h5py.vlen_dtype(np.uint8)), ("b", h5py.ref_dtype)])
    file.create_dataset("text", (ROWS,), kind)


STORES: dict[str, tuple] = {
    "external link": (
        replaced("place", lambda f, p: h5py.ExternalLink(other_store(p), "/place")), "leads"
    ),
    "external text": (
        replaced("text", lambda f, p: h5py.ExternalLink(other_store(p), "/text")), "leads"
    ),
    "link to a folder's images": (
        replaced("images", lambda f, p: h5py.ExternalLink(other_store(p), "/")), "leads"
    ),
    "soft link": (replaced("place", lambda f, p: h5py.SoftLink("/canvas")), "leads"),
    "soft link in a ring": (replaced("place", lambda f, p: h5py.SoftLink("/place")), "leads"),
    "external bytes": (
        replaced("place", lambda f, p: f.create_dataset(
            "place", (ROWS,), "i4", external=[(str(p.secret), 0, 4 * ROWS)]) and None), "leads",
    ),
    "external pages": (replaced("images/20x30", raw_images), "leads"),
    "virtual column": (replaced("place", virtual), "leads"),
    "virtual pages": (replaced("images/20x30", virtual_images), "leads"),
    "a trillion rows": (claimed("canvas", (10**12,)), "claims"),
    "columns of unlike length": (claimed("place", (10**9,)), "not integers"),
    "a trillion texts": (claimed("text", (10**12,), h5py.string_dtype()), "not text"),
    "one text a hundred thousand times": (spoilt(shared_text), "characters", 500),
    "a page that swells": (spoilt(swelling_page), "no whole store", 60),
    "a chunk of a million pages": (replaced("images/20x30", swelling_chunk), "no pages"),
    "canvas of terabytes": (
        spoilt(lambda f, p: f.attrs.modify("canvases", np.array([[2**30, 2**30]]))), "canvas"
    ),
    "canvas below zero": (
        spoilt(lambda f, p: f.attrs.modify("canvases", np.array([[-1, 30]]))), "canvas"
    ),
    "canvases of text": (spoilt(lambda f, p: f.attrs.create("canvases", "20x30")), "canvases"),
    "objects for text": (replaced("text", objects), "not text"),
    "numbers for text": (replaced("text", lambda f, p: np.arange(ROWS)), "not text"),
    "text for numbers": (replaced("place", lambda f, p: [b"a"] * ROWS), "not integers"),
    "text of no encoding": (
        replaced("text", lambda f, p: f.create_dataset(
            "text", data=[b"\xff\xfe"] * ROWS, dtype=h5py.string_dtype()) and None), "whole store",
    ),
    "group for a column": (replaced("text", lambda f, p: f.create_group("text") and None), "leads"),
    "place that is not there": (
        spoilt(lambda f, p: f["place"].__setitem__(0, 10**6)), "whole store"
    ),
    "place below zero": (spoilt(lambda f, p: f["place"].__setitem__(0, -1)), "no place"),
    "page larger than its canvas": (
        spoilt(lambda f, p: f["size"].__setitem__(0, (10**6, 10**6))), "larger"
    ),
    "canvas that is not there": (spoilt(lambda f, p: f["canvas"].__setitem__(0, 99)), "canvas"),
    "unknown split": (spoilt(lambda f, p: f["split"].__setitem__(0, "all")), "split"),
    "version of many": (
        spoilt(lambda f, p: f.attrs.create("version", np.array([1, 1]))), "version"
    ),
    "no attributes": (spoilt(lambda f, p: f.attrs.__delitem__("fingerprint")), "whole store"),
    "pickled attributes": (spoilt(pickled_attribute), "not a paragraph_ocr store"),
    "another HDF5 file": (
        lambda p: h5py.File(p.folder / "a.h5", "w").create_dataset("x", data=[1]).file.close(),
        "not a paragraph_ocr store",
    ),
    "pickle": (lambda p: (p.folder / "a.h5").write_bytes(pickled(p)), "not a whole HDF5"),
    "link to a secret": (lambda p: (p.folder / "a.h5").symlink_to(p.secret), "not a whole HDF5"),
}  # fmt: skip
STORE_CASES = {f"store: {name}": Case("store", *case) for name, case in STORES.items()}

# --- archives --------------------------------------------------------------------------------------


def zipped(name: str, data: bytes = b"<x/>", *, mode: int = 0o644, times: int = 1, **more):
    def write(place: Place) -> None:
        with zipfile.ZipFile(place.folder / "a.zip", "w", more.pop("method", 8)) as archive:
            for number in range(times):
                info = zipfile.ZipInfo(name.format(number))
                info.external_attr, info.compress_type = mode << 16, archive.compression
                archive.writestr(info, data)

    return write


def tarred(*members: tuple[str, bytes, str, bytes], form: int = tarfile.PAX_FORMAT):
    """Write members given as (name, type, target, data)."""

    def write(place: Place) -> None:
        with tarfile.open(place.folder / "a.tgz", "w:gz", format=form) as archive:
            for name, kind, target, data in members:
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = kind, target, len(data)
                archive.addfile(info, io.BytesIO(data))

    return write


def raw_tar(make: Callable[[], bytes]) -> Callable[[Place], object]:
    return lambda place: (place.folder / "a.tgz").write_bytes(gzip.compress(make(), 1))


def tar_header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def nested(place: Place) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", 8) as archive:
        archive.writestr("../../a01-000.xml", SECRET)
        archive.writestr("bomb", bytes(2**26))
    with zipfile.ZipFile(place.folder / "a.zip", "w", 8) as archive:
        archive.writestr("inner.zip", inner.getvalue())


def lying_zip(place: Place) -> None:
    """Claim that a file of 64 MB unpacks to 4 bytes."""
    zipped("a.xml", bytes(2**26))(place)
    path = place.folder / "a.zip"
    size = struct.pack("<I", 2**26)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 4)))


REG, SYM, LNK = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
LINK = stat.S_IFLNK | 0o777
ARCHIVES: dict[str, tuple[Callable[[Place], object], str | None]] = {
    "zip that climbs": (zipped("../a.xml"), "leads outside"),
    "zip that climbs late": (zipped("a/b/../../../a.xml"), "leads outside"),
    "zip of an absolute path": (zipped("/etc/a.xml"), "leads outside"),
    "zip of a drive": (zipped("C:\\a.xml"), "leads outside"),
    "zip that climbs backwards": (zipped("..\\a.xml"), "leads outside"),
    "zip of a shell's words": (zipped("$(touch x);`id`'\".xml"), None),
    "zip with a link out": (zipped("a.xml", b"/etc/passwd", mode=LINK), "leads outside"),
    "zip bomb": (zipped("a.xml", bytes(2**28)), "swell"),
    "zip bomb of many": (zipped("{}.xml", bytes(2**22), times=64), "swell"),
    "zip that lies of its size": (lying_zip, "broken"),
    "zip by another method": (zipped("a.xml", method=zipfile.ZIP_LZMA), "deflate"),
    "zip within a zip": (nested, None),
    "tar that climbs": (tarred(("../a.xml", REG, "", b"")), "leads outside"),
    "tar of an absolute path": (tarred(("/etc/a.xml", REG, "", b"")), "leads outside"),
    "tar with a symbolic link": (tarred(("a.xml", SYM, "/etc/passwd", b"")), "leads outside"),
    "tar with a link that climbs": (tarred(("b/a.xml", SYM, "../../x", b"")), "leads outside"),
    "tar with a hard link": (tarred(("a.xml", LNK, "../../x", b"")), "leads outside"),
    "tar with a device": (tarred(("a.xml", tarfile.CHRTYPE, "", b"")), "device"),
    "tar with a pipe": (tarred(("a.xml", tarfile.FIFOTYPE, "", b"")), "device"),
    "tar bomb": (tarred(("a.xml", REG, "", bytes(2**28))), "swell"),
    "tar bomb passed over": (tarred(("a.bin", REG, "", bytes(2**28))), "swell"),
    "tar with an endless name": (
        raw_tar(lambda: tar_header(tarfile.GNUTYPE_LONGNAME, 2**28) + bytes(2**28)), "broken",
    ),
    "tar with an endless header": (
        raw_tar(lambda: tar_header(tarfile.XHDTYPE, 2**28) + b"9" * 2**28), "broken",
    ),
    "tar with names of names": (
        raw_tar(lambda: (tar_header(tarfile.GNUTYPE_LONGNAME, 2) + b"a\0" + bytes(510)) * 5000),
        "broken",
    ),
    "tar of a negative size": (
        raw_tar(lambda: tar_header(REG, 0)[:124] + b"\xff" * 12 + tar_header(REG, 0)[136:]), "",
    ),
    "gzip that is none": (
        lambda p: (p.folder / "a.tgz").write_bytes(b"\x1f\x8b" + bytes(100)), "broken"
    ),
}  # fmt: skip
ARCHIVE_CASES = {f"archive: {name}": Case("archive", *case) for name, case in ARCHIVES.items()}

# --- folders of pages ------------------------------------------------------------------------------


def png(width: int = 40, height: int = 20) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 255).save(file, "PNG")
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    whole = kind + data
    return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))


def claiming_png(width: int, height: int, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(60_001)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + data + chunk(b"IEND", b"")


def claiming_tiff(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("L", (40, 20), shade) for shade in range(250)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


def with_exif(data: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("L", (40, 20), 255).save(file, "JPEG", exif=b"Exif\0\0" + data)
    return file.getvalue()


def page(content: bytes | None, *, text: str = "text", name: str = "p.png"):
    def write(place: Place) -> None:
        if content is not None:
            (place.folder / name).write_bytes(content)
        (place.folder / name).with_suffix(".txt").write_text(text)

    return write


def manifest(row: dict | str, name: str = "manifest.jsonl") -> Callable[[Place], object]:
    def write(place: Place) -> None:
        (place.folder / "p.png").write_bytes(png())
        line = row if isinstance(row, str) else json.dumps(row)
        (place.folder / name).write_text(line.replace("{picture}", str(place.picture)))

    return write


def linked(name: str, to: str, *, beside: dict[str, bytes] | None = None):
    """Put a link in the folder to something outside of it."""

    def write(place: Place) -> None:
        for other, content in (beside or {}).items():
            (place.folder / other).write_bytes(content)
        target = {"secret": place.secret, "picture": place.picture}.get(to, Path(to))
        (place.folder / name).symlink_to(target)

    return write


def xml(text: str | bytes) -> Callable[[Place], object]:
    def write(place: Place) -> None:
        (place.folder / "p.png").write_bytes(png())
        content = text if isinstance(text, bytes) else text.encode()
        (place.folder / "p.xml").write_bytes(
            content.replace(b"SECRET_FILE", str(place.secret).encode())
        )

    return write


ENTITIES = "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
REGION = (
    '<PcGts><Page imageFilename="{}"><TextRegion id="r"><Coords points="{}"/>{}'
    "</TextRegion></Page></PcGts>"
)
WORDS = "<TextEquiv><Unicode>{}</Unicode></TextEquiv>"
COORDS = "1,1 30,1 30,15"
TEXT_REGION = f'<TextRegion id="r"><Coords points="{COORDS}"/>{WORDS.format("a")}</TextRegion>'


def doctype(inside: str, used: str) -> str:
    return f"<!DOCTYPE PcGts [{inside}]>" + REGION.format("p.png", COORDS, WORDS.format(used))


FOLDERS: dict[str, tuple] = {
    # images
    "PNG of 3.6 gigapixels": (page(claiming_png(60_000, 60_000)), "150,000,000"),
    "PNG of the largest numbers": (page(claiming_png(2**31 - 1, 2**31 - 1)), "150,000,000"),
    "PNG that claims and has nothing": (page(claiming_png(12_000, 12_000)), "cannot be read", 700),
    "PNG of 36 megapixels in 35 kB": (page(png(6000, 6000)), None, 800),
    "PNG with a comment that swells": (
        page(claiming_png(40, 20, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))))), "",
    ),
    "PNG with a colour profile that swells": (
        page(claiming_png(40, 20, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28))))), "MAX_TEXT_CHUNK",
    ),
    "PNG cut short": (page(png()[:40]), "is no PNG"),
    "PNG of no size": (page(claiming_png(0, 0)), ""),
    "TIFF of 3.6 gigapixels": (page(claiming_tiff(60_000, 60_000), name="p.tif"), "150,000,000"),
    "TIFF whose bytes lie elsewhere": (page(claiming_tiff(400, 400), name="p.tif"), "cannot be read"),
    "animation": (page(animated()), None),
    "zip behind a picture": (page(png() + b"PK\x03\x04" + bytes(100)), None),
    "PostScript by the name of a picture": (
        page(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x) (w) file\n"), "is no PNG",
    ),
    "SVG by the name of a picture": (page(b'<svg><image href="file:///etc/passwd"/></svg>'), "is no PNG"),
    "GIF by the name of a picture": (page(b"GIF89a\xff\xff\xff\xff\0\0\0"), "is no PNG"),
    "pickle by the name of a picture": (lambda p: page(pickled(p))(p), "is no PNG"),
    "camera's notes that are broken": (page(with_exif(b"II*\0\xff\xff\xff\xff"), name="p.jpg"), None),
    "camera's notes in a ring": (
        page(with_exif(b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"),
             name="p.jpg"), None,
    ),
    # links
    "picture that is a link out": (linked("p.png", "picture", beside={"p.txt": b"a"}), "leads outside"),
    "text that is a link out": (linked("p.txt", "secret", beside={"p.png": png()}), "leads outside"),
    "manifest that is a link out": (linked("manifest.csv", "secret"), "leads outside"),
    "XML that is a link out": (linked("p.xml", "secret", beside={"p.png": png()}), "leads outside"),
    "text without end": (linked("p.txt", "/dev/zero", beside={"p.png": png()}), ""),
    "link to itself": (linked("p.png", "p.png", beside={"p.txt": b"a"}), ""),
    "pipe for a text": (
        lambda p: [page(png())(p), (p.folder / "p.txt").unlink(), os.mkfifo(p.folder / "p.txt")], "",
    ),
    # manifests
    "manifest that climbs": (manifest({"image": "../outside.png", "text": "a"}), "outside the folder"),
    "manifest that climbs and returns": (
        manifest({"image": "a/../../x/p.png", "text": "a"}), "outside the folder"
    ),
    "manifest of an absolute path": (manifest('{"image": "{picture}", "text": "a"}'), "outside"),
    "manifest of an address": (
        manifest({"image": "http://127.0.0.1:9/p.png", "text": "a"}), "does not exist"
    ),
    "manifest of a home folder": (manifest({"image": "~/p.png", "text": "a"}), "does not exist"),
    "name with a null": (manifest({"image": "p.png\0.txt", "text": "a"}), "no character"),
    "text with a null": (manifest({"image": "p.png", "text": "a\0b"}), "no character"),
    "half a character": (manifest('{"image": "p.png", "text": "\\ud800"}'), "no character"),
    "endless name": (manifest({"image": "p" * 100_000, "text": "a"}), "does not exist"),
    "row without end": (
        manifest("image,text\np.png," + "a" * 2_000_000, "manifest.csv"), "is no CSV"
    ),
    "deep JSON": (manifest("[" * 200_000), "is no JSON"),
    "endless number": (manifest('{"image": "p.png", "text": ' + "9" * 10_000 + "}"), "JSON"),
    "list for a text": (manifest({"image": "p.png", "text": ["a"] * 10_000}), "is no text"),
    "manifest of 100 MB": (manifest("\n" * 100_000_000), "more than 67,108,864 bytes", 500),
    # XML
    "laughs": (xml(doctype('<!ENTITY a "ha">' + ENTITIES, "&i;")), "DTD"),
    "quadratic laughs": (xml(doctype(f'<!ENTITY a "{"a" * 100_000}">', "&a;" * 10_000)), "DTD"),
    "entity of a file": (xml(doctype('<!ENTITY a SYSTEM "file://SECRET_FILE">', "&a;")), "DTD"),
    "entity of an address": (xml(doctype('<!ENTITY a SYSTEM "http://127.0.0.1:9/">', "&a;")), "DTD"),
    "DTD of an address": (xml('<!DOCTYPE a SYSTEM "http://127.0.0.1:9/"><PcGts/>'), "DTD"),
    "entity in the DTD": (
        xml(doctype('<!ENTITY % a SYSTEM "file://SECRET_FILE">%a;', "a")), "DTD"
    ),
    "include": (
        xml('<PcGts xmlns:xi="http://www.w3.org/2001/XInclude">'
            '<xi:include href="file://SECRET_FILE" parse="text"/></PcGts>'), "holds no",
    ),
    "scan that climbs": (xml(REGION.format("../../p.png", COORDS, WORDS.format("a"))), "outside"),
    "scan that is a secret": (xml(REGION.format("SECRET_FILE", COORDS, WORDS.format("a"))), "outside"),
    "corners beyond numbers": (
        xml(REGION.format("p.png", "1,1 1e400,1 5,5", WORDS.format("a"))), "lacks"
    ),
    "corners at the end of the world": (
        xml(REGION.format("p.png", "0,0 3000000000,0 5,5", WORDS.format("a"))), "farther"
    ),
    "pages in pages": (
        xml("<PcGts>" + ('<Page imageFilename="p.png">' + TEXT_REGION) * 3000 + "</Page>" * 3000
            + "</PcGts>"), "listed twice",
    ),
    "deep": (xml("<a>" * 100_000 + "</a>" * 100_000), "neither"),
    "unknown encoding": (xml('<?xml version="1.0" encoding="secret"?><PcGts/>'), "broken XML"),
    "encoding of no bytes": (xml('<?xml version="1.0" encoding="utf-7"?><PcGts/>'), "broken XML"),
}  # fmt: skip
FOLDER_CASES = {f"folder: {name}": Case("folder", *case) for name, case in FOLDERS.items()}

# --- Parquet ---------------------------------------------------------------------------------------


def parquet(table: Callable[[Place], pyarrow.Table], **settings) -> Callable[[Place], object]:
    return lambda place: pyarrow.parquet.write_table(
        table(place), place.folder / "train.parquet", **settings
    )


def extension(place: Place) -> pyarrow.Table:
    """Return a table with a column of the type that pyarrow once unpickled (CVE-2023-47248)."""
    marks = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled(place),
    }
    fields = [
        pyarrow.field("image", pyarrow.binary(), metadata=marks),
        pyarrow.field("text", pyarrow.string()),
    ]
    return pyarrow.table([[b"none"], ["a"]], schema=pyarrow.schema(fields))


def rows(**columns) -> Callable[[Place], pyarrow.Table]:
    return lambda place: pyarrow.table(columns)


def other_path(place: Place) -> pyarrow.Table:
    images = [{"bytes": None, "path": str(place.picture)}]
    return pyarrow.table({"image": images, "text": ["a"]})


PARQUETS: dict[str, tuple] = {
    "type with a pickle": (parquet(extension), "is no PNG"),
    "path for an image": (parquet(other_path), "holds no bytes"),
    "numbers for images": (parquet(rows(image=[1], text=["a"])), "holds no bytes"),
    "numbers for text": (parquet(rows(image=[png()], text=[1])), "empty transcription"),
    "a row that swells": (
        parquet(rows(image=[bytes(2**26)], text=["a"]), compression="zstd"), "bomb",
    ),
    "rows that swell": (
        parquet(rows(image=[bytes(2**20)] * 64, text=["a"] * 64), compression="zstd",
                use_dictionary=False), "bomb",
    ),
    "cut short": (
        lambda p: (p.folder / "train.parquet").write_bytes(b"PAR1" + bytes(100)), "whole Parquet"
    ),
    "footer without end": (
        lambda p: (p.folder / "train.parquet").write_bytes(b"PAR1\xff\xff\xff\x7fPAR1"), "whole Parquet",
    ),
}  # fmt: skip
PARQUET_CASES = {f"parquet: {name}": Case("parquet", *case) for name, case in PARQUETS.items()}

# --- EMNIST ----------------------------------------------------------------------------------------

NAMES = {
    f"emnist-byclass-{half}-{kind}-ubyte.gz": axes
    for half in ("train", "test")
    for kind, axes in (("images-idx3", 3), ("labels-idx1", 1))
}


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + data


def gzips(first: Callable[[], bytes], *, packed: bool = False) -> Callable[[Place], object]:
    """Write EMNIST's four files, the first of them spoilt."""

    def write(place: Place) -> None:
        whole = {3: idx((2, 28, 28), bytes(2 * 784)), 1: idx((2,), b"\1\2")}
        for number, (name, axes) in enumerate(NAMES.items()):
            content = whole[axes] if number else first()
            path = place.folder / name
            path.write_bytes(content if packed and not number else gzip.compress(content, 1))

    return write


def matlab(dataset: object) -> Callable[[Place], object]:
    return lambda place: scipy.io.savemat(
        place.folder / "emnist-byclass.mat", {"dataset": dataset}, do_compression=True
    )


def matlab_swelling(place: Place) -> None:
    """Write a gigabyte of zeros, packed in elements of eight megabytes."""
    packed = zlib.compress(bytes(2**23))
    element = struct.pack("<II", 15, len(packed)) + packed
    head = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM"
    (place.folder / "emnist-byclass.mat").write_bytes(head + element * 128)


def matlab_claiming(place: Place) -> None:
    """Write a cell array that claims ten thousand million cells, and holds none."""
    dims = struct.pack("<IIii", 5, 8, 100_000, 100_000)
    name = struct.pack("<II", 1, 7) + b"dataset\0"
    flags = struct.pack("<IIII", 6, 8, 1, 0)
    body = flags + dims + name
    head = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM"
    matrix = struct.pack("<II", 14, len(body)) + body
    (place.folder / "emnist-byclass.mat").write_bytes(head + matrix)


EMNISTS: dict[str, tuple] = {
    "a million million images": (gzips(lambda: idx((2**31, 28, 28), b"")), "claims"),
    "images of gigabytes": (gzips(lambda: idx((1, 2**31, 2**31), b"")), "claims"),
    "more than it claims": (gzips(lambda: idx((2, 28, 28), bytes(2**28))), "holds more"),
    "less than it claims": (gzips(lambda: idx((900_000, 28, 28), b"")), "holds only"),
    "pickle": (lambda p: gzips(lambda: pickled(p))(p), "begins with"),
    "no gzip": (gzips(lambda: b"none", packed=True), "cannot be read"),
    "link to a secret": (
        lambda p: [gzips(lambda: b"")(p), *(
            [(p.folder / n).unlink(), (p.folder / n).symlink_to(p.secret)] for n in [*NAMES][:1]
        )], "leads outside",
    ),
    "MATLAB that swells": (matlab_swelling, "unpacks to more"),
    "MATLAB of objects": (
        matlab({"train": np.array([[{"a": 1}]], object), "test": 1}), "not EMNIST's"
    ),
    "MATLAB of words": (matlab("text"), "not EMNIST's"),
    "MATLAB of claims": (matlab_claiming, "cannot be read"),
    "MATLAB that is HDF5": (
        lambda p: h5py.File(p.folder / "emnist-byclass.mat", "w").close(), "cannot be read"
    ),
}  # fmt: skip
EMNIST_CASES = {f"emnist: {name}": Case("emnist", *case) for name, case in EMNISTS.items()}

# --- texts and faces -------------------------------------------------------------------------------

OTHER_CASES = {
    "texts: link to a secret": Case("texts", linked("a.txt", "secret"), "leads outside"),
    "texts: without end": Case("texts", linked("a.txt", "/dev/zero"), "leads outside"),
    "texts: no text": Case(
        "texts", lambda p: (p.folder / "a.txt").write_bytes(b"\xff\xfe"), "UTF-8"
    ),
    "fonts: a pickle": Case(
        "fonts", lambda p: (p.folder / "a.ttf").write_bytes(pickled(p)), "datamodule.fonts"
    ),
    "fonts: tables beyond the file": Case(
        "fonts",
        lambda p: (p.folder / "a.ttf").write_bytes(b"\0\1\0\0\0\1\0\0\0\0\0\0cmap" + b"\xff" * 12),
        "datamodule.fonts",
    ),
}

CASES: dict[str, Case] = {
    **CONFIG_CASES, **WEIGHT_CASES, **ENCODER_CASES, **STORE_CASES, **ARCHIVE_CASES, **FOLDER_CASES,
    **PARQUET_CASES, **EMNIST_CASES, **OTHER_CASES,
}  # fmt: skip
