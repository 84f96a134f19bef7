"""An evaluation as one page of HTML that needs nothing but itself."""

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from string import Template

import numpy as np
from PIL import Image
from rapidfuzz.distance import Levenshtein

from paragraph_ocr.reading.evaluation import (
    BINS,
    Bin,
    Calibration,
    Comparison,
    Estimate,
    Evaluation,
    Read,
)

CONFUSIONS = 20
WRITERS = 30
REVIEWED = (0.05, 0.1, 0.2, 0.5)

RATE_NAMES = {
    "cer": "character errors",
    "wer": "word errors",
    "exact": "without an error",
    "cer_collapsed": "character errors, white space collapsed",
    "cer_mean": "character errors, mean of paragraphs",
}
_GROUP_NAMES = {"lines": "By lines", "length": "By length", "writer": "By writer"}


@dataclass(frozen=True, slots=True)
class Side:
    """A model under its name, and how it read."""

    name: str
    evaluation: Evaluation


def report(
    sides: Sequence[Side],
    comparison: Comparison | None,
    *,
    about: Mapping[str, str],
    notes: Sequence[str],
    image: Callable[[int], np.ndarray],
    show: int,
) -> str:
    """Return the page; every text in it is escaped.

    Args:
        sides: the model in question, and the one that it is compared with, if any.
        image: returns the page of a row, uint8 (H, W), 0 is paper.
        show: how many paragraphs, of the worst and of the best.
    """
    name, evaluation = sides[0].name, sides[0].evaluation
    worst = evaluation.worst(show)
    rest = [one for one in evaluation.best(2 * show) if one not in worst][:show]
    return _PAGE.substitute(
        title=html.escape(f"How {name} reads"),
        about=_definitions(about),
        cards=_cards(evaluation),
        notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        comparison=_comparison(sides, comparison) if comparison else "",
        groups=_groups(evaluation),
        errors=_errors(evaluation),
        calibration=_calibration(evaluation),
        worst="".join(_paragraph(one, image(one.row)) for one in worst),
        best=f"<h2>Best paragraphs</h2>{''.join(_paragraph(one, image(one.row)) for one in rest)}"
        if rest
        else "",
        resamples=f"{evaluation.resamples:,}",
    )


def marked(reading: str, truth: str) -> tuple[str, str]:
    """Return truth and reading as HTML, with what differs marked in each.

    Written wrongly or too much: marked in the reading; left out: marked in the truth, with a mark where it
    is missing in the reading.
    """
    true, written = [], []
    for step in Levenshtein.opcodes(truth, reading):
        was = _visible(truth[step.src_start : step.src_end], differs=step.tag != "equal")
        now = _visible(reading[step.dest_start : step.dest_end], differs=step.tag != "equal")
        if step.tag == "equal":
            true.append(was)
            written.append(now)
            continue
        if was:
            true.append(f'<mark class="was">{was}</mark>')
        gap = '<mark class="gap"></mark>'
        written.append(f'<mark class="now">{now}</mark>' if now else gap)
    return "".join(true), "".join(written)


def _visible(text: str, *, differs: bool) -> str:
    escaped = html.escape(text)
    return escaped.replace("\n", "⏎\n").replace(" ", "␣") if differs else escaped


def _shown(character: str) -> str:
    return {" ": "space", "\n": "newline", "": "nothing"}.get(character, character)


def _percent(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{100 * value:.1f}%" if abs(value) >= 0.001 or value == 0 else f"{100 * value:.2f}%"


def _interval(estimate: Estimate) -> str:
    return f"{_percent(estimate.low)} to {_percent(estimate.high)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """Return a table of cells that are HTML already."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<table class="{kind}"><thead>{line("th", heads)}</thead><tbody>{body}</tbody></table>'


def _definitions(about: Mapping[str, str]) -> str:
    return "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in about.items()
    )


def _cards(evaluation: Evaluation) -> str:
    rates = evaluation.rates
    big = "".join(
        f'<div class="card"><b>{_percent(rates[key].value)}</b>'
        f"<span>{RATE_NAMES[key]}</span><small>{_interval(rates[key])}</small></div>"
        for key in ("cer", "wer", "exact")
    )
    characters = int(evaluation.counts["characters"].sum())
    size = (
        f'<div class="card"><b>{len(evaluation):,}</b><span>paragraphs</span>'
        f"<small>{characters:,} characters</small></div>"
    )
    small = "; ".join(
        f"{RATE_NAMES[key]} {_percent(rates[key].value)} ({_interval(rates[key])})"
        for key in ("cer_collapsed", "cer_mean")
    )
    return f'<div class="cards">{big}{size}</div><p class="small">{small}.</p>'


