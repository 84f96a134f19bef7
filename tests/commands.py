"""Commands as processes of their own that are forked from one which has imported torch already.

Starting Python and importing takes most of the seconds of a command that fails or trains two steps.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]

_IMPORTED = [
    "paragraph_ocr.validation", "paragraph_ocr.run", "paragraph_ocr.search.search",
    "paragraph_ocr.search.trial", "paragraph_ocr.search.report", "paragraph_ocr.reading.read",
]  # fmt: skip


def run_command(
    script: str,
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str],
    more_bytes: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script of this project to its end, as `subprocess.run` would.

    What a library takes from the environment while it is imported is that of the tests themselves.

    Args:
        more_bytes: that it may ask for; None is as many as the machine gives.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = _start([script, *arguments], cwd, env, streams, more_bytes, session=False)
        process.join()
        shown = [stream.read_text() for stream in streams]
    assert process.exitcode is not None
    words = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.CompletedProcess(words, process.exitcode, *shown)


def start_command(
    script: str, *arguments: str, cwd: Path = ROOT, env: Mapping[str, str], streams: Sequence[Path]
) -> BaseProcess:
    """Start a script as the first process of a session, which can be killed with all that it starts.

    Args:
        streams: files for standard output and standard error.
    """
    for stream in streams:  # before anybody looks, and without what was said before
        stream.write_bytes(b"")
    process = _start([script, *arguments], cwd, env, streams, None, session=True)
    atexit.register(kill_command, process)  # what a failed test leaves at work would be waited for
    return process


def kill_command(process: BaseProcess) -> None:
    """Kill a started command and all that it has started, if it is at work."""
    if process.is_alive() and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # so young that it has no session yet
            process.kill()


def _start(
    words: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    streams: Sequence[Path],
    more_bytes: int | None,
    *,
    session: bool,
) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    words = [str(ROOT / words[0]), *words[1:]]
    process = context.Process(
        target=_become, args=(words, str(cwd), dict(env), streams, more_bytes, session)
    )
    process.start()
    return process


def _become(
    words: list[str],
    cwd: str,
    env: dict[str, str],
    streams: list[Path],
    more_bytes: int | None,
    session: bool,
) -> None:
    if session:
        os.setsid()
    if more_bytes is not None:
        limit = psutil.Process().memory_info().vms + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
