import json
import shutil
import sqlite3

import pytest
import torch
import yaml
from safetensors.torch import load_file

from paragraph_ocr.config import Experiment
from paragraph_ocr.errors import UserError
from paragraph_ocr.help import CONF
from paragraph_ocr.quantised import restore
from paragraph_ocr.run import RELEASE, folder_name, make_folder, run
from paragraph_ocr.validation import compose, validate
from small_curriculum import FEW_STAGES, INSTALLED, RECIPES, SMALL_CURRICULUM

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
ENCODERS = sorted(path.stem for path in (CONF / "model/encoder").glob("*.yaml"))
DECODERS = sorted(path.stem for path in (CONF / "model/decoder").glob("*.yaml"))
SIZES = {
    "tiny": (0, 0.5),
    "small": (0.7, 3),
    "base": (6, 16),
    "fine": (9, 10),
    "reference": (15.56, 15.57),
}
SIZES["line_cnn"] = (3, 4)  # a window of 64x28; the lab's 28x28 gives half


IAM = sorted(path.stem for path in (CONF / "datamodule").glob("iam_*.yaml"))
NEEDED = {
    "model=line_cnn": ["datamodule=synthetic_lines"],
    "datamodule=folder": ["datamodule.root=tests"],
    **{f"datamodule={name}": ["datamodule.root=tests"] for name in IAM},
    "datamodule=emnist": ["datamodule.root=tests"],
    "datamodule=emnist_lines": ["datamodule.root=tests"],
    "vocabulary=from_data": ["datamodule=fake"],
    "curriculum=lines_to_page": ["datamodule=synthetic_paragraphs"],
    "datamodule=synthetic_letters": INSTALLED,
}
"""What a choice needs of its user."""


def built_model(*overrides):
    from paragraph_ocr import build, build_model

    experiment = validate(compose(list(overrides)))
    vocabulary = build.build_vocabulary(experiment)
    return experiment, build_model.build_recognizer(experiment, vocabulary), vocabulary


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_at_the_size_it_promises(name):
    _, recognizer, _ = built_model(f"model={name}", *NEEDED.get(f"model={name}", []))
    millions = sum(parameter.numel() for parameter in recognizer.parameters()) / 1e6
    low, high = SIZES.get(name, (16, 100))
    assert low <= millions <= high


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_encoder_goes_with_every_decoder(encoder, decoder):
    experiment = validate(
        compose(["model=tiny", f"model/encoder={encoder}", f"model/decoder={decoder}"])
    )
    alone = yaml.safe_load((CONF / f"model/encoder/{encoder}.yaml").read_text())
    assert experiment.model.encoder.name == alone["name"]
    alone = yaml.safe_load((CONF / f"model/decoder/{decoder}.yaml").read_text())
    assert experiment.model.decoder.width == alone["width"]


@pytest.mark.parametrize(
    "override",
    [f"optimizer={p.stem}" for p in (CONF / "optimizer").glob("*.yaml")]
    + [f"schedule={p.stem}" for p in (CONF / "schedule").glob("*.yaml")]
    + [f"curriculum={p.stem}" for p in (CONF / "curriculum").glob("*.yaml")]
    + [f"regularization={p.stem}" for p in (CONF / "regularization").glob("*.yaml")]
    + [f"decoding={p.stem}" for p in (CONF / "decoding").glob("*.yaml")]
    + [f"datamodule={p.stem}" for p in (CONF / "datamodule").glob("*.yaml")]
    + [f"vocabulary={p.stem}" for p in (CONF / "vocabulary").glob("*.yaml")]
    + [f"debug={p.stem}" for p in (CONF / "debug").glob("*.yaml")]
    + ["trainer=auto", "trainer=cpu", "trainer=ddp", "tracking=off"],
)
def test_every_choice_builds_all_parts(override, tmp_path):
    from paragraph_ocr import build

    experiment, recognizer, vocabulary = built_model(
        "model=tiny", override, *NEEDED.get(override, []), f"outputs={tmp_path}"
    )
    learner = build.build_learner(experiment, recognizer, vocabulary)
    trainer = build.build_trainer(experiment, folder=tmp_path, logger=None, callbacks=[])
    assert build.build_pages(experiment, vocabulary).batch_size > 0
    assert build.build_datamodule(experiment, vocabulary) is not None
    assert learner.configure_optimizers is not None
    assert trainer.max_epochs is not None


