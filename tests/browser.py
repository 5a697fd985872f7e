"""HTML pages looked at in headless Chromium, where there is one."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
PHONE = 390  # pixels


def browse(page, *flags):
    """Open a page; returns Chromium's standard output."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def seen_at(width, page, tmp_path):
    """What a page is like in a frame of so many pixels.

    Its width, pictures, charts, how many have no description, and how many tables do not fit.
    """
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{page.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe>'
        '<pre id="o"></pre><script>f.onload = () => { const d = f.contentDocument; const images = [...d.images];'
        "const charts = [...d.querySelectorAll('.chart img')];"
        "o.textContent = JSON.stringify({wide: d.documentElement.scrollWidth, images: images.length,"
        "broken: images.filter(i => !i.naturalWidth).length, charts: charts.length,"
        "chart: charts[0].getBoundingClientRect().width, mute: images.filter(i => !i.alt).length,"
        "cut: [...d.querySelectorAll('.scroll')].filter(t => t.scrollWidth > t.clientWidth).length}) }</script>"
    )
    dom = browse(frame, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    return json.loads(re.search(r'<pre id="o">(.*?)</pre>', dom)[1])


def assert_readable(page, tmp_path):
    """Fits a phone, shows all its pictures, describes them, and has a dark side; returns what was seen."""
    seen = seen_at(PHONE, page, tmp_path)
    assert seen["wide"] <= PHONE and seen["broken"] == 0 and seen["mute"] == 0, seen
    assert 300 < seen["chart"] <= PHONE
    corners = []
    for scheme in (0, 1):  # dark, light
        picture = tmp_path / f"{page.stem}{scheme}.png"
        browse(
            page, "--window-size=500,900", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}"
        )
        corners.append(sum(Image.open(picture).convert("RGB").getpixel((2, 2))))
    assert corners[0] < 100 < 700 < corners[1]
    return seen
