"""The rendered book: links, boxes, alt text, widgets and pages in a real browser. `make test` builds it first."""
import functools
import http.server
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"

if not (HTML / "index.html").exists():
    pytest.skip("the book is not built; run make book", allow_module_level=True)

PAGES = sorted(p for p in HTML.rglob("*.html") if not {"_static", "_sources", "_modules"} & set(p.relative_to(HTML).parts))
CONTENT = [p for p in PAGES if p.relative_to(HTML).parts[0] == "nbs"]


class Reader(HTMLParser):
    """Collects what the tests ask for from one page."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.images, self.media, self.text = set(), [], [], [], []
        self.skip = 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "a" and attributes.get("name"):
            self.ids.add(attributes["name"])
        if tag == "img":
            self.images.append(attributes)
        if tag in ("audio", "svg"):
            self.media.append((tag, attributes))
        if tag in ("script", "style"):
            self.skip += 1

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.skip -= 1

    def handle_data(self, data):
        if not self.skip:
            self.text.append(data)


@functools.cache
def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def name_of(path):
    return str(path.relative_to(HTML))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_internal_links_lead_somewhere(page):
    for link in read(page).links:
        if re.match(r"[a-z]+:", link) or link.startswith("//"):
            continue
        target, fragment = urldefrag(unquote(link))
        goal = (page.parent / target).resolve() if target else page
        if goal.is_dir():
            goal = goal / "index.html"
        assert goal.exists(), f"{link} leads nowhere"
        if fragment and goal.suffix == ".html" and HTML in goal.parents:
            assert fragment in read(goal).ids, f"{link}: no such place on that page"


@pytest.mark.parametrize("page", CONTENT, ids=name_of)
def test_no_raw_directives_and_no_errors(page):
    text = "".join(read(page).text)
    for raw in ("#| ", ":::", "{misconception}", "{question}", "{versions}", "{dropdown}", "{py:", "{cite", "Traceback (most recent call last)", "[WARN"):
        if raw in ("#| ", ":::", "{dropdown}") and name_of(page) == "nbs/workshop/exercises.html":
            continue  # this page explains the notation itself
        assert raw not in text, f"the page shows {raw!r}"
    html = page.read_text(encoding="utf-8")
    assert 'class="output error"' not in html and "output traceback" not in html


@pytest.mark.parametrize("page", CONTENT, ids=name_of)
def test_every_picture_and_sound_has_words(page):
    reader = read(page)
    for image in reader.images:
        if "_static/images/logo_" in image.get("src", ""):
            continue  # the theme's own buttons
        alt = image.get("alt", "")
        assert len(alt.split()) >= 3, f"picture without alt text: {image.get('src', '')[:60]} alt={alt!r}"
        assert not alt.startswith("../_images"), "the alt text is a file name"
    for tag, attributes in reader.media:
        if tag == "audio":
            assert attributes.get("aria-label"), "a sound without a label"


def test_indexes_are_filled():
    misconceptions = read(HTML / "nbs/back/misconceptions.html")
    assert sum("#misconception-" in link for link in misconceptions.links) >= 5
    questions = "".join(read(HTML / "nbs/back/questions.html").text)
    assert "Which details matter in the end?" in questions
    times = (HTML / "nbs/back/times.html").read_text(encoding="utf-8")
    assert "not run" not in times


def test_api_page_documents_every_public_name():
    import ast

    api = read(HTML / "nbs/back/api.html")
    for path in (ROOT / "speechlearn").rglob("*.py"):
        if path.name.startswith("_"):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert f"module-{module}" in api.ids, f"{module} is missing on the API page"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
                assert f"{module}.{node.name}" in api.ids, f"{module}.{node.name} is missing on the API page"


@pytest.fixture(scope="module")
def server():
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(HTML))
    handler.log_message = lambda *args: None
    http.server.SimpleHTTPRequestHandler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def open_page(browser, server):
    """Opens a page with everything outside this machine cut off; gives the page, and collects errors and requests."""
    contexts = []

    def opener(name, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.errors, page.outside = [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))

        def route(route):
            if route.request.url.startswith((server, "data:", "blob:")):
                route.continue_()
            else:
                page.outside.append(route.request.url)
                route.abort()

        page.route("**/*", route)
        page.goto(f"{server}/{name}", wait_until="load")
        return page

    yield opener
    for context in contexts:
        context.close()


@pytest.mark.browser
@pytest.mark.parametrize("path", CONTENT, ids=name_of)
def test_page_opens_without_errors_and_without_network(open_page, path):
    page = open_page(name_of(path))
    page.wait_for_timeout(300)
    assert page.errors == []
    assert page.outside == [], "the page asked for something from outside"
    if page.locator("span.math, div.math").count():
        page.wait_for_selector("mjx-container", timeout=10_000)


@pytest.mark.browser
@pytest.mark.parametrize("path", CONTENT, ids=name_of)
def test_page_fits_a_phone(open_page, path):
    page = open_page(name_of(path), viewport={"width": 375, "height": 800})
    overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 1, f"the page is {overflow} px wider than a phone"


@pytest.mark.browser
def test_slider_changes_the_picture(open_page):
    page = open_page("nbs/workshop/viz.html")
    widget = page.locator(".speechlearn-widget").first
    widget.scroll_into_view_if_needed()
    before = widget.locator(".speechlearn-frames").screenshot()
    shown = widget.locator("img:visible").get_attribute("data-frame")
    slider = widget.locator("input[type=range]")
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    assert widget.locator("img:visible").count() == 1
    assert widget.locator("img:visible").get_attribute("data-frame") == "5" != shown
    assert widget.locator(".speechlearn-frames").screenshot() != before
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert widget.locator("img:visible").get_attribute("data-frame") == "4"
    assert widget.locator("output").inner_text() == "300"


@pytest.mark.browser
def test_still_picture_without_javascript(open_page):
    page = open_page("nbs/workshop/viz.html", java_script_enabled=False)
    assert page.locator(".speechlearn-widget img:visible").count() == 1


@pytest.mark.browser
def test_the_browser_remembers_finished_chapters(open_page):
    page = open_page("nbs/sound/01_waveforms.html")
    tick = page.locator("input.chapter-tick")
    assert not tick.is_checked()
    tick.check()
    page.reload()
    assert page.locator("input.chapter-tick").is_checked()
    assert page.locator("nav a.done[href*='01_waveforms'], .bd-sidebar a.done").count() >= 1