def _comparison(sides: Sequence[Side], comparison: Comparison) -> str:
    names = [html.escape(side.name) for side in sides]
    rows = []
    for key, (ours, theirs) in comparison.rates.items():
        difference = comparison.differences[key]
        rows.append(
            (
                RATE_NAMES[key],
                _percent(ours),
                _percent(theirs),
                f"{100 * difference.value:+.2f}",
                f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}",
            )
        )
    same = len(sides[0].evaluation) - comparison.better - comparison.worse
    sure = comparison.p_value < 0.05
    verdict = "unlikely to be chance" if sure else "may well be chance"
    p_value = f"{comparison.p_value:.4f}" if comparison.p_value >= 0.0005 else "below 0.0005"
    return (
        "<h2>Against another model</h2>"
        + _table(("", names[0], names[1], "difference, points", "95% interval"), rows)
        + f"<p>{names[0]} reads {comparison.better:,} paragraphs with fewer errors, "
        f"{comparison.worse:,} with more, {same:,} with as many. The difference in character errors "
        f"{verdict} (p = {p_value}, paired permutation test over paragraphs).</p>"
    )


def _groups(evaluation: Evaluation) -> str:
    parts = []
    for kind, heading in _GROUP_NAMES.items():
        groups = evaluation.groups(kind)
        if len(groups) < 2:
            continue
        said = ""
        if len(groups) > WRITERS:
            said = f'<p class="small">The {WRITERS} of {len(groups):,} with the most errors.</p>'
            hardest = sorted(groups.items(), key=lambda item: -item[1][1]["cer"].value)
            groups = dict(hardest[:WRITERS])
        finite = [r["cer"].high for _, r in groups.values() if math.isfinite(r["cer"].high)]
        scale = max(finite, default=0.0) or 1.0
        rows = [
            (
                html.escape(name),
                f"{count:,}",
                _percent(rates["cer"].value),
                _bar(rates["cer"], scale),
                _interval(rates["cer"]),
                _percent(rates["wer"].value),
                _percent(rates["exact"].value),
            )
            for name, (count, rates) in groups.items()
        ]
        heads = ("", "paragraphs", "CER", "", "95% interval", "WER", "without an error")
        parts.append(f"<h3>{heading}</h3>{said}{_table(heads, rows, kind='groups')}")
    return f"<h2>Where the errors are</h2>{''.join(parts)}" if parts else ""


def _bar(estimate: Estimate, scale: float) -> str:
    """Return a bar as long as the rate, with a whisker from low to high."""

    def at(value: float) -> float:
        return 150 * min(1.0, value / scale)

    value, low, high = map(at, estimate)
    return (
        '<svg viewBox="0 0 156 14" width="156" height="14">'
        f'<rect class="bar" x="0" y="2" width="{value:.1f}" height="10"/>'
        f'<path class="whisker" d="M{low:.1f} 7H{high:.1f}M{low:.1f} 4V10M{high:.1f} 4V10"/></svg>'
    )


