"""viz: alt text, static widgets, their page without a kernel."""
import matplotlib.pyplot as plt
import pytest

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
