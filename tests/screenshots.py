"""Pictures of a page at two widths, light and dark, and what a browser finds wrong with it.

    python tests/screenshots.py RUN/report.html FOLDER [--height 1600]

Needs playwright (`pip install -e ".[browser]"`, or an environment of its own: nothing of opcd is
imported) and a Chromium on the path (`apt-get install chromium`). Writes report-390-light.png and
three more. Status 1 where the page fetches something, complains, or is wider than the window.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDER = """[...document.querySelectorAll('body *')].filter(e =>
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    && !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 80))"""


def browser_path() -> str | None:
    """A Chromium of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def shots(file: Path, folder: Path, height: int | None = None) -> dict[Path, list[str]]:
    """The pictures of a page that were written, each with what is wrong there.

    height: of the page, in pixels, from the top; all of it without.
    """
    from playwright.sync_api import sync_playwright

    path, address, found = browser_path(), file.resolve().as_uri(), {}
    assert path is not None, f"no browser is installed: none of {', '.join(NAMES)}"
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        for width in WIDTHS:
            for scheme in SCHEMES:
                context = browser.new_context(
                    viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
                )
                page = context.new_page()
                wrong = _watched(page, address)
                page.goto(address)
                wrong += page.evaluate(WIDER)
                clip = {"x": 0, "y": 0, "width": width, "height": height} if height else None
                picture = folder / f"{file.stem}-{width}-{scheme}.png"
                page.screenshot(path=picture, full_page=True, clip=clip)
                found[picture] = wrong
                context.close()
        browser.close()
    return found


def _watched(page: Any, address: str) -> list[str]:
    """What it says and fetches, as it comes."""
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: wrong.append(r.url) if r.url != address else None)
    return wrong


def main(given: Sequence[str] | None = None) -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--height", type=int, help="pixels from the top; without: all")
    arguments = parser.parse_args(given)
    found = shots(arguments.page, arguments.folder, arguments.height)
    for picture, wrong in found.items():
        print(picture, f"{picture.stat().st_size / 1000:.0f} kB", *wrong, sep="  ")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
