"""Line charts and histograms as SVG for HTML pages; their colours come from the page, for light and for dark."""

from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44
COLOURS = 8  # --series-0 .. --series-7, defined in STYLE

STYLE = """
:root { --ink: #1b1f24; --paper: #ffffff; --faint: #d5dae0; --muted: #57606a; --card: #f5f7f9;
  --series-0: #0b62a8; --series-1: #b4470a; --series-2: #1a7a3c; --series-3: #8a2f8f;
  --series-4: #7a6200; --series-5: #00717a; --series-6: #a3243b; --series-7: #555c66; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e6e9ed; --paper: #12161b; --faint: #343b44; --muted: #a0a9b4; --card: #1b2128;
  --series-0: #6cb6f2; --series-1: #f2a26c; --series-2: #6fd08c; --series-3: #d79adb;
  --series-4: #dcc24a; --series-5: #5fcdd6; --series-6: #f28ba0; --series-7: #b6bec8; } }
svg.chart { width: 100%; max-width: 720px; height: auto; display: block; }
svg.chart text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg.chart .axis { stroke: var(--muted); } svg.chart .grid { stroke: var(--faint); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .2rem 0 1rem; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 1.6em; height: 0; border-top: 3px solid; vertical-align: middle; }
"""


def ticks(low, high, most=6):
    """At most so many round numbers (1, 2 or 5 times a power of ten apart) from low to high; low < high."""
    step = 10.0**-12
    while (high - low) / step > most - 1:
        leading = float(f"{step:.0e}"[0])
        step *= 2.5 if leading == 2 else 2
    first = -(-low // step)
    count = int((high - first * step) / step + 1e-9) + 1
    return [round((first + i) * step, 12) for i in range(count)]


class Chart:
    """An SVG whose marks are given in the numbers of its axes.

    Args:
        x_range, y_range: (low, high) of each axis.
        x_label, y_label: what the axes show.
        alt: what the chart says, for those who do not see it.
        percent: the y axis is a share, written in percent.
    """

    def __init__(self, x_range, y_range, x_label, y_label, alt, percent=False):
        self.x_range, self.y_range = x_range, y_range
        self.parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt, quote=True)}">',
            f"<title>{escape(alt)}</title>",
        ]
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for value in ticks(*y_range):
            y, text = self.y(value), f"{100 * value:g}%" if percent else f"{value:g}"
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for value in ticks(*x_range, most=11):
            x = self.x(value)
            self.parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            self.parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
        self.parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (LEFT + right) / 2
        self.parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
        turned = f"rotate(-90 14 {(TOP + bottom) / 2})"
        self.parts.append(
            f'<text x="14" y="{(TOP + bottom) / 2}" text-anchor="middle" transform="{turned}">{escape(y_label)}</text>'
        )

    def x(self, value):
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value):
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def line(self, xs, ys, colour, dashed=False):
        """A curve through the points, in series colour number `colour`."""
        points = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        stroke = f'stroke="var(--series-{colour % COLOURS})" stroke-width="2"{dash}'
        self.parts.append(f'<polyline points="{points}" fill="none" {stroke}/>')

    def bars(self, edges, heights, colour):
        """A histogram: heights between consecutive edges."""
        for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
            if height:
                x, y = self.x(left), self.y(height)
                self.parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{self.x(right) - x:.1f}" '
                    f'height="{HEIGHT - BOTTOM - y:.1f}" fill="var(--series-{colour % COLOURS})" fill-opacity="0.55"/>'
                )

    def svg(self):
        return "".join(self.parts) + "</svg>"


def legend(names):
    """What the series colours 0, 1, ... stand for, as HTML."""
    items = (
        f'<li><i style="border-color: var(--series-{i % COLOURS})"></i> {escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
