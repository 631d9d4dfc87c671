"""The reviewer's pages as a browser shows them. Without Chromium they skip; with Q4KD_REQUIRE_BROWSER=1 they fail."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_bundle import register
from report_bundles import build_history, build_hostile, build_mixed

from q4kd.harness.records.store import open_store
from q4kd.harness.report.html import render
from q4kd.harness.report.site import write_site

REAL = Path(__file__).parents[3] / "evidence" / "bundles"
PAGES = ("mixed", "hostile", "cpu", "h200", "index", "profile")

# Contrast of every visible text against what lies under it: WCAG 2.2, 1.4.3.
CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const part = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const under = e => {
    const layers = [];
    for (let p = e; p; p = p.parentElement) layers.push(parse(getComputedStyle(p).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), e = walker.currentNode.parentElement;
    if (!text || e.closest('title, style, .vh') || !e.getClientRects().length) continue;
    const s = getComputedStyle(e), svg = e.namespaceURI.endsWith('svg');
    const back = under(e), ink = over(parse(svg ? s.fill : s.color), back);
    const [hi, lo] = [light(ink), light(back)].sort((a, b) => b - a);
    const size = parseFloat(s.fontSize), bold = Number(s.fontWeight) >= 700;
    const least = !svg && (size >= 24 || (size >= 18.66 && bold)) ? 3 : 4.5;
    seen += 1;
    const ratio = (hi + 0.05) / (lo + 0.05);
    if (ratio < least) found.push([text.slice(0, 30), e.className, ratio.toFixed(2)]);
  }
  return [seen, found];
}"""
# The same for what carries meaning without being text: 1.4.11 asks for 3.
GRAPHICS = """() => {
  const root = getComputedStyle(document.documentElement);
  const rgb = name => root.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map(h => parseInt(h, 16) / 255);
  const part = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const paper = light(rgb('--paper'));
  return ['--good', '--bad', '--open', '--link', '--s1', '--s2', '--s3', '--s4', '--s5'].map(name => {
    const [hi, lo] = [light(rgb(name)), paper].sort((a, b) => b - a);
    return [name, (hi + 0.05) / (lo + 0.05)];
  }).filter(([, ratio]) => ratio < 3);
}"""
TALLEST = (
    "Math.max(0, ...[...document.querySelectorAll('.matrix tbody tr')].map(r => r.getBoundingClientRect().height))"
)
LABELS = """() => ({
  svg: [...document.querySelectorAll('svg')].filter(e => e.getAttribute('role') !== 'img'
    || !e.getAttribute('aria-label')?.trim() || !e.querySelector('title')?.textContent.trim()).length,
  tables: [...document.querySelectorAll('table')].filter(t => !t.querySelector('th')
    || [...t.querySelectorAll('th')].some(h => !['col', 'row'].includes(h.scope))
    || [...t.querySelectorAll('tbody tr')].some(r => !r.querySelector('th[scope=row], td[colspan]'))
    || !(t.caption || t.closest('[role=region][aria-label]'))).length,
  regions: [...document.querySelectorAll('.scroll')].filter(r => r.tabIndex || !r.getAttribute('aria-label')).length,
  ids: (ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id)),
  anchors: [...document.querySelectorAll('a[href^="#"]')].filter(a => !document.getElementById(a.hash.slice(1))).length,
  headings: (hs => hs.filter((h, i) => i && h - hs[i - 1] > 1).length + (hs.filter(h => h === 1).length !== 1))(
    [...document.querySelectorAll('h1,h2,h3,h4,h5')].map(h => Number(h.tagName[1]))),
  main: document.querySelectorAll('main').length - 1,
  empty: [...document.querySelectorAll('a, summary, button')].filter(e => !e.textContent.trim()).length,
})"""


