"""The config in a run folder: written, read back equal, and never trusted."""

import pytest
import yaml

from paragraph_ocr.errors import UserError
from paragraph_ocr.help import CONF
from paragraph_ocr.stored import CONFIG, read_config, write_config
from paragraph_ocr.validation import compose, validate
from small_curriculum import INSTALLED

DATA = sorted(path.stem for path in (CONF / "datamodule").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def experiment(*overrides):
    return validate(compose(list(overrides)))


def changed(folder, change):
    """Write a good config with one change made to it, and return its folder."""
    write_config(experiment(), folder)
    tree = yaml.safe_load((folder / CONFIG).read_text())
    change(tree)
    (folder / CONFIG).write_text(yaml.safe_dump(tree))
    return folder


@pytest.mark.parametrize("choice", [f"model={m}" for m in MODELS])
def test_every_model_comes_back_as_it_was_written(choice, tmp_path):
    line = ["datamodule=synthetic_lines"] if "line_cnn" in choice else []
    written = experiment(choice, *line, "+optimizer.extra={momentum: 0.9}")
    write_config(written, tmp_path)
    read = read_config(tmp_path)
    assert read == written
    assert type(read.model) is type(written.model)


@pytest.mark.parametrize("name", DATA)
def test_every_data_module_comes_back_as_it_was_written(name, tmp_path):
    needed = [f"datamodule.root={tmp_path}"] if needs_root(name) else []
    written = experiment(
        f"datamodule={name}", *needed, *(INSTALLED if name == "synthetic_letters" else [])
    )
    write_config(written, tmp_path)
    read = read_config(tmp_path / CONFIG)
    assert read == written
    assert type(read.datamodule) is type(written.datamodule)


def needs_root(name):
    return name.startswith(("iam", "emnist", "folder"))


def test_paths_of_another_machine_are_no_matter(tmp_path):
    folder = changed(tmp_path, lambda tree: tree["model"].update(weights="/nowhere/best"))
    assert read_config(folder).model.weights == "/nowhere/best"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("schema"), "schema"),
        (lambda t: t["schema"].update(model="os.system"), "schema"),
        (lambda t: t.update(_target_="os.system"), "_target_"),
        (lambda t: t["model"].update(_target_="os.system"), "model._target_"),
        (lambda t: t["model"]["encoder"].update(hub="x"), "model.encoder.hub"),
        (lambda t: t["trainer"].pop("accelerator"), "trainer.accelerator"),
        (lambda t: t["model"]["decoder"].update(depth="deep"), "depth"),
        (lambda t: t["model"]["decoder"].update(depth=10**9), "model.decoder.depth"),
        (lambda t: t.update(name="${oc.env:HOME}"), "interpolation"),
        (lambda t: t["optimizer"]["extra"].update(a=["${oc.env:HOME}"]), "interpolation"),
        (lambda t: t.update(model="small"), "model must be a mapping"),
        (lambda t: t.update(seed=None), "seed"),
    ],
)
def test_a_changed_config_is_refused_in_one_line(change, said, tmp_path):
    with pytest.raises(UserError, match=said) as refused:
        read_config(changed(tmp_path, change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "a: [",
        "!!python/object/apply:os.system ['true']",
        "a: &a [x]\nb: [*a, *a]",
        "[" * 5000,
        "\x00",
        "x" * 2_000_000,
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(text, tmp_path):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError) as refused:
        read_config(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="run folder"):
        read_config(tmp_path)


def test_a_curriculum_comes_back_as_it_was_written(tmp_path):
    written = experiment(
        "curriculum=lines_to_page", "datamodule=synthetic_paragraphs",
        "+datamodule@curriculum.corpora.noise=fake",
    )  # fmt: skip
    write_config(written, tmp_path)
    read = read_config(tmp_path)
    assert read == written
    for name, corpus in written.curriculum.corpora.items():
        assert type(read.curriculum.corpora[name]) is type(corpus)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["schema"].pop("corpora"),
        lambda t: t["schema"]["corpora"].pop("one_line"),
        lambda t: t["schema"]["corpora"].update(one_line="transformer"),
        lambda t: t["schema"]["corpora"].update(one_line=["rendered"]),
        lambda t: t["schema"].update(corpora="rendered"),
        lambda t: t["curriculum"].update(corpora=3),
        lambda t: t["curriculum"]["corpora"]["one_line"].update(_target_="os.system"),
        lambda t: t["curriculum"]["corpora"]["one_line"].update(height=-3),
        lambda t: t["curriculum"]["stages"][0].update(corpora="one_line"),
        lambda t: t["curriculum"]["stages"][0].update(corpora={"another": 1.0}),
        lambda t: t["curriculum"].update(stages={"a": 1}),
    ],
)
def test_a_curriculum_that_was_changed_is_refused_in_one_line(change, tmp_path):
    write_config(
        experiment("curriculum=lines_to_page", "datamodule=synthetic_paragraphs"), tmp_path
    )
    tree = yaml.safe_load((tmp_path / CONFIG).read_text())
    change(tree)
    (tmp_path / CONFIG).write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as refused:
        read_config(tmp_path)
    assert "\n" not in str(refused.value)
