"""viz: alt text, static widgets, their page without a kernel."""
import io
import json
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.viz import COLOURS, StaticWidget, interact_static, show, style


def draw(size=1, colour="blue"):
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot([0, size], [0, 1], color=COLOURS[colour], linewidth=4)
    ax.set(xlim=(0, 5))
    return fig


def test_show_needs_words_and_a_figure():
    picture = show(draw(), alt='a line that rises "steeply"')
    page = picture._repr_html_()
    assert 'alt="a line that rises &quot;steeply&quot;"' in page and "data:image/png;base64," in page
    assert picture.png.startswith(b"\x89PNG") and plt.get_fignums() == []
    with pytest.raises(ValueError, match="needs alt text"):
        show(draw(), alt="  ")
    with pytest.raises(TypeError, match="does the drawing function end in"):
        show(None, alt="nothing")
    plt.close("all")


def test_axes_are_shown_as_their_figure():
    assert show(draw().axes[0], alt="a line").png.startswith(b"\x89PNG")


def test_widget_draws_every_combination_in_order():
    widget = interact_static(draw, size=[1, 2, 3], colour=["blue", "orange"], alt=lambda size, colour: f"{colour} line to {size}")
    assert isinstance(widget, StaticWidget) and len(widget.frames) == 6 and widget.values[1] == {"size": 1, "colour": "orange"}
    assert widget.alts[-1] == "orange line to 3" and len(set(widget.frames)) == 6
    page = widget._repr_html_()
    assert page.count("<img") == 6 and page.count(" hidden") == 5 and page.count('type="range"') == 2
    assert widget.n_bytes == sum(map(len, widget.frames)) and plt.get_fignums() == []
    assert widget._repr_html_() != page  # another id each time, so that two of them live on one page


def test_start_and_its_errors():
    widget = interact_static(draw, size=[1, 2, 3], alt="a line", start={"size": 3})
    assert 'value="2"' in widget._repr_html_()
    for wrong, message in (
        (dict(), "got 0"), (dict(a=[1, 2], b=[1, 2], c=[1, 2]), "got 3"), (dict(size=[1]), "needs at least two"), (dict(size=[1, 2], start={"size": 9}), "none of its values"),
    ):
        with pytest.raises(ValueError, match=message):
            interact_static(draw, alt="a line", **wrong)
    with pytest.raises(TypeError, match="expected a matplotlib figure"):
        interact_static(lambda size: 3, size=[1, 2], alt="a line")
    with pytest.raises(ValueError, match="needs alt text"):
        interact_static(draw, size=[1, 2], alt="")


def test_too_heavy_widgets_are_refused(monkeypatch):
    monkeypatch.setattr("speechlearn.viz.MAX_WIDGET_BYTES", 1000)
    with pytest.raises(ValueError, match="Use fewer values"):
        interact_static(draw, size=[1, 2], alt="a line")


def test_colours_can_be_told_apart_in_grey():
    def grey(colour):
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    assert abs(grey(COLOURS["blue"]) - grey(COLOURS["orange"])) > 40
    style()
    assert plt.rcParams["axes.prop_cycle"].by_key()["color"][:2] == [COLOURS["blue"], COLOURS["orange"]]


def test_live_version_is_an_ipywidget():
    pytest.importorskip("ipywidgets")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        box = interact_static(draw, size=[1, 2, 3], alt="a line").live()
    assert box.children[0].options[2] == ("3", 3) and box.children[0].value == 2


@pytest.mark.browser
@pytest.mark.parametrize("width", [1000, 375])
def test_two_sliders_in_a_bare_page(browser, width):
    widget = interact_static(draw, size=[1, 2, 3], colour=["blue", "orange"], alt=lambda size, colour: f"{colour} {size}")
    page = browser.new_page(viewport={"width": width, "height": 700})
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.set_content(f"<body>{widget._repr_html_()}{widget._repr_html_()}</body>")
    first = page.locator(".speechlearn-widget").first
    sliders = first.locator("input[type=range]")

    def shown():
        return [img.get_attribute("alt") for img in first.locator("img:visible").all()]

    assert shown() == ["orange 2"]
    sliders.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert shown() == ["orange 3"] and first.locator("output").nth(0).inner_text() == "3"
    box = sliders.nth(1).bounding_box()
    page.mouse.click(box["x"] + 4, box["y"] + box["height"] / 2)
    assert shown() == ["blue 3"] and sliders.nth(1).get_attribute("aria-valuetext") == "blue"
    assert page.locator(".speechlearn-widget").nth(1).locator("img:visible").get_attribute("alt") == "orange 2"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in requests if not url.startswith(("data:", "about:"))] == []
    page.close()


