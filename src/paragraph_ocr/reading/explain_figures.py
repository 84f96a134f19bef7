"""What `explain.py` measures, drawn: a figure a question, and an animation along the text."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.positions import add_grid_positions
from paragraph_ocr.reading.explain import (
    Circuit,
    Trace,
    causal_mask,
    entropy,
    random_circuit,
    random_matrix,
)

DPI = 100
HEAT = "#e6550d"  # of attention on a page: orange shows on ink and on paper

MOST_LABELS = 48
"""Characters along an axis, or pictures of a sheet, above which only the first are shown."""

_MOST_TICKS = 120  # more would stand in one another

_SHOWN = {" ": "␣", "\n": "⏎"}


def label(token: str) -> str:
    """Return a token as figures show it: white space as a sign."""
    return _SHOWN.get(token, token)


def png(figure: Figure) -> bytes:
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=DPI)
    return packed.getvalue()


def attention_by_character(
    page: UInt8[np.ndarray, "H W"],
    looks: Float[Tensor, "L h w"],
    labels: Sequence[str],
    *,
    cell_px: tuple[int, int],
    columns: int = 4,
) -> Figure:
    """Return the page once for each character, with where the model looked when it wrote it."""
    count = min(len(labels), MOST_LABELS)
    aspect = page.shape[0] / page.shape[1]
    rows = -(-count // columns)
    figure = _figure(3.0 * columns, rows * (3.0 * aspect + 0.25))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, axes in enumerate(grid):
        axes.set_axis_off()
        if index < count:
            _overlay(axes, page, looks[index], cell_px)
            axes.set_title(f"{index + 1}  {label(labels[index])}", fontsize=9, pad=2)
    return figure


def attention_averages(page: UInt8[np.ndarray, "H W"], trace: Trace) -> Figure:
    """Return the attention averaged over the whole text and the heads: of each layer, and of all."""
    layers = trace.cross_attention.mean(dim=(1, 2))
    return _overlays(
        page,
        [*layers, layers.mean(dim=0)],
        [*(f"layer {number}" for number in range(1, len(layers) + 1)), "all layers"],
        columns=min(3, len(layers) + 1),
        cell_px=trace.cell_px,
    )


def attention_by_head(
    page: UInt8[np.ndarray, "H W"], trace: Trace, position: int, name: str
) -> Figure:
    """Return where each head of each layer looks for one character: a row a layer."""
    layers, heads = trace.cross_attention.shape[:2]
    figure = _overlays(
        page,
        list(trace.cross_attention[:, :, position].flatten(0, 1)),
        [f"layer {n + 1} head {h + 1}" for n in range(layers) for h in range(heads)],
        columns=heads,
        cell_px=trace.cell_px,
    )
    figure.suptitle(f"writing {label(name)} (character {position + 1})", fontsize=10)
    return figure


def attention_path(trace: Trace, labels: Sequence[str]) -> Figure:
    """Return the attention of the last layer along the text, summed over columns and over rows.

    A model that reads walks down the rows, and across the columns once for each line.
    """
    looks = trace.looks()
    figure = _figure(min(20.0, max(6.0, 0.16 * len(labels) + 1.5)), 5.0)
    down, across = figure.subplots(2, 1, sharex=True)
    for axes, sums, name in ((down, looks.sum(dim=2), "row"), (across, looks.sum(dim=1), "column")):
        axes.imshow(sums.T.numpy(), aspect="auto", cmap="magma", interpolation="nearest")
        axes.set_ylabel(f"{name} of cells")
        for end in (i for i, text in enumerate(labels) if text == "\n"):
            axes.axvline(end + 0.5, color="white", lw=0.7)
    _label_axis(across, labels, "x")
    return figure


def animate(
    page: UInt8[np.ndarray, "H W"],
    looks: Float[Tensor, "L h w"],
    labels: Sequence[str],
    *,
    cell_px: tuple[int, int],
    most_frames: int = 120,
) -> list[Image.Image]:
    """Return a frame for each character: the page, where the model looks, the text so far below."""
    scale = max(1, round(640 / page.shape[1]))
    paper = 1 - np.repeat(np.repeat(page, scale, 0), scale, 1)[..., None] / 255.0
    heat = np.array([int(HEAT[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    font = ImageFont.load_default(size=18)
    lines = "".join(map(str, labels[:most_frames])).split("\n")
    frames = []
    for index in range(min(len(labels), most_frames)):
        weights = _on_pixels(looks[index], page.shape, cell_px)
        alpha = np.repeat(np.repeat(weights / max(weights.max(), 1e-9), scale, 0), scale, 1)
        shaded = paper * (1 - 0.75 * alpha[..., None]) + heat * 0.75 * alpha[..., None]
        picture = Image.fromarray((shaded * 255).astype(np.uint8))
        frame = Image.new("RGB", (picture.width, picture.height + 24 * len(lines) + 10), "white")
        frame.paste(picture)
        ImageDraw.Draw(frame).multiline_text(
            (8, picture.height + 4), "".join(labels[: index + 1]), fill="black", font=font
        )
        frames.append(frame.quantize(64))
    return frames


def gif(frames: Sequence[Image.Image], *, milliseconds: int = 180) -> bytes:
    packed = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    frames[0].save(
        packed, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    return packed.getvalue()


def causal(trace: Trace, read: Sequence[str]) -> Figure:
    """Return the mask, and beside it what each layer's self-attention makes of it.

    Args:
        read: the tokens that the positions have read, the start first.
    """
    read = read[:MOST_LABELS]
    means = trace.self_attention.mean(dim=1)[:, : len(read), : len(read)]
    side = 0.4 + max(3.0, 0.13 * len(read))
    figure = _figure(side * (len(means) + 1), side + 0.7)
    mask, *others = figure.subplots(1, len(means) + 1, squeeze=False)[0]
    mask.imshow(causal_mask(len(read)).numpy(), cmap="Greys", vmin=0, vmax=2)
    mask.set_title("may be seen (grey)", fontsize=9)
    for number, (axes, mean) in enumerate(zip(others, means, strict=True), start=1):
        axes.imshow(mean.sqrt().numpy(), cmap="magma", vmin=0, vmax=1)
        axes.set_title(f"layer {number}, mean of heads (square root)", fontsize=9)
    for axes in (mask, *others):
        _label_axis(axes, read, "x")
        _label_axis(axes, read, "y")
    mask.set_ylabel("position that looks")
    mask.set_xlabel("position looked at")
    return figure


def positions(decoder: Decoder, *, length: int, grid: tuple[int, int]) -> Figure:
    """Return the 1-D code of the text, and of the 2-D code how like one cell's is to all others'."""
    figure = _figure(12.0, 3.6)
    code, cell, alike = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    one = decoder.positions[:length]
    code.imshow(one.numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    code.set(title="1-D: sines of the position in the text", xlabel="channel", ylabel="position")
    two = add_grid_positions(torch.zeros(1, decoder.width, *grid))[0]
    flat = two.flatten(1)
    # a channel of the columns' half, and one of the rows', at a wavelength of some cells
    quarter = decoder.width // 8 // 2 * 2
    cell.imshow(
        (two[quarter] + two[decoder.width // 2 + quarter]).numpy(), aspect="auto", cmap="RdBu"
    )
    cell.set(title="2-D: a row channel + a column channel", xlabel="column", ylabel="row")
    row, column = grid[0] // 2, grid[1] // 2
    likeness = torch.nn.functional.cosine_similarity(
        flat, two[:, row, column, None], dim=0
    ).reshape(grid)
    alike.imshow(likeness.numpy(), aspect="auto", cmap="viridis")
    alike.plot(column, row, "r+")
    alike.set(title="2-D: cosine with the cell at +", xlabel="column", ylabel="row")
    for axes in (code, cell, alike):
        axes.title.set_fontsize(9)
    return figure


def embeddings(trace: Trace, decoder: Decoder, read: Sequence[str]) -> Figure:
    """Return the embedded tokens without and with positions, and how alike they are to one another.

    Without positions the same letter is the same vector wherever it stands; with them no two are.
    """
    read = read[:MOST_LABELS]
    together = trace.streams[0, : len(read)]
    apart = together - decoder.positions[: len(read)]
    side = 0.4 + max(3.0, 0.13 * len(read))
    figure = _figure(3 * side, 2 * side)
    parts = figure.subplots(2, 2, width_ratios=(2, 1))
    largest = float(together.abs().quantile(0.99))
    for (values, cosines), vectors, name in zip(
        parts, (apart, together), ("without positions", "with positions"), strict=True
    ):
        values.imshow(vectors.numpy(), aspect="auto", cmap="RdBu", vmin=-largest, vmax=largest)
        values.set(title=f"embedding {name}", xlabel="channel")
        _label_axis(values, read, "y")
        unit = torch.nn.functional.normalize(vectors, dim=1)
        cosines.imshow((unit @ unit.T).numpy(), cmap="viridis", vmin=-1, vmax=1)
        cosines.set(title=f"cosine {name}")
        for axis in ("x", "y"):
            _label_axis(cosines, read, axis)
        for axes in (values, cosines):
            axes.title.set_fontsize(9)
    return figure


def features(
    page: UInt8[np.ndarray, "H W"],
    maps: Mapping[str, Float[Tensor, "C ..."]],
    *,
    num_channels: int = 4,
) -> Figure:
    """Return the page, and after each stage of the ResNet the channels that vary most over it."""
    aspect = page.shape[0] / page.shape[1]
    columns = num_channels + 1
    figure = _figure(2.6 * columns, (len(maps) + 1) * (2.6 * aspect + 0.3))
    grid = figure.subplots(len(maps) + 1, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    grid[0, 0].imshow(page, cmap="Greys")
    grid[0, 0].set_title(f"page {page.shape[0]}x{page.shape[1]} px", fontsize=8)
    for row, (name, found) in zip(grid[1:], maps.items(), strict=True):
        channels, height, width = found.shape
        shown = {"extent": (0, width, height, 0), "aspect": "auto", "interpolation": "nearest"}
        row[0].imshow(found.abs().mean(dim=0).numpy(), cmap="magma", **shown)
        row[0].set_title(f"{name}: {channels} x {height}x{width}, mean size", fontsize=8)
        most = found.flatten(1).std(dim=1).topk(min(num_channels, channels)).indices
        for axes, channel in zip(row[1:], most.tolist(), strict=False):
            axes.imshow(found[channel].numpy(), cmap="magma", **shown)
            axes.set_title(f"channel {channel}", fontsize=8)
    return figure


def lens(
    logits: Float[Tensor, "stages L V"],
    stages: Sequence[str],
    labels: Sequence[str],
    tokens: Sequence[str],
) -> Figure:
    """Return what each stage of the residual stream would write for each character, and how surely.

    Args:
        labels: what should be written; a cell that says so is framed.
        tokens: the vocabulary's.
    """
    labels = labels[:MOST_LABELS]
    sure, written = logits[:, : len(labels)].softmax(dim=-1).max(dim=-1)
    figure = _figure(max(5.0, 0.24 * len(labels) + 1.5), 0.32 * len(stages) + 1.2)
    axes = figure.subplots()
    image = axes.imshow(sure.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, origin="lower")
    for stage, row in enumerate(written.tolist()):
        for place, token in enumerate(row):
            right = tokens[token] == labels[place]
            axes.text(
                place, stage, label(tokens[token]), ha="center", va="center",
                fontsize=8 if len(tokens[token]) == 1 else 5,
                color="white" if sure[stage, place] > 0.6 else "black",
                fontweight="bold" if right else "normal",
                bbox={"boxstyle": "square,pad=0.25", "fill": False, "ec": "tab:green", "lw": 1.2}
                if right else None,
            )  # fmt: skip
    axes.set_yticks(range(len(stages)), stages, fontsize=8)
    _label_axis(axes, labels, "x")
    axes.set_xlabel("what should be written (framed where the stage says so)", fontsize=8)
    figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    return figure


def spectra(found: Mapping[str, Sequence[Circuit]], *, width: int) -> Figure:
    """Return the singular values of each head's circuits, beside random matrices of their shape.

    Args:
        found: circuits by name, one for each head.
        width: of the residual stream.
    """
    figure = _figure(11.0, 2.8 * -(-len(found) // 2))
    grid = figure.subplots(-(-len(found) // 2), 2, squeeze=False).ravel()
    for axes, (name, heads) in zip(grid, found.items(), strict=False):
        rank = len(heads[0].singular)
        factors, full = random_circuit(width, rank, seed=0), random_matrix(width, seed=0)
        for number, circuit in enumerate(heads, start=1):
            _spectrum(axes, circuit, f"head {number}", lw=1.2)
        _spectrum(axes, factors, f"random, {width}x{rank} by {rank}x{width}", color="0.4", ls="--")
        _spectrum(axes, full, f"random, {width}x{width}", color="0.7", ls=":")
        axes.set(title=name, xlabel="singular value number", yscale="log", ylim=(0.01, 1.2))
        axes.set_xlim(0, 2 * rank)
        axes.set_ylabel("share of the largest")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7, title="effective rank", title_fontsize=7)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    return figure


def readings(
    told: Trace,
    free: Trace,
    truth: Sequence[str],
    tokens: Sequence[str],
    *,
    name: str = "true text",
) -> Figure:
    """Return the truth, what the model writes when fed it, and what it writes when fed its own text.

    Positions are compared one by one, so one character too many makes all after it red.
    """
    rows = [
        (name, list(truth), None),
        ("teacher-forced", *_written(told, tokens)),
        ("free-running", *_written(free, tokens)),
    ]
    length = min(MOST_LABELS, max(len(texts) for _, texts, _ in rows))
    figure = _figure(max(5.0, 0.22 * length + 1.6), 1.7)
    axes = figure.subplots()
    for place, (_, texts, sure) in enumerate(rows):
        for index, text in enumerate(texts[:length]):
            wrong = index >= len(truth) or text != truth[index]
            shade = 1.0 if sure is None else float(sure[index])
            axes.text(
                index, -place, label(text), ha="center", va="center",
                fontsize=9 if len(text) == 1 else 5, color="tab:red" if wrong else "black",
                bbox={"boxstyle": "square,pad=0.3", "ec": "none",
                      "fc": colormaps["Blues"](0.45 * shade) if sure is not None else "white"},
            )  # fmt: skip
    axes.set(xlim=(-1, length), ylim=(-len(rows) + 0.3, 0.7), xticks=[])
    axes.set_yticks(range(0, -len(rows), -1), [heading for heading, _, _ in rows])
    axes.spines[:].set_visible(False)
    return figure


def entropies(traces: Mapping[str, Trace], labels: Mapping[str, Sequence[str]]) -> Figure:
    """Return how undecided the model was at each character, in bits."""
    longest = max(len(texts) for texts in labels.values())
    figure = _figure(max(6.0, 0.16 * min(longest, MOST_LABELS) + 1.5), 2.0 * len(traces))
    for axes, (name, trace) in zip(
        figure.subplots(len(traces), 1, sharey=True, squeeze=False)[:, 0],
        traces.items(),
        strict=True,
    ):
        shown = labels[name][:MOST_LABELS]
        bits = entropy(trace.logits)[: len(shown)].numpy()
        axes.bar(range(len(bits)), bits, color="tab:blue")
        most = float(np.log2(trace.logits.shape[-1]))
        axes.set_title(f"{name}: {bits.mean():.2f} bits in the mean, of at most {most:.2f}")
        axes.set_ylabel("bits")
        axes.set_xlim(-1, len(bits))
        axes.title.set_fontsize(9)
        _label_axis(axes, shown, "x")
    return figure


def _written(trace: Trace, tokens: Sequence[str]) -> tuple[list[str], Tensor]:
    sure, written = trace.logits.softmax(dim=-1).max(dim=-1)
    return [tokens[token] for token in written.tolist()], sure


def _figure(width_in: float, height_in: float) -> Figure:
    return Figure(figsize=(width_in, height_in), layout="constrained")


def _overlays(
    page: UInt8[np.ndarray, "H W"],
    grids: Sequence[Float[Tensor, "h w"]],
    titles: Sequence[str],
    *,
    columns: int,
    cell_px: tuple[int, int],
) -> Figure:
    rows = -(-len(grids) // columns)
    aspect = page.shape[0] / page.shape[1]
    figure = _figure(3.0 * columns, rows * (3.0 * aspect + 0.3) + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for each in axes:
        each.set_axis_off()
    for each, grid, title in zip(axes, grids, titles, strict=False):
        _overlay(each, page, grid, cell_px)
        each.set_title(title, fontsize=8, pad=2)
    return figure


def _overlay(
    axes: Axes,
    page: UInt8[np.ndarray, "H W"],
    weights: Float[Tensor, "h w"],
    cell_px: tuple[int, int],
) -> None:
    """Draw a page, and over it attention as colour, the strongest cell in full."""
    heat = _on_pixels(weights, page.shape, cell_px)
    axes.imshow(page, cmap="Greys", vmin=0, vmax=255)
    colour = np.array([int(HEAT[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    shade = np.empty((*page.shape, 4), np.uint8)
    shade[..., :3] = colour
    shade[..., 3] = 190 * heat / max(heat.max(), 1e-9)
    axes.imshow(shade)


def _on_pixels(
    weights: Float[Tensor, "h w"], shape: tuple[int, ...], cell_px: tuple[int, int]
) -> np.ndarray:
    """Return each pixel's cell's weight, cut to the page."""
    spread = np.repeat(np.repeat(weights.numpy(), cell_px[0], axis=0), cell_px[1], axis=1)
    return spread[: shape[0], : shape[1]]


def _spectrum(axes: Axes, circuit: Circuit, name: str, **style) -> None:
    values = (circuit.singular / circuit.singular[0]).numpy()
    axes.plot(
        range(1, len(values) + 1), values, label=f"{name}: {circuit.effective_rank:.1f}", **style
    )


def _label_axis(axes: Axes, texts: Sequence[str], axis: str) -> None:
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    if len(texts) <= _MOST_TICKS:
        set_ticks(range(len(texts)), [label(text) for text in texts], fontsize=6)
