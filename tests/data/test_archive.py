"""Archives are read whole or refused by name; nothing of them reaches the disk."""

import io
import stat
import tarfile
import zipfile

import pytest

from paragraph_ocr.data.archive import MAX_RATIO, Source, sources
from paragraph_ocr.errors import UserError

FILES = {"a/one.txt": b"one" * 100, "b/two.xml": b"two" * 3000, "three.png": bytes(range(256)) * 8}


def write_tar(path, files=FILES, *, mode="w:gz", links=()):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for kind, name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


def write_zip(path, files=FILES, *, links=(), compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        for name, target in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return path


def read(path, wanted=lambda name: True) -> dict:
    return {str(member.name): member.data for member in Source(path).members(wanted)}


WRITERS = {
    "x.zip": write_zip,
    "x.tgz": write_tar,
    "x.tar.gz": write_tar,
    "x.tar": lambda path, *rest, **more: write_tar(path, *rest, mode="w", **more),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_packed_is_read(tmp_path, name):
    path = WRITERS[name](tmp_path / name)
    assert read(path) == FILES
    assert read(path, lambda name: name.suffix == ".xml") == {"b/two.xml": FILES["b/two.xml"]}
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_is_read_like_an_archive_hidden_files_left_out(tmp_path):
    for name, data in {**FILES, ".hidden": b"", "__MACOSX/x": b"", "words/w.png": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    write_zip(tmp_path / "b" / "more.zip")
    folder, archive = sources(tmp_path, skip=["words"])
    found = {
        str(member.name): member.data for member in folder.members(lambda n: n.suffix != ".zip")
    }
    assert found == FILES
    assert archive.path.name == "more.zip"


@pytest.mark.parametrize("name", WRITERS)
def test_every_truncation_is_refused(tmp_path, name):
    whole = WRITERS[name](tmp_path / name).read_bytes()
    # tar fills its last block with zeros, of which some may be missing
    content = len(whole.rstrip(b"\0")) if name == "x.tar" else len(whole)
    for size in range(0, content, max(1, content // 60)):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{name} is cut short or broken.*Fetch it again"):
            read(tmp_path / name)


@pytest.mark.parametrize("pack", [write_zip, write_tar])
@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "C:\\x", "..\\x", "\\\\server\\x", "a/.."]
)
def test_a_name_that_leads_out_is_refused(tmp_path, pack, name):
    path = pack(tmp_path / ("x.zip" if pack is write_zip else "x.tgz"), {"fine": b"1", name: b"2"})
    with pytest.raises(UserError, match="leads outside"):
        read(path, lambda name: False)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../x", "b/../../../x"])
def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_passed_over(tmp_path, target):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with pytest.raises(UserError, match="leads outside"):
            read(write_tar(tmp_path / "x.tgz", links=[(kind, "a/link", target)]))
    with pytest.raises(UserError, match="leads outside"):
        read(write_zip(tmp_path / "x.zip", links=[("a/link", target)]))
    inside = [(tarfile.SYMTYPE, "a/link", "../three.png"), (tarfile.LNKTYPE, "l", "a/one.txt")]
    assert read(write_tar(tmp_path / "y.tgz", links=inside)) == FILES
    assert read(write_zip(tmp_path / "y.zip", links=[("a/link", "../three.png")])) == FILES


def test_a_device_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a device"):
        read(write_tar(tmp_path / "x.tgz", links=[(tarfile.CHRTYPE, "null", "")]))


@pytest.mark.parametrize("name", ["link.xml", "link.zip", "link"])
def test_a_link_out_of_a_folder_or_to_nowhere_is_refused(tmp_path, name):
    (tmp_path / "secret").mkdir()
    (tmp_path / "in").mkdir()
    for target in (tmp_path / "secret", tmp_path / "in" / "nothing"):
        (tmp_path / "in" / name).symlink_to(target)
        with pytest.raises(UserError, match=f"{name} leads outside of"):
            sources(tmp_path / "in")
        (tmp_path / "in" / name).unlink()
    (tmp_path / "in" / "a.xml").write_text("a")
    (tmp_path / "in" / "b.xml").symlink_to("a.xml")
    assert read(tmp_path / "in") == {"a.xml": b"a", "b.xml": b"a"}


def test_a_header_that_claims_gigabytes_is_refused(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**32
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="claims too much"):
        read(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    zeros = bytes(40 * 2**20)
    assert len(zeros) > MAX_RATIO * 50_000
    for path in (
        write_zip(tmp_path / "x.zip", {"b": zeros}),
        write_tar(tmp_path / "x.tgz", {"b": zeros}),
    ):
        with pytest.raises(UserError, match="bomb"):
            read(path)
    many = {f"{index}": zeros[: 10 * 2**20] for index in range(4)}  # none of them too large alone
    with pytest.raises(UserError, match="bomb"):
        read(write_zip(tmp_path / "y.zip", many))


def test_a_zip_that_lies_about_a_size_or_a_checksum_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a": b"0123456789" * 10}, compression=zipfile.ZIP_STORED)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0123456789", b"0123456780", 1))
    with pytest.raises(UserError, match="cut short or broken"):
        read(path)
    size = (100).to_bytes(4, "little")
    place = whole.rindex(size + size)
    path.write_bytes(whole[: place + 4] + (200).to_bytes(4, "little") + whole[place + 8 :])
    with pytest.raises(UserError, match="cut short or broken"):
        read(path)


def test_an_encrypted_zip_says_so(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a": b"0"})
    whole = bytearray(path.read_bytes())
    whole[whole.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="encrypted"):
        read(path)