def test_colours_are_those_of_okabe_and_ito():
    published = {
        "black": "#000000", "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73",
        "yellow": "#F0E442", "blue": "#0072B2", "vermillion": "#D55E00", "purple": "#CC79A7",
    }  # Okabe and Ito, "Color Universal Design", 2008: the red, green and blue values printed there
    assert {name: COLOURS[name] for name in published} == published


def test_pictures_have_the_size_that_was_asked_for():
    assert size_of(show(draw(), alt="a line").png) == (450, 300)  # 3 x 2 inches, 150 dots per inch
    widget = interact_static(draw, size=[1, 2], alt="a line", dpi=80)
    assert {size_of(frame) for frame in widget.frames} == {(240, 160)}, "frames of one size do not make the page jump"


def size_of(picture: bytes) -> tuple[int, int]:
    from PIL import Image

    return Image.open(io.BytesIO(picture)).size


def test_the_limit_itself_is_allowed(monkeypatch):
    n_bytes = interact_static(draw, size=[1, 2], alt="a line").n_bytes
    monkeypatch.setattr("speechlearn.viz.MAX_WIDGET_BYTES", n_bytes)
    assert interact_static(draw, size=[1, 2], alt="a line").n_bytes == n_bytes
    monkeypatch.setattr("speechlearn.viz.MAX_WIDGET_BYTES", n_bytes - 1)
    with pytest.raises(ValueError, match=r"2 pictures take 0\.0 MB"):
        interact_static(draw, size=[1, 2], alt="a line")


def test_an_array_of_values_makes_a_slider():
    import numpy as np

    widget = interact_static(draw, size=np.array([0.5, 1.0, 1.5]), alt=lambda size: f"to {size:g}")
    assert widget.alts == ["to 0.5", "to 1", "to 1.5"]
    assert [text for tag, text in parsed(widget._repr_html_()).texts if tag == "output"] == ["1"]


