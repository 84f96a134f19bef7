"""Paragraphs as somebody cuts them out of a page: neighbouring lines come along in part."""

from itertools import accumulate

import numpy as np

from paragraph_ocr.data.render import Drawing

_OTHERS, _OWN = 0.5, 0.75
"""Share of the edges that run through another line; through that, or through the heads or tails of the
paragraph's own. The rest run between two lines."""

_LEAST_LINES = 2
"""That are left whole."""

_LEGIBLE = 0.6
"""Share of the height of x from which on a line that is cut is read nevertheless."""


def cut_out(drawing: Drawing, generator: np.random.Generator) -> Drawing:
    """Return the paragraph without its first or last line, of which the image then keeps a part.

    Edges are level, however lines slope. What is left begins as high on the canvas as the drawing did.
    """
    starts = [*accumulate((len("".join(line.split())) for line in drawing.lines), initial=0)]
    (inked,) = np.nonzero(drawing.image.any(axis=1))
    if not len(inked):  # a few dots that the pen has hardly pressed
        return drawing
    begin, top, bottom = int(inked[0]), int(inked[0]), int(inked[-1]) + 1
    first, last = 0, len(drawing.lines)
    for upper in (True, False):
        kind, place = generator.random(2)
        line = first if upper else last - 1
        tops, bottoms = drawing.letters[starts[line] : starts[line + 1], 1::2].T
        head, foot = np.median(tops), np.median(bottoms)  # of its small letters
        if kind < _OTHERS and last - first > _LEAST_LINES:
            first, last = (first + 1, last) if upper else (first, last - 1)
            shown = _LEGIBLE * (foot - head)
            edge = (foot - shown, bottoms.max()) if upper else (tops.min(), head + shown)
        elif _OTHERS <= kind < _OWN:
            edge = (tops.min(), head) if upper else (foot, bottoms.max())
        else:
            continue
        row = round(edge[0] + place * (edge[1] - edge[0]))
        top, bottom = (max(top, row), bottom) if upper else (top, min(bottom, row))
    bottom = max(top, bottom)
    image = np.zeros_like(drawing.image)
    image[begin : begin + bottom - top] = drawing.image[top:bottom]
    boxes = drawing.boxes[first:last].copy()
    letters = drawing.letters[starts[first] : starts[last]].copy()
    for kept in (boxes, letters):
        kept[:, 1::2] = kept[:, 1::2].clip(top, bottom) - top + begin
    return Drawing(image, drawing.lines[first:last], boxes, letters)