def test_what_ends_between_two_validations_is_validated_once_more(run_experiment):
    typed = ["model=tiny", "datamodule=fake", "debug=ci", "schedule=constant", "tracking=off"]
    typed += ["trainer.max_epochs=-1", "trainer.accelerator=cpu"]  # of 4 steps
    at_epoch, later = (
        run_experiment(*typed, f"trainer.max_steps={steps}").metrics for steps in (4, 6)
    )
    assert later["val/loss"] != at_epoch["val/loss"]
    assert later["val/loss"] == pytest.approx(at_epoch["val/loss"], rel=0.5)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not name.startswith("iam_")])
def test_every_experiment_runs_two_steps(run_experiment, name):
    recipe = [*RECIPES[name], *FEW_STAGES] if name in RECIPES else []
    outcome = run_experiment(f"experiment={name}", *recipe, "debug=ci", "tracking=off")
    assert 0 < outcome.metrics["val/loss"] < 20
    assert (outcome.folder / "best.safetensors").exists()
    assert (outcome.folder / "last.safetensors").exists()
    assert (outcome.folder / RELEASE).exists() == (name in {"ten_minutes", "one_hour"})


def test_what_is_released_is_what_was_tested(run_experiment):
    typed = ["experiment=ten_minutes", *RECIPES["ten_minutes"], *FEW_STAGES, "model=tiny"]
    outcome = run_experiment(*typed, "debug=ci", "tracking=off")
    released = outcome.folder / RELEASE
    again = run_experiment(
        "model=tiny", "debug=ci", "tracking=off", *INSTALLED, "datamodule=synthetic_letters",
        "datamodule.num_val=2", "datamodule.num_test=2", "datamodule.num_train=1",
        f"model.weights={released}", "trainer.max_steps=1", "optimizer=sgd", "optimizer.lr=1e-12",
        "regularization=none", "model.encoder.freeze=true",
    )  # fmt: skip
    measured = json.loads((released / "metrics.json").read_text())
    assert measured["test/loss"] == outcome.metrics["test/loss"]
    assert again.metrics["test/loss"] == pytest.approx(measured["test/loss"], rel=1e-5)
    unrounded = load_file(outcome.folder / "best.safetensors")
    rounded = restore(load_file(released / "best.safetensors"))
    apart = [not torch.equal(rounded[name], weight) for name, weight in unrounded.items()]
    assert any(apart) and not all(apart)


def test_a_run_that_goes_further_releases_anew(run_experiment):
    typed = ["model=tiny", "datamodule=fake", "debug=ci", "release=true", "tracking=off"]
    first = run_experiment(*typed)
    metrics = first.folder / RELEASE / "metrics.json"
    before = json.loads(metrics.read_text())
    further = [f"resume={first.folder}", "trainer.max_steps=6", "trainer.max_epochs=3"]
    assert run(validate(compose(further)), overrides=further).folder == first.folder
    assert json.loads(metrics.read_text())["train/loss"] != before["train/loss"]


@pytest.mark.parametrize("name", ["iam_finetune", "iam_from_scratch"])
def test_every_recipe_for_iam_runs_two_steps(run_experiment, iam_copies, tmp_path, name):
    small = ["model=tiny", "trainer=cpu", "tracking=off", "datamodule.num_workers=0"]
    size = ["datamodule.height=96", "datamodule.width=128", "datamodule.max_length=190"]
    if name == "iam_finetune":
        start = run_experiment(
            *small, "datamodule=fake", "debug=ci", "trainer.max_steps=1", "release=true"
        )
        recipe = [f"model.weights={start.folder / RELEASE}"]
    else:
        rendered = ("one_line", "two_lines", "four_lines", "seven_lines")
        recipe = [
            *(f"curriculum.corpora.{corpus}.num_train=4" for corpus in rendered),
            *(f"~curriculum.corpora.{corpus}" for corpus in rendered[2:]),
            # the first stage has all that is rendered: a process beside would only be waited for
            "curriculum.stages=[{corpora:{iam_lines:1,one_line:1,two_lines:1},batch_size:2,max_steps:1},"
            "{corpora:{pages:1,two_lines:1},batch_size:2}]",
        ]
    outcome = run_experiment(
        f"experiment={name}", f"datamodule.root={iam_copies / 'archives'}", *small, *size, *recipe,
        "debug=quick", "trainer.max_steps=2", "curriculum.look_every=1",
    )  # fmt: skip
    assert 0 < outcome.metrics["val/loss"] < 20
    assert outcome.metrics["test/cer"] >= 0
    assert (outcome.folder / RELEASE).exists() == (name == "iam_finetune")


