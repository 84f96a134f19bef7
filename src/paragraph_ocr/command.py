"""What `train.py` does with a command that is typed: compose, validate, run."""

import os
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from paragraph_ocr import console, timeline
from paragraph_ocr.config import register_schema
from paragraph_ocr.errors import Stopped, UserError
from paragraph_ocr.help import CONF
from paragraph_ocr.targets import guard_hydra
from paragraph_ocr.validation import explain, is_refusal, validate

os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of being printed by Hydra
register_schema()
guard_hydra()


@hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")
def train(composed: DictConfig) -> Any:
    """Run what Hydra composed, and return what a sweep compares: a figure, or a trial's measurements."""
    if composed.get("trial") is not None:  # its mistakes are the study's to record
        experiment = validate(composed)
        from paragraph_ocr.search.trial import run_trial

        return run_trial(experiment, HydraConfig.get().sweeper)
    try:
        experiment = validate(composed)
        if HydraConfig.get().mode == RunMode.MULTIRUN and experiment.trainer.devices != 1:
            raise UserError(  # each process would start the sweep again
                f"trainer.devices={experiment.trainer.devices} does not go with -m. Pass "
                "trainer.devices=1, or leave out -m."
            )
        timeline.mark("composed")
        # torch, Lightning and MLflow take seconds to import: not before the config is known to be good
        from paragraph_ocr.run import run

        timeline.mark("imported")
        outcome = run(experiment, overrides=list(HydraConfig.get().overrides.task))
    except UserError as error:
        sys.exit(_refuse(error))  # raised further, Hydra would print the overrides before it
    except Stopped as stopped:
        sys.exit(_refuse(stopped, status=1))
    return outcome.metrics.get("val/cer", float("nan"))


def run_typed() -> int:
    """Do what the command line says, and return its exit status."""
    try:
        train()
    except UserError as error:
        return _refuse(error)
    except Stopped as stopped:
        return _refuse(stopped, status=1)
    except KeyboardInterrupt:
        return 1
    except Exception as error:
        if not is_refusal(error):
            raise
        return _refuse(explain(error))
    return 0


def _refuse(error: Exception, *, status: int = 2) -> int:
    console.error(str(error))
    return status
