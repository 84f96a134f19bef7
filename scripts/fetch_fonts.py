"""Fetch handwriting-like fonts with npm, and put them beside those that are installed as Python packages.

    python scripts/fetch_fonts.py
    python train.py experiment=... datamodule.fonts=outputs/fonts

All are under the OFL or the Apache licence; each licence lies beside its font.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from paragraph_ocr import arguments, console
from paragraph_ocr.errors import UserError

if TYPE_CHECKING:
    from paragraph_ocr.data.archive import Source

FAMILIES = (
    "annie-use-your-telescope", "architects-daughter", "bad-script", "caveat-brush",
    "cedarville-cursive", "covered-by-your-grace", "delicious-handrawn", "gaegu",
    "gloria-hallelujah", "gochi-hand", "handlee", "herr-von-muellerhoff", "homemade-apple", "itim",
    "licorice", "mansalva", "marck-script", "mr-de-haviland", "nanum-pen-script", "neucha",
    "oooh-baby", "patrick-hand", "playpen-sans", "poor-story", "reenie-beanie", "sacramento",
    "schoolbell", "shantell-sans", "short-stack", "sriracha", "sue-ellen-francisco",
    "swanky-and-moo-moo", "the-girl-next-door", "vibur", "whisper",
)  # fmt: skip
"""Of Fontsource: faces with a lower case of their own, nearest to what people write."""

TOGETHER = 8  # packages that npm is asked for in one command


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: str = field(default="outputs/fonts", metadata={"help": "where the fonts go"})
    families: tuple[str, ...] = field(
        default=(), metadata={"help": "of Fontsource; none is those known to serve"}
    )
    installed: bool = field(
        default=True, metadata={"help": "put the faces of installed packages there too"}
    )


def fetch(options: Options) -> None:
    """Fill the folder; what is there already is not fetched again.

    Raises:
        UserError: npm is not here, or does not bring a family.
    """
    from paragraph_ocr.data.fonts import find_faces

    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    families = options.families or FAMILIES
    missing = [family for family in families if not (folder / f"{family}.woff").exists()]
    for begin in range(0, len(missing), TOGETHER):
        with tempfile.TemporaryDirectory() as aside:
            pack(missing[begin : begin + TOGETHER], Path(aside), folder)
        console.say(f"{min(begin + TOGETHER, len(missing))} of {len(missing)} families")
    copied = 0
    if options.installed:
        for path in find_faces(None):
            if not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())
                copied += 1
    console.say(f"{folder}: {len(missing)} families fetched, {copied} installed faces copied.")
    console.say(f"Use them with: python train.py datamodule.fonts={folder}")


def pack(families: list[str], aside: Path, folder: Path) -> None:
    """Let npm pack the families into a folder, and take font and licence out of each archive."""
    from paragraph_ocr.data.archive import sources

    command = ["npm", "pack", "--silent", *(f"@fontsource/{family}" for family in families)]
    try:
        subprocess.run(command, cwd=aside, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("npm is not installed. Install Node.js, and type this again.") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "npm gave no reason").splitlines()[0]
        raise UserError(f"npm pack: {said}. See that these are families of Fontsource.") from error
    archives = {source.path.name: source for source in sources(aside)}
    for family in families:
        archive = next(
            (a for n, a in archives.items() if n.startswith(f"fontsource-{family}-")), None
        )
        wanted = {f"{family}-latin-400-normal.woff": ".woff", "LICENSE": ".LICENSE"}
        found = {} if archive is None else taken(archive, set(wanted))
        if found.keys() != wanted.keys():
            raise UserError(
                f"families={family}: the package has no regular Latin face. Leave it out."
            )
        for name, suffix in wanted.items():
            (folder / f"{family}{suffix}").write_bytes(found[name])


def taken(archive: "Source", names: set[str]) -> dict[str, bytes]:
    """Return the bytes of the files of these names, wherever they lie in the archive."""
    return {m.name.name: m.data for m in archive.members(lambda path: path.name in names)}


if __name__ == "__main__":
    sys.exit(arguments.run(Options, fetch, about=__doc__ or ""))
