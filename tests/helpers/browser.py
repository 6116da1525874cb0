"""Runs a drawn page in headless Chromium, where there is one, and asks it how it went."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,900 --virtual-time-budget=5000"
)
# Errors of the page's own script, and what it wrote to the console as one, in the order in which they came.
_WATCH = """<script>
const told = text => { document.documentElement.dataset.error = (document.documentElement.dataset.error || "") + text + "; "; };
window.onerror = told;
console.error = told;
</script>"""


def browse(page: str, probe: str, folder: Path) -> str:
    """What `probe` set as document.body.dataset.probe, run after the page's own script. Fails if the page threw an error."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    file = folder / "page.html"
    file.write_text(page.replace("<head>", "<head>" + _WATCH).replace("</body>", f"<script>{probe}</script></body>"))
    command = [chromium, *_FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root and "data-error" not in root.group(), root and root.group()
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:]
    return found.group(1)