class parsed(HTMLParser):
    """A page as a browser's parser sees it: tags with their attributes, and text with the tag around it."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.inside = [], [], [None]
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "input"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag, f"</{tag}> closes nothing: a text broke out of its place"

    def handle_data(self, text):
        self.texts.append((self.inside[-1], text))

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ['"', "</script><script>alert(1)</script>", "a & b", "&lt;", "<img src=x onerror=alert(1)>", "'", "\\", "%(id)s", "100 %"]
)


@settings(max_examples=60, deadline=None)
@given(first=st.lists(WORDS, min_size=2, max_size=4, unique=True), second=st.lists(WORDS, min_size=2, max_size=3, unique=True), data=st.data())
def test_any_words_may_label_a_slider_or_describe_a_frame(first, second, data):
    params = {"first_word": first, "second": second}
    start = {name: data.draw(st.integers(0, len(values) - 1)) for name, values in params.items()}
    alts = [f"{a} / {b}" for a in first for b in second]
    page = parsed(StaticWidget(draw, [b"x"] * len(alts), alts, params, start)._repr_html_())
    assert page.inside == [None] and len(page.named("script")) == 1
    pictures, sliders = page.named("img"), page.named("input")
    assert [picture["alt"] for picture in pictures] == alts
    # the still picture is the one that belongs to where the handles stand
    (shown,) = [picture["alt"] for picture in pictures if "hidden" not in picture]
    assert shown == f"{first[start['first_word']]} / {second[start['second']]}"
    assert [json.loads(slider["data-labels"]) for slider in sliders] == [first, second]
    assert [slider["aria-label"] for slider in sliders] == ["first word", "second"]
    assert [slider["aria-valuetext"] for slider in sliders] == [first[start["first_word"]], second[start["second"]]]


@pytest.fixture
def bare_page(browser):
    """Opens HTML in an otherwise empty page that may load nothing; gives the page and collects errors and requests."""
    contexts = []

    def opener(html, *, width=1000, **options):
        context = browser.new_context(viewport={"width": width, "height": 700}, **options)
        contexts.append(context)
        page = context.new_page()
        page.errors, page.outside = [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(("data:", "about:")) else page.outside.append(request.url))
        page.set_content(f"<!doctype html><body>{html}</body>")
        return page

    yield opener
    for context in contexts:
        context.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1000, 375])
def test_dragging_and_arrow_keys_change_what_one_sees(bare_page, width):
    page = bare_page(interact_static(draw, size=[1, 2, 3, 4], alt="a line", start={"size": 1})._repr_html_(), width=width)
    frames, slider = page.locator(".speechlearn-frames"), page.locator("input[type=range]")
    seen = [frames.screenshot()]
    box = slider.bounding_box()
    assert box["width"] >= 100 and box["x"] >= 0 and box["x"] + box["width"] <= width, "a finger cannot reach the whole slider"
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, middle, steps=6)
    page.mouse.up()
    assert slider.input_value() == "3"
    seen.append(frames.screenshot())
    page.keyboard.press("ArrowLeft")  # the drag has left the focus on the slider
    seen.append(frames.screenshot())
    page.keyboard.press("Home")
    assert slider.input_value() == "0" and frames.screenshot() == seen[0], "the same value shows the same picture again"
    assert len(set(seen)) == 3 and page.errors == [] and page.outside == []


@pytest.mark.browser
def test_every_position_of_two_sliders_shows_its_own_frame(bare_page):
    widget = interact_static(draw, size=[1, 2, 3], colour=["blue", "orange"], alt=lambda size, colour: f"{colour} {size}")
    page = bare_page(widget._repr_html_())
    first, second = page.locator("input[type=range]").all()
    for values, alt in zip(widget.values, widget.alts):
        first.fill(str([1, 2, 3].index(values["size"])))
        second.fill(str(["blue", "orange"].index(values["colour"])))
        assert [picture.get_attribute("alt") for picture in page.locator("img:visible").all()] == [alt]
        assert page.locator("output").all_inner_texts() == [str(values["size"]), values["colour"]]
    assert page.errors == []


@pytest.mark.browser
def test_sliders_are_reached_and_named_without_a_mouse(bare_page):
    widget = interact_static(lambda line_size, colour: draw(line_size, colour), line_size=[1, 2, 3], colour=["blue", "orange"], alt="a line")
    page = bare_page(widget._repr_html_())
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert page.locator("output").all_inner_texts() == ["3", "blue"]
    # found by role and name, as a screen reader finds them; exactly one picture is offered to it
    assert page.get_by_role("slider", name="line size").get_attribute("aria-valuetext") == "3"
    assert page.get_by_role("slider", name="colour").get_attribute("aria-valuetext") == "blue"
    assert page.get_by_role("img", name="a line").count() == 1


@pytest.mark.browser
def test_the_starting_picture_remains_without_javascript(bare_page):
    widget = interact_static(draw, size=[1, 2, 3], alt=lambda size: f"to {size}", start={"size": 3})
    page = bare_page(widget._repr_html_(), java_script_enabled=False)
    assert [picture.get_attribute("alt") for picture in page.locator("img:visible").all()] == ["to 3"]


@pytest.mark.browser
def test_a_widget_starts_when_its_script_is_run_after_it_was_put_in_and_only_once(bare_page):
    """JupyterLab sets the HTML of an output first and then runs its scripts; a second run must change nothing."""
    page = bare_page("<div id=output></div>")
    run_scripts = """html => {
        const place = document.getElementById("output");
        if (html !== null) { place.innerHTML = html; }
        place.querySelectorAll("script").forEach(old => {
            const script = document.createElement("script");
            script.textContent = old.textContent;
            old.replaceWith(script);
        });
    }"""
    page.evaluate(run_scripts, interact_static(draw, size=[1, 2, 3], alt=lambda size: f"to {size}")._repr_html_())
    slider, picture = page.locator("input[type=range]"), page.locator("img:visible")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert picture.get_attribute("alt") == "to 3"
    page.evaluate(run_scripts, None)
    assert picture.get_attribute("alt") == "to 3" and slider.input_value() == "2"
    page.keyboard.press("ArrowLeft")
    assert picture.get_attribute("alt") == "to 2" and page.errors == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 375])
def test_pictures_wider_than_a_phone_shrink_to_fit_it(bare_page, width):
    def wide(size):
        return plt.subplots(figsize=(7, 3))[0]

    page = bare_page(show(wide(1), alt="empty axes")._repr_html_() + interact_static(wide, size=[1, 2], alt="empty axes")._repr_html_(), width=width)
    for picture in page.locator("img:visible").all():
        assert picture.evaluate("picture => picture.naturalWidth") > width, "a picture that fits anyway tests nothing"
        box = picture.bounding_box()
        assert box["x"] + box["width"] <= width
        assert box["width"] / box["height"] == pytest.approx(7 / 3, rel=0.02), "the picture is squeezed"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
