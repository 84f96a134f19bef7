import pytest

from paragraph_ocr.errors import UserError
from paragraph_ocr.validation import CONF, compose, validate

CHOICES = [
    (folder.relative_to(CONF).as_posix(), file.stem)
    for folder in sorted(path for path in CONF.rglob("*") if path.is_dir())
    for file in sorted(folder.glob("*.yaml"))
]
NEEDS_A_GPU = {("trainer", "gpu")}


@pytest.mark.parametrize(("group", "choice"), [c for c in CHOICES if c not in NEEDS_A_GPU])
def test_every_file_of_conf_composes_and_validates(group, choice):
    needed = ["datamodule.root=tests"] if choice.startswith(("folder", "iam_")) else []
    if group.startswith("hydra/sweeper/"):
        needed = ["hydra/sweeper=study"]
    assert validate(compose([*needed, f"{group}={choice}"])).seed == 0


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
        ("datamodule=folder", "datamodule.root=<folder"),
        ("datamodule=iam_paragraphs", "datamodule.root=<folder of IAM's archives>"),
        ("datamodule.too_long=drop", "error, skip"),
        ("datamodule.root=tests", "Pass datamodule=folder|pass datamodule=folder"),
        ("model.encoder.extra.foo=1", r"\+model.encoder.extra.foo=1"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(typed, said):
    with pytest.raises(UserError, match=said) as refusal:
        validate(compose([typed]))
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
