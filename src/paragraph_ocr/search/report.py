"""What a search leaves in MLflow: a parent run with the best, the table and the plots."""

import contextlib
import csv
import html
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from paragraph_ocr.search.study import SharedStudy, objective_values, verdict
from paragraph_ocr.tracking import PARENT_VARIABLE, SharedRun

matplotlib.use("Agg")  # no screen

SECONDS_BETWEEN_REFRESHES = 20.0
SHARE_OF_TIME = 0.03
"""Of the search's time that refreshing may take."""

_PLOTS = {
    "history": "plot_optimization_history",
    "importances": "plot_param_importances",
    "slices": "plot_slice",
    "parallel_coordinates": "plot_parallel_coordinate",
}
"""Optuna's functions of these names draw with matplotlib (images) and with plotly (the page)."""


class StudyRun:
    """The MLflow run of a study: one for all its processes and restarts."""

    def __init__(
        self,
        study: SharedStudy,
        outputs: Path,
        *,
        objective: Sequence[str],
        experiment_name: str,
        uri: str | None,
    ) -> None:
        self.study, self.objective = study, list(objective)
        self.run = SharedRun(
            outputs,
            name=study.name,
            tags={"kind": "study", "study": study.name, "storage": study.storage_url},
            experiment_name=experiment_name,
            uri=uri,
        )
        self._next = 0.0
        self._shown = -1

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Be the parent of runs that start while the block runs; refreshed for a last time after it.

        The run's end is told only if no other process is still at work.
        """
        before = os.environ.get(PARENT_VARIABLE)
        os.environ[PARENT_VARIABLE] = self.run.run_id
        self.study.recover()
        self.end_lost_runs(self.study)
        try:
            with self.run.ending(others=self._others):
                try:
                    yield
                finally:
                    self.end_lost_runs(self.study)
                    self.refresh(force=True)
        finally:
            if before is None:
                del os.environ[PARENT_VARIABLE]
            else:
                os.environ[PARENT_VARIABLE] = before

    def _others(self) -> bool:
        """Return whether another process still works on the study."""
        if self.study.num_counted() >= self.study.total:
            return False
        self.study.recover()
        return any(trial.state == TrialState.RUNNING for trial in self.study.trials())

    def end_lost_runs(self, study: SharedStudy) -> None:
        """Say KILLED of the runs whose trial no process works on any more."""
        states = {str(trial.number): trial.state for trial in study.trials()}
        for run_id, tags in self.run.running_children():
            if tags.get("study") != study.name:
                continue
            if states.get(tags["trial"]) != TrialState.RUNNING:
                self.run.kill(run_id, reason="its process is gone")

    def refresh(self, *, force: bool = False) -> None:
        """Bring table and plots up to date, unless that was just done or nothing has changed."""
        trials = self.study.trials()
        done = sum(trial.state.is_finished() for trial in trials)
        if done == self._shown or (time.monotonic() < self._next and not force):
            return
        began = time.monotonic()
        self._shown = done
        best = self.study.best()
        for index, name in enumerate(self.objective):
            values = [trial.values[index] for trial in best]
            if values:
                self.run.log_metrics({f"best/{name}": min(values, key=abs)}, step=done)
        if best:
            for key, value in best[0].params.items():
                self.run.tag(f"best.{key}", str(value))
        self.run.log_text(_table(trials, self.objective), "trials.csv")
        self.run.log_text(_table(best, self.objective), "best.csv")
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if len(complete) >= 2:
            for name, figure in figures(self.study.study, self.objective).items():
                self.run.log_figure(figure, f"plots/{name}.png")
                plt.close(figure)
            self.run.log_text(page(self.study, self.objective), "search.html")
        cost = time.monotonic() - began
        self._next = time.monotonic() + max(SECONDS_BETWEEN_REFRESHES, cost / SHARE_OF_TIME)

    def log_winners(
        self, winners: Mapping[str, FrozenTrial], confirmed: Mapping[str, FrozenTrial]
    ) -> None:
        """Log which trials won, and how they did when trained again."""
        if len(self.objective) == 2 and winners:
            figure = pareto_figure(self.study.study, self.objective, winners)
            self.run.log_figure(figure, "plots/pareto_front.png")
            plt.close(figure)
        self.run.log_json(
            {
                name: {
                    "trial": trial.number,
                    "params": trial.params,
                    "metrics": trial.user_attrs["result"]["metrics"],
                    "confirmed": _confirmed(confirmed.get(name)),
                }
                for name, trial in winners.items()
            },
            "winners.json",
        )


def _confirmed(trial: FrozenTrial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    result = trial.user_attrs.get("result", {})
    told = {"state": verdict(trial), "reported": trial.intermediate_values}
    told |= {key: result.get(key) for key in ("metrics", "folder")}
    return {**told, "reason": trial.user_attrs.get("reason")}


def figures(study: optuna.Study, objective: Sequence[str]) -> dict[str, Figure]:
    """Return the plots that the study's trials allow, by name."""
    from optuna.visualization import matplotlib as draw

    made: dict[str, Figure] = {}

    for index, metric in enumerate(objective):
        target = None if len(objective) == 1 else _value(index)
        suffix = "" if len(objective) == 1 else f"_{metric.replace('/', '_')}"
        for name, plot in _PLOTS.items():
            # a plot wants two different values, say; the rest are worth having without it
            with warnings.catch_warnings(), contextlib.suppress(ValueError, RuntimeError):
                warnings.simplefilter(
                    "ignore"
                )  # "experimental", and layouts that are a little tight
                axes = getattr(draw, plot)(study, target=target, target_name=metric)
                figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
                figure.set_size_inches(11, 6)
                figure.tight_layout()
                made[f"{name}{suffix}"] = figure
    if len(objective) == 2:
        made["pareto_front"] = pareto_figure(study, objective, {})
    return made