def _chromium() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    return None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    required = os.environ.get("Q4KD_REQUIRE_BROWSER") == "1"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    path = _chromium()
    if sync_playwright is None or path is None:
        what = "playwright" if sync_playwright is None else "Chromium"
        if required:
            pytest.fail(f"Q4KD_REQUIRE_BROWSER=1 and no {what}")
        pytest.skip(f"no {what}")
    with sync_playwright() as play:
        # Chromium refuses to start as root with its sandbox, as in most containers.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = play.chromium.launch(executable_path=path, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    found: dict[str, Path] = {}
    for name in ("cpu", "h200"):  # before the registries are replaced: the files that a check reads are real ones
        newest = max(REAL.glob(f"*-{name}*.tar.*"))
        found[name] = root / f"{name}.html"
        found[name].write_text(render(open_store(newest), None))
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        found["mixed"] = build_mixed(root / "mixed") / "report.html"
        hostile = build_hostile(root / "hostile")
        found["hostile"] = hostile / "new.html"
        found["hostile"].write_text(render(open_store(hostile)))
        history = list(build_history(root, [0.80, 0.81, 0.79, 0.80, 0.805, 0.95, 2.9]))
        contract = history[-1] / "contracts" / "demo-v1.yaml"
        contract.write_text(contract.read_text().replace("limit: 100.5", "limit: 200.5"))
        (root / "bundles" / "broken <b>.tar.gz").write_bytes(b"nothing")
        write_site(root / "bundles", root / "site")
    found["index"], found["profile"] = root / "site" / "index.html", root / "site" / "profile-cpu.html"
    return found


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    contexts = []

    def go(name: str, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.seen = {"console": [], "requests": []}
        page.on("console", lambda message: page.seen["console"].append(message.text))
        page.on("pageerror", lambda error: page.seen["console"].append(str(error)))
        page.on("dialog", lambda dialog: page.seen["console"].append(f"dialog {dialog.message}"))
        page.on("request", lambda request: page.seen["requests"].append(request.url))
        page.goto(pages[name].as_uri())
        return page

    yield go
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_quiet_readable_and_labelled(visit: Any, pages: dict[str, Path], name: str) -> None:
    page = visit(name)
    assert page.seen["requests"] == [pages[name].as_uri()]
    assert page.locator("script, iframe, object, embed, form, img, link").count() == 0
    assert len(pages[name].read_bytes()) < 2_000_000
    faults = page.evaluate(LABELS)
    assert faults == dict.fromkeys(faults, 0)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        seen, poor = page.evaluate(CONTRAST)
        assert (poor, page.evaluate(GRAPHICS)) == ([], []), scheme
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert seen > 50 and dark == (scheme == "dark")
    for width in (1400, 400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert name == "hostile" or page.evaluate(TALLEST) < 140  # a cell of one letter per line is no table
    assert page.seen["console"] == []


def test_the_policy_stops_styles_and_scripts_that_are_not_the_pages_own(visit: Any) -> None:
    page = visit("mixed")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.evaluate("document.body.setAttribute('style', 'background: rgb(1, 2, 3)')")
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('style'), {textContent: 'body {margin: 9em}'}))"
    )
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before != "rgb(1, 2, 3)"
    assert page.evaluate("getComputedStyle(document.body).marginTop") == "0px"
    assert page.evaluate("window.ran") is None
    assert len(page.seen["console"]) == 3


@pytest.mark.parametrize("name", ["mixed", "cpu", "h200"])
def test_the_verdict_and_its_counts_stand_above_the_fold(visit: Any, name: str) -> None:
    page = visit(name)
    title = page.locator("h1").inner_text()
    assert "Failed: 1 of 4 claims fell" in title if name == "mixed" else "claim" in title
    for width, height in ((1400, 900), (400, 800)):
        page.set_viewport_size({"width": width, "height": height})
        for selector in ("h1", ".eyebrow", ".lede", ".tiles"):
            box = page.locator(selector).bounding_box()
            assert box["y"] + box["height"] <= height, (selector, width)


