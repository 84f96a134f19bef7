"""Which values each key may hold by itself."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from paragraph_ocr.errors import UserError, nearest

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.decoder.norm": ("pre", "post"),
    "optimizer.name": ("adamw", "adam", "sgd", "muon"),
    "schedule.name": ("constant", "cosine", "one_cycle", "warmup_stable_decay"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda"),
    "trainer.precision": ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"),
    "trainer.strategy": ("auto", "ddp"),
    "trainer.on_nan": ("stop", "skip", "rollback"),
    "trainer.profiler": ("simple", "advanced", "pytorch"),
    "decoding.name": ("greedy", "vote", "beam"),
    "model.loss": ("windows", "ctc"),
    "regularization.augment_on": ("device", "workers"),
    "vocabulary.unknown": ("error", "drop", "replace"),
    "datamodule.too_long": ("error", "skip"),
    "datamodule.placement": ("disk", "host", "gpu"),
    "tracking.name": ("mlflow", "off"),
}

_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "model.encoder.stage": (0, 4),
    "model.decoder.depth": (1, 100),
    "model.decoder.width": (4, 65536),
    "model.decoder.heads": (1, 1024),
    "model.decoder.feed_forward": (1, 1_000_000),
    "model.window_width_px": (2, 10_000),
    "model.window_stride_px": (2, 10_000),
    "model.channels": (1, 10_000),
    "model.width": (1, 1_000_000),
    "datamodule.batch_size": (1, 1_000_000),
    "datamodule.num_workers": (0, 1024),
    "datamodule.max_length": (3, 100_000),
    "datamodule.length_buckets": (0, 100_000),
    "datamodule.pad_to_multiple": (1, 100_000),
    "datamodule.height": (32, 10_000),
    "datamodule.width": (32, 10_000),
    "datamodule.min_lines": (1, 1000),
    "datamodule.min_characters": (1, 100_000),
    "datamodule.max_lines": (1, 1000),
    "datamodule.dataset_len": (1, 100_000_000),
    "datamodule.num_train": (1, 100_000_000),
    "datamodule.num_val": (1, 100_000_000),
    "datamodule.num_test": (1, 100_000_000),
    "datamodule.random_share": (0, 1),
    "datamodule.test_random_share": (0, 1),
    "datamodule.jitter": (0, 2),
    "datamodule.pressure": (0, 1),
    "datamodule.joined": (0, 1),
    "datamodule.word_slant_deg": (0, 20),
    "datamodule.crossed_out": (0, 1),
    "datamodule.baseline_wave": (0, 1),
    "datamodule.uneven_lines": (0, 1),
    "datamodule.mixed_faces": (0, 1),
    "datamodule.stretch": (0, 1),
    "datamodule.reach": (0, 1),
    "datamodule.spread": (0, 1),
    "datamodule.lean_deg": (0, 45),
    "datamodule.line_slope_deg": (0, 5),
    "datamodule.long_bars": (0, 5),
    "datamodule.underlined": (0, 1),
    "datamodule.cut_out": (0, 1),
    "datamodule.forms": (0, 0.5),
    "datamodule.min_overlap": (0, 0.9),
    "datamodule.max_overlap": (0, 0.9),
    "regularization.dropout": (0, 0.99),
    "regularization.weight_decay": (0, 10),
    "regularization.label_smoothing": (0, 0.99),
    "regularization.gradient_clip": (0, 1e9),
    "regularization.token_noise": (0, 0.99),
    "regularization.guidance": (0, 100),
    "regularization.ema": (0, 0.999999),
    "regularization.calm_after": (0, 1),
    "regularization.calm": (0, 1),
    "regularization.augmentation.rotation_deg": (0, 45),
    "regularization.augmentation.shear_deg": (0, 60),
    "regularization.augmentation.scale": (0, 0.9),
    "regularization.augmentation.perspective": (0, 0.3),
    "regularization.augmentation.translation_px": (0, 1000),
    "regularization.augmentation.elastic_px": (0, 100),
    "regularization.augmentation.tremor_px": (0, 100),
    "regularization.augmentation.pen_px": (0, 20),
    "regularization.augmentation.blur_px": (0, 20),
    "regularization.augmentation.ink": (0, 1),
    "regularization.augmentation.paper": (0, 1),
    "regularization.augmentation.noise": (0, 1),
    "regularization.augmentation.neighbours_px": (0, 200),
    "regularization.augmentation.rules": (0, 1),
    "regularization.augmentation.threshold": (0, 1),
    "regularization.augmentation.show_through": (0, 1),
    "regularization.augmentation.stains": (0, 1),
    "regularization.augmentation.coarse_px": (0, 8),
    "regularization.augmentation.specks": (0, 0.1),
    "regularization.augmentation.jpeg": (0, 1),
    "optimizer.lr": (0, 100),
    "schedule.warmup_steps": (0, 10_000_000),
    "schedule.final_factor": (0, 1),
    "schedule.decay_share": (0, 1),
    "curriculum.look_every": (1, 1_000_000),
    "curriculum.replay": (0, 0.9),
    "trainer.overfit_batches": (0, 1e9),
    "trainer.accumulate_grad_batches": (1, 1_000_000),
    "trainer.checkpoint.every_s": (0, 1e9),
    "trainer.checkpoint.every_n_steps": (1, 1_000_000_000),
    "trainer.checkpoint.keep": (1, 1000),
    "decoding.beam_width": (1, 1000),
    "tracking.num_samples": (0, 1000),
}


def check_values(composed: DictConfig) -> None:
    """Check each value alone, against its choices or its range."""
    _check_values(composed, "")
    for name in composed.curriculum.corpora:  # each is a data module
        _check_values(composed, f"curriculum.corpora.{name}", instead_of="datamodule")


def _check_values(composed: DictConfig, path: str, *, instead_of: str = "") -> None:
    """Check what lies below a path against the rules for what lies below another."""
    for key, choices in _CHOICES.items():
        if key.startswith(instead_of):
            place = path + key.removeprefix(instead_of)
            check_choice(place, OmegaConf.select(composed, place), choices)
    for key, (low, high) in _RANGES.items():
        if not key.startswith(instead_of):
            continue
        place = path + key.removeprefix(instead_of)
        value = OmegaConf.select(composed, place)
        if value is not None and not low <= value <= high:
            raise UserError(
                f"{place}={value} must lie in {low:.10g} to {high:.10g}. Pass {place}=<number>."
            )


def check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        close = nearest(str(value), choices, count=1)
        raise UserError(
            f"{key}={value} is not one of {', '.join(choices)}. "
            f"Pass {key}={close[0] if close else '<one of these>'}."
        )
