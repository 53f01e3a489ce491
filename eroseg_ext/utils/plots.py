"""The pictures that ``eroseg demo`` and ``eroseg train`` write, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

Colour = tuple[int, int, int]

_VOID = (0, 0, 0)
_NO_VALUE = "0.55"
_WEIGHT_AT_TAU = 1 / math.cosh(0.5) ** 2
"""A pixel that weighs at least this is in the front: its eroded confidence is at most tau."""
_WIDTH = 13.0
_DPI = 110


class Example(NamedTuple):
    """One image and what the network says of it, as it is and attacked; tensors on the CPU."""

    image: Tensor
    """float32 [3, H, W] in [0, 1]"""
    labels: Tensor
    """int64 [H, W], -1 where void"""
    before: Tensor
    """int64 [H, W], prediction on the image"""
    adversarial: Tensor | None
    """float32 [3, H, W] in [0, 1]"""
    after: Tensor | None
    """int64 [H, W], prediction on the adversarial image"""


def distinct_colours(count: int) -> tuple[Colour, ...]:
    """That many RGB colours (0 to 255) that can be told apart, as far as that goes."""
    if count <= 20:
        listed = np.asarray(colormaps["tab20"].colors)  # type: ignore[attr-defined]
        # Dark and light of a hue are neighbours in this map: take all dark ones first.
        chosen = np.concatenate([listed[0::2], listed[1::2]])[:count]
    else:
        chosen = colormaps["gist_rainbow"](np.linspace(0, 1, count))[:, :3]
        chosen = chosen * np.asarray([1.0, 0.65, 0.4])[np.arange(count) % 3, None]
    return tuple((int(red), int(green), int(blue)) for red, green, blue in np.rint(chosen * 255))


def colourise(labels: Tensor, palette: Sequence[Colour]) -> npt.NDArray[np.uint8]:
    """Classes int64 [H, W] as colours uint8 [H, W, 3]; what is no class of the palette (void) is black."""
    table = np.asarray([*palette, _VOID], np.uint8)
    classes = labels.numpy()
    return table[np.where((classes >= 0) & (classes < len(palette)), classes, len(palette))]


def attack_panel(
    path: Path,
    example: Example,
    confidence: Sequence[Tensor],
    fronts: Sequence[tuple[int, Tensor]],
    *,
    eps: float,
    steps: int,
    classes: Sequence[str],
    palette: Sequence[Colour],
) -> None:
    """Draws one image's attack: what the network sees, what it says, how sure it is, and how the front moves.

    Args:
        path: PNG file to write.
        example: the image, attacked.
        confidence: float32 [H, W], on the image and on the adversarial image; not finite where void.
        fronts: step, counted from 0, and each pixel's weight in it: float32 [H, W], NaN where void.
        eps, steps: of the attack.
        classes, palette: name and colour of each class.
    """
    assert example.adversarial is not None
    height, width = example.labels.shape
    row = _WIDTH / 4.25 * height / width + 0.32
    patches = _class_patches(classes, palette)
    # Inches that a legend entry takes: its letters, its colour and the gap to the next.
    entry = 0.075 * max(len(str(patch.get_label())) for patch in patches) + 0.6
    lines = math.ceil(len(patches) * entry / _WIDTH)
    legend = 0.2 * lines + 0.2
    figure = Figure(figsize=(_WIDTH, 3 * row + legend + 0.3), dpi=_DPI, layout="constrained")
    # The fifth column holds the colour bars.
    grid = figure.add_gridspec(4, 5, width_ratios=[1, 1, 1, 1, 0.035], height_ratios=[row, row, row, legend])
    axes = [[figure.add_subplot(grid[y, x]) for x in range(4)] for y in range(3)]

    amplification = 0.5 / eps if eps > 0 else 1.0
    noise = _pixels(0.5 + (example.adversarial - example.image) * amplification)
    shown = _pictures(example, palette, eps)
    shown.insert(4, (f"perturbation, amplified {amplification:.0f}x", noise))
    for place, picture in zip((*axes[0][:3], *axes[1][:3]), shown, strict=True):
        _show(place, *picture)

    maps = [np.ma.masked_invalid(values.numpy()) for values in confidence]
    # One scale for both; the few surest pixels would otherwise leave no colours to the rest.
    top = max(float(np.percentile(maps[0].compressed(), 98)) if maps[0].count() else 1.0, 1e-6)
    for place, when, values in zip((axes[0][3], axes[1][3]), ("before", "after"), maps, strict=True):
        colours = _show(place, f"confidence {when}, in log-odds", values, cmap="viridis", vmin=0, vmax=top)
    figure.colorbar(colours, cax=figure.add_subplot(grid[0:2, 4]), extend="max")

    for place in axes[2][len(fronts) :]:
        place.set_axis_off()
    for place, (step, weight) in zip(axes[2], fronts, strict=False):
        values = np.ma.masked_invalid(weight.numpy())
        share = 100 * float((values >= _WEIGHT_AT_TAU).mean()) if values.count() else 0.0
        title = f"front, step {step + 1} of {steps}: {share:.0f} % of pixels"
        colours = _show(place, title, values, cmap="inferno", vmin=0, vmax=1)
    if fronts:
        figure.colorbar(colours, cax=figure.add_subplot(grid[2, 4]))
    _legend(figure.add_subplot(grid[3, :]), patches, math.ceil(len(patches) / lines))
    figure.savefig(path)


def examples_panel(path: Path | BinaryIO, examples: Sequence[Example], classes: Sequence[str], eps: float) -> None:
    """Draws a row for each example: image, label, prediction, and, if it was attacked by ``eps``, the same of that."""
    palette = distinct_colours(len(classes))
    rows = [_pictures(example, palette, eps) for example in examples]
    columns = len(rows[0])
    width = _WIDTH * columns / 5
    heights = [width / columns * example.labels.shape[0] / example.labels.shape[1] + 0.3 for example in examples]
    figure = Figure(figsize=(width, sum(heights) + 0.5), dpi=_DPI, layout="constrained")
    grid = figure.add_gridspec(len(examples) + 1, columns, height_ratios=[*heights, 0.5])
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            _show(figure.add_subplot(grid[y, x]), *picture)
    _legend(figure.add_subplot(grid[-1, :]), _class_patches(classes, palette), 12)
    figure.savefig(path, format="png")


def accuracy_curves(path: Path, curves: Mapping[str, Sequence[float]], images: int) -> None:
    """Draws the pixel accuracy in percent of every method, before each step and after the last, over so many images."""
    figure = Figure(figsize=(7.5, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for (method, values), colour in zip(curves.items(), colormaps["tab10"].colors, strict=False):  # type: ignore[attr-defined]
        strong = method == "eroseg"
        style: dict[str, Any] = {"color": "black", "linewidth": 2.6, "zorder": 3} if strong else {"color": colour}
        axes.plot(range(len(values)), values, label=method, **style)
    axes.set_xlabel("attack steps taken")
    axes.set_ylabel("pixel accuracy, %")
    axes.set_xlim(0, max(len(values) for values in curves.values()) - 1 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Pixel accuracy under attack, {images} test images", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=9)
    figure.savefig(path)


def _class_patches(classes: Sequence[str], palette: Sequence[Colour]) -> list[Patch]:
    """Entries of the legend; of very many classes, whose colours cannot be told apart anyway, only the first."""
    named = [*zip(classes[:40], palette[:40], strict=True), ("void", _VOID)]
    return [
        Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="0.3", linewidth=0.5, label=name)
        for name, (red, green, blue) in named
    ]


def _legend(axes: Axes, patches: list[Patch], columns: int) -> None:
    axes.set_axis_off()
    legend = axes.legend(handles=patches, loc="center", ncols=columns, frameon=False, fontsize=9)
    legend.set_in_layout(False)  # a wide one would push the pictures together


def _pictures(example: Example, palette: Sequence[Colour], eps: float) -> list[tuple[str, Any]]:
    """Titles and pictures: image, label, prediction, and the same of the attacked image."""

    def predicted(title: str, prediction: Tensor) -> tuple[str, Any]:
        valid = example.labels >= 0
        share = (prediction == example.labels)[valid].double().mean().item() if valid.any() else 0.0
        return f"{title}: {100 * share:.1f} % correct", colourise(prediction, palette)

    shown = [("image", _pixels(example.image)), ("label", colourise(example.labels, palette))]
    shown.append(predicted("prediction", example.before))
    if example.adversarial is not None and example.after is not None:
        shown.append((f"attacked image, eps {eps * 255:.3g}/255", _pixels(example.adversarial)))
        shown.append(predicted("prediction on it", example.after))
    return shown


def _show(axes: Axes, title: str, values: Any, **style: Any) -> Any:
    shown = axes.imshow(values, interpolation="nearest", **style)
    axes.set_title(title, fontsize=10)
    axes.set_facecolor(_NO_VALUE)
    axes.set_xticks([])
    axes.set_yticks([])
    return shown


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """Image float [3, H, W] as uint8 [H, W, 3]."""
    return (image.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