def test_a_curriculum_goes_from_stage_to_stage_and_mlflow_draws_it(
    run_experiment, curriculum_stores, tmp_path
):
    shutil.copytree(curriculum_stores, tmp_path / "data")
    typed = ["model=tiny", "trainer.accelerator=cpu", "tracking.system_metrics=false"]
    run_experiment(*typed, *SMALL_CURRICULUM, "trainer.max_epochs=5")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = database.execute(
            "select step, value from metrics where key = 'curriculum/stage' order by step"
        ).fetchall()
    assert [stage for _, stage in rows] == [0, 1, 1, 2, 2]
    assert [step for step, _ in rows] == [2, 5, 8, 11, 14]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_curriculum_of_recorded_steps_takes_its_pages_from_the_card(run_experiment):
    typed = [*SMALL_CURRICULUM, "model=tiny", "trainer=gpu", "tracking=off", "regularization=scans"]
    typed += ["datamodule.placement=gpu", "trainer.max_epochs=8", "trainer.deterministic=false"]
    recorded = run_experiment(*typed).metrics
    plain = run_experiment(*typed, "trainer.cuda_graphs=false").metrics
    assert recorded["curriculum/stage"] == plain["curriculum/stage"] == 2
    assert recorded["val/loss"] == pytest.approx(plain["val/loss"], rel=0.2)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "debug").glob("*.yaml")))
def test_every_debug_overlay_runs(run_experiment, name):
    overrides = ["model=tiny", "datamodule=fake", f"debug={name}", "tracking=off"]
    outcome = run_experiment(*overrides, "trainer.max_steps=4", "trainer.accelerator=cpu")
    assert (outcome.folder / "last.safetensors").exists()
    traces = list(outcome.folder.glob("*.trace.json"))
    assert bool(traces) == (name == "profile")


@pytest.mark.parametrize(("max_steps", "recorded"), [(1, 0), (2, 1), (4, 3), (12, 3)])
def test_a_trace_holds_the_operations_of_three_steps(run_experiment, capsys, max_steps, recorded):
    outcome = run_experiment(
        "model=tiny", "datamodule=fake", "debug=profile", "tracking=off", "trainer=cpu",
        f"trainer.max_steps={max_steps}",
    )  # fmt: skip
    traces = list(outcome.folder.glob("*.trace.json"))
    assert len(traces) == 1
    assert traces[0].stat().st_size < 50_000_000
    said = " ".join(capsys.readouterr().out.split())
    assert str(traces[0]) in said and "ui.perfetto.dev" in said
    events = json.loads(traces[0].read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    steps = [name for name in {*names} if name.startswith("ProfilerStep#")]
    assert names.count("run_training_batch") == recorded
    if recorded:
        assert len(steps) >= recorded
        for operation in (
            "aten::convolution",
            "aten::addmm",
            "aten::layer_norm",
            "aten::embedding",
        ):
            assert sum(operation in name for name in names) >= recorded, operation
        assert any("optimizer_step" in name for name in names)
    assert "aten::" in (outcome.folder / "profile.txt").read_text() or not recorded
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(
    "override",
    ["trainer.fast_dev_run=true", "decoding=beam", "trainer.early_stopping.patience=1",
     "trainer.max_time=00:00:00:02", "trainer.deterministic=true", "trainer.val_check_interval=0.5"],
)  # fmt: skip
def test_settings_of_the_trainer_and_of_reading_run(run_experiment, override):
    typed = ["model=tiny", "datamodule=fake", "tracking=off", "trainer.accelerator=cpu"]
    metrics = run_experiment(*typed, "trainer.max_epochs=2", override).metrics
    assert 0 <= metrics["val/cer"] < 20


def test_a_run_leaves_its_config_and_its_story_in_mlflow(run_experiment, tmp_path):
    outcome = run_experiment("model=tiny", "debug=ci")
    stored = yaml.safe_load((outcome.folder / "config.yaml").read_text())
    assert stored["model"]["encoder"]["name"] == "test_resnet"
    assert set(stored) == {"schema", *Experiment.__dataclass_fields__}
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]
        metrics = {key for (key,) in database.execute("select distinct key from metrics")}
        parameters = dict(database.execute("select key, value from params"))
    assert {"train/loss", "val/loss", "val/cer", "val/wer", "val/exact", "lr"} <= metrics
    assert {"test/cer", "parameters", "images_per_second"} <= metrics
    assert parameters["model.decoder.depth"] == "2"
    artifacts = tmp_path / "artifacts" / outcome.run_id / "artifacts"
    assert (artifacts / "config.yaml").exists()
    assert (artifacts / "readings.json").exists()
    assert len(list((artifacts / "samples").glob("*.png"))) == 2


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(run_experiment):
    overrides = ("model=tiny", "debug=ci", "tracking=off")
    first, second = run_experiment(*overrides), run_experiment(*overrides)
    other = run_experiment(*overrides, "seed=1")
    assert first.metrics["val/loss"] == second.metrics["val/loss"]
    assert first.metrics["val/loss"] != other.metrics["val/loss"]
    assert len({first.folder, second.folder, other.folder}) == 3


