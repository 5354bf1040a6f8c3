"""The page in a real browser: python3 page_in_browser.py URL MODEL [PICTURE]

Needs Playwright and a Chromium: its own, or the one that CHROMIUM names.
"""

import os
import sys

from playwright.sync_api import expect, sync_playwright

url, _model, *picture = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    problems, elsewhere = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: elsewhere.append(request.url) if not request.url.startswith((url, "data:")) else None)
    page.goto(url)
    # No wait_for_function: the page's policy forbids it to evaluate text.
    expect(page.locator("#model")).to_contain_text("context of")

    def go(times):
        page.click("#go")
        expect(page.locator("body")).to_have_attribute("data-done", str(times), timeout=30_000)

    # Complete, beside the same without memory.
    page.fill("#prompt", "Queen Anne sailed to")
    page.fill("#count", "16")
    page.fill("#temperature", "0")
    page.select_option("#compare", "off")
    go(1)
    answers = page.locator(".answer")
    assert answers.count() == 2, answers.count()
    tokens = answers.nth(0).locator(".token")
    gates = [float(gate) for gate in tokens.evaluate_all("all => all.map(t => t.dataset.gate).filter(g => g !== undefined)")]
    assert len(gates) >= tokens.count() - 1 and all(0 < gate < 1 for gate in gates), gates
    colours = tokens.evaluate_all("all => new Set(all.map(t => t.style.background)).size")
    assert colours > 2, "gates are seen as colours"
    assert "tokens in" in answers.nth(0).locator(".cost").inner_text()
    assert answers.nth(1).locator(".token[data-gate]").count() == 0

    # The n-grams behind a token, and each stream's gate.
    tokens.nth(4).hover()
    detail = page.locator("#detail")
    assert detail.is_visible() and "looked up" in detail.inner_text(), detail.inner_text()
    assert detail.locator("tr").count() >= 1 and "stream 0" in detail.inner_text()
    if picture:
        page.screenshot(path=picture[0])
    before = tokens.nth(4).get_attribute("data-gate")
    options = page.locator("#shown option")
    if options.count() > 1:
        page.select_option("#shown", index=options.count() - 1)
        assert tokens.nth(4).get_attribute("data-gate") != before

    # Chat.
    page.check("#chat-mode")
    page.fill("#prompt", "Who was Ada?")
    go(2)
    assert page.locator(".turn").count() == 2, page.locator("#conversation").inner_text()

    # An impossible request is told.
    page.check("input[value=complete]")
    page.fill("#prompt", "Ada")
    page.fill("#count", "100000")
    go(3)
    assert "context" in page.locator(".error").first.inner_text()
    # The browser reports the refused request itself.
    problems = [problem for problem in problems if "400" not in problem]
    assert not problems, problems
    assert not elsewhere, elsewhere
    print("the page works in", browser.version)
    browser.close()
