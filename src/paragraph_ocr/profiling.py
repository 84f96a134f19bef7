"""A trace of a few training steps, for a person to look at: what runs when, on the CPU and on the GPU."""

from pathlib import Path

import torch
from pytorch_lightning.profilers import Profiler
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from paragraph_ocr import console

_STEP = "run_training_batch"
"""Lightning's name of a step."""

_WAIT, _WARM_UP, _RECORD = 5, 1, 3
"""Steps that are left out (the first compile, choose algorithms and take memory), that the recorder warms up
in, and that are recorded. A step of a small model is some 3 MB."""

_ROWS = 30  # of the table


class StepTrace(Profiler):
    """Records three training steps, once, with the names that Lightning gives to what it does in them.

    Leaves `steps.trace.json`, which https://ui.perfetto.dev and chrome://tracing open, and `profile.txt`, a
    table of the operations that took longest. Of several processes, the first is recorded.

    Args:
        max_steps: of the run; a short one is recorded from an earlier step on. -1: it is long enough.
    """

    def __init__(self, folder: Path, *, max_steps: int = -1) -> None:
        super().__init__()
        self._trace, self._table = folder / "steps.trace.json", folder / "profile.txt"
        room = _WAIT if max_steps < 0 else max_steps - _WARM_UP - _RECORD
        self._wait = min(_WAIT, max(0, room))
        self._recorder: profile | None = None
        self._spans: dict[str, record_function] = {}
        self._written = False

    def start(self, action_name: str) -> None:
        if action_name == _STEP and self.local_rank == 0 and not self._written:
            self._begin()
        if self._recorder is not None and action_name not in self._spans:
            self._spans[action_name] = record_function(action_name)
            self._spans[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        if action_name in self._spans:
            self._spans.pop(action_name).__exit__(None, None, None)
        if action_name == _STEP and self._recorder is not None:
            self._recorder.step()
            if self._written:
                self._end()

    def describe(self) -> None:
        """Lightning calls this at the end of a run, however it ends: one of few steps may still record."""
        self._end()

    def _begin(self) -> None:
        if self._recorder is not None:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._recorder = profile(
            activities=activities,
            schedule=schedule(wait=self._wait, warmup=_WARM_UP, active=_RECORD, repeat=1),
            on_trace_ready=self._write,
        )
        self._recorder.start()

    def _write(self, recorder: profile) -> None:
        recorder.export_chrome_trace(str(self._trace))
        sort_by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorder.key_averages().table(sort_by=sort_by, row_limit=_ROWS)
        self._table.write_text(table, encoding="utf-8")
        self._written = True
        console.say(f"trace of {_RECORD} steps: {self._trace} (open it in https://ui.perfetto.dev)")

    def _end(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        for span in self._spans.values():
            span.__exit__(None, None, None)
        self._spans.clear()
        recorder.stop()