@plt.style.context("default")  # Optuna's plots leave another behind
def pareto_figure(
    study: optuna.Study, objective: Sequence[str], winners: Mapping[str, FrozenTrial]
) -> Figure:
    """Return all complete trials over two objectives, the front joined and the winners named."""
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    front = sorted(study.best_trials, key=lambda trial: trial.values)
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")

    def points(trials: Sequence[FrozenTrial]) -> tuple[list[float], list[float]]:
        return [trial.values[0] for trial in trials], [trial.values[1] for trial in trials]

    axes.scatter(*points(complete), 16, color="0.7", label=f"{len(complete)} trials")  # type: ignore[misc]
    axes.plot(*points(front), "o-", color="tab:blue", ms=4, label="Pareto front")
    for colour, (name, trial) in zip(
        ("tab:red", "tab:green", "tab:orange"), winners.items(), strict=False
    ):
        label = f"{name}: trial {trial.number}, {trial.values[0]:.3g}"
        axes.scatter(*points([trial]), 90, marker="D", color=colour, zorder=3, label=label)  # type: ignore[misc]
    for index, name in enumerate(objective):
        (axes.set_ylabel if index else axes.set_xlabel)(
            "parameters (millions)" if name == "parameters" else name
        )
        values = [trial.values[index] for trial in complete]
        if min(values) > 0 and max(values) > 30 * min(values):
            (axes.set_yscale if index else axes.set_xscale)("log")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    axes.set_title(study.study_name)
    return figure


def page(study: SharedStudy, objective: Sequence[str]) -> str:
    """Return one HTML page that needs nothing else: the best trials and the interactive plots."""
    import plotly.io
    from optuna import visualization as draw

    best = _html_table(sorted(study.best(), key=lambda trial: trial.values), objective)
    parts = [f"<h1>{html.escape(study.name)}</h1><h2>Best</h2>{best}"]
    plots: list[Any] = []
    if len(objective) in (2, 3):
        plots.append(draw.plot_pareto_front(study.study, target_names=list(objective)))
    for index, metric in enumerate(objective):
        target = None if len(objective) == 1 else _value(index)
        for plot in _PLOTS.values():
            with contextlib.suppress(ValueError, RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plots.append(getattr(draw, plot)(study.study, target=target, target_name=metric))
    for index, figure in enumerate(plots):
        parts.append(plotly.io.to_html(figure, full_html=False, include_plotlyjs=index == 0))
    body = "\n".join(parts)
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:2px 10px;text-align:left}"
    title = html.escape(study.name)
    return (
        f"<!doctype html><html><head><meta charset=utf-8><title>{title}</title>"
        f"<style>{style}</style></head><body>{body}</body></html>"
    )


def rows(trials: Sequence[FrozenTrial], objective: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of plain values for each trial: number, state, objectives, parameters, reason."""
    listed = []
    for trial in trials:
        values = dict.fromkeys(objective) | dict(
            zip(objective, objective_values(trial), strict=False)
        )
        metrics = trial.user_attrs.get("result", {}).get("metrics", {})
        seconds = trial.user_attrs.get("result", {}).get("seconds")
        listed.append(
            {
                "trial": trial.number,
                "state": verdict(trial),
                **values,
                **{k: v for k, v in metrics.items() if k not in values and k.startswith("val/")},
                "seconds": None if seconds is None else round(seconds, 2),
                **trial.params,
                "reason": trial.user_attrs.get("reason", ""),
            }
        )
    return listed


def _table(trials: Sequence[FrozenTrial], objective: Sequence[str]) -> str:
    listed = rows(trials, objective)
    columns = list(dict.fromkeys(key for row in listed for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(listed)
    return text.getvalue()


def _html_table(trials: Sequence[FrozenTrial], objective: Sequence[str]) -> str:
    listed = rows(trials, objective)
    columns = list(dict.fromkeys(key for row in listed for key in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = [
        "".join(f"<td>{html.escape(_short(row.get(column, '')))}</td>" for column in columns)
        for row in listed
    ]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(index: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: float(trial.values[index])
