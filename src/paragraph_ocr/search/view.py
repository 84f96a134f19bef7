"""What a person sees of a search while it runs, and when it is over."""

import datetime
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from paragraph_ocr import console
from paragraph_ocr.search.study import SharedStudy, counts, objective_values, verdict

NUM_LAST = 8


class LiveView:
    """Counts, best so far, time left and the last trials; a line for each trial without a terminal."""

    def __init__(self, study: SharedStudy, *, objective: Sequence[str], storage: str) -> None:
        self.study, self.objective, self.storage = study, list(objective), storage
        # runs in this process silence the common console
        self._console = console.another()
        self._seen: set[int] = set()
        self._began, self._before = time.monotonic(), study.num_counted()
        self._live = Live(
            console=self._console, get_renderable=self.render, refresh_per_second=1, transient=True
        )

    def __enter__(self) -> "LiveView":
        path = self.storage.removeprefix("journal:///")
        shown = f"/{path}" if path != self.storage and not path.startswith("/") else path
        self._console.print(
            Text(f"study {self.study.name}: {self._before} of {self.study.total} trials done; "
                 f"browse: optuna-dashboard {shown}"),
            soft_wrap=True,
        )  # fmt: skip
        self._seen = {t.number for t in self.study.trials() if t.state.is_finished()}
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
        self.refresh(last=True)
        self._console.print(self.render())

    def refresh(self, *, last: bool = False) -> None:
        """Print a line for each trial that has ended; the live table renews itself."""
        if self._console.is_terminal and not last:
            return
        for trial in self.study.trials():
            if trial.state.is_finished() and trial.number not in self._seen:
                self._seen.add(trial.number)
                if not self._console.is_terminal:
                    self._console.print(Text(self._line(trial)), soft_wrap=True)

    def render(self) -> RenderableType:
        """Return the whole view."""
        trials = self.study.trials()
        tally = Counter(map(verdict, trials))
        done = sum(map(counts, trials))
        left = self._seconds_left(done)
        head = Text.assemble(
            (f"{self.study.name}  ", "bold"),
            (f"{done}/{self.study.total}", "bold green"),
            f"  complete {tally['complete']}  pruned {tally['pruned']}  failed {tally['failed']}"
            f"  running {tally['running']}",
            "".join(
                f"  {word} {tally[word]}" for word in ("lost", "impossible") if tally[word]
            ),
            f"  left {left}" if left else "",
        )  # fmt: skip
        best = self.study.best()
        parts: list[RenderableType] = [head]
        if best:
            title = "Best" if len(self.objective) == 1 else f"Pareto front ({len(best)})"
            shown = sorted(best, key=lambda trial: trial.values)[:NUM_LAST]
            parts.append(self._table(shown, title))
        recent = [
            trial
            for trial in trials
            if trial.state.is_finished() or trial.state == TrialState.RUNNING
        ]
        parts.append(self._table(recent[-NUM_LAST:], "Last trials"))
        return Group(*parts)

    def _seconds_left(self, done: int) -> str:
        here = done - self._before
        if here <= 0 or done >= self.study.total:
            return ""
        seconds = (time.monotonic() - self._began) / here * (self.study.total - done)
        return str(datetime.timedelta(seconds=round(seconds)))

    def _table(self, trials: Sequence[FrozenTrial], title: str) -> Table:
        keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
        names = [key.rpartition(".")[2] for key in keys]
        labels = [
            key.removeprefix("model.") if names.count(name) > 1 else name
            for key, name in zip(keys, names, strict=True)
        ]
        table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
        for column in ("trial", "state", *self.objective, *labels):
            table.add_column(column, overflow="fold")
        for trial in trials:
            values: list[float | None] = [*objective_values(trial)] or [None] * len(self.objective)
            table.add_row(
                str(trial.number),
                _coloured(verdict(trial)),
                *(_short(value) for value in values),
                *(_short(trial.params.get(key)) for key in keys),
            )
        return table

    def _line(self, trial: FrozenTrial) -> str:
        values = "".join(
            f"  {name} {value:.4g}"
            for name, value in zip(self.objective, objective_values(trial), strict=False)
        )
        reason = f"  {trial.user_attrs['reason']}" if "reason" in trial.user_attrs else ""
        params = ", ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
        return f"trial {trial.number:4d}  {verdict(trial):10s}{values}{reason}  {params}"

    @staticmethod
    def show_winners(
        winners: Mapping[str, FrozenTrial],
        confirmed: Mapping[str, FrozenTrial],
        *,
        objective: Sequence[str],
    ) -> None:
        """Print each winner, and how it went on when trained again."""
        screen = console.another()
        for name, trial in winners.items():
            params = ", ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
            metrics = trial.user_attrs["result"]["metrics"]
            told = ", ".join(f"{key} {_short(value)}" for key, value in metrics.items())
            screen.print(Text(f"{name}: trial {trial.number}: {params}", style="bold"))
            screen.print(Text(f"  {told}"))
            again = confirmed.get(name)
            if again is None:
                continue
            steps = ", ".join(f"{k}: {_short(v)}" for k, v in again.intermediate_values.items())
            after = again.user_attrs.get("result", {}).get("metrics", {})
            told = ", ".join(f"{key} {_short(value)}" for key, value in after.items())
            screen.print(Text(f"  confirmed ({verdict(again)}): {told}\n  reported {steps}"))


def _short(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _coloured(word: str) -> Text:
    colours = {"complete": "green", "running": "cyan", "pruned": "yellow", "failed": "red"}
    return Text(word, style=colours.get(word, "dim"))
