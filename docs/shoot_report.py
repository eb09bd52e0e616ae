"""Draws docs/route-stats.png: `python docs/shoot_report.py RUN/report/routing.html docs/route-stats.png`.

The atlas of patches of a report. Needs Chromium, its driver and the package selenium. Photographs that may not be
published have no place in such a picture.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH, HEIGHT = 1240, 1500


def shoot(report: Path, section: str) -> Image.Image:
    """A section of the page, as high as the window at most."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.get(report.resolve().as_uri())
        browser.execute_script(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
        browser.implicitly_wait(5)
        browser.find_element("css selector", f"#{section} .expert img")
        return Image.open(io.BytesIO(browser.find_element("id", section).screenshot_as_png)).convert("RGB")


if __name__ == "__main__":
    page, picture = map(Path, sys.argv[1:])
    shoot(page, "atlas").save(picture, optimize=True)
