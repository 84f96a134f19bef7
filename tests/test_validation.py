import pytest

from paragraph_ocr.errors import UserError
from paragraph_ocr.help import CONF
from paragraph_ocr.validation import compose, overridden, validate
from small_curriculum import INSTALLED, RECIPES

CHOICES = [
    (folder.relative_to(CONF).as_posix(), file.stem)
    for folder in sorted(path for path in CONF.rglob("*") if path.is_dir())
    for file in sorted(folder.glob("*.yaml"))
]
NEEDS_A_GPU = {("trainer", "gpu")}
NEEDED = {
    **{key: ["datamodule.root=tests"] for key in ("folder", "emnist", "emnist_lines")},
    **{path.stem: ["datamodule.root=tests"] for path in (CONF / "datamodule").glob("iam_*.yaml")},
    "line_cnn": ["datamodule=synthetic_lines"],
    "lines_to_page": ["datamodule=synthetic_paragraphs"],
    "synthetic_letters": INSTALLED,
    **RECIPES,
}
"""What a choice needs of its user."""


@pytest.mark.parametrize(("group", "choice"), [c for c in CHOICES if c not in NEEDS_A_GPU])
def test_every_file_of_conf_composes_and_validates(group, choice):
    needed = NEEDED.get(choice, [])
    if group.startswith("hydra/sweeper/"):
        needed = ["hydra/sweeper=study"]
    # the choice first: what it needs may change keys that only it brings
    assert validate(compose([f"{group}={choice}", *needed])).seed == 0


