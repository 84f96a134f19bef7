"""The scripts' key=value arguments: values as typed, mistakes in one line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from paragraph_ocr import arguments
from paragraph_ocr.errors import UserError


@dataclass(frozen=True)
class Options:
    image: str = field(metadata={"help": "file or folder"})
    split: Literal["train", "val"] = "val"
    write: tuple[Literal["txt", "json"], ...] = ()
    into: Path = Path("out")
    limit: int | None = None
    share: float = 0.5
    quiet: bool = False


def test_values_are_taken_as_they_are():
    path = "scans/a=b, (c) 'd' $e.png"
    assert arguments.parse(Options, [f"image={path}"]) == Options(path)


def test_every_type_is_parsed():
    words = [
        "image=x",
        "split=train",
        "write=txt,json",
        "into=a/b",
        "limit=3",
        "share=1e-2",
        "quiet=True",
    ]
    wanted = Options("x", "train", ("txt", "json"), Path("a/b"), 3, 0.01, True)
    assert arguments.parse(Options, words) == wanted
    assert arguments.parse(Options, ["image=x", "limit=null", "write="]) == Options("x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "image has no value. Pass image=<file or folder>"),
        (["image="], "image has no value"),
        (["imgae=x"], "nearest: image.*Pass image="),
        (["zzz=x"], "Pass one of image, split"),
        (["image"], "not of the form key=value. Pass image="),
        (["image=x", "image=y"], "given twice"),
        (["image=x", "split=tran"], "not one of train, val. Pass split=train"),
        (["image=x", "write=txt,jsn"], "not one of txt, json. Pass write=json"),
        (["image=x", "limit=few"], "must be a whole number"),
        (["image=x", "limit=1.5"], "must be a whole number"),
        (["image=x", "share=half"], "must be a number"),
        (["image=x", "quiet=maybe"], "must be true or false"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_type(words, said):
    with pytest.raises(UserError, match=said) as refused:
        arguments.parse(Options, words)
    assert "\n" not in str(refused.value)


def test_a_script_ends_with_the_status_of_its_command(monkeypatch, capsys):
    def status(command, *words):
        monkeypatch.setattr("sys.argv", ["script.py", *words])
        return arguments.run(Options, command, about="What it does.")

    def interrupted(options):
        raise KeyboardInterrupt

    assert status(lambda options: None, "image=x") == 0
    assert status(lambda options: 2, "image=x") == 2
    assert status(interrupted, "image=x") == 1
    assert status(lambda options: None, "imge=x") == 2
    assert "Pass image=" in capsys.readouterr().err


def test_help_lists_every_option_with_its_default(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    assert arguments.run(Options, lambda options: 5, about="What it does.") == 0
    shown = capsys.readouterr().out
    assert "What it does." in shown
    for line in ("image=<file or folder>", "split=<value> (default val)", "(default false)"):
        assert line in shown


def test_the_first_word_chooses_among_subjects(monkeypatch, capsys):
    done = []

    def status(*words):
        monkeypatch.setattr("sys.argv", ["script.py", *words])
        subjects = {"show": (Options, done.append), "send": (Options, lambda options: 3)}
        return arguments.run_subject(subjects, about="What it does.")

    assert status("show", "image=x", "limit=2") == 0
    assert done == [Options("x", limit=2)]
    assert status("send", "image=x") == 3
    assert status("shwo", "image=x") == 2
    assert "Pass show before the options" in capsys.readouterr().err
    assert status("image=x") == 2
    assert status() == 2
    assert status("--help") == 0
    assert capsys.readouterr().out.count("image=<file or folder>") == 2
