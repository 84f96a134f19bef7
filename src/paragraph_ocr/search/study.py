"""An Optuna study that any number of processes, side by side or one after another, work to a total.

A trial that ended by itself counts: it completed, was pruned, or failed. Optuna has one state, FAIL,
for what failed and for what never counted, so a trial in it carries a verdict:

    failed      counted; `reason` says why
    lost        its process is gone; its parameters are run again by a trial with `retry_of`
    impossible  its config is refused before anything is built
    duplicate   another trial has its parameters
    surplus     another process took the last place first

Nothing is decided by reading and then writing: a process first takes a trial, whose number storage
hands out in one order for all, and withdraws it if a lower number has the better claim.
"""

import contextlib
import fcntl
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna import Trial
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from paragraph_ocr.errors import UserError

optuna.logging.set_verbosity(optuna.logging.WARNING)

SECONDS_BETWEEN_LEASES = 5.0
SECONDS_TO_CHOOSE = 3.0
"""That one process waits for another to choose its parameters."""

SECONDS_TO_LOST = 30.0
"""A trial of another machine whose lease stood still for so long is lost."""

CONFIRMED = ".confirmed"
"""In the name of the study, in the same storage, that trains the winners of a search again."""


def open_storage(url: str) -> BaseStorage:
    """Return the storage at journal:///<file> or at an RDB's URL.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if url.startswith("journal:///"):
            path = Path(url.removeprefix("journal:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path), lock_obj=_FileLock(path)))  # type: ignore[arg-type]
        return _open_database(url)
    except (OSError, ImportError, ValueError, SQLAlchemyError, StorageInternalError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"hydra.sweeper.storage={url} cannot be opened: {first}. "
            "Pass journal:///<file>, or an SQLAlchemy URL."
        ) from error


def _open_database(url: str) -> BaseStorage:
    """Return Optuna's storage in a database; of several that make its tables at once, all but one fail."""
    for _ in range(5):
        with contextlib.suppress(DBAPIError):
            return optuna.storages.RDBStorage(url)
        time.sleep(1)
    return optuna.storages.RDBStorage(url)


def study_folder(outputs: Path, name: str) -> Path:
    """Return where a study keeps its journal and its trials' folders."""
    return outputs / "studies" / name


def storage_url(outputs: Path, name: str, configured: str | None) -> str:
    """Return where a study is kept: a journal in its folder, unless configured otherwise."""
    if configured is not None:
        return configured
    searched = name.partition(CONFIRMED)[0]
    return f"journal:///{study_folder(outputs, searched).resolve()}/journal.log"


class _FileLock:
    """A lock that the kernel takes back from a killed process; Optuna's own would wait for it."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._file = journal.with_name(f"{journal.name}.lock").open("ab")

    def acquire(self) -> bool:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._cut_torn_line()
        return True

    def release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def _cut_torn_line(self) -> None:
        """Drop what a machine that went down in the middle of a line has left of it."""
        if not self._journal.exists():
            return
        with self._journal.open("r+b") as journal:
            end = journal.seek(0, os.SEEK_END)
            kept = end
            while kept:
                journal.seek(kept - 1)
                if journal.read(1) == b"\n":
                    break
                kept -= 1
            if kept < end:
                journal.truncate(kept)


def verdict(trial: FrozenTrial) -> str:
    """Return how a trial stands, in one word: complete, pruned, running, waiting or a verdict."""
    if trial.state == TrialState.FAIL:
        return str(trial.user_attrs.get("verdict", "lost"))
    return trial.state.name.lower()


def counts(trial: FrozenTrial) -> bool:
    return verdict(trial) in ("complete", "pruned", "failed")


def objective_values(trial: FrozenTrial) -> list[float]:
    """Return the objectives of a complete trial; Optuna gives a pruned one's last report as its value."""
    return list(trial.values) if trial.state == TrialState.COMPLETE else []


class _SeededByNumber(BaseSampler):
    """A sampler made anew for each trial and seeded by its number: no two processes draw alike."""

    def __init__(self, make: Callable[[int, bool], BaseSampler], at_random: bool) -> None:
        self._make, self._at_random = make, at_random
        self._inner = make(0, at_random)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner = self._make(trial.number, self._at_random)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, Any]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._inner.after_trial(study, trial, state, values)


