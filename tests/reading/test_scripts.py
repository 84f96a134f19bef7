"""scripts/read.py and scripts/evaluate.py as they are typed."""

import copy
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pages import scans

from paragraph_ocr.errors import UserError

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Return a function that takes the words after scripts/read.py and returns the exit status."""
    module = script("read")
    monkeypatch.chdir(tmp_path)

    def typed(*words):
        monkeypatch.setattr("sys.argv", ["read.py", *words])
        return module.arguments.run(module.Options, module.read, about=module.__doc__)

    return typed


@pytest.fixture
def evaluate():
    return script("evaluate").main


def test_one_image_gives_its_text_and_nothing_else(read, recognizer, run_folder, images, capsys):
    path = scans(images)[0]
    assert read(f"checkpoint={run_folder}", f"image={path}", "device=cpu") == 0
    assert capsys.readouterr().out == recognizer.read(path).text + "\n"


def test_a_model_says_whether_pages_are_normalised_unless_the_words_do(
    read, run_folder, images, capsys, tmp_path
):
    from paragraph_ocr.reading import Recognizer

    path, run = scans(images)[8], shutil.copytree(run_folder, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    assert config.count("normalise: false") == 1
    (run / "config.yaml").write_text(config.replace("normalise: false", "normalise: true"))
    recognizer = Recognizer.load(run, device="cpu")
    assert recognizer.normalise
    texts = {}
    for words in ((), ("normalise=true",), ("normalise=false",)):
        assert read(f"checkpoint={run}", f"image={path}", *words) == 0
        texts[words] = capsys.readouterr().out
    own, wanted, unwanted = texts.values()
    assert own == wanted == recognizer.read(path).text + "\n" != unwanted


def test_a_model_says_how_it_reads_unless_the_words_do(
    read, recognizer, run_folder, images, capsys
):
    from paragraph_ocr.build_model import build_decoding
    from paragraph_ocr.validation import overridden

    path = scans(images)[0]
    for name in ("greedy", "beam", "vote"):
        chosen = overridden(recognizer.experiment, [f"decoding={name}"])
        other = copy.copy(recognizer)
        other.decoding = build_decoding(chosen, recognizer.vocabulary)
        assert name == "greedy" or other.decoding != recognizer.decoding
        words = [f"checkpoint={run_folder}", f"image={path}", "device=cpu", f"decoding={name}"]
        assert read(*words, "write=json", f"into={name}") == 0
        expected, written = (
            other.read(path),
            json.loads(Path(f"{name}/{path.stem}.json").read_text()),
        )
        assert capsys.readouterr().out.startswith(expected.text + "\n")
        assert written["log_probability"] == pytest.approx(expected.log_probability, abs=1e-4)


def test_a_folder_gives_every_image_and_the_files_asked_for(
    read, recognizer, run_folder, images, capsys, tmp_path
):
    words = [f"checkpoint={run_folder}", f"image={images}", "write=txt,json,page,alto", "into=out"]
    assert read(*words, "batch_size=5", "device=cpu") == 0
    shown = capsys.readouterr().out
    for path in scans(images):
        text = recognizer.read(path).text
        assert f"==> {path} <==\n{text}\n" in shown
        assert (tmp_path / "out" / f"{path.stem}.txt").read_text() == text + "\n"
        assert json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())["text"] == text
    assert "12 of 12 images read" in shown
    assert len(list((tmp_path / "out").iterdir())) == 48
    assert read(*words) == 0  # again, over what it wrote before


def test_a_glob_and_folders_within_folders(read, run_folder, images, capsys, tmp_path):
    for name in ("a/one.png", "b/one.png", "b/two.tif", "b/two.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(scans(images)[0].read_bytes())
    assert read(f"checkpoint={run_folder}", "image=**/*.png", "write=txt", "into=out") == 0
    written = sorted(p.relative_to("out").as_posix() for p in Path("out").rglob("*.txt"))
    assert written == ["a/one.txt", "b/one.txt", "b/two.txt"]
    assert read(f"checkpoint={run_folder}", "image=b", "write=txt", "into=both") == 0
    written = sorted(p.name for p in Path("both").rglob("*.txt"))
    assert written == ["one.txt", "two.png.txt", "two.tif.txt"]


def test_a_bad_image_among_others_is_one_line_and_status_2(
    read, run_folder, images, capsys, tmp_path
):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    (tmp_path / "bad" / "b.png").write_bytes(scans(images)[0].read_bytes())
    assert read(f"checkpoint={run_folder}", "image=bad") == 2
    shown = capsys.readouterr()
    (refused,) = [line for line in shown.err.splitlines() if "bad" in line]
    assert "a.png is no PNG" in refused
    assert "1 of 2 images read" in shown.out


def test_no_transcription_is_written_over(read, run_folder, images):
    before = {path: path.read_text() for path in images.glob("*.txt")}
    words = [f"checkpoint={run_folder}", f"image={images}", f"into={images}"]
    assert read(*words, "write=txt") == 2
    assert {path: path.read_text() for path in images.glob("*.txt")} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint=RUN"], "image has no value"),
        (["image=IMAGE"], "experiment=ten_minutes"),
        (["image=x.png", "checkpoint=nowhere"], "image=x.png does not exist"),
        (["checkpoint=RUN", "image=empty"], "holds no"),
        (["checkpoint=RUN", "image=IMAGE", "write=pdf"], "not one of txt, json, page, alto"),
        (["checkpoint=nowhere", "image=IMAGE"], "Pass checkpoint=outputs/runs"),
        (["checkpoint=RUN", "image=IMAGE", "batch_size=0"], "batch_size=0 must lie in"),
        (["checkpoint=RUN", "imge=IMAGE"], "nearest: image"),
        (["checkpoint=RUN", "image=IMAGE", "decoding=view"], "greedy, vote"),
    ],
)
@pytest.mark.usefixtures("no_release")
def test_mistakes_in_reading_are_one_line(read, run_folder, images, capsys, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(run_folder), "IMAGE": str(scans(images)[0])}
    typed = [w.replace("RUN", places["RUN"]).replace("IMAGE", places["IMAGE"]) for w in words]
    assert read(*typed) == 2
    refused = capsys.readouterr().err
    assert said in refused
    assert refused.count("\n") == 1


def test_an_evaluation_shows_its_rates(evaluate, run_folder, capsys, tmp_path):
    words = [f"checkpoint={run_folder}", "datamodule.split=val", "split=val", f"outputs={tmp_path}"]
    assert evaluate([*words, "tracking=off", f"into={tmp_path / 'a=b'}"]) == 0
    shown = capsys.readouterr().out
    assert "12 paragraphs" in shown
    assert "character errors" in shown
    assert (tmp_path / "a=b" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["split=test"], "experiment=ten_minutes"),
        (["checkpoint=x", "splt=test"], "nearest: split"),
        (["checkpoint=x", "optimizer.lr=1"], "is no option here"),
        (["checkpoint=x", "split=tset"], "Pass split=test"),
        (["checkpoint=x"], "no run folder"),
        (["x"], "not of the form key=value"),
    ],
)
@pytest.mark.usefixtures("no_release")
def test_mistakes_in_evaluating_are_one_line(evaluate, capsys, words, said):
    assert evaluate(words) == 2
    refused = capsys.readouterr().err
    assert said in refused
    assert refused.count("\n") == 1


def test_without_a_checkpoint_the_released_model_reads(read, released, images, capsys):
    path = scans(images)[0]
    assert read(f"image={path}") == 0
    assert capsys.readouterr().out == released.read(path).text + "\n"


def test_the_released_model_is_evaluated_on_other_data_than_its_own(
    evaluate, released, images, capsys, tmp_path
):
    words = ["datamodule=folder", f"datamodule.root={images}", "datamodule.split=test"]
    assert evaluate([*words, "limit=3", f"outputs={tmp_path / 'outputs'}", "device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "3 paragraphs" in shown and "logged to MLflow" in shown
    into = tmp_path / "outputs" / "evaluations" / "paragraphs" / "folder_test"
    tree = json.loads((into / "evaluation.json").read_text())
    assert [one["reading"] for one in tree["readings"]] == [
        released.read(path).text for path in scans(images)[:3]
    ]
    assert evaluate(["tracking=off"]) == 2  # on its own data, whose place a release does not tell
    assert "Pass datamodule.root=" in capsys.readouterr().err


def test_the_released_model_is_the_pages_and_is_explained(released, images, monkeypatch, tmp_path):
    seen = []
    app, explain = script("app"), script("explain")
    monkeypatch.setattr("paragraph_ocr.web.app.serve", lambda page, port: seen.append(port))
    app.app(app.Options(port=0))
    assert seen == [0]
    explain.explain(explain.Options(image=str(scans(images)[0]), folder=tmp_path / "explained"))
    assert "How paragraphs reads" in (tmp_path / "explained" / "explain.html").read_text()


def test_both_explain_themselves(evaluate, read, capsys):
    assert evaluate(["--help"]) == 0
    assert "against=<" in capsys.readouterr().out
    assert read("--help") == 0
    assert (
        "into=<folder of the written files> (default outputs/readings)" in capsys.readouterr().out
    )


def test_words_of_another_language_or_of_none_can_be_asked_for(
    read, recognizer, run_folder, images
):
    from paragraph_ocr.build_model import build_decoding
    from paragraph_ocr.validation import overridden

    path = scans(images)[0]
    for typed, language in (("none", "null"), ("de", "de")):
        chosen = overridden(
            recognizer.experiment, ["decoding=vote", f"decoding.lexicon={language}"]
        )
        other = copy.copy(recognizer)
        other.decoding = build_decoding(chosen, recognizer.vocabulary)
        assert (other.decoding.lexicon is None) == (typed == "none")
        words = [f"checkpoint={run_folder}", f"image={path}", "device=cpu", "decoding=vote"]
        assert read(*words, f"lexicon={typed}", "write=txt", f"into={typed}") == 0
        assert Path(f"{typed}/{path.stem}.txt").read_text().strip() == other.read(path).text.strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["decoding=vote", "lexicon=xx"], "decoding.lexicon=xx is no language"),
        (["decoding=greedy", "lexicon=en"], "Pass decoding=vote"),
    ],
)
def test_a_lexicon_that_is_not_there_or_does_nothing_is_told(
    read, run_folder, images, capsys, words, said
):
    path = scans(images)[0]
    assert read(f"checkpoint={run_folder}", f"image={path}", "device=cpu", *words) == 2
    assert said in capsys.readouterr().err


def test_a_card_names_texts_faces_licences_stages_and_time(recognizer, tmp_path):
    from paragraph_ocr.config import CurriculumConfig, StageConfig
    from paragraph_ocr.data.fonts import find_faces
    from paragraph_ocr.reading.card import model_card
    from paragraph_ocr.validation import compose, validate

    fonts, texts = tmp_path / "fonts", tmp_path / "texts"
    fonts.mkdir()
    texts.mkdir()
    (texts / "LICENSE").write_text("Letters of a friend, with her leave.\nMore.")
    for face, licence in zip(
        find_faces(None)[:3], ("SIL Open Font License", "Apache License", ""), strict=True
    ):
        (fonts / face.name).write_bytes(face.read_bytes())
        if licence:
            (fonts / face.name).with_suffix(".LICENSE").write_text(f"Under the {licence}, Version")
    names = [path.stem for path in find_faces(fonts)]
    recognizer = copy.copy(recognizer)
    recognizer.experiment = experiment = copy.deepcopy(recognizer.experiment)
    experiment.datamodule = replace(
        validate(compose(["datamodule=synthetic_notes"])).datamodule,
        fonts=str(fonts),
        texts=str(texts),
        held_out=names[:1],
    )
    lines = replace(experiment.datamodule, height=96, texts=None)
    stages = [StageConfig({"lines": 1.0}, 32, 0.8, None), StageConfig({"pages": 1.0}, 8)]
    experiment.curriculum = CurriculumConfig(corpora={"lines": lines}, stages=stages)
    experiment.decoding = validate(compose(["decoding=vote"])).decoding
    card = model_card(
        recognizer,
        run=f"experiment=ten_minutes,outputs={tmp_path}",
        metrics={"minutes": 8.04, "test/cer": 0.0625},
        num_bytes=1,
    )
    for said in (
        "`texts`: Letters of a friend, with her leave.", "Shakespeare's plays", "3 faces",
        f"SIL OFL 1.1: {names[0]}", f"Apache 2.0: {names[1]}", f"as their packages say: {names[2]}",
        f"see new hands: {names[0]}.", "`python train.py experiment=ten_minutes`, seed 0, 8.0 minutes",
        "| lines | 96x448 | 32 | loss below 0.8 |", "| pages | 160x448 | 8 | the end |",
        "| test/cer | 0.0625 |",
        "by the vote of 2 to 10 readings of each page, val/ by one; words that no dictionary (en) has",
    ):  # fmt: skip
        assert said in card
    assert str(tmp_path) not in card
    assert "until the next one's pages have been rendered" not in card
    experiment.curriculum.wait = False
    card = model_card(recognizer, run="experiment=ten_minutes", metrics={}, num_bytes=1)
    assert "until the next one's pages have been rendered" in card
    (fonts / find_faces(fonts)[0].name).unlink()
    experiment.datamodule.fonts = str(tmp_path / "nowhere")
    run = "experiment=ten_minutes,outputs=out,optimizer.lr=1e-3"
    card = model_card(recognizer, run=run, metrics={}, num_bytes=1)
    assert "`nowhere`, which was not there" in card
    assert "`python train.py experiment=ten_minutes` and overrides, seed 0" in card


def test_a_release_is_small_reads_alike_and_names_no_place(
    run_folder, recognizer, images, tmp_path, capsys
):
    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.stored import read_config

    export, folder = script("export"), tmp_path / "models" / "notes"
    options = {"checkpoint": str(run_folder), "to": "release"}
    export.export(export.Options(**options, folder=folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "best.safetensors", "config.yaml", "metrics.json",
    ]  # fmt: skip
    size = (folder / "best.safetensors").stat().st_size
    assert size < 0.4 * (run_folder / "best.safetensors").stat().st_size
    stored = read_config(folder)
    assert str(tmp_path) not in (folder / "config.yaml").read_text()
    assert stored.model == recognizer.experiment.model
    card = (folder / "README.md").read_text()
    assert "int8" in card and "with their transcriptions" in card and str(tmp_path) not in card
    released = Recognizer.load(folder, device="cpu")
    for name, tensor in released.model.state_dict().items():
        other = recognizer.model.state_dict()[name].float()
        if other.ndim > 1:
            assert (tensor - other).abs().max() <= 0.006 * other.abs().max(), name
    scanned = scans(images)
    texts = [transcript.text for transcript in released.read_all(scanned)]
    exact = [transcript.text for transcript in recognizer.read_all(scanned)]
    alike = [one == other for one, other in zip(texts, exact, strict=True)]
    assert sum(alike) >= 0.7 * len(exact)  # where it stammers, rounding tells for how long
    with pytest.raises(UserError, match="exists"):
        export.export(export.Options(**options, folder=folder))
    with pytest.raises(UserError, match="folder has no value"):
        export.export(export.Options(**options))
