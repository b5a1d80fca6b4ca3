"""The loss curve of a run as a small SVG picture."""

from collections.abc import Sequence

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48
_MAX_POINTS = 600


def loss_curve(losses: Sequence[tuple[int, float]], title: str) -> str:
    """Return an SVG of (step, loss) points; a run without finite losses gives an empty frame."""
    points = [(step, loss) for step, loss in losses if abs(loss) < float("inf")]
    stride = max(len(points) // _MAX_POINTS, 1)
    points = points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])
    low, high = _span([loss for _, loss in points])
    first, last = _span([float(step) for step, _ in points])
    right, bottom = _WIDTH - _MARGIN, _HEIGHT - _MARGIN

    def place(step: float, loss: float) -> str:
        x = _MARGIN + (step - first) / (last - first) * (right - _MARGIN)
        y = bottom - (loss - low) / (high - low) * (bottom - _MARGIN)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(step, loss) for step, loss in points)
    text = 'font-family="sans-serif" font-size="12" fill="#444"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
        f'<path d="M{_MARGIN},{_MARGIN}V{bottom}H{right}" fill="none" stroke="#999"/>'
        f'<polyline points="{line}" fill="none" stroke="#2a6fdb" stroke-width="2"/>'
        f'<text x="{_MARGIN}" y="{_MARGIN - 16}" {text}>{_escaped(title)}</text>'
        f'<text x="4" y="{_MARGIN + 4}" {text}>{high:.3f}</text>'
        f'<text x="4" y="{bottom}" {text}>{low:.3f}</text>'
        f'<text x="{_MARGIN}" y="{bottom + 18}" {text}>{first:.0f}</text>'
        f'<text x="{right}" y="{bottom + 18}" text-anchor="end" {text}>step {last:.0f}</text></svg>\n'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low, low + 1.0)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