def test_weights_of_a_run_start_another(run_experiment, capsys):
    overrides = ("model=tiny", "debug=ci", "tracking=off")
    first = run_experiment(*overrides)
    again = run_experiment(*overrides, f"model.weights={first.folder}", "optimizer.lr=1e-9")
    assert again.metrics["test/loss"] == pytest.approx(first.metrics["test/loss"], abs=0.05)
    with pytest.raises(UserError, match="belongs to another model"):
        run_experiment(*overrides, f"model.weights={first.folder}", "model.decoder.depth=3")
    warning = "was trained with model.encoder.horizontal_stride="
    assert warning not in "".join(capsys.readouterr())
    other = "model.encoder.horizontal_stride=16"  # the same shapes, and cells of another width
    run_experiment(*overrides, f"model.weights={first.folder}", other)
    assert warning in " ".join("".join(capsys.readouterr()).split())


def test_overfitting_validates_and_tests_the_very_batch_it_trains(run_experiment):
    metrics = run_experiment(
        "model=tiny",
        "model.encoder.freeze=true",  # BatchNorm would differ between training and validation
        "debug=ci",
        "tracking=off",
        "trainer.overfit_batches=1",
        "optimizer.lr=1e-9",
    ).metrics
    assert metrics["val/loss"] == pytest.approx(metrics["train/loss"], abs=1e-4)
    assert metrics["val/loss"] == pytest.approx(metrics["test/loss"], abs=1e-4)
    assert metrics["val/cer"] == metrics["test/cer"]


def test_no_two_runs_share_a_folder(tmp_path):
    folders = {make_folder(tmp_path, folder_name("a=b,c")) for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.name.replace("a-b-c", "").strip("0123456789_-") == "" for folder in folders)


def test_a_folder_of_ones_own_trains_and_is_read(run_experiment, tmp_path):
    from PIL import Image, ImageDraw

    folder = tmp_path / "mine"
    folder.mkdir()
    for index in range(6):
        page = Image.new("L", (90 + 8 * index, 40), "white")
        ImageDraw.Draw(page).text((5, 10), f"page {index}", fill=0)
        page.save(folder / f"p{index}.png")
        (folder / f"p{index}.txt").write_text(f"page\n{index}")
    outcome = run_experiment(
        "model=tiny",
        "datamodule=folder",
        f"datamodule.root={folder}",
        "datamodule.height=64",
        "datamodule.width=160",
        "datamodule.batch_size=2",
        "datamodule.max_length=20",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        "tracking=off",
    )
    assert 0 < outcome.metrics["test/loss"] < 20
    assert outcome.metrics["test/cer"] >= 0


