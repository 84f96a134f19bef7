"""The `key=value` arguments of the scripts: a dataclass says which there are; a mistake is one line.

Values are taken as they are after the first `=`, so that a path may hold `=`, commas and blanks.
"""

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from paragraph_ocr.errors import UserError, nearest

T = TypeVar("T")

_HELP = {"--help", "-h", "help"}
_TRUTH = {"true": True, "false": False}


def run(kind: type[T], command: Callable[[T], int | None], *, about: str) -> int:
    """Return the exit status of a script: the arguments parsed, its command run, mistakes told.

    Args:
        command: takes the options and returns a status, None being 0.
        about: shown by --help, above the list of options.
    """
    words = sys.argv[1:]
    if _HELP & set(words):
        return _help(f"{about.strip()}\n\n{described(kind)}")
    return _status(lambda: command(parse(kind, words)))


def run_subject(
    subjects: Mapping[str, tuple[type, Callable[[Any], int | None]]], *, about: str
) -> int:
    """Return the exit status of a script whose first argument is a word that says what it does.

    Args:
        subjects: the words, each with its options and its command, as in `run`.
    """
    words = sys.argv[1:]
    if _HELP & set(words):
        listed = [f"{name}\n{described(kind)}" for name, (kind, _) in subjects.items()]
        return _help("\n\n".join([about.strip(), *listed]))

    def command() -> int | None:
        first = words[0] if words else ""
        if first not in subjects:
            close = nearest(first, subjects, count=1)
            raise UserError(
                f"the first argument {first!r} is not one of {', '.join(subjects)}. "
                f"Pass {close[0] if close else next(iter(subjects))} before the options."
            )
        kind, run_it = subjects[first]
        return run_it(parse(kind, words[1:]))

    return _status(command)


def _help(text: str) -> int:
    from paragraph_ocr import console

    console.say(text)
    return 0


def _status(command: Callable[[], int | None]) -> int:
    from paragraph_ocr import console

    try:
        return command() or 0
    except UserError as error:
        console.error(str(error))
        return 2
    except KeyboardInterrupt:
        return 1


def parse(kind: type[T], words: Sequence[str]) -> T:
    """Return the options that the words give.

    Args:
        kind: a dataclass. A field may be str, int, float, bool, Path, a Literal of texts, a tuple of
            these (parted by commas), or one of them or None (written null); its metadata may say
            under "help" what it is for.

    Raises:
        UserError: a word is no key=value, a key is unknown or given twice, a value is impossible, or
            one without a default is missing.
    """
    hints, values = get_type_hints(kind), {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign:
            raise UserError(
                f"{word!r} is not of the form key=value. Pass {_missing_or_first(kind)}=<value>."
            )
        if key not in hints:
            raise _unknown(key, text, list(hints))
        if key in values:
            raise UserError(f"{key} is given twice. Pass it once.")
        values[key] = _value(key, text, hints[key])
    for option in _options(kind):
        if option.name not in values and not _has_default(option):
            raise UserError(f"{option.name} has no value. Pass {option.name}={_meant(option)}.")
    return kind(**values)


def described(kind: type) -> str:
    """Return a line for each option: its name, its default, what it is for."""
    lines = []
    for option in _options(kind):
        default = "" if not _has_default(option) else f" (default {_written(_default(option))})"
        lines.append(f"  {option.name}={_meant(option)}{default}")
    return "\n".join(lines)


def _value(key: str, text: str, hint: Any) -> Any:
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in alternatives and text == "null":
        return None
    (wanted,) = (one for one in alternatives if one is not type(None))
    if get_origin(wanted) is Literal:
        return _choice(key, text, get_args(wanted))
    if get_origin(wanted) is tuple:
        items = tuple(part.strip() for part in text.split(",") if part.strip())
        (item, _) = get_args(wanted)
        return tuple(_value(key, part, item) for part in items)
    if wanted is bool:
        if text.lower() not in _TRUTH:
            raise UserError(f"{key}={text} must be true or false. Pass {key}=true.")
        return _TRUTH[text.lower()]
    if wanted in (str, Path):
        if not text:
            raise UserError(f"{key} has no value. Pass {key}=<value>.")
        return wanted(text)
    try:
        return wanted(text)
    except ValueError as error:
        kind = "a whole number" if wanted is int else "a number"
        raise UserError(f"{key}={text} must be {kind}. Pass {key}=<number>.") from error


def _choice(key: str, text: str, choices: Sequence[str]) -> str:
    if text in choices:
        return text
    close = nearest(text, choices, count=1)
    raise UserError(
        f"{key}={text} is not one of {', '.join(choices)}. "
        f"Pass {key}={close[0] if close else '<one of these>'}."
    )


def _unknown(key: str, text: str, known: Sequence[str]) -> UserError:
    close = nearest(key, known)
    if not close:
        return UserError(f"{key}={text} is no option. Pass one of {', '.join(known)}.")
    return UserError(
        f"{key}={text} is no option (nearest: {', '.join(close)}). Pass {close[0]}=<value>."
    )


def _options(kind: type) -> tuple[Field[Any], ...]:
    assert is_dataclass(kind)
    return fields(kind)


def _has_default(option: Field[Any]) -> bool:
    return option.default is not MISSING or option.default_factory is not MISSING


def _default(option: Field[Any]) -> Any:
    if option.default is not MISSING:
        return option.default
    assert option.default_factory is not MISSING
    return option.default_factory()


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "null" if value is None else str(value)


def _meant(option: Field[Any]) -> str:
    return f"<{option.metadata.get('help', 'value')}>"


def _missing_or_first(kind: type) -> str:
    needed = [option.name for option in _options(kind) if not _has_default(option)]
    return (needed or [option.name for option in _options(kind)])[0]