class SharedStudy:
    """A study to be worked to `total` counted trials.

    Args:
        identity: what must not change between those who work on it: keys and values as text.
        make_sampler: called with a seed, returns a sampler; with True after it, one that draws blindly.

    Raises:
        UserError: the study was begun with another identity, or the storage cannot be opened.
    """

    def __init__(
        self,
        name: str,
        *,
        storage: str,
        directions: Sequence[str],
        total: int,
        identity: Mapping[str, str],
        make_sampler: Callable[[int, bool], BaseSampler],
        pruner: optuna.pruners.BasePruner | None = None,
    ) -> None:
        self.name, self.total, self.storage_url = name, total, storage
        self._make_sampler = make_sampler
        self.storage = open_storage(storage)
        try:
            self.study = optuna.create_study(
                study_name=name,
                storage=self.storage,
                directions=list(directions),  # type: ignore[arg-type]
                pruner=pruner,
                load_if_exists=True,
            )
        except ValueError as error:
            raise UserError(f"hydra.sweeper.direction={directions}: {error}.") from error
        self._require(dict(identity))
        self._watched: dict[
            int, tuple[Any, float]
        ] = {}  # a lease's last value, and when it changed
        self.exhausted = False  # the sampler has proposed all there is
        self.draw_at_random = False  # the sampler proposes nothing new

    def _require(self, identity: dict[str, str]) -> None:
        begun = self.study.user_attrs.get("identity")
        if begun is None:
            self.study.set_user_attr("identity", identity)
            return
        changed = [
            f"{key}={begun.get(key, 'nothing')} (now {identity.get(key, 'nothing')})"
            for key in [*begun, *(key for key in identity if key not in begun)]
            if begun.get(key) != identity.get(key)
        ]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"The study {self.name} was begun with {', '.join(changed[:3])}{more}. "
                "Pass hydra.sweeper.study_name=<new name> to begin another."
            )

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def num_counted(self) -> int:
        return sum(counts(trial) for trial in self.trials())

    def claim(self) -> Trial | None:
        """Return a trial that this process is to run, or None if none is to be had now."""
        self.recover()
        trials = self.trials()
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if not waiting:
            if sum(map(_holds_a_place, trials)) >= self.total:
                return None
            for trial in trials:
                if verdict(trial) == "lost" and not _is_retried(trial, trials):
                    self.study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
                    break
        self.study.sampler = _SeededByNumber(self._make_sampler, self.draw_at_random)
        taken = self.study.ask()
        taken.set_user_attr("owner", _owner())
        return None if self._has_lost_the_race(taken) else taken

    def _has_lost_the_race(self, taken: Trial) -> bool:
        before = [trial for trial in self.trials() if trial.number < taken.number]
        original = taken.user_attrs.get("retry_of")
        if original is not None:
            rivals = [t for t in before if t.user_attrs.get("retry_of") == original]
            if any(verdict(t) not in ("surplus", "duplicate") for t in rivals):
                self.withdraw(taken, "duplicate", f"another process runs {original} again")
                return True
        if sum(map(_holds_a_place, before)) >= self.total:
            self.withdraw(taken, "surplus", "all places are taken")
            return True
        return False

    def is_duplicate(self, trial: Trial) -> bool:
        """Return whether a trial with a lower number runs, or ran, with the same parameters.

        Waits for the others to have chosen theirs.
        """
        self.set_attribute(trial, "chosen", True)
        began = time.monotonic()
        while time.monotonic() - began < SECONDS_TO_CHOOSE and any(
            other.state == TrialState.RUNNING
            and other.number < trial.number
            and "chosen" not in other.user_attrs
            for other in self.trials()
        ):
            time.sleep(0.02)
        return any(
            other.params == trial.params and other.number < trial.number
            for other in self.trials()
            if counts(other) or other.state == TrialState.RUNNING
        )

    def withdraw(self, trial: Trial, word: str, reason: str) -> None:
        """End a trial that does not count, with one of the verdicts above."""
        self._end(trial.number, word, reason)

    def fail(self, trial: Trial, reason: str) -> None:
        """End a trial that failed, and counts."""
        self._end(trial.number, "failed", reason)

    def tell(self, trial: Trial, values: Sequence[float] | None, *, pruned: bool = False) -> None:
        """End a trial with its objective values, or as pruned."""
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        try:
            self.study.tell(trial.number, None if pruned else list(values or ()), state)
        except (UpdateFinishedTrialError, ValueError, RuntimeError) as error:
            now = self.trials()[trial.number].state
            if not now.is_finished():
                raise
            # either it was given up for lost while this process stood still, and runs again, or
            # BruteForceSampler wants to stop a loop of Optuna's own, having seen everything
            self.exhausted = now == state and isinstance(error, RuntimeError)

    def set_attribute(self, trial: Trial, key: str, value: Any) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial._trial_id, key, value)

    def _end(self, number: int, word: str, reason: str) -> None:
        study_id = self.study._study_id
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial_id, "verdict", word)
            self.storage.set_trial_user_attr(trial_id, "reason", reason)
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def recover(self) -> None:
        """Give up the trials whose processes are gone."""
        now = time.monotonic()
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        for trial in running:
            owner = trial.user_attrs.get("owner")
            if owner is not None and owner["host"] == platform.node():
                if not _is_alive(owner):
                    self._end(trial.number, "lost", "its process is gone")
                continue
            # clocks of two machines differ: what counts is how long the lease stood still here
            lease = trial.user_attrs.get("lease")
            value, since = self._watched.get(trial.number, (lease, now))
            if value != lease:
                since = now
            self._watched[trial.number] = (lease, since)
            if now - since > SECONDS_TO_LOST:
                self._end(trial.number, "lost", f"no sign of life for {SECONDS_TO_LOST:.0f} s")

    @contextlib.contextmanager
    def lease(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Give signs of life for these trials while the block runs."""
        ended = threading.Event()

        def renew() -> None:
            count = 0
            while not ended.wait(SECONDS_BETWEEN_LEASES):
                count += 1
                for trial in trials:
                    with contextlib.suppress(UpdateFinishedTrialError):
                        self.storage.set_trial_user_attr(trial._trial_id, "lease", count)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def best(self) -> list[FrozenTrial]:
        """Return the best trial, or the Pareto front of several objectives."""
        complete = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        if not complete:
            return []
        if len(self.study.directions) > 1:
            return self.study.best_trials
        return [self.study.best_trial]


def best_trial(study: optuna.Study, number: int | None = None) -> FrozenTrial:
    """Return the trial of that number, or the best by the first objective.

    Raises:
        UserError: there is none, or it did not complete.
    """
    trials = study.get_trials(deepcopy=False)
    complete = {t.number: t for t in trials if t.state == TrialState.COMPLETE}
    if number is not None and number not in complete:
        raise UserError(
            f"Trial {number} of {study.study_name} did not complete; these did: "
            f"{', '.join(map(str, complete)) or 'none'}. Pass the number of one of them."
        )
    if not complete:
        raise UserError(
            f"No trial of {study.study_name} has completed. Go on with the search first."
        )
    if number is not None:
        return complete[number]
    least = study.directions[0] == optuna.study.StudyDirection.MINIMIZE
    return (min if least else max)(complete.values(), key=lambda trial: trial.values)


def overrides_to_repeat(
    study: optuna.Study, trial: FrozenTrial, further: Sequence[str]
) -> list[str]:
    """Return what to type for a single run with a trial's parameters; `further` wins."""
    from paragraph_ocr.search.space import Space

    chosen = [*study.user_attrs["overrides"], *Space({}).overrides(trial.params)]
    keys = {override.partition("=")[0].lstrip("+~") for override in further}
    kept = [part for part in chosen if part.partition("=")[0].lstrip("+~") not in keys]
    name = f"name={study.study_name} {trial.number:04d} again"
    # flags, such as --config-dir, must come before the first override
    return [*further, *kept, "hydra.mode=RUN", *([] if "name" in keys else [name])]


def why_unusable(names: Sequence[str], metrics: Mapping[str, float]) -> str | None:
    """Return why a run's metrics are no objective values, or None if they are."""
    for name in names:
        if name not in metrics:
            return f"{name} was not measured; there are {', '.join(metrics)}"
        if not math.isfinite(metrics[name]):
            return f"{name} is {metrics[name]}"
    return None


def _holds_a_place(trial: FrozenTrial) -> bool:
    return counts(trial) or trial.state in (TrialState.RUNNING, TrialState.WAITING)


def _is_retried(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    return any(
        other.user_attrs.get("retry_of") == trial.number
        and verdict(other) not in ("surplus", "duplicate")
        for other in trials
    )


def _owner() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _is_alive(owner: Mapping[str, Any]) -> bool:
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["started"]) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
