"""The total of a study, whoever works on it and whoever is killed: no training here, only trials."""

import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from paragraph_ocr.errors import UserError
from paragraph_ocr.search import study as study_module
from paragraph_ocr.search.study import SharedStudy, counts, verdict, why_unusable


def random_sampler(seed: int, plain: bool) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def shared(folder, *, total=5, identity=None, directions=("minimize",)):
    return SharedStudy(
        "s",
        storage=f"journal:///{folder}/journal.log",
        directions=directions,
        total=total,
        identity=identity or {"space": "x"},
        make_sampler=random_sampler,
    )


def complete(study):
    """Run the study to its total; return how many trials this took."""
    count = 0
    while study.num_counted() < study.total:
        trial = study.claim()
        if trial is None:
            time.sleep(0.02)
            continue
        trial.suggest_float("x", 0, 1)
        if study.is_duplicate(trial):
            study.withdraw(trial, "duplicate", "seen")
            continue
        study.tell(trial, [trial.params["x"]])
        count += 1
    return count


def test_the_same_command_again_goes_on_to_the_total(tmp_path):
    assert complete(shared(tmp_path, total=5)) == 5
    assert complete(shared(tmp_path, total=5)) == 0
    assert complete(shared(tmp_path, total=8)) == 3


def test_what_failed_counts_and_what_is_impossible_does_not(tmp_path):
    study = shared(tmp_path, total=3)
    for end in (
        lambda t: study.fail(t, "it broke"),
        lambda t: study.withdraw(t, "impossible", "width"),
        lambda t: study.tell(t, None, pruned=True),
        lambda t: study.tell(t, [1.0]),
    ):
        trial = study.claim()
        assert trial is not None
        trial.suggest_float("x", 0, 1)
        end(trial)
    assert [verdict(t) for t in study.trials()] == ["failed", "impossible", "pruned", "complete"]
    assert study.num_counted() == 3
    assert study.trials()[0].user_attrs["reason"] == "it broke"
    assert study.claim() is None


def test_a_trial_whose_process_is_gone_runs_again_with_its_parameters(tmp_path):
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from test_study import shared\n"
        "t = shared(sys.argv[1]).claim(); t.suggest_float('x', 0, 1); print('on', flush=True); time.sleep(99)"
    )
    here = str(Path(__file__).parent)
    worker = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), here], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "on\n"
    study = shared(tmp_path)
    study.recover()
    assert verdict(study.trials()[0]) == "running", "it is alive"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    complete(study)
    first, *rest = study.trials()
    assert verdict(first) == "lost"
    (again,) = [t for t in rest if "retry_of" in t.user_attrs]
    assert again.params == first.params
    assert sum(map(counts, study.trials())) == 5


def test_a_retry_that_is_lost_in_turn_runs_again(tmp_path):
    study = shared(tmp_path, total=1)
    for _ in range(3):
        trial = study.claim()
        assert trial is not None
        value = trial.suggest_float("x", 0, 1)
        study.withdraw(trial, "lost", "killed")
    complete(study)
    assert len({t.params["x"] for t in study.trials()}) == 1
    assert study.trials()[-1].params["x"] == value
    assert [verdict(t) for t in study.trials()] == ["lost", "lost", "lost", "complete"]


def test_a_trial_of_another_machine_is_lost_when_its_lease_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "SECONDS_TO_LOST", 0.3)
    monkeypatch.setattr(study_module, "SECONDS_BETWEEN_LEASES", 0.05)
    study, other = shared(tmp_path), shared(tmp_path)
    trial = study.claim()
    assert trial is not None
    trial.set_user_attr("owner", {"host": platform.node() + "x", "pid": 1, "started": 0})
    with study.lease([trial]):
        for _ in range(10):
            other.recover()
            time.sleep(0.1)
        assert verdict(other.trials()[0]) == "running", "it gave signs of life"
    for _ in range(6):
        other.recover()
        time.sleep(0.1)
    assert verdict(other.trials()[0]) == "lost"
    study.tell(trial, [1.0])  # too late, and no error
    assert verdict(study.trials()[0]) == "lost"


def test_two_that_run_the_same_lost_trial_again_settle_it_by_number(tmp_path):
    study, other = shared(tmp_path), shared(tmp_path)
    trial = study.claim()
    assert trial is not None
    trial.suggest_float("x", 0, 1)
    study.withdraw(trial, "lost", "killed")
    for one in (study, other):  # as if both had looked at the same moment
        one.study.enqueue_trial(trial.params, user_attrs={"retry_of": 0})
    taken = [study.claim(), other.claim()]
    assert sum(t is not None for t in taken) == 1
    assert Counter(map(verdict, study.trials())) == {"lost": 1, "running": 1, "duplicate": 1}


def test_who_comes_too_late_for_the_last_place_withdraws(tmp_path):
    study, other = shared(tmp_path, total=1), shared(tmp_path, total=1)
    trial = study.claim()
    assert trial is not None
    assert other.claim() is None, "the place is held"
    late = other.study.ask()  # as if both had looked at the same moment
    assert other._has_lost_the_race(late)
    assert verdict(other.trials()[1]) == "surplus"


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_reach_the_total_exactly_and_repeat_nothing(tmp_path, processes):
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_study import shared, complete\n"
        "print(complete(shared(sys.argv[1], total=24)))"
    )
    here = str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), here], stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    done = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    study = shared(tmp_path, total=24)
    assert sum(done) == study.num_counted() == 24
    params = [t.params["x"] for t in study.trials() if counts(t)]
    assert len(set(params)) == 24
    assert not [t for t in study.trials() if t.state in (TrialState.RUNNING, TrialState.WAITING)]


def test_another_space_or_objective_is_refused_with_what_changed(tmp_path):
    shared(tmp_path, identity={"objective": "minimize val/cer", "optimizer.lr": "0 to 1"})
    with pytest.raises(UserError) as refused:
        shared(tmp_path, identity={"objective": "minimize val/cer", "optimizer.lr": "0 to 2"})
    line = str(refused.value)
    assert "optimizer.lr=0 to 1 (now 0 to 2)" in line
    assert "hydra.sweeper.study_name=" in line
    assert "val/cer" not in line
    assert "\n" not in line


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path):
    complete(shared(tmp_path, total=3))
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker')
    study = shared(tmp_path, total=4)
    assert complete(study) == 1
    assert journal.read_bytes().startswith(whole)


def test_an_rdb_works_as_a_journal_does(tmp_path):
    study = SharedStudy(
        "s",
        storage=f"sqlite:///{tmp_path}/study.db",
        directions=["minimize", "maximize"],
        total=3,
        identity={},
        make_sampler=random_sampler,
    )
    for _ in range(3):
        trial = study.claim()
        assert trial is not None
        x = trial.suggest_float("x", 0, 1)
        study.tell(trial, [x, x])
    assert study.num_counted() == 3
    assert len(study.best()) == 3


def test_a_storage_that_cannot_be_opened_is_named():
    with pytest.raises(UserError, match=r"storage=nonsense"):
        study_module.open_storage("nonsense")


@pytest.mark.parametrize(
    ("metrics", "said"),
    [({"b": 1.0}, "a was not measured"), ({"a": float("nan")}, "a is nan"), ({"a": 1.0}, None)],
)
def test_metrics_that_are_no_objective_are_named(metrics, said):
    why = why_unusable(["a"], metrics)
    assert why is None if said is None else said in why
