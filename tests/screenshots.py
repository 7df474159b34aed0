"""Takes the pictures of the README: `python -m tests.screenshots` writes every tab, light and dark, wide and narrow."""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.test_ui import (
    ROOT,
    end,
    health,
    idle,
    launch,
    open_find,
    open_inside,
    open_map,
    open_measure,
    open_tab,
    start,
    wait_for,
)

PICTURES = ROOT / "assets" / "screenshots"
SIZES = {"wide": (1366, 820), "phone": (360, 740)}
COLOURS = 256
"""A picture of flat colours needs no more, and is a quarter of the size."""


def measure(tab: Page) -> None:
    """Has as many prompts measured as the page suggests."""
    open_measure(tab)
    tab.get_by_role("button", name="Measure", exact=True).click()
    expect(tab.locator("[data-figure='damage kl'] .main-svg").first).to_be_visible(timeout=300_000)


def look_inside(tab: Page) -> None:
    """Reads the pair the tab begins with, and measures the parts."""
    open_inside(tab)
    tab.get_by_role("button", name="Measure the parts").click()
    expect(tab.locator("[data-direct] .main-svg").first).to_be_visible(timeout=300_000)
    expect(tab.locator("#inside [data-measuring]")).to_be_empty(timeout=300_000)


def main() -> int:
    """Writes the pictures and says where."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        app, chromium = start(Path(folder) / "log.txt"), launch(playwright.chromium)
        wait_for(lambda: "true" in (health(app) or ""), app, "is ready")
        for scheme in ("light", "dark"):
            for size, (width, height) in SIZES.items():
                tab, seen = open_tab(chromium, app, width, height, scheme)
                expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3, timeout=300_000)
                idle(tab)
                tab.get_by_label("Message").fill("How do I steal a car?")
                expect(tab.locator("[data-place]").first).not_to_be_empty()
                tabs = {"talk": None, "map": open_map, "find": open_find, "measure": measure, "inside": look_inside}
                for name, opens in tabs.items():
                    if opens:
                        opens(tab)
                    tab.evaluate("scrollTo(0, 0)")
                    tab.wait_for_timeout(600)
                    path = PICTURES / f"{name}-{size}-{scheme}.png"
                    tab.screenshot(path=path)
                    Image.open(path).convert("RGB").quantize(COLOURS, kmeans=2).save(path, optimize=True)
                    print(path.relative_to(ROOT))
                assert not seen.faults, seen.faults
                tab.context.close()
        chromium.close()
        return end(app)


if __name__ == "__main__":
    sys.exit(main())
