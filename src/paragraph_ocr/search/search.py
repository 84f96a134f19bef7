"""`python train.py -m search=<name>`: trials asked of a study and run by a Hydra launcher."""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna import Trial
from optuna.trial import FrozenTrial

from paragraph_ocr import build, console
from paragraph_ocr.config import Experiment, StudyConfig
from paragraph_ocr.errors import Stopped, UserError
from paragraph_ocr.search.report import StudyRun
from paragraph_ocr.search.space import Space
from paragraph_ocr.search.study import (
    CONFIRMED,
    SharedStudy,
    counts,
    storage_url,
    study_folder,
    verdict,
    why_unusable,
)
from paragraph_ocr.search.view import LiveView
from paragraph_ocr.targets import check_targets
from paragraph_ocr.validation import REFUSALS, explain, validate

WORKER_VARIABLE = "PARAGRAPH_OCR_WORKER"
"""Environment variable that tells a process that another one shows and reports the search."""

SECONDS_BETWEEN_LOOKS = 0.5
REFUSALS_TO_DRAW_AT_RANDOM = 3
REFUSALS_TO_GIVE_UP = 500
_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@dataclass(frozen=True)
class Work:
    """Trials to be run to a total: those of a search, or of the confirmation of its winners."""

    study: SharedStudy
    space: Space
    objective: list[str]

    def job(self, trial: Trial, params: Mapping[str, Any]) -> list[str]:
        """Return what Hydra's launcher is to run."""
        named = f"name={self.title(trial, params)}"
        return [*self.overrides(params), f"trial={trial.number}", named]

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        return [*self.space.fixed, *self.space.overrides(params)]

    def title(self, trial: Trial, params: Mapping[str, Any]) -> str:
        """Return the name of a trial's run, quoted for Hydra."""
        short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in params.items()}
        return _quoted(f"{trial.number:04d} " + ", ".join(self.space.overrides(short)))


@dataclass(frozen=True)
class Confirmation(Work):
    """The winners of a search, each trained again under further overrides."""

    winners: Mapping[str, FrozenTrial]
    further: Sequence[str]
    searched: Space

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        winner = self.winners[params["winner"]]
        chosen = self.searched.overrides(winner.params)
        study = f"hydra.sweeper.study_name={self.study.name}"
        return [*self.searched.fixed, *chosen, *self.further, study]

    def title(self, trial: Trial, params: Mapping[str, Any]) -> str:
        winner = params["winner"]
        return _quoted(f"{winner}: trial {self.winners[winner].number:04d} confirmed")