@pytest.mark.parametrize("name", IAM)
def test_every_form_of_iam_trains_and_is_read(run_experiment, iam_copies, name):
    small = ["height=96", "width=128", "max_length=190"] if name != "iam_lines" else []
    metrics = run_experiment(
        "model=tiny",
        f"datamodule={name}",
        f"datamodule.root={iam_copies / 'archives'}",
        "debug=quick",
        "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        "tracking=off",
        *(f"datamodule.{change}" for change in ("batch_size=2", "num_workers=0", *small)),
    ).metrics
    assert 0 < metrics["val/loss"] < 20
    assert metrics["test/cer"] >= 0


@pytest.mark.parametrize("corpus", ["emnist", "emnist_lines"])
@pytest.mark.parametrize("model", ["tiny", "line_cnn"])
def test_emnist_trains_and_is_read(run_experiment, emnist, corpus, model):
    outcome = run_experiment(
        f"model={model}",
        *(["model.channels=4"] if model == "line_cnn" else []),
        f"datamodule={corpus}",
        f"datamodule.root={emnist['gzip archive']}",
        "datamodule.num_train=40",
        "datamodule.num_val=6",
        "datamodule.num_test=6",
        "datamodule.batch_size=8",
        "debug=quick",
        "trainer.accelerator=cpu",
        "tracking=off",
    )
    assert 0 < outcome.metrics["val/loss"] < 20
    assert outcome.metrics["test/cer"] >= 0


@pytest.mark.parametrize("loss", ["windows", "ctc"])
def test_lines_in_fonts_train_a_line_cnn_that_comes_back_from_its_run(run_experiment, loss):
    typed = [
        "model=line_cnn",
        f"model.loss={loss}",
        "model.window_stride_px=8",
        "model.channels=4",
        "datamodule=synthetic_lines",
        "datamodule.num_train=16",
        "datamodule.num_val=4",
        "datamodule.num_test=4",
        "datamodule.batch_size=8",
        "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        "tracking=off",
    ]
    first = run_experiment(*typed)
    again = run_experiment(*typed, f"model.weights={first.folder}", "optimizer.lr=1e-12")
    assert again.metrics["test/loss"] == pytest.approx(first.metrics["test/loss"], abs=1e-3)


def test_ctc_with_too_few_windows_is_refused():
    with pytest.raises(UserError, match="Pass model.window_stride_px=14"):
        built_model("model=line_cnn", "model.loss=ctc", "datamodule=synthetic_lines")
    built_model(
        "model=line_cnn",
        "model.loss=ctc",
        "datamodule=synthetic_lines",
        "model.window_stride_px=14",
    )


def test_a_vocabulary_found_in_the_data_stands_in_the_run_and_comes_back_without_it(
    run_experiment, tmp_path
):
    typed = ["model=tiny", "datamodule=fake", "vocabulary=from_data", "trainer.max_steps=2"]
    outcome = run_experiment(*typed, "vocabulary.unknown=replace", "tracking=off")
    stored = yaml.safe_load((outcome.folder / "config.yaml").read_text())["vocabulary"]
    assert len(stored["characters"]) > 50
    assert stored["characters"] == "".join(sorted(set(stored["characters"])))

    from paragraph_ocr import build

    experiment = validate(compose(typed))
    experiment.outputs = "nowhere"  # no data is looked at
    experiment.vocabulary.characters = stored["characters"]
    vocabulary = build.build_vocabulary(experiment)
    assert "".join(vocabulary.characters) == stored["characters"]
    experiment.outputs = str(tmp_path)
    datamodule = build.build_pages(experiment, vocabulary)
    assert len(list((tmp_path / "data").glob("*.h5"))) == 1
    datamodule.prepare_data()
    assert len(list((tmp_path / "data").glob("*.h5"))) == 1, "another store was made"


def test_pages_augmented_by_workers_train(run_experiment):
    typed = ["model=tiny", "datamodule=fake", "tracking=off", "trainer.max_epochs=2"]
    strong = ["regularization=strong", "regularization.augment_on=workers"]
    assert run_experiment(*typed, *strong, "datamodule.num_workers=2").metrics["val/loss"] > 0