@pytest.mark.parametrize(
    ("typed", "kind"), [("1", int), ("1.0", float), ("0.5", float), ("0", int)]
)
def test_a_number_of_batches_stays_a_number_and_a_share_a_share(typed, kind):
    experiment = validate(compose([f"trainer.overfit_batches={typed}"]))
    assert type(experiment.trainer.overfit_batches) is kind


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("model=smal", "Pass model=small"),
        ("modle=small", "nearest: model"),
        ("model/encoder=resnet19", "Pass model/encoder=resnet18"),
        ("model.encoder=resnet18", "model/encoder=<choice>"),
        ("trainer.max_epoch=3", "trainer.max_epochs"),
        ("++trainer.max_epoch=3", "trainer.max_epochs"),
        ("+model.lrr=1", "optimizer.lr"),
        ("batch_size=3", "datamodule.batch_size"),
        ("datamodule.batch_size=lots", "a whole number"),
        ("datamodule.batch_size=0", "must lie in"),
        ("trainer.overfit_batches=abc", "1 is one batch"),
        ("trainer.overfit_batches=1.5", "overfit_batches=1"),
        ("optimizer.lr=fast", "a number"),
        ("optimizer.lr=0", "learns nothing"),
        ("seed=-1", "must lie in"),
        ("seed", "key=value"),
        ("a b=", "key=value"),
        ("experiment=nope", "overfit_batch"),
        ("~model", "has no value"),
        ("model.decoder.norm=middle", "pre, post"),
        ("model.decoder.heads=3", "not divisible"),
        ("datamodule.max_length=100", "too short"),
        ("datamodule.min_lines=20", "above"),
        ("datamodule.mean_characters=999", "must lie between"),
        ("model.weights=nowhere", "does not exist"),
        ("datamodule.fonts=nowhere", "is not a folder"),
        ("decoding.beam_width=4", "Pass decoding=beam"),
        ("decoding.views=[[1,1,0,0]]", "Pass decoding=vote"),
        ("decoding.lexicon=en", "Pass decoding=vote"),
        ("decoding.enough=[[2,0.1]]", "Pass decoding=vote"),
        ("datamodule=folder", "datamodule.root=<folder"),
        ("datamodule=iam_paragraphs", "datamodule.root=<folder of IAM's archives>"),
        ("datamodule.too_long=drop", "error, skip"),
        ("datamodule.placement=card", "disk, host, gpu"),
        ("datamodule=emnist_lines", "datamodule.root=<folder of EMNIST's files"),
        ("model=line_cnn", "Pass datamodule=synthetic_lines"),
        ("model.loss=ctc", "does not belong to this model"),
        ("regularization.augmentation.perspective=0.5", "must lie in 0 to 0.3"),
        ("regularization.augment_on=gpu", "device, workers"),
        ("vocabulary.characters=null", "Pass vocabulary=from_data"),
        ("vocabulary.unknown=replac", "Pass vocabulary.unknown=replace"),
        ("datamodule.root=tests", "Pass datamodule=folder|pass datamodule=folder"),
        ("model.encoder.extra.foo=1", r"\+model.encoder.extra.foo=1"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(typed, said):
    refuse([typed], said)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("model=line_cnn datamodule=synthetic_lines decoding=beam", "Pass decoding=greedy"),
        (
            "model=line_cnn datamodule=synthetic_lines regularization.guidance=1",
            "Pass regularization.guidance=0",
        ),
        (
            "model=line_cnn datamodule=synthetic_lines model.encoder.stage=3",
            "not belong to this model",
        ),
        (
            "model=line_cnn datamodule=synthetic_lines model/encoder=resnet34",
            "is no part of the chosen",
        ),
        ("model=line_cnn datamodule=synthetic_lines model.loss=ctd", "Pass model.loss=ctc"),
        (
            "model=line_cnn datamodule=synthetic_lines model.window_stride_px=7",
            "Pass model.window_stride_px=8",
        ),
        ("vocabulary.unknown=replace vocabulary.replacement=ab", "must be a single character"),
        ("vocabulary.unknown=replace vocabulary.replacement=_", "is not in vocabulary.characters"),
        ("datamodule=emnist_lines datamodule.min_overlap=0.5", "is above datamodule.max_overlap"),
        ("datamodule=emnist_lines datamodule.max_overlap=1", "must lie in 0 to 0.9"),
        (
            "datamodule=emnist_lines datamodule.max_characters=40",
            "datamodule.max_length=42 or more",
        ),
        ("datamodule=emnist_lines datamodule.min_characters=32", "must be below"),
        (
            "datamodule.placement=host regularization.augment_on=workers",
            "Pass regularization.augment_on=device",
        ),
        (
            "datamodule=iam_synthetic_paragraphs datamodule.root=tests datamodule.placement=host",
            "Pass datamodule.placement=disk",
        ),
        (
            "datamodule=iam_synthetic_paragraphs datamodule.root=tests datamodule.length_buckets=8",
            "Pass datamodule.length_buckets=0",
        ),
        ("datamodule.pad_to_multiple=0", "must lie in 1"),
        (
            "trainer=cpu datamodule.placement=gpu",
            "^datamodule.placement=gpu needs a GPU, and trainer.accelerator=cpu. Pass .*=host",
        ),
        ("decoding=vote decoding.views=[]", "Pass decoding=greedy"),
        ("decoding=vote decoding.views=[[1,1,0,0],[0.9,0]]", r"decoding.views has \[0.9, 0\]"),
        ("decoding=vote decoding.views=[[3,1,0,0]]", r"decoding.views has \[3, 1, 0, 0\]"),
        ("decoding=vote decoding.views=[[1,1,80,0]]", "a lean of at most 60"),
        ("decoding=vote decoding.views=[1,1,0,0]", "decoding.views has 1,"),
        ("decoding.heights=[96,96]", "must be pixels that rise"),
        ("decoding.heights=[0]", "must be pixels that rise"),
        ("decoding=vote decoding.enough=[2]", "decoding.enough has 2,"),
        ("decoding=vote decoding.enough=[[2,2]]", r"decoding.enough has \[2, 2\]"),
        ("decoding=vote decoding.enough=[[1,0.1]]", "from 2 to fewer than the 10 views"),
        ("decoding=vote decoding.enough=[[10,0.1]]", "from 2 to fewer than the 10 views"),
        ("decoding=vote decoding.enough=[[4,0.2],[6,0.1]]", r"decoding.enough has \[6, 0.1\]"),
        ("decoding=vote decoding.enough=[[4,0.1],[4,0.2]]", r"decoding.enough has \[4, 0.2\]"),
        ("decoding=vote decoding.enough=[[2.5,0.1]]", r"decoding.enough has \[2.5, 0.1\]"),
        ("decoding=vote decoding.enough=[[2,true]]", r"decoding.enough has \[2, True\]"),
        ("regularization.calm_after=0.5 trainer.max_epochs=-1", "Pass trainer.max_time"),
        ("regularization.calm_after=0.5 regularization.augment_on=workers", "augment_on=device"),
        ("tracking.register=notes", "tracking.log_model=true"),
        ("tracking=off tracking.log_model=true", "tracking=mlflow"),
        ("tracking.log_model=true tracking.register=a/b", "letters, digits"),
    ],
)
def test_what_does_not_go_together_is_one_line_with_the_remedy(typed, said):
    refuse(typed.split(" "), said)


