"""What this machine must have for a trainer: processes, a device, its precision."""

from paragraph_ocr.config import Experiment, TrainerConfig
from paragraph_ocr.errors import UserError


def check_devices(experiment: Experiment) -> None:
    """Check that the devices asked for are here, and can do what is asked of them."""
    trainer = experiment.trainer
    devices = trainer.devices
    if devices != "auto" and not (
        str(devices).lstrip("-").isdecimal() and int(devices) in {-1, *range(1, 4097)}
    ):
        raise UserError(
            f"trainer.devices={devices} must be a number of devices, or auto for all. "
            "Pass trainer.devices=1."
        )
    _check_processes(experiment)
    _check_device(trainer)
    if experiment.datamodule.placement == "gpu":
        _check_gpu(trainer)


def _check_processes(experiment: Experiment) -> None:
    """Check that what is for one process is not asked of several."""
    trainer = experiment.trainer
    if str(trainer.devices) == "1":
        return
    if trainer.overfit_batches:
        raise UserError(
            f"trainer.overfit_batches={trainer.overfit_batches} is for one process, and trainer.devices="
            f"{trainer.devices}. Pass trainer.devices=1."
        )
    if experiment.trial is not None:
        raise UserError(
            f"trainer.devices={trainer.devices} does not go with a search, which trains a trial on one "
            "device. Pass trainer.devices=1, and hydra.sweeper.gpus and n_jobs for several at once."
        )


def _check_device(trainer: TrainerConfig) -> None:
    """Check that the device is there and can compute in the precision asked for.

    Asks torch, and so imports it, only if the answer depends on the machine.
    """
    half = trainer.precision.startswith(("16", "bf16"))
    if trainer.accelerator == "cpu":
        if trainer.precision.startswith("16"):
            raise UserError(
                f"trainer.precision={trainer.precision} needs a GPU, and trainer.accelerator=cpu. "
                "Pass trainer.precision=32-true, or bf16-mixed."
            )
        return
    if trainer.accelerator == "auto" and not half:
        return
    import torch

    if not torch.cuda.is_available():
        if trainer.accelerator != "auto":
            raise UserError(
                f"trainer.accelerator={trainer.accelerator} needs a GPU, and torch finds none here. "
                "Pass trainer=cpu, or trainer=auto."
            )
        if trainer.precision.startswith("16"):
            raise UserError(
                f"trainer.precision={trainer.precision} needs a GPU, and torch finds none here. "
                "Pass trainer.precision=auto."
            )
    elif trainer.precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"trainer.precision={trainer.precision} is not supported by this GPU. "
            "Pass trainer.precision=16-mixed."
        )


def _check_gpu(trainer: TrainerConfig) -> None:
    """Check that there is a card to keep pages on; as `_check_device`, asks torch only if it must."""
    here = "trainer.accelerator=cpu" if trainer.accelerator == "cpu" else None
    if here is None:
        import torch

        here = None if torch.cuda.is_available() else "torch finds none here"
    if here is not None:
        raise UserError(
            f"datamodule.placement=gpu needs a GPU, and {here}. Pass datamodule.placement=host."
        )