def _errors(evaluation: Evaluation) -> str:
    kinds, total = evaluation.kinds, evaluation.edits.total()
    said = ", ".join(f"<b>{count:,}</b> {kind}" for kind, count in kinds.items())
    if not total:
        return "<p>No character is wrong.</p>" + _histogram(evaluation)
    rows = [
        (
            html.escape(_shown(true)),
            html.escape(_shown(written)),
            f"{count:,}",
            _percent(count / total),
            _percent(count / evaluation.occurrences[true]) if true else "",
        )
        for (true, written), count in evaluation.edits.most_common(CONFUSIONS)
    ]
    heads = ("true", "written", "times", "of all errors", "of the true ones")
    lost = {
        character: sum(n for (true, _), n in evaluation.edits.items() if true == character)
        for character in evaluation.occurrences
    }
    hardest = sorted(lost.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
    characters = [
        (
            html.escape(_shown(character)),
            f"{evaluation.occurrences[character]:,}",
            f"{count:,}",
            _percent(count / evaluation.occurrences[character]),
        )
        for character, count in hardest
        if count
    ]
    character_heads = ("character", "in the truth", "misread", "share")
    return (
        f"<p>{total:,} character errors: {said}.</p>"
        '<div class="columns">'
        f"<div><h3>Confusions</h3>{_table(heads, rows)}</div>"
        f"<div><h3>Characters that cost most</h3>{_table(character_heads, characters)}</div>"
        f"<div><h3>Errors a paragraph</h3>{_histogram(evaluation)}</div></div>"
    )


def _histogram(evaluation: Evaluation) -> str:
    """Return how many paragraphs have which CER, as SVG; the last bar holds those above 100%."""
    rates = np.clip(np.nan_to_num([one.cer for one in evaluation.read], posinf=2.0), 0, 1.05)
    exact = int((rates == 0).sum())
    edges = np.linspace(0, 1, 21)
    counts = [exact, *np.histogram(rates[(rates > 0) & (rates < 1)], edges)[0]]
    counts.append(int((rates >= 1).sum()))
    top, broad = max(counts), 280 / len(counts)
    bars = "".join(
        f'<rect class="{"best" if index == 0 else "bar"}" x="{index * broad:.1f}" '
        f'y="{100 - 90 * count / top:.1f}" width="{broad - 1:.1f}" height="{90 * count / top:.1f}">'
        f"<title>{count:,} paragraphs</title></rect>"
        for index, count in enumerate(counts)
    )
    ticks = "".join(
        f'<text x="{(1 + share * 20) * broad:.1f}" y="114" text-anchor="middle">{100 * share:.0f}%</text>'
        for share in (0.25, 0.5, 0.75, 1.0)
    )
    return (
        f'<svg viewBox="0 0 284 134" width="284" height="134">{bars}{ticks}'
        '<text x="0" y="114">exact</text>'
        '<text x="140" y="130" text-anchor="middle">CER of a paragraph</text></svg>'
    )


def _calibration(evaluation: Evaluation) -> str:
    calibration = evaluation.calibration
    bins = calibration.bins
    if not bins:
        return "<p>Nothing was written.</p>"
    rows = [
        (_percent(found.confidence), _percent(found.right), f"{found.count:,}") for found in bins
    ]
    reviewed = [
        (_percent(share), _percent(found), _percent(rest))
        for share in REVIEWED
        for found, rest in [evaluation.review(share)]
    ]
    heads = ("paragraphs looked through", "errors found", "CER of the rest")
    return (
        '<div class="columns">'
        f"<div><h3>Characters</h3>{_reliability(bins)}</div>"
        f"<div><h3>In figures</h3>{_table(('confidence', 'right', 'characters'), rows)}"
        f"<p>Mean gap: <b>{_percent(calibration.error)}</b> (expected calibration error, "
        f"{BINS} bins); {_leaning(calibration)}.</p></div>"
        f"<div><h3>The least confident first</h3>{_table(heads, reviewed)}</div></div>"
    )


def _leaning(calibration: Calibration) -> str:
    bins = calibration.bins
    total = sum(found.count for found in bins)
    lean = sum(found.count * (found.confidence - found.right) for found in bins) / total
    if abs(lean) < 0.01:
        return "confidence and truth agree on the whole"
    return f"the model is {_percent(abs(lean))} too {'sure' if lean > 0 else 'unsure'} on the whole"


def _reliability(bins: Sequence[Bin]) -> str:
    """Return share right over confidence, as SVG: on the diagonal confidence means what it says."""
    side = 220

    def place(found: Bin) -> tuple[float, float]:
        return 40 + side * found.confidence, 10 + side * (1 - found.right)

    most = max(found.count for found in bins)
    columns = "".join(
        f'<rect class="count" x="{place(found)[0] - 5:.1f}" width="10" '
        f'y="{10 + side - 60 * found.count / most:.1f}" height="{60 * found.count / most:.1f}"/>'
        for found in bins
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, bins))
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{found.count:,} characters: confidence '
        f"{_percent(found.confidence)}, right {_percent(found.right)}</title></circle>"
        for found in bins
        for x, y in [place(found)]
    )
    ticks = "".join(
        f'<text x="{40 + side * share:.0f}" y="{side + 26}" text-anchor="middle">{100 * share:.0f}%</text>'
        f'<text x="34" y="{14 + side * (1 - share):.0f}" text-anchor="end">{100 * share:.0f}%</text>'
        for share in (0, 0.5, 1)
    )
    return (
        f'<svg viewBox="0 0 280 {side + 46}" width="280" height="{side + 46}">'
        f'<rect class="frame" x="40" y="10" width="{side}" height="{side}"/>'
        f'<path class="diagonal" d="M40 {10 + side}L{40 + side} 10"/>{columns}'
        f'<polyline points="{line}"/>{dots}{ticks}'
        f'<text x="{40 + side / 2}" y="{side + 42}" text-anchor="middle">confidence</text></svg>'
        '<p class="small">Points: share of right characters. Columns: how many were written so '
        "confidently.</p>"
    )


