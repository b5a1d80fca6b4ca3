"""The loss curve of a run as a small SVG picture, and as PNG where matplotlib is installed."""

import io
from collections.abc import Sequence
from typing import Any, TypeAlias

Points: TypeAlias = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48
_MAX_POINTS = 600
_TRAINED, _KEPT = "#2a6fdb", "#d9822b"


def loss_curve(losses: Points, title: str, validation: Points = ()) -> str:
    """Return an SVG of (step, loss) points; a run without finite losses gives an empty frame."""
    trained, kept = _thinned(losses), _thinned(validation)
    low, high = _span([loss for _, loss in (*trained, *kept)])
    first, last = _span([float(step) for step, _ in (*trained, *kept)])
    right, bottom = _WIDTH - _MARGIN, _HEIGHT - _MARGIN

    def place(step: float, loss: float) -> str:
        x = _MARGIN + (step - first) / (last - first) * (right - _MARGIN)
        y = bottom - (loss - low) / (high - low) * (bottom - _MARGIN)
        return f"{x:.1f},{y:.1f}"

    def line(points: Points, colour: str) -> str:
        places = " ".join(place(step, loss) for step, loss in points)
        return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'

    text = 'font-family="sans-serif" font-size="12" fill="#444"'
    legend = f'<text x="{right}" y="{_MARGIN}" text-anchor="end" {text[:-5]}{_KEPT}">validation</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
        f'<path d="M{_MARGIN},{_MARGIN}V{bottom}H{right}" fill="none" stroke="#999"/>'
        f"{line(trained, _TRAINED)}{line(kept, _KEPT) + legend if kept else ''}"
        f'<text x="{_MARGIN}" y="{_MARGIN - 16}" {text}>{_escaped(title)}</text>'
        f'<text x="4" y="{_MARGIN + 4}" {text}>{high:.3f}</text>'
        f'<text x="4" y="{bottom}" {text}>{low:.3f}</text>'
        f'<text x="{_MARGIN}" y="{bottom + 18}" {text}>{first:.0f}</text>'
        f'<text x="{right}" y="{bottom + 18}" text-anchor="end" {text}>step {last:.0f}</text></svg>\n'
    )


def loss_picture(losses: Points, title: str, validation: Points = ()) -> bytes | None:
    """Return a PNG of (step, loss) points, equal bytes for equal points; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure: Any = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for points, name, colour, mark in ((losses, "training", _TRAINED, ""), (validation, "validation", _KEPT, "o")):
        shown = _thinned(points)
        if shown:
            axes.plot(*zip(*shown, strict=True), color=colour, marker=mark, markersize=4, label=name)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _thinned(points: Points) -> list[tuple[int, float]]:
    """Return the finite ones of `points`, a few hundred and the last."""
    finite = [(step, loss) for step, loss in points if abs(loss) < float("inf")]
    stride = max(len(finite) // _MAX_POINTS, 1)
    return finite[::stride] + (finite[-1:] if (len(finite) - 1) % stride else [])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low, low + 1.0)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