class Search:
    """One process's part in a study.

    Args:
        config: Hydra's config of the whole command.
        arguments: the overrides that were typed.
    """

    def __init__(
        self,
        config: DictConfig,
        arguments: list[str],
        *,
        loader: ConfigLoader,
        launcher: Launcher,
    ) -> None:
        self.config, self.loader, self.launcher = config, loader, launcher
        self.options: StudyConfig = _options(config)
        options = self.options
        self.objective = _listed(options.objective)
        self.directions = _listed(options.direction)
        if len(self.directions) != len(self.objective):
            raise UserError(
                f"hydra.sweeper.direction={self.directions} must have a word for each of "
                f"hydra.sweeper.objective={self.objective}. Pass minimize or maximize for each."
            )
        prunes = options.pruner.get("_target_") != "optuna.pruners.NopPruner"
        if prunes and len(self.objective) > 1:
            raise UserError(
                f"hydra/sweeper/pruner does not go with {len(self.objective)} objectives: no trial is "
                "the worse one. Pass hydra/sweeper/pruner=none."
            )
        if prunes and options.report.metric is None:
            raise UserError(
                "hydra.sweeper.report.metric has no value, and a pruner needs it. "
                "Pass hydra.sweeper.report.metric=val/cer."
            )
        self.space = Space.parse(
            options.params, arguments, when=options.when, constraints=options.constraints
        )
        self.outputs = Path(config.outputs)
        self.folder = study_folder(self.outputs, options.study_name)
        self.is_helper = WORKER_VARIABLE in os.environ
        # what trials change, checked as one
        self._defaults = self._compose([*self.space.fixed, "trial=0"])
        experiment = self._experiment(self._defaults)
        if options.sampler.get("_target_") == "optuna.samplers.BruteForceSampler":
            self.space.require_finite()
        # an expression that cannot be computed would look like a config that is impossible
        self.space.broken(_plain(self._defaults), _plain(self._defaults.hydra.runtime.choices))
        self.study = self._open(options.study_name, options.n_trials, self._identity(experiment))
        self.study.study.set_user_attr("overrides", self.space.fixed)
        self.work = Work(self.study, self.space, self.objective)
        self._began = time.time()
        self._view: LiveView | None = None
        self._run: StudyRun | None = None

    def run(self) -> None:
        """Work until the study has its total, then confirm its winners and report.

        Raises:
            Stopped: too many trials failed in a row.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # before the helpers start, which then find it there
        with console.progress("prepare") as progress:
            workers = len(os.sched_getaffinity(0))
            self.corpus.prepare(self.outputs / "data", num_workers=workers, progress=progress)
        with self._reporting(), self._helpers():
            done = self._complete(self.work)
            winners = self._winners()
            if done and self.options.confirm and winners:
                self._complete(self._confirmation(winners))
        if not self.is_helper:
            self._report_winners(winners)

    # --- trials -------------------------------------------------------------------------------

    def _complete(self, work: Work) -> bool:
        """Run trials until the study has its total, waiting for those of other processes.

        Returns whether it got there, or as far as the space goes; if not, the time is over.
        """
        refused = 0
        while (done := work.study.num_counted()) < work.study.total:
            counted = f"{done} of {work.study.total} trials of {work.study.name}"
            if self._is_time_over():
                console.another().print(
                    f"Time is over: {counted} are done; the same command goes on."
                )
                return False
            self._check_failures(work)
            if refused >= REFUSALS_TO_GIVE_UP or work.study.exhausted or self._all_tried(work):
                console.another().print(f"{counted} are all that its space and constraints allow.")
                return True
            began = time.perf_counter()
            batch: list[tuple[Trial, dict[str, Any]]] = []
            for _ in range(self._batch_size()):
                claimed = self._claim(work)
                if claimed is None:
                    break
                trial, params, refusal = claimed
                if refusal is None:
                    batch.append((trial, params))
                refused = 0 if refusal is None else refused + 1
                work.study.draw_at_random = refused >= REFUSALS_TO_DRAW_AT_RANDOM
            if batch:
                self._launch(work, batch, began)
                self._refresh()
            elif claimed is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self._refresh()
        return True

    def _all_tried(self, work: Work) -> bool:
        size = work.space.size()
        if size is None:
            return False
        tried = [t for t in work.study.trials() if verdict(t) == "impossible" or counts(t)]
        return len({tuple(sorted(t.params.items(), key=str)) for t in tried}) >= size

    def _batch_size(self) -> int:
        """Return how many jobs go to the launcher at once: one, where jobs run in this process."""
        basic = self.config.hydra.launcher._target_ == _BASIC
        return 1 if basic or self.is_helper else self.options.n_jobs

    def _claim(self, work: Work) -> tuple[Trial, dict[str, Any], str | None] | None:
        """Return a trial with its parameters, and why it is refused, if so; None: none to be had."""
        trial = work.study.claim()
        if trial is None:
            return None
        params = work.space.suggest(trial, _plain(self._defaults))
        if work.study.is_duplicate(trial):
            work.study.withdraw(trial, "duplicate", "another trial has these parameters")
            return trial, params, "duplicate"
        try:
            composed = self._compose(work.job(trial, params))
            broken = work.space.broken(_plain(composed), _plain(composed.hydra.runtime.choices))
            refusal = broken and f"{broken} does not hold"
            self._experiment(composed)
        except UserError as error:
            refusal = str(error)
        if refusal:
            work.study.withdraw(trial, "impossible", refusal)
        return trial, params, refusal

    def _launch(
        self, work: Work, batch: Sequence[tuple[Trial, dict[str, Any]]], began: float
    ) -> None:
        """Run the trials, and tell the study how each ended; `began` is when they were asked for."""
        jobs = [work.job(trial, params) for trial, params in batch]
        trials = [trial for trial, _ in batch]
        try:
            with work.study.lease(trials):
                results = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
        except BaseException as error:  # interrupted, or the launcher itself broke
            for trial in trials:
                work.study.withdraw(trial, "lost", f"{type(error).__name__} ended its process")
            raise
        seconds = time.perf_counter() - began
        for trial, result in zip(trials, results, strict=True):
            self._conclude(work, trial, result, seconds / len(batch))
        self._keep_weights_of_the_best(work)

    def _conclude(self, work: Work, trial: Trial, result: JobReturn, seconds: float) -> None:
        if result.status != JobStatus.COMPLETED:
            error = result._return_value
            work.study.fail(trial, _reason(error))
            error.__traceback__ = None  # it holds the model, and the GPU's memory with it
            return
        shown: dict[str, Any] = result._return_value
        metrics: dict[str, float] = shown["metrics"]
        measured = {
            **{key: shown[key] for key in ("metrics", "folder", "memory_mib")},
            "seconds": seconds,
            "overhead_seconds": seconds - shown["fit_seconds"],
        }
        work.study.set_attribute(trial, "result", measured)
        if shown["pruned"]:
            work.study.tell(trial, None, pruned=True)
            return
        unusable = why_unusable(work.objective, metrics)
        if unusable:
            work.study.fail(trial, unusable)
        else:
            work.study.tell(trial, [metrics[name] for name in work.objective])

    def _keep_weights_of_the_best(self, work: Work) -> None:
        """Delete the weights of trials that others surpass: a hundred models fill a disk."""
        best = {trial.number for trial in work.study.best()}
        for trial in work.study.trials():
            if trial.state.is_finished() and trial.number not in best:
                folder = trial.user_attrs.get("result", {}).get("folder")
                for file in Path(folder).glob("*.safetensors") if folder else ():
                    file.unlink(missing_ok=True)

    def _is_time_over(self) -> bool:
        limit = self.options.timeout
        return limit is not None and time.time() - self._began > limit

    def _check_failures(self, work: Work) -> None:
        """Raise Stopped if the last trials, of this command's time, all failed."""
        ended = [
            (trial.datetime_complete.timestamp(), trial)
            for trial in work.study.trials()
            if counts(trial) and trial.datetime_complete is not None
        ]
        ended.sort(key=lambda pair: pair[0])
        last = [trial for when, trial in ended if when > self._began][-self.options.max_failures :]
        reasons = [trial.user_attrs.get("reason") for trial in last]
        if len(last) == self.options.max_failures and all(reasons):
            raise Stopped(
                f"The last {len(last)} trials of {work.study.name} failed, the newest so: {reasons[-1]}. "
                "Mend that and type the same command again."
            )

    # --- configs ------------------------------------------------------------------------------

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        try:
            return self.loader.load_sweep_config(self.config, list(overrides))
        except REFUSALS as error:
            raise explain(error) from error

    def _experiment(self, composed: DictConfig) -> Experiment:
        task = composed.copy()
        with open_dict(task):
            del task["hydra"]
        OmegaConf.resolve(task)
        return validate(task)

    def _identity(self, experiment: Experiment) -> dict[str, str]:
        """Return what two processes of one study must agree on, in words."""
        from paragraph_ocr.run import flatten

        vocabulary = build.build_vocabulary(experiment)
        characters = build.writable(experiment, vocabulary)
        self.corpus = build.build_corpus(experiment.datamodule, characters, seed=experiment.seed)
        free = {"outputs", "name", "trial", "datamodule.num_workers", "datamodule.root"}
        free |= {"trainer.accelerator", "trainer.devices", "trainer.profiler"}
        swept = set(self.space.distributions)
        fixed = {
            key: str(value)
            for key, value in flatten(asdict(experiment)).items()
            if key not in free | swept and not key.startswith("tracking.")
        }
        return {
            "objective": ", ".join(
                map(" ".join, zip(self.directions, self.objective, strict=True))
            ),
            **self.space.describe(),
            **fixed,
            "data": self.corpus.fingerprint()[:12],
        }

    def _open(self, name: str, total: int, identity: Mapping[str, str]) -> SharedStudy:
        return SharedStudy(
            name,
            storage=storage_url(self.outputs, name, self.options.storage),
            directions=self.directions,
            total=total,
            identity=identity,
            make_sampler=partial(_sampler, self.options.sampler),
        )

    # --- winners ------------------------------------------------------------------------------

    def _winners(self) -> dict[str, FrozenTrial]:
        """Return each winner that the search has found; ties go to the first objective met best."""
        found = {}
        for name, rule in self.options.winners.items():
            fit = [
                trial
                for trial in self.study.trials()
                if trial.state == optuna.trial.TrialState.COMPLETE
                and all(
                    trial.user_attrs["result"]["metrics"].get(metric, float("inf")) <= most
                    for metric, most in rule.where.items()
                )
            ]
            if fit:
                found[name] = min(
                    fit,
                    key=lambda t: (t.user_attrs["result"]["metrics"][rule.least], t.values or []),
                )
        return found

    def _confirmation(self, winners: Mapping[str, FrozenTrial]) -> Confirmation:
        # other winners, after more trials, are another study
        numbered = "-".join(str(trial.number) for _, trial in sorted(winners.items()))
        name = f"{self.options.study_name}{CONFIRMED}-{numbered}"
        numbers = {key: str(trial.number) for key, trial in winners.items()}
        distribution = optuna.distributions.CategoricalDistribution(sorted(winners))
        study = self._open(name, len(winners), {**numbers, "confirm": str(self.options.confirm)})
        for key in sorted(winners):
            study.study.enqueue_trial({"winner": key}, skip_if_exists=True)
        space = Space({"winner": distribution})
        return Confirmation(
            study, space, self.objective, winners, list(self.options.confirm), self.space
        )

    def _report_winners(self, winners: Mapping[str, FrozenTrial]) -> None:
        confirmed: dict[str, FrozenTrial] = {}
        if self.options.confirm and winners:
            work = self._confirmation(winners)
            confirmed = {t.params["winner"]: t for t in work.study.trials() if counts(t)}
        assert self._run is not None or self.config.tracking.name == "off"
        LiveView.show_winners(winners, confirmed, objective=self.objective)
        if self._run:
            self._run.log_winners(winners, confirmed)

    # --- other processes, and what a person sees -----------------------------------------------

    @contextmanager
    def _helpers(self) -> Iterator[None]:
        """Run this very command n_jobs - 1 times more while the block runs, each to its own log."""
        helpers: list[subprocess.Popen[bytes]] = []
        logs = []
        alone = self._batch_size() > 1 or self.is_helper
        if not alone and self.options.n_jobs > 1:
            # more threads than cores, each spinning while it waits, made trials twenty times slower
            threads = max(1, len(os.sched_getaffinity(0)) // self.options.n_jobs)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if self.options.gpus and not alone:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(self.options.gpus[0])
        for index in range(1, 1 if alone else self.options.n_jobs):
            variables = {**os.environ, WORKER_VARIABLE: str(index)}
            if self.options.gpus:
                device = self.options.gpus[index % len(self.options.gpus)]
                variables["CUDA_VISIBLE_DEVICES"] = str(device)
            log = (self.folder / f"process{index}.log").open("ab")
            logs.append(log)
            command = [sys.executable, *sys.argv]
            helpers.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
        try:
            yield
        except BaseException:
            for helper in helpers:
                helper.terminate()
            raise
        finally:
            for helper in helpers:
                helper.wait()
            for log in logs:
                log.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Keep MLflow's parent run and the live view while the block runs."""
        if self.is_helper:
            from paragraph_ocr.tracking import PARENT_VARIABLE

            assert PARENT_VARIABLE in os.environ or self.config.tracking.name == "off"
            yield
            return
        tracking = self.config.tracking
        run = None
        if tracking.name != "off":
            run = StudyRun(
                self.study,
                self.outputs,
                objective=self.objective,
                experiment_name=tracking.experiment_name,
                uri=tracking.uri,
            )
        self._run = run
        with LiveView(self.study, objective=self.objective, storage=self.study.storage_url) as view:
            self._view = view
            if run is None:
                yield
            else:
                with run.open():
                    yield

    def _refresh(self) -> None:
        if self._view:
            self._view.refresh()
        if self._run:
            self._run.refresh()


def _options(config: DictConfig) -> StudyConfig:
    missing = OmegaConf.missing_keys(config.hydra.sweeper)
    if missing:
        key = sorted(missing)[0]
        raise UserError(f"hydra.sweeper.{key} has no value. Pass hydra.sweeper.{key}=<value>.")
    sweeper = OmegaConf.to_object(config.hydra.sweeper)
    assert isinstance(sweeper, StudyConfig)
    for node, allowed in ((sweeper.sampler, "samplers"), (sweeper.pruner, "pruners")):
        check_targets(node, f"hydra.sweeper.{allowed[:-1]}")
        if "_target_" not in node:
            raise UserError(
                f"hydra.sweeper.{allowed[:-1]}._target_ has no value. Pass a class of optuna.{allowed}."
            )
    return sweeper


def _sampler(config: Mapping[str, Any], seed: int, plain: bool) -> optuna.samplers.BaseSampler:
    """Return a new sampler; its seed differs from trial to trial and from one process to the next."""
    base = config.get("seed")
    if plain:
        return optuna.samplers.RandomSampler(seed=seed)
    made = {**config, "seed": None if base is None else base * 1_000_003 + seed}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return instantiate(made)
    except Exception as error:  # what instantiate wraps a TypeError or ValueError in
        first = str(error).splitlines()[0]
        raise UserError(f"hydra.sweeper.sampler={dict(config)}: {first}") from error


def _plain(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "").replace('"', "'") + '"'


def _listed(value: Any) -> list[str]:
    return [str(element) for element in value] if isinstance(value, list) else [str(value)]


def _reason(error: BaseException) -> str:
    """Return one line that says why a trial failed."""
    text = " ".join(str(error).split()) or "no message"
    if "out of memory" in text or "can't allocate memory" in text or isinstance(error, MemoryError):
        return f"out of memory: {text[:200]}"
    return f"{type(error).__name__}: {text[:300]}"
