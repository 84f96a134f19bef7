"""What a trial leaves behind in its process."""

import gc

from omegaconf import OmegaConf

from paragraph_ocr import console
from paragraph_ocr.config import StudyConfig
from paragraph_ocr.learning.learner import Learner
from paragraph_ocr.search import trial
from paragraph_ocr.validation import compose, validate


def learners():
    gc.collect()
    return sum(isinstance(found, Learner) for found in gc.get_objects())


def test_no_learner_is_alive_when_a_trial_gives_its_memory_back(tmp_path, monkeypatch):
    monkeypatch.setattr(console.console, "quiet", console.console.quiet)  # which a trial sets
    monkeypatch.setattr(trial, "_set_aside_what_stays", lambda: None)
    experiment = validate(
        compose(["model=tiny", "datamodule=fake", "debug=ci", "trainer=cpu", f"outputs={tmp_path}"])
    )
    experiment.trial = 0
    before = learners()
    monkeypatch.setattr(trial, "_memory_mib", lambda: {"learners": learners() - before})
    study = StudyConfig(study_name="one", objective="val/cer", direction="minimize", n_trials=1)
    result = trial.run_trial(experiment, OmegaConf.structured(study))
    assert result["metrics"]
    assert result["memory_mib"] == {"learners": 0}