def test_what_fell_is_open_with_its_counterexample_and_what_it_means(visit: Any) -> None:
    page = visit("mixed")
    fell = page.locator(".claims > li", has_text="DEMO-005")
    assert fell.locator("> details").get_attribute("open") is not None
    assert fell.get_by_text("Counterexample: 100.0 is over").is_visible()
    assert fell.get_by_text("What this most likely means: it does not").is_visible()
    undecided = page.locator(".claims > li", has_text="DEMO-003")
    assert undecided.get_by_text("the claim has no executable falsifier").is_visible()
    survived = page.locator(".claims > li", has_text="DEMO-001")
    assert not survived.locator(".body").is_visible()
    survived.locator("summary").first.click()
    assert survived.locator(".body").is_visible()
    order = [text.split()[0] for text in page.locator(".claims .id").all_inner_texts()]
    assert order == ["DEMO-005", "DEMO-003", "DEMO-001", "DEMO-004"]
    assert page.locator("section", has=page.locator("#untested")).get_by_text("DEMO-002").is_visible()


@pytest.mark.parametrize("name", ["mixed", "profile"])
def test_the_keyboard_reaches_everything_in_the_order_of_the_page(visit: Any, name: str) -> None:
    page = visit(name)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page = visit(name)  # from the top again
    stops = page.evaluate(
        "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')].filter(e => e.checkVisibility()).length"
    )
    backwards, outlined = 0, 0
    page.evaluate("window.before = null")
    for _ in range(min(stops, 25)):
        page.keyboard.press("Tab")
        late, ring = page.evaluate("""() => {
          const now = document.activeElement, was = window.before;
          window.before = now;
          return [was && !(was.compareDocumentPosition(now) & Node.DOCUMENT_POSITION_FOLLOWING),
                  parseFloat(getComputedStyle(now).outlineWidth) >= 2];
        }""")
        backwards, outlined = backwards + bool(late), outlined + bool(ring)
    assert (backwards, outlined) == (0, min(stops, 25)) and stops > 15
    page.evaluate("document.querySelector('details:not([open]) > summary')?.focus()")
    if name == "mixed":
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.parentElement.open")


@pytest.mark.parametrize("name", ["mixed", "profile"])
def test_without_script_the_page_says_the_same(visit: Any, name: str) -> None:
    said = [visit(name, java_script_enabled=on).locator("body").inner_text() for on in (True, False)]
    assert said[0] == said[1] and len(said[0]) > 500


def test_motion_only_for_those_who_want_it_and_paper_shows_what_is_folded(visit: Any) -> None:
    page = visit("mixed", reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    body = page.locator(".claims > li", has_text="DEMO-001").locator(".body")
    assert not body.is_visible()
    page.emulate_media(media="print")
    assert body.bounding_box()["height"] > 50 and not page.locator(".toc").is_visible()


def test_hostile_text_is_shown_spelt_out_and_does_nothing(visit: Any) -> None:
    page = visit("hostile")
    assert page.seen["console"] == []
    text = page.locator("body").inner_text()
    assert "<script>alert(1)</script>" in text and "\\u202e" in text and "\\x1b" in text and "\\ud800" in text
    assert not {"\u202e", "\u2066", "\x1b", "\x07"} & set(page.content())
    assert page.locator("svg script, svg foreignObject, a[href^='http'], a[href^='javascript']").count() == 0


def test_links_lead_to_the_raw_files_and_to_the_reports(visit: Any, pages: dict[str, Path]) -> None:
    for name in ("mixed", "index", "profile"):
        page = visit(name)
        links = page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))")
        outward = [link for link in links if not link.startswith("#")]
        assert outward and all((pages[name].parent / link).is_file() for link in outward)
    page.locator("main a", has_text="2026-10-07").first.click()
    assert "Failed: 1 of 1 claim fell" in page.locator("h1").inner_text()


def test_a_profile_is_chosen_without_script(visit: Any) -> None:
    page = visit("index", java_script_enabled=False)
    page.get_by_role("navigation", name="Profiles").get_by_role("link", name="cpu").click()
    assert page.url.endswith("profile-cpu.html")
    assert page.locator("[aria-current=page]").inner_text() == "cpu"
    rows = page.locator("section", has=page.locator("#regressions")).locator("tbody tr").all_inner_texts()
    assert len(rows) == 2 and "2026-10-07" in rows[0] and "2026-10-06" in rows[1]
    loosened = page.locator("section", has=page.locator("#loosened")).inner_text()
    assert "limit: 100.5 → 200.5" in loosened
