"""Whatever somebody else's file holds, it is one line or harmless: nothing runs, nothing outside is read.

Each case is read in a process of its own, which may take so much memory and time and no more.
"""

import os
import pickle
import resource
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest
import torch

from malicious_files import CASES, SECRET, Place, png
from paragraph_ocr import build, build_model
from paragraph_ocr.config import register_schema
from paragraph_ocr.data.archive import sources
from paragraph_ocr.data.emnist import read_emnist
from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.fonts import load_faces
from paragraph_ocr.data.iam import IamCorpus
from paragraph_ocr.data.store import Store
from paragraph_ocr.data.text import folder as read_texts
from paragraph_ocr.errors import UserError
from paragraph_ocr.help import CONF
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.stored import read_config
from paragraph_ocr.targets import CheckedCallbacks
from paragraph_ocr.validation import compose, validate

SECONDS = 20  # on a machine that others use too; the slowest takes three


@dataclass(frozen=True)
class Ended:
    """How a reading ended: refused in a line, or with what was read; `crash` is a traceback."""

    refusal: str | None
    read: str
    crash: str | None
    grown_mib: float
    seconds: float


def read_store(path: Path) -> str:
    store = Store(path)
    return repr([store.texts, [int(store.image(row).sum()) for row in range(len(store))]])


def read_folder(folder: Path) -> str:
    corpus = FolderCorpus(name="x", folder=folder, height=64, width=64)
    return read_store(corpus.prepare(folder.parent / "stores", num_workers=0))


def read_archives(folder: Path) -> str:
    return repr([m for source in sources(folder) for m in source.members(lambda name: True)])


def read_lines(folder: Path) -> str:
    corpus = IamCorpus(
        name="x", folder=folder, unit="lines", height=56, width=1536, split="reference"
    )
    return read_store(corpus.prepare(folder.parent / "stores", num_workers=0))


@pytest.fixture(scope="module")
def readers() -> dict[str, Callable[[Path], object]]:
    experiment = validate(compose(["model=tiny", "trainer=cpu"]))
    recognizer = build_model.build_recognizer(experiment, build.build_vocabulary(experiment))

    def read_weights(folder: Path) -> None:
        (file,) = folder.iterdir()
        named = folder if file.suffix in {".safetensors", ".txt"} else file
        build_model.load_weights(recognizer, named)

    def read_pretrained(folder: Path) -> None:
        (file,) = folder.iterdir()
        overlay = {"pretrained_cfg_overlay": {"file": str(file)}}
        Encoder("test_resnet", stage=2, pretrained=True, extra=overlay)

    def read_checkpoint(folder: Path) -> None:
        (file,) = folder.iterdir()
        Encoder("test_resnet", stage=2, extra={"checkpoint_path": str(file)})

    return {
        "config": read_config,
        "weights": read_weights,
        "encoder": read_pretrained,
        "checkpoint_path": read_checkpoint,
        "store": lambda folder: read_store(folder / "a.h5"),
        "folder": read_folder,
        "archive": read_archives,
        "parquet": read_lines,
        "emnist": read_emnist,
        "texts": read_texts,
        "fonts": lambda folder: load_faces(folder, characters="ab"),
    }


def apart(work: Callable[[], object]) -> Ended:
    """Return how `work` ends in a fork of this process."""
    receiving, sending = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        signal.alarm(SECONDS)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refusal, read, crash = None, "", None
        try:
            read = repr(work())
        except UserError as error:
            refusal = str(error)
        except BaseException:
            crash = traceback.format_exc()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        with os.fdopen(sending, "wb") as pipe:
            pickle.dump((refusal, read[:1_000_000], crash, grown), pipe)
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"killed: it took {SECONDS} s, or crashed ({status})"
    return Ended(*pickle.loads(said), time.monotonic() - began)


@pytest.fixture
def place(tmp_path) -> Place:
    secret, picture = tmp_path / "secret.txt", tmp_path / "outside.png"
    secret.write_text(SECRET)
    picture.write_bytes(png())
    (tmp_path / "folder").mkdir()
    return Place(tmp_path / "folder", secret, picture, tmp_path / "marker")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_file_from_a_stranger(name, place, readers):
    case = CASES[name]
    case.write(place)
    ended = apart(lambda: readers[case.reader](place.folder))
    assert ended.crash is None, ended.crash
    assert not place.marker.exists(), "it was executed"
    assert SECRET not in ended.read + (ended.refusal or ""), "what lies outside was read"
    assert ended.grown_mib < case.most_mib
    if case.said is None:
        assert ended.refusal is None
    else:
        assert ended.refusal is not None, f"it was read: {ended.read[:500]}"
        assert case.said in ended.refusal
        assert "\n" not in ended.refusal and len(ended.refusal) < 1000


def test_the_payload_of_these_files_would_be_noticed(place):
    from malicious_files import pickled

    pickle.loads(pickled(place))
    assert place.marker.exists()


TARGETS = [
    "+hydra.callbacks.x={_target_: os.system, command: id}",
    "+hydra.callbacks.parent.x={_target_: subprocess.Popen, args: id}",
    "+hydra.callbacks.x={_target_: paragraph_ocr.run.os.system}",
    "hydra.callbacks.parent._target_=paragraph_ocr.build.build_trainer",
    "+hydra.callbacks.x={_target_: hydra.experimental.callbacks.os.system}",
    "hydra.launcher._target_=os.system",
    "hydra.sweeper._target_=posix.system",
    "+hydra.job_logging.handlers={x: {class: subprocess.Popen}}",
    "+hydra.job_logging.formatters={x: {class: posix.system}}",
    "+hydra.job_logging.handlers={x: {class: logging.os.system}}",
    "+hydra.env={_target_: os.system}",
    "+model.encoder.extra={_target_: os.system}",
    "+optimizer.extra={_target_: os.system}",
]
STUDY_TARGETS = [
    "hydra.sweeper.sampler._target_=os.system",
    "hydra.sweeper.sampler._target_=optuna.samplers._base.os.system",
    "+hydra.sweeper.sampler.gamma={_target_: os.system}",
    "hydra.sweeper.pruner._target_=optuna.visualization.plot_slice",
    "+hydra.sweeper.pruner.wrapped_pruner=[{_target_: os.system}]",
]


@pytest.mark.parametrize("override", [*TARGETS, *STUDY_TARGETS])
def test_a_config_names_no_code_but_what_belongs_there(override):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_schema()
    search = ["search=learning_rate"] if override in STUDY_TARGETS else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("train", [*search, override], return_hydra_config=True)
    if "hydra" not in override:  # an open node: nothing in it is ever instantiated
        del composed.hydra
        with pytest.raises(UserError, match="_target_"):
            experiment = validate(composed)
            vocabulary = build.build_vocabulary(experiment)
            build.build_learner(
                experiment, build_model.build_recognizer(experiment, vocabulary), vocabulary
            )
        return
    with pytest.raises(UserError, match="names code") as refused:
        CheckedCallbacks(composed)
    assert "\n" not in str(refused.value)


def test_every_config_that_is_shipped_passes():
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_schema()
    for search in [None, *sorted(path.stem for path in (CONF / "search").glob("*.yaml"))]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            chosen = [f"search={search}"] if search else ["hydra/job_logging=default"]
            CheckedCallbacks(hydra_compose("train", chosen, return_hydra_config=True))
