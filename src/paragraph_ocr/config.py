"""The shape of an experiment.

YAML holds values, these dataclasses hold the shape: Hydra merges the files of `conf/` into them, so
a misspelt key or a wrong type stops the run before anything is loaded. Only `validation.validate`
makes an `Experiment` out of the result. Units and meanings of the fields stand beside the values in
`conf/`.
"""

from dataclasses import dataclass, field
from typing import Any, Union

from omegaconf import MISSING

Number = Union[int, float]  # noqa: UP007  (OmegaConf needs the typing form; 1 stays an int)


@dataclass
class EncoderConfig:
    name: str = MISSING
    stage: int = MISSING
    horizontal_stride: int | None = None
    in_channels: int = 1
    pretrained: bool = False
    freeze: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class DecoderConfig:
    depth: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    feed_forward: int = MISSING
    norm: str = MISSING
    tied: bool = MISSING


@dataclass
class ModelConfig:
    """What every model has; a subclass says what it is made of."""

    weights: str | None = None


@dataclass
class TransformerModel(ModelConfig):
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass
class LineCnnModel(ModelConfig):
    """A CNN slid along a line."""

    window_width_px: int = MISSING
    window_stride_px: int = MISSING
    channels: int = MISSING
    width: int = MISSING
    loss: str = MISSING


@dataclass
class DataConfig:
    """What every data module has; a subclass says where its paragraphs come from."""

    name: str = MISSING
    root: str | None = None
    batch_size: int = MISSING
    num_workers: int = MISSING
    max_length: int = MISSING
    height: int = MISSING
    width: int = MISSING
    too_long: str = "error"
    normalise: bool = False
    placement: str = "disk"
    length_buckets: int = 0
    pad_to_multiple: int = 1


@dataclass
class GeneratedData(DataConfig):
    """Paragraphs made to measure: `datamodule=fake` draws noise, a subclass renders text."""

    min_lines: int = MISSING
    max_lines: int = MISSING
    min_characters: int = MISSING
    mean_characters: int = MISSING
    max_characters: int = MISSING
    num_train: int = MISSING
    num_val: int = MISSING
    num_test: int = MISSING


@dataclass
class RenderedData(GeneratedData):
    fonts: str | None = None
    held_out: list[str] = field(default_factory=list)
    texts: str | None = None
    random_share: float = MISSING
    test_random_share: float | None = None
    jitter: float = 0.0
    pressure: float = 0.0
    joined: float = 0.0
    word_slant_deg: float = 0.0
    crossed_out: float = 0.0
    baseline_wave: float = 0.0
    uneven_lines: float = 0.0
    mixed_faces: float = 0.0
    stretch: float = 0.0
    reach: float = 0.0
    spread: float = 0.0
    lean_deg: float = 0.0
    line_slope_deg: float = 0.0
    long_bars: float = 0.0
    underlined: float = 0.0
    cut_out: float = 0.0
    forms: float = 0.0


@dataclass
class EmnistData(DataConfig):
    """Characters of EMNIST, whose files lie below `root`."""

    num_train: int = MISSING
    num_val: int = MISSING
    num_test: int = MISSING


@dataclass
class EmnistLinesData(EmnistData):
    texts: str | None = None
    min_characters: int = MISSING
    max_characters: int = MISSING
    min_overlap: float = MISSING
    max_overlap: float = MISSING


@dataclass
class FolderData(DataConfig):
    """The user's own images and transcriptions, below `root`."""

    split: str = MISSING


@dataclass
class IamData(DataConfig):
    """The IAM handwriting database, below `root`; a subclass says what is cut out of it."""

    split: str = MISSING


@dataclass
class IamLinesData(IamData):
    pass


@dataclass
class IamParagraphsData(IamData):
    pass


@dataclass
class IamStackedData(IamParagraphsData):
    """Training paragraphs stacked anew in every epoch from training lines, with the real ones or without."""

    dataset_len: int = MISSING
    max_lines: int = MISSING
    originals: bool = MISSING


@dataclass
class VocabularyConfig:
    """`characters` is null until the data has been seen, if `from_data`."""

    characters: str | None = MISSING
    from_data: bool = False
    fold: bool = False
    unknown: str = "error"
    replacement: str = "?"


@dataclass
class AugmentationConfig:
    rotation_deg: float = 0.0
    shear_deg: float = 0.0
    scale: float = 0.0
    perspective: float = 0.0
    translation_px: float = 0.0
    elastic_px: float = 0.0
    tremor_px: float = 0.0
    pen_px: float = 0.0
    blur_px: float = 0.0
    ink: float = 0.0
    paper: float = 0.0
    noise: float = 0.0
    neighbours_px: float = 0.0
    rules: float = 0.0
    threshold: float = 0.0
    show_through: float = 0.0
    stains: float = 0.0
    coarse_px: float = 0.0
    specks: float = 0.0
    jpeg: float = 0.0


@dataclass
class RegularizationConfig:
    dropout: float = MISSING
    weight_decay: float = MISSING
    label_smoothing: float = MISSING
    gradient_clip: float = MISSING
    token_noise: float = MISSING
    guidance: float = 0.0
    ema: float = 0.0
    augment_on: str = "device"
    calm_after: float = 1.0
    calm: float = 0.4
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class OptimizerConfig:
    name: str = MISSING
    lr: float = MISSING
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    name: str = MISSING
    warmup_steps: int = 0
    decay_share: float = 1.0
    final_factor: float = 1.0