def refuse(overrides, said):
    with pytest.raises(UserError, match=said) as refusal:
        validate(compose(overrides))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["datamodule=iam_lines", "datamodule.split=auto"], "reference, independent, aachen"),
        (["datamodule=folder", "datamodule.split=aachen"], "auto, train, val, test"),
        (["datamodule=iam_lines", "datamodule.dataset_len=3"], "does not belong"),
        (["datamodule=iam_synthetic_paragraphs", "datamodule.dataset_len=0"], "must lie in"),
        (["datamodule=iam_paragraphs", "datamodule.root=nowhere"], "is not a folder"),
    ],
)
def test_each_data_module_has_choices_of_its_own(typed, said):
    with pytest.raises(UserError, match=said) as refusal:
        validate(compose(["datamodule.root=tests", *typed]))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["fonts", "texts"])
def test_what_is_not_fetched_yet_is_told_with_the_command(monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    refuse([f"datamodule.{kind}=outputs/{kind}"], f"Type `python scripts/fetch.py {kind}`")


def test_pages_on_a_card_need_a_card(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse(
        ["datamodule.placement=gpu"], "^datamodule.placement=gpu needs a GPU, and torch finds none"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert validate(compose(["datamodule.placement=gpu"])).datamodule.placement == "gpu"


def test_a_model_that_was_trained_from_a_card_reads_without_one():
    trained = validate(compose(["trainer=cpu"]))
    trained.datamodule.placement = "gpu"
    assert overridden(trained, []).datamodule.placement == "disk"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("curriculum.corpora.one_line.num_train=0", "curriculum.corpora.one_line.num_train=0 must lie in"),
        ("curriculum.corpora.one_line.min_lines=7", "is above curriculum.corpora.one_line.max_lines=1"),
        ("curriculum.corpora.one_line.fonts=nowhere", "curriculum.corpora.one_line.fonts=nowhere is not a"),
        ("curriculum.corpora.seven_lines.max_length=700", "which the model is built for"),
        ("curriculum.corpora.one_line.colour=3", "curriculum.corpora.one_line.colour=3 is not a key"),
        ("curriculum.stages=[{corpora:{none:1},batch_size:3}]", "is not one of pages, one_line"),
        ("curriculum.stages=[{corpora:{pages:0},batch_size:3}]", "must be above 0"),
        ("curriculum.stages=[{corpora:{pages:1},batch_size:0}]", "a batch_size of 1 or more"),
        ("curriculum.stages=[{corpora:{pages:1},batch_size:3,below:1}]", "ends with the training"),
        (
            "curriculum.stages=[{corpora:{pages:1},batch_size:3},{corpora:{pages:1},batch_size:3}]",
            "stages[0] never ends",
        ),
        ("trainer.overfit_batches=1", "Pass curriculum=none"),
        ("trainer.devices=2", "Pass trainer.devices=1"),
        ("curriculum.replay=1", "curriculum.replay=1.0 must lie in"),
    ],
)  # fmt: skip
def test_a_curriculum_that_cannot_be_is_refused_by_name(typed, said):
    with pytest.raises(UserError) as refused:
        validate(compose(["curriculum=lines_to_page", "datamodule=synthetic_paragraphs", typed]))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        (["schedule=cosine", "trainer.max_epochs=-1"], "trainer.max_time"),
        (["schedule=warmup_stable_decay", "trainer.max_epochs=-1"], "trainer.max_time"),
        (["schedule=one_cycle", "trainer.max_epochs=-1"], "trainer.max_steps"),
        (["schedule=one_cycle", "trainer.max_time=00:00:01:00"], "trainer.max_steps"),
        (["schedule=cosine", "trainer.max_time=00:00:01:00"], None),
        (["schedule=constant", "trainer.max_epochs=-1"], None),
        (["schedule=one_cycle", "trainer.max_epochs=-1", "trainer.max_steps=9"], None),
        (["schedule=one_cycle", "trainer.max_time=00:00:01:00", "trainer.max_epochs=3"], None),
    ],
)
def test_a_schedule_that_ends_must_know_when(typed, remedy):
    if remedy is None:
        validate(compose(typed))
        return
    with pytest.raises(UserError, match=f"needs to know when training ends. Pass {remedy}="):
        validate(compose(typed))
