"""How long a report's page takes to open in Chromium, from its file to the last card laid out.

python benchmarks/report_page.py report.html [--repeat=5]
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from vau_jax.common.files import dump_json


def main() -> None:
    parser = argparse.ArgumentParser(description="opening a report")
    parser.add_argument("report", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if not chromium:
        sys.exit("error: no chromium on PATH: install Debian's package")
    seconds = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(args.repeat):
            page = browser.new_page()
            began = time.monotonic()
            page.goto(f"file://{args.report.resolve()}")
            page.evaluate("document.querySelector('.card:last-child')?.getBoundingClientRect().y")
            seconds.append(time.monotonic() - began)
            cards = page.locator(".card").count()
            page.close()
        browser.close()
    size = args.report.stat().st_size
    print(dump_json({"open_s": statistics.median(seconds), "max_s": max(seconds), "cards": cards, "bytes": size}))


if __name__ == "__main__":
    main()
