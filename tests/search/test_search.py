"""`train.py -m search=...` as a command: kills, several processes, bad trials, refusals, MLflow."""

import csv
import json
import random
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from quick_search import command, environment, runs, search

from commands import kill_command, run_command, start_command
from paragraph_ocr.build import build_vocabulary
from paragraph_ocr.build_model import build_recognizer, load_weights
from paragraph_ocr.help import CONF
from paragraph_ocr.search.study import counts, open_storage, verdict
from paragraph_ocr.validation import compose, validate

ROOT = Path(__file__).parents[2]


def trials(outputs: Path, name: str = "quick") -> list[optuna.trial.FrozenTrial]:
    """The trials of a study: none until it is there, a moment after its journal."""
    journal = outputs / "studies" / name.partition(".confirmed")[0] / "journal.log"
    if not journal.exists():
        return []
    storage = open_storage(f"journal:///{journal}")
    if name not in optuna.get_all_study_names(storage):
        return []
    return optuna.load_study(study_name=name, storage=storage).trials


def parent_and_children(outputs: Path):
    listed = runs(outputs)
    (parent,) = [run for run in listed if run.get("kind") == "study"]
    return parent, [run for run in listed if run is not parent]


def test_a_search_leaves_a_parent_with_table_and_plots_and_children_by_name(conf, tmp_path):
    outputs = tmp_path / "outputs"
    done = search(conf, outputs, "hydra.sweeper.n_trials=3")
    assert done.returncode == 0, done.stderr
    assert "optuna-dashboard" in done.stdout
    assert [verdict(t) for t in trials(outputs)] == ["complete"] * 3
    parent, children = parent_and_children(outputs)
    assert parent["status"] == "FINISHED"
    assert "best.optimizer.lr" in parent
    assert len(children) == 3
    for child, trial in zip(
        sorted(children, key=lambda c: c["name"]), trials(outputs), strict=True
    ):
        assert child["mlflow.parentRunId"] == parent["run"]
        rate = float(f"{trial.params['optimizer.lr']:.4g}")
        assert child["name"] == f"{trial.number:04d} optimizer.lr={rate!r}"
        assert (child["status"], child["trial_state"]) == ("FINISHED", "COMPLETE")
    (artifacts,) = (outputs / "artifacts").glob(f"{parent['run']}/artifacts")
    with (artifacts / "trials.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert [float(row["val/loss"]) for row in rows] == [t.value for t in trials(outputs)]
    assert (artifacts / "plots" / "history.png").stat().st_size > 5000
    assert "plotly" in (artifacts / "search.html").read_text()
    # the best keeps its weights, and the others make room
    best = min(trials(outputs), key=lambda t: t.value)
    kept = {path.parent.name for path in outputs.glob("studies/quick/*/*.safetensors")}
    assert kept == {f"{best.number:04d}"}

    again = search(conf, outputs, "hydra.sweeper.n_trials=3")
    assert again.returncode == 0
    assert len(runs(outputs)) == 4, "nothing is left to do"

    # the best is trained again as a single run, with what is typed beside it
    study = str(outputs / "studies" / "quick")
    typed = ["--config-dir", str(conf), "trainer.max_epochs=1"]
    done = run_command("scripts/best.py", study, *typed, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    (config,) = outputs.glob("runs/*/config.yaml")
    alone = yaml.safe_load(config.read_text())
    assert alone["optimizer"]["lr"] == best.params["optimizer.lr"]
    assert alone["trainer"]["max_epochs"] == 1
    assert alone["trial"] is None
    for wrong in ([study, "--trial=77"], [str(tmp_path)]):
        done = run_command("scripts/best.py", *wrong, env=environment())
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1

    # with another objective, space or data, the study refuses
    for changed, said in (
        ("hydra.sweeper.objective=val/cer", "objective=minimize val/loss (now minimize val/cer)"),
        ("optimizer.lr=interval(0.1, 0.2)", "optimizer.lr="),
        ("datamodule.num_train=12", "datamodule.num_train=8 (now 12)"),
        ("trainer.max_epochs=3", "trainer.max_epochs=2 (now 3)"),
    ):
        refused = search(conf, outputs, changed)
        assert refused.returncode == 2, changed
        (line,) = refused.stderr.strip().splitlines()
        assert said in line and "hydra.sweeper.study_name=" in line


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "search").glob("*.yaml")))
def test_every_search_that_is_shipped_runs_a_trial(name, tmp_path):
    outputs = tmp_path / "outputs"
    typed = [
        f"search={name}", "datamodule=fake", "debug=ci", f"outputs={outputs}",
        "hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1", "hydra.sweeper.winners={}",
    ]  # fmt: skip
    done = run_command("train.py", *typed, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert [verdict(t) for t in trials(outputs, name) if counts(t)] == ["complete"]


def kill_and_go_on(conf, outputs, *, total, kills, arguments=()):
    """Kill a search at random moments, start it again each time; return how often it was killed.

    The moments: up to 2 s after a trial was begun, and every fifth time within 4 s of the start.
    """
    dice = random.Random(0)
    _, script, *typed = command(conf, outputs, f"hydra.sweeper.n_trials={total}", *arguments)
    said = [outputs.parent / name for name in ("stdout", "stderr")]
    killed = 0
    while True:
        before = len(trials(outputs))
        process = start_command(script, *typed, cwd=outputs.parent, env=environment(), streams=said)
        if killed < kills and killed % 5 < 4:
            while process.is_alive() and len(trials(outputs)) <= before:
                time.sleep(0.05)
        process.join(600.0 if killed == kills else dice.uniform(0, 4 if killed % 5 == 4 else 2))
        if process.exitcode is not None:
            assert process.exitcode == 0, said[1].read_text()[-2000:]
            return killed
        assert killed < kills, "it did not end"
        kill_command(process)
        process.join()
        killed += 1


def check_whole(outputs, *, total):
    """Check that a study has its total, each parameter once, and MLflow knows of no run under way."""
    listed = trials(outputs)
    counted = [trial for trial in listed if counts(trial)]
    assert len(counted) == total
    assert len({trial.params["optimizer.lr"] for trial in counted}) == total
    lost = [trial for trial in listed if verdict(trial) == "lost"]
    for trial in lost:
        assert any(t.user_attrs.get("retry_of") == trial.number for t in listed), "it is run again"
    assert "RUNNING" not in {run["status"] for run in runs(outputs)}
    parent, children = parent_and_children(outputs)
    assert parent["status"] == "FINISHED"
    finished = Counter(run["trial"] for run in children if run.get("trial_state") == "COMPLETE")
    assert set(finished) >= {str(trial.number) for trial in counted}
    best = min(counted, key=lambda trial: trial.value)
    experiment = validate(compose(["model=tiny", "model.decoder.depth=1", "datamodule=fake"]))
    recognizer = build_recognizer(experiment, build_vocabulary(experiment))
    before = torch.cat([p.flatten() for p in recognizer.parameters()]).clone()
    load_weights(recognizer, outputs.parent / best.user_attrs["result"]["folder"])
    assert not torch.equal(before, torch.cat([p.flatten() for p in recognizer.parameters()]))
    return len(lost)


def test_a_search_killed_again_and_again_reaches_its_total_exactly(conf, tmp_path):
    outputs = tmp_path / "outputs"
    assert kill_and_go_on(conf, outputs, total=8, kills=3) >= 2
    check_whole(outputs, total=8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_of_sixty_trials(conf, tmp_path):
    outputs = tmp_path / "outputs"
    longer = ["trainer.max_epochs=40"]  # a second each, or they are done before the last kill
    killed = kill_and_go_on(conf, outputs, total=60, kills=20, arguments=longer)
    lost = check_whole(outputs, total=60)
    print(f"{killed} kills, {lost} trials lost and run again, {len(trials(outputs))} trials in all")  # noqa: T201
    assert killed == 20
    assert lost >= 5


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_of_four_processes_one_is_killed_and_its_trial_runs_again_within_a_minute(conf, tmp_path):
    outputs = tmp_path / "outputs"
    typed = command(conf, outputs, "hydra.sweeper.n_trials=24", "trainer.max_epochs=40")
    started = [
        subprocess.Popen(typed, cwd=tmp_path, env=environment(), start_new_session=True)
        for _ in range(4)
    ]
    victim = started[2]
    mine: list[optuna.trial.FrozenTrial] = []
    while not mine:
        time.sleep(0.2)
        mine = [
            trial
            for trial in trials(outputs)
            if verdict(trial) == "running"
            and trial.user_attrs.get("owner", {}).get("pid") == victim.pid
        ]
    victim.kill()
    began = time.monotonic()
    while not any(t.user_attrs.get("retry_of") == mine[0].number for t in trials(outputs)):
        time.sleep(0.2)
        assert time.monotonic() - began < 60
    print(f"run again after {time.monotonic() - began:.1f} s")  # noqa: T201
    assert [p.wait() for p in started if p is not victim] == [0, 0, 0]
    assert check_whole(outputs, total=24) == 1


def test_two_processes_of_one_command_share_a_study(conf, tmp_path):
    outputs = tmp_path / "outputs"
    done = search(
        conf, outputs, "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2", "trainer.max_epochs=40"
    )
    assert done.returncode == 0, done.stderr
    check_whole(outputs, total=8)
    assert len({trial.user_attrs["owner"]["pid"] for trial in trials(outputs)}) == 2


def test_hydras_joblib_launcher_runs_trials_too(conf, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    outputs = tmp_path / "outputs"
    typed = ["hydra/launcher=joblib", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    # its processes start as the first one did, so that one must not be forked
    done = subprocess.run(
        command(conf, outputs, *typed),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_whole(outputs, total=4)


BAD = {
    "good": "optimizer: {lr: 0.1}",
    "raises": "model: {encoder: {name: vit_small_resnet26d_224}}",
    "not_a_number": "optimizer: {lr: 100}\nregularization: {gradient_clip: 0}",
    "memory": "model: {decoder: {width: 65536, feed_forward: 1000000}}",
    "pruned": "optimizer: {lr: 1e-9}",
}


def test_each_kind_of_bad_trial_is_told_apart_and_the_search_goes_on(conf, tmp_path):
    for name, text in BAD.items():
        (conf / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    (conf / "hydra" / "sweeper" / "pruner").mkdir(parents=True)
    (conf / "hydra" / "sweeper" / "pruner" / "threshold.yaml").write_text(
        "_target_: optuna.pruners.ThresholdPruner\nupper: 5.0\n"
    )
    quick = conf / "search" / "quick.yaml"
    quick.write_text(re.sub("params: .*", "params: {}", quick.read_text()))
    outputs = tmp_path / "outputs"
    done = search(
        conf, outputs, f"experiment={','.join(BAD)}", "optimizer=sgd",
        "trainer.max_epochs=40", "trainer.check_val_every_n_epoch=40", "trainer.log_every_n_steps=1",
        "hydra/sweeper/sampler=grid", "hydra/sweeper/pruner=threshold",
        "hydra.sweeper.report.metric=val/loss", "hydra.sweeper.n_trials=9",
        more_bytes=8 * 2**30,  # its first matrix has 16 GiB, which many a machine would fill
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert "5 of 9 trials" in done.stdout, "no combination is left"
    found = {trial.params["experiment"]: trial for trial in trials(outputs) if counts(trial)}
    states = {name: verdict(trial) for name, trial in found.items()}
    assert states == {
        "good": "complete",
        "raises": "failed",
        "not_a_number": "failed",
        "memory": "failed",
        "pruned": "pruned",
    }
    pruned = f"trial {found['pruned'].number:4d}  pruned      experiment=pruned"
    assert pruned in done.stdout, "what the pruner saw is no value of the objective"
    reasons = {name: trial.user_attrs.get("reason", "") for name, trial in found.items()}
    assert "model.encoder.name=vit_small_resnet26d_224" in reasons["raises"]
    assert "Diverged: train/loss is" in reasons["not_a_number"]
    assert reasons["memory"].startswith("out of memory")
    _, children = parent_and_children(outputs)
    told = {run["trial"]: (run["status"], run.get("trial_state")) for run in children}
    assert {name: told[str(trial.number)] for name, trial in found.items()} == {
        "good": ("FINISHED", "COMPLETE"),
        "raises": ("FAILED", None),
        "not_a_number": ("FAILED", None),
        "memory": ("FAILED", None),
        "pruned": ("FINISHED", "PRUNED"),
    }


def test_failures_in_a_row_stop_the_search_and_say_why(conf, tmp_path):
    outputs = tmp_path / "outputs"
    arguments = ["model.encoder.name=vit_small_resnet26d_224", "hydra.sweeper.max_failures=2"]
    done = search(conf, outputs, *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "The last 2 trials of quick failed" in line
    assert "vit_small_resnet26d_224" in line
    assert [verdict(t) for t in trials(outputs)] == ["failed", "failed"]
    parent, _ = parent_and_children(outputs)
    assert parent["status"] == "FAILED"


def test_winners_are_trained_again_and_their_curve_is_kept(conf, tmp_path):
    quick = conf / "search" / "quick.yaml"
    quick.write_text(
        quick.read_text()
        .replace("objective: val/loss", "objective: [parameters, val/loss]")
        .replace(
            "    n_trials: 4\n",
            "    n_trials: 4\n    direction: [minimize, minimize]\n"
            "    winners: {least: {where: {val/loss: 100}, least: parameters}}\n"
            "    confirm: [trainer.max_epochs=4]\n    report: {metric: train/loss}\n",
        )
    )
    outputs = tmp_path / "outputs"
    done = search(conf, outputs, "model.decoder.width=16,32", "model.decoder.heads=1,3")
    assert done.returncode == 0, done.stderr
    listed = trials(outputs)
    assert "impossible" in {verdict(t) for t in listed}
    assert all(t.params["model.decoder.heads"] == 1 for t in listed if counts(t)), (
        "3 divides neither"
    )
    least = min((t for t in listed if counts(t)), key=lambda t: t.values)
    (again,) = trials(outputs, f"quick.confirmed-{least.number}")
    assert sorted(again.intermediate_values) == [2, 4]
    parent, _ = parent_and_children(outputs)
    artifacts = outputs / "artifacts" / parent["run"] / "artifacts"
    told = json.loads((artifacts / "winners.json").read_text())["least"]
    assert told["trial"] == least.number
    assert told["confirmed"]["reported"] == {
        str(step): value for step, value in again.intermediate_values.items()
    }
    assert (artifacts / "plots" / "pareto_front.png").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["hydra.sweeper.n_trial=5"], "hydra.sweeper.n_trials"),
        (["hydra.sweeper.n_trials=lots"], "a whole number"),
        (["hydra/sweeper/sampler=tree"], "hydra/sweeper/sampler=tpe"),
        (["hydra/sweeper/pruner=median"], "hydra.sweeper.report.metric"),
        (["hydra.sweeper.sampler._target_=os.system"], "optuna.samplers"),
        (["hydra.sweeper.direction=[minimize,minimize]"], "hydra.sweeper.objective"),
        (["hydra.sweeper.storage=nonsense"], "journal:///"),
        (["+hydra.sweeper.sampler.colour=red"], "colour"),
        (["hydra.sweeper.constraints=['nowhere == 1']"], "cannot be computed"),
        (["search=smallest"], "search=smallest_model"),
        (["hydra/sweeper/sampler=grid"], "optimizer.lr has any number"),
    ],
)
def test_a_mistake_about_the_search_is_one_line_with_status_2(typed, said, conf, tmp_path):
    outputs = tmp_path / "outputs"
    done = search(conf, outputs, *typed)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert said in line


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_over_thirty_trials(conf, tmp_path):
    outputs = tmp_path / "outputs"
    done = search(conf, outputs, "hydra.sweeper.n_trials=32")
    assert done.returncode == 0, done.stderr
    held = [trial.user_attrs["result"]["memory_mib"]["host"] for trial in trials(outputs)]
    print([round(mib) for mib in held])  # noqa: T201
    early, late = sum(held[6:12]) / 6, sum(held[-6:]) / 6
    assert late - early < 20, "MiB"