def _paragraph(one: Read, page: np.ndarray) -> str:
    true, written = marked(one.reading, one.truth)
    where = html.escape(
        one.source + (f", {one.writer}" if one.writer not in ("", one.source) else "")
    )
    errors = f"{one.errors:,} error{'' if one.errors == 1 else 's'}"
    return (
        f'<section class="paragraph"><header>CER <b>{_percent(one.cer)}</b>, {errors}, '
        f"confidence {_percent(one.confidence)} <small>row {one.row}: {where}</small></header>"
        f'<img alt="" src="data:image/png;base64,{_png(page)}" width="{page.shape[1]}">'
        f'<div class="texts"><div><h4>truth</h4><pre>{true}</pre></div>'
        f"<div><h4>reading</h4><pre>{written}</pre></div></div></section>"
    )


def _png(page: np.ndarray) -> str:
    packed = BytesIO()
    # 16 grey levels show strokes as well, in a third of the bytes
    grey = Image.fromarray(255 - page).quantize(16)
    grey.save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode("ascii")


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1d2733; --soft: #667485; --line: #dfe5ec; --bar: #6c9bd2;
  --wrong: #ffd5cf; --wrong-ink: #a11708; --was: #d8efd9; --was-ink: #1c6b28; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 2rem auto;
  max-width: 1140px; padding: 0 1.2rem; }
h1 { font-size: 1.55rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 2px solid var(--line);
  padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
h4 { font-size: .75rem; margin: 0; color: var(--soft); font-weight: 600; text-transform: uppercase; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .9rem; margin: 0 0 1.2rem;
  font-size: .88rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .7rem 1rem; }
.card b { display: block; font-size: 1.9rem; line-height: 1.2; }
.card span { display: block; } .card small { color: var(--soft); }
.small, small { color: var(--soft); font-size: .85rem; }
.note { background: #fff6db; border-left: 4px solid #e8b931; padding: .4rem .8rem; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; margin: .3rem 0 .8rem; }
th { font-weight: 600; color: var(--soft); }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .7rem .2rem 0; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.columns { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
.columns p { max-width: 19rem; } .columns table { font-size: .85rem; }
.columns th, .columns td { padding-right: .55rem; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg { vertical-align: middle; }
.bar { fill: var(--bar); } .best { fill: #63b37a; } .count { fill: #e3eaf2; }
.whisker { stroke: var(--ink); stroke-width: 1.2; fill: none; }
.frame { fill: none; stroke: var(--line); } .diagonal { stroke: #aab6c3; stroke-dasharray: 4 4; }
polyline { fill: none; stroke: var(--bar); stroke-width: 2; } circle { fill: #2f6db5; }
.paragraph { border: 1px solid var(--line); border-radius: 10px; margin: .8rem 0; padding: .7rem 1rem;
  break-inside: avoid; }
.paragraph header { margin-bottom: .5rem; } .paragraph small { margin-left: .5rem; }
.paragraph img { max-width: 100%; height: auto; border: 1px solid var(--line); background: #fff; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: .3rem 1.6rem;
  margin-top: .5rem; }
pre { font: 14px/1.5 ui-monospace, monospace; margin: .1rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
mark { border-radius: 3px; padding: 0 1px; }
.now { background: var(--wrong); color: var(--wrong-ink); }
.was { background: var(--was); color: var(--was-ink); }
.gap { background: var(--wrong-ink); padding: 0 1.5px; margin: 0 1px; }
</style>
</head>
<body>
<h1>$title</h1>
<dl>$about</dl>
$cards
$notes
$comparison
$groups
<h2>What is misread</h2>
$errors
<h2>Whether confidence can be trusted</h2>
$calibration
<h2>Worst paragraphs</h2>
<p class="small">In the truth <mark class="was">green</mark>: what was not read so. In the reading
<mark class="now">red</mark>: wrong or too much; <mark class="gap"></mark> left out.</p>
$worst
$best
<p class="small">Intervals: the middle 95% of $resamples resamples of the paragraphs. Rates are pooled:
errors over true characters (words), newlines counted, so that a page weighs more than a note.</p>
</body>
</html>
""")
