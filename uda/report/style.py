"""How figures look, and how they become SVG that follows the page's light or dark colours."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape, unescape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of what is no data."""

    ink: str = "#1d2430"
    muted: str = "#667085"
    grid: str = "#d9dee7"
    paper: str = "#ffffff"


PRINT = Theme()
#: unlikely colours that become CSS variables of the page
PAGE = Theme("#010203", "#040506", "#070809", "#0a0b0c")
_VARIABLES = {"ink": PAGE.ink, "muted": PAGE.muted, "grid": PAGE.grid, "paper": PAGE.paper}

SOURCE, TARGET, RIGHT, WRONG = "#3b7dd8", "#e0702f", "#2a9d8f", "#d1495b"
RUNS = ("#3b7dd8", "#e0702f", "#2a9d8f", "#b5579f", "#c0951d", "#7a6fd0", "#d1495b", "#5f9a4c")


@dataclass(frozen=True)
class Plot:
    """A figure to be made.

    Attributes:
        name: of its file; ``title``: HTML above it; ``alt``: what it shows, for those who do not see it.
        draw: makes it with a theme.
        caption: HTML below it.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Theme], Figure]
    caption: str = ""


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Matplotlib's settings for a theme."""
    import matplotlib as mpl

    settings = {
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9.5,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": theme.muted, "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink, "text.color": theme.ink, "xtick.color": theme.muted,
        "ytick.color": theme.muted, "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.labelsize": 8.5,
        "axes.grid": True, "grid.color": theme.grid, "grid.linewidth": 0.7, "axes.axisbelow": True,
        "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "legend.frameon": False, "legend.fontsize": 8,
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "svg.fonttype": "none",
        "svg.hashsalt": "uda", "figure.constrained_layout.use": True, "axes.linewidth": 0.8,
        "xtick.major.width": 0.8, "ytick.major.width": 0.8,
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def new_figure(width: float, height: float, **kwargs: Any) -> Any:
    """Figure and axes, without pyplot: nothing global, no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**kwargs)


def save(plot: Plot, kind: str) -> bytes:
    """A figure as a file of its own, on white, with its title in it."""
    out = io.BytesIO()
    with styled(PRINT):
        figure = plot.draw(PRINT)
        if words := unescape(re.sub(r"<[^>]*>", "", plot.title)):
            figure.suptitle(words, x=0.02, ha="left", fontsize=10, fontweight="bold")
        extra = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 200}
        figure.savefig(out, format=kind, facecolor=PRINT.paper, **extra)
    return out.getvalue()


def inline_svg(plot: Plot) -> str:
    """A figure as an ``<svg>`` element for the page: ids of its own, colours by CSS variables, no reference outside."""
    out = io.BytesIO()
    with styled(PAGE):
        plot.draw(PAGE).savefig(out, format="svg", dpi=180, metadata={"Date": None})
    return for_page(out.getvalue().decode(), plot.name, plot.alt)


def for_page(svg: str, name: str, alt: str) -> str:
    """Matplotlib's SVG file as an element within HTML."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for variable, colour in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"'DejaVu Sans', *sans-serif|'DejaVu Sans'", "system-ui, sans-serif", svg)
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1]) * 4 / 3
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    label = escape(alt, quote=True)
    return svg.replace(
        "<svg ",
        f'<svg role="img" aria-label="{label}" style="max-width:{width:.0f}px;min-width:{0.62 * width:.0f}px" ',
        1,
    ).strip()


def data_uri(image: Any) -> str:
    """A picture ``[H, W, 3]`` (uint8) as a PNG in a data URI; small ones are enlarged without smoothing, large ones cut
    down to 160 pixels.
    """
    from PIL import Image

    picture = Image.fromarray(image)
    if max(picture.size) > 160:
        picture.thumbnail((160, 160))
    elif max(picture.size) < 64:
        times = -(-96 // max(picture.size))
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