PAGES = "pages"
"""What a curriculum calls the data module's own training paragraphs."""


@dataclass
class StageConfig:
    """A stage of a curriculum: shares of its corpora, and when it is over."""

    corpora: dict[str, float] = MISSING
    batch_size: int = MISSING
    below: float | None = None
    max_steps: int | None = None


@dataclass
class CurriculumConfig:
    """Without stages, training takes the data module's pages from its first step to its last."""

    name: str = "none"
    look_every: int = 50
    replay: float = 0.0
    wait: bool = True
    corpora: dict[str, DataConfig] = field(default_factory=dict)
    stages: list[StageConfig] = field(default_factory=list)


@dataclass
class EarlyStoppingConfig:
    patience: int | None = None
    min_delta: float = 0.0
    when_read: bool = True


@dataclass
class CheckpointConfig:
    every_s: float | None = 60.0
    every_n_steps: int | None = None
    keep: int = 2


@dataclass
class TrainerConfig:
    """Lightning's Trainer by its own names, and what is ours: compile, cuda_graphs, on_nan, checkpoint,
    early_stopping.
    """

    accelerator: str = MISSING
    devices: Union[int, str] = MISSING  # noqa: UP007
    strategy: str = MISSING
    precision: str = MISSING
    max_epochs: int | None = None
    max_steps: int = -1
    max_time: str | None = None
    overfit_batches: Number = 0
    limit_train_batches: Number = 1.0
    limit_val_batches: Number = 1.0
    limit_test_batches: Number = 1.0
    accumulate_grad_batches: int = 1
    val_check_interval: Number = 1.0
    check_val_every_n_epoch: int | None = None
    log_every_n_steps: int = 10
    fast_dev_run: Union[bool, int] = False  # noqa: UP007
    deterministic: bool = False
    profiler: str | None = None
    compile: bool = False
    cuda_graphs: bool = True
    on_nan: str = "stop"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)


@dataclass
class DecodingConfig:
    name: str = MISSING
    beam_width: int = 1
    length_penalty: float = 0.0
    max_loss: float | None = None
    # four and two numbers each, which checks/ looks at: OmegaConf takes no 1 for a float in a list of lists
    views: list[Any] = field(default_factory=list)
    enough: list[Any] = field(default_factory=list)
    lexicon: str | None = None
    heights: list[int] = field(default_factory=list)

    @property
    def readings(self) -> str:
        """How many readings vote for a page's text: "10", or "2 to 10"; "" where there is no vote."""
        most = str(len(self.views)) if self.views else ""
        return f"{self.enough[0][0]} to {most}" if self.enough else most


@dataclass
class TrackingConfig:
    name: str = MISSING
    experiment_name: str = "paragraph_ocr"
    uri: str | None = None
    system_metrics: bool = True
    num_samples: int = 16
    log_model: bool = False
    register: str | None = None


@dataclass
class Experiment:
    seed: int = MISSING
    name: str | None = None
    outputs: str = MISSING
    trial: int | None = None
    resume: str | None = None
    release: bool = False
    model: ModelConfig = MISSING
    datamodule: DataConfig = MISSING
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    # a node that holds `int | float` cannot be MISSING: every compose would die of an assertion
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class ReportConfig:
    metric: str | None = None
    every: str = "epoch"


@dataclass
class WinnerConfig:
    where: dict[str, float] = field(default_factory=dict)
    least: str = MISSING


@dataclass
class StudyConfig:
    """The options of `hydra/sweeper=study`; those of Hydra's own Optuna sweeper keep their names."""

    _target_: str = "hydra_plugins.paragraph_ocr_sweeper.StudySweeper"
    study_name: str = MISSING
    storage: str | None = None
    objective: Any = MISSING
    direction: Any = MISSING
    n_trials: int = MISSING
    n_jobs: int = 1
    timeout: float | None = None
    gpus: list[int] | None = None
    max_failures: int = 5
    params: dict[str, Any] = field(default_factory=dict)
    when: dict[str, str] = field(default_factory=dict)
    constraints: list[str] = field(default_factory=list)
    sampler: dict[str, Any] = field(default_factory=dict)
    pruner: dict[str, Any] = field(default_factory=dict)
    report: ReportConfig = field(default_factory=ReportConfig)
    winners: dict[str, WinnerConfig] = field(default_factory=dict)
    confirm: list[str] = field(default_factory=list)
    _recursive_: bool = False  # sampler and pruner are made anew for each trial


SCHEMAS: dict[str, type[DataConfig] | type[ModelConfig]] = {
    "generated": GeneratedData,
    "rendered": RenderedData,
    "folder": FolderData,
    "iam_lines": IamLinesData,
    "iam_paragraphs": IamParagraphsData,
    "iam_stacked": IamStackedData,
    "emnist": EmnistData,
    "emnist_lines": EmnistLinesData,
    "transformer": TransformerModel,
    "line_cnn": LineCnnModel,
}
"""Node types that a datamodule's or model's YAML names in its defaults list, as /schema/<name>."""


def register_schema() -> None:
    """Make the dataclasses known to Hydra: `schema` for the root, `schema/...` for its kinds of nodes."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Experiment)
    store.store(group="hydra/sweeper/schema", name="study", node=StudyConfig)
    for name, node in SCHEMAS.items():
        store.store(group="schema", name=name, node=node)
