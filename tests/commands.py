"""Commands as processes of their own that are forked from one which has imported torch already.

Starting Python and importing takes most of the seconds of a command that fails or trains two steps.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

_IMPORTED = [
    "paragraph_ocr.validation", "paragraph_ocr.run", "paragraph_ocr.search.search",
    "paragraph_ocr.search.trial", "paragraph_ocr.search.report", "paragraph_ocr.reading.read",
]  # fmt: skip


def run_command(
    script: str, *arguments: str, cwd: Path = ROOT, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script of this project to its end, as `subprocess.run` would.

    What a library takes from the environment while it is imported is that of the tests themselves.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        words = [str(ROOT / script), *arguments]
        process = context.Process(target=_become, args=(words, str(cwd), dict(env), streams))
        process.start()
        process.join()
        shown = [stream.read_text() for stream in streams]
    assert process.exitcode is not None
    return subprocess.CompletedProcess([sys.executable, *words], process.exitcode, *shown)


def _become(words: list[str], cwd: str, env: dict[str, str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
