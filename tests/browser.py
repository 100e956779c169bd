"""
Pages as a browser shows them: `python -m tests.browser < JSON` opens them and tells of each.

It is a process of its own because Playwright runs an event loop, on which Django refuses to
use the database. It takes {"pages": [...], "cookie": ...} on standard input.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from typing import Any

#: What a browser in a container needs, and no traffic of its own.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

#: Color scheme, width of the window, whether scripts run.
VIEWS = (("light", 1280, True), ("dark", 1280, True), ("light", 390, False))


def find() -> str | None:
    """Return the path of Chromium, or None if it or Playwright is not there."""
    if importlib.util.find_spec("playwright") is None:
        return None
    return shutil.which("chromium") or shutil.which("chromium-browser")


def look(page: Any, url: str) -> dict[str, Any]:
    """Open a page; return what it says of itself and what the browser complains of."""
    told: list[str] = []

    def hear(message: Any) -> None:
        if message.type in ("error", "warning"):
            told.append(message.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(url)
    found = {
        "url": url,
        "title": page.title(),
        "told": told,
        "too_wide": page.locator("html").evaluate("html => html.scrollWidth - innerWidth"),
    }
    chart = page.locator(".kms-chart")
    if chart.count():
        bar = chart.locator(".kms-success rect").first
        found["fill"] = bar.evaluate("rect => getComputedStyle(rect).fill")
        found["bars"] = chart.locator("svg g rect").count()
        chart.locator("summary").click()
        found["table"] = chart.locator("details table").is_visible()
    page.remove_listener("console", hear)
    return found


def main() -> None:
    from playwright.sync_api import sync_playwright

    asked = json.load(sys.stdin)
    seen = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=ARGUMENTS)
        for scheme, width, scripts in VIEWS:
            context = browser.new_context(
                color_scheme=scheme,
                viewport={"width": width, "height": 900},
                java_script_enabled=scripts,
            )
            context.add_cookies([asked["cookie"]])
            # It is asked for by the browser and not by any page.
            context.route("**/favicon.ico", lambda route: route.fulfill(status=204))
            page = context.new_page()
            for url in asked["pages"]:
                view = {"scheme": scheme, "width": width, "scripts": scripts}
                seen.append({**look(page, url), **view})
            context.close()
        browser.close()
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
