"""The report in a real browser, Debian's headless Chromium: display, clicks and accessibility."""

import base64
import json

import pytest

from klquant.backends.report import describe, render_html
from support import report_cases
from support.report_cases import DEAD, HOSTILE, OUTLIER

pytest.importorskip("selenium", reason="needs selenium")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from support.browser import CHROMIUM, CONTRAST, DRIVER, Page, start

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = start(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report():
    found = report_cases.peculiar()
    scales = {name: [0.1, 0.2, 0.0] for name in found.amax}
    return describe(found, title=HOSTILE, diagnosis=report_cases.diagnosis(found.amax), weight_scales=scales)


@pytest.fixture(scope="module")
def path(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_html(report), encoding="utf-8")
    return path


@pytest.fixture
def page(driver, path):
    page = Page(driver)
    page.emulate()
    page.open(path)
    yield page
    assert page.log() == []


def sort_of(page, text):
    return page.run("return arguments[0].closest('th').ariaSort", page.heading(text))


def pick(name):
    return f"#tensor-table [data-pick='{name}']"


def test_it_opens_from_disk_and_asks_for_nothing(page, report):
    assert page.driver.current_url.startswith("file://")
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.names() == [tensor.name for tensor in report.tensors]
    assert page["#download"].is_displayed()
    assert json.loads(page.run("return document.getElementById('data').textContent")) == json.loads(report.as_json())


def test_names_are_shown_and_never_run(page):
    assert page.driver.title == HOSTILE
    page.run("arguments[0].click()", page.run("return document.querySelectorAll('#sensitivity [data-pick]')[6]"))
    assert page["#layer-title"].text == HOSTILE
    assert HOSTILE in page["#histogram"].get_attribute("aria-label")
    assert page.driver.title == HOSTILE
    assert page.run("return document.scripts.length") == 6


def test_headings_sort_up_down_and_back(page, report):
    amax = {tensor.name: tensor.amax for tensor in report.tensors}
    original = page.names()
    page.heading("amax").click()
    assert [amax[name] for name in page.names()] == sorted(amax.values())
    assert sort_of(page, "amax") == "ascending"
    page.heading("amax").click()
    assert [amax[name] for name in page.names()] == sorted(amax.values(), reverse=True)
    assert sort_of(page, "amax") == "descending"
    page.heading("Tensor").click()
    assert (sort_of(page, "amax"), sort_of(page, "Tensor")) == ("none", "ascending")
    page.heading("amax").click()
    for _ in range(2):
        page.heading("amax").click()
    assert page.names() == original


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("criterion", lambda tensor: tensor.chosen.criterion),
        ("clipped", lambda tensor: tensor.chosen.clipped),
        ("mse", lambda tensor: tensor.criteria["mse"].threshold if tensor.criteria else None),
        ("max", lambda tensor: tensor.criteria["max"].threshold if tensor.criteria else None),
        ("Warnings", lambda tensor: len(tensor.warnings)),
    ],
)
def test_each_heading_sorts_its_own_column_with_what_is_missing_last(page, report, text, value):
    values = {tensor.name: value(tensor) for tensor in report.tensors}
    known = [one for one in values.values() if one is not None]
    for backwards in (False, True):
        page.heading(text).click()
        missing = [None] * (len(values) - len(known))
        assert [values[name] for name in page.names()] == sorted(known, reverse=backwards) + missing


def test_numbers_in_names_are_sorted_by_value(page):
    page.heading("Tensor").click()
    assert [name for name in page.names() if name.startswith("f")] == [f"features.{3 * k}.conv" for k in range(6)]


def test_the_keyboard_sorts_and_picks(page):
    page["#filter-warned"].send_keys(Keys.TAB)  # to the table, which can be scrolled
    assert page.run("return document.activeElement.getAttribute('aria-label')") == "Table of tensors"
    ActionChains(page.driver).send_keys(Keys.TAB, Keys.ENTER).perform()
    assert sort_of(page, "Tensor") == "ascending"
    ActionChains(page.driver).send_keys(Keys.SPACE).perform()
    assert sort_of(page, "Tensor") == "descending"
    page[pick("features.6.conv")].send_keys(Keys.ENTER)
    assert page["#layer-title"].text == "features.6.conv"


def test_focus_is_seen(page):
    ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_filter_narrows_the_table(page):
    page["#filter-name"].send_keys("FEATURES.")
    assert page.names() == [f"features.{3 * k}.conv" for k in range(6)]
    assert page["#filter-count"].text == "6 of 9 tensors"
    page["#filter-name"].send_keys("9", Keys.ENTER)  # Enter must not reload the page
    assert page.names() == ["features.9.conv"]
    page["#filter-name"].clear()
    page["#filter-warned"].click()
    assert page.names() == [DEAD, OUTLIER]
    page.heading("amax").click()
    assert page.names() == [DEAD, OUTLIER]
    page["#filter-warned"].click()
    assert page["#filter-count"].text == "9 tensors"


def test_the_worst_tensor_is_chosen_first(page, report, tmp_path):
    assert page["#layer-title"].text == OUTLIER
    assert "clips" in page["#layer-warnings"].text
    assert page.run("return document.querySelectorAll('section.warnings li').length") == 2
    calm = report._replace(tensors=[tensor._replace(warnings=[]) for tensor in report.tensors])
    (tmp_path / "calm.html").write_text(render_html(calm), encoding="utf-8")
    page.open(tmp_path / "calm.html")
    assert report.tensors[0].name != OUTLIER
    assert page["#layer-title"].text == OUTLIER


def test_a_picked_tensor_has_its_numbers_and_charts(page, report):
    tensor = next(tensor for tensor in report.tensors if tensor.name == "features.9.conv")
    before = page.drawn("histogram")
    page[pick(tensor.name)].click()
    assert page["#layer-title"].text == tensor.name
    rows = page.run("return [...document.querySelectorAll('#layer-criteria tbody tr')].map((row) => row.innerText)")
    assert [row.split()[0] for row in rows] == ["entropy", "max", "percentile", "mse"]
    assert "(chosen)" in rows[0]
    assert f"{tensor.criteria['mse'].threshold:.3f}" in rows[3]
    assert page.drawn("histogram") != before
    for chart in ("histogram", "divergence"):
        assert page[f"#{chart} canvas"].size["width"] > 1000
        assert tensor.name in page[f"#{chart}"].get_attribute("aria-label")
    current = page.run("return [...document.querySelectorAll('tr[aria-current]')].map((row) => row.dataset.name)")
    assert current == [tensor.name]


LIKENESS = """
const [chart, share, name] = arguments;
const [canvas, over] = ["canvas", ".u-over"].map((part) => document.querySelector(`#${chart} ${part}`));
const [outer, inner] = [canvas, over].map((one) => one.getBoundingClientRect());
const x = Math.round(inner.left - outer.left + share * inner.width) - 1;
const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
copy.drawImage(canvas, 0, 0);
const { data } = copy.getImageData(x, inner.top - outer.top, 3, inner.height);
const wanted = colour(name).match(/[0-9a-f]{2}/g).map((hex) => parseInt(hex, 16));
const away = (k) => wanted.reduce((sum, value, c) => sum + Math.abs(value - data[k + c]), 0);
return Math.min(...Array.from({ length: data.length / 4 }, (_, k) => away(4 * k)));
"""


def test_each_threshold_is_marked_where_it_is(page, report):
    tensor = next(tensor for tensor in report.tensors if tensor.name == "features.6.conv")
    page[pick(tensor.name)].click()
    assert len({round(one.ratio, 2) for one in tensor.criteria.values()}) == 4
    for name, one in tensor.criteria.items():
        right = (1 + one.ratio) / 2
        for chart, share in (("histogram", right), ("histogram", 1 - right), ("divergence", one.ratio)):
            assert page.run(LIKENESS, chart, share, name) < 60


def test_a_tensor_without_values_has_no_charts(page):
    page[pick(DEAD)].click()
    assert not page["#layer-charts"].is_displayed()
    assert page["#layer-warnings"].text == "all its values are 0; it gets scale 1"
    page[pick(OUTLIER)].click()
    assert page["#layer-charts"].is_displayed()


def point(page, chart, share, *, drag=None):
    """Point at a share of the width of a chart, or drag from there to another."""
    area = page[f"#{chart} .u-over"]
    page.run("arguments[0].scrollIntoView({ block: 'center' })", area)
    left = int((share - 0.5) * area.size["width"])
    actions = ActionChains(page.driver, duration=20).move_to_element_with_offset(area, left, 0)
    if drag is not None:
        actions.click_and_hold().move_by_offset(int((drag - share) * area.size["width"]), 0).release()
    actions.perform()
    page.settle()
    return page["#readout"].text


def pointed_at(text):
    return float(text.removeprefix("At ").partition(":")[0])


SHARE = """
const [over, cursor] = [".u-over", ".u-cursor-x"].map((part) => document.querySelector(`#${arguments[0]} ${part}`));
return parseFloat(cursor.style.transform.match(/[\\d.]+/)[0]) / over.clientWidth;
"""


def test_both_charts_read_and_zoom_as_one(page):
    page[pick("features.6.conv")].click()  # amax 3, both signs
    text = point(page, "histogram", 0.9)
    assert pointed_at(text) == pytest.approx(2.4, abs=0.03)
    assert "values from" in text
    assert "KL" in text
    assert page.run(SHARE, "histogram") == pytest.approx(0.9, abs=0.01)
    assert page.run(SHARE, "divergence") == pytest.approx(0.8, abs=0.01)  # the same value: its axis begins at 0
    assert "KL" not in point(page, "histogram", 0.51)  # narrower than the narrowest candidate
    point(page, "histogram", 0.75, drag=0.95)
    assert pointed_at(point(page, "divergence", 0.01)) == pytest.approx(1.5, abs=0.1)
    ActionChains(page.driver).double_click(page["#divergence .u-over"]).perform()
    assert pointed_at(point(page, "histogram", 0.01)) == pytest.approx(-2.94, abs=0.05)


def test_the_readout_counts_what_lies_beyond(page, report):
    name = "features.6.conv"  # of both signs
    tensor = next(tensor for tensor in report.tensors if tensor.name == name)
    page[pick(name)].click()
    text = point(page, "histogram", 0.7)
    per_bar, width = tensor.bars.bins_per_bar, tensor.bars.bin_width
    left, right = tensor.bars.counts[250::-1], tensor.bars.counts[250:]  # from the inside to the outside
    assert (per_bar, len(left), len(right)) == (2, 251, 251)
    outside = [k for k in range(1, 251) if (per_bar * (k - 1) + 0.5) * width >= pointed_at(text)]
    share = 100 * sum(left[k] + right[k] for k in outside) / tensor.num_values
    assert f"{right[outside[0] - 1]:,} values from" in text
    assert f" {share:.3g}% in bars beyond" in text


def test_the_switch_changes_the_scale_of_the_counts(page):
    logarithmic = page.drawn("histogram")
    curve = page.drawn("divergence")
    page["#log"].click()
    page.settle()
    assert page.drawn("histogram") != logarithmic
    assert page.drawn("divergence") == curve
    page["#log"].send_keys(Keys.SPACE)
    page.settle()
    assert page.drawn("histogram") == logarithmic


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(page, scheme):
    page.emulate(scheme=scheme)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    found = page.run(CONTRAST)
    assert len(found) > 200
    assert [(ratio, where) for ratio, where in found if ratio < 4.5] == []


def test_dark_is_dark_with_its_charts(page):
    paper = "return getComputedStyle(document.body).backgroundColor"
    light, drawn = page.run(paper), page.drawn("histogram")
    page.emulate(scheme="dark")
    assert page.run(paper) == "rgb(20, 24, 29)" != light
    assert page.drawn("histogram") != drawn
    page.emulate(scheme="light")
    assert page.drawn("histogram") == drawn


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_width(page, width, tmp_path):
    page.emulate(width=width)
    page.settle()
    assert page.run("return document.documentElement.scrollWidth") == width
    assert page.where(".scroll", "one.getBoundingClientRect().right > innerWidth") == []
    assert width * 0.85 < page["#histogram canvas"].size["width"] < width
    assert page.screenshot(tmp_path / f"{width}.png")[0] == width


def test_on_a_phone_the_name_stays_while_the_table_is_scrolled(page):
    page.emulate(width=390)
    left = "return document.querySelector('#tensor-table tbody th').getBoundingClientRect().left"
    before = page.run(left)
    page.run("document.querySelector('#tensors .scroll').scrollLeft = 300")
    assert page.run(left) == pytest.approx(before, abs=1)


def test_printed_it_is_light_whole_and_without_controls(page, tmp_path):
    page.emulate(scheme="dark")
    dark = page.drawn("histogram")
    page.emulate(scheme="dark", media="print", width=1030)  # A4 across
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.drawn("histogram") != dark
    assert not page[".filters"].is_displayed()
    assert page.where(".scroll", "one.scrollWidth > one.clientWidth") == []
    assert page.where(".scroll, .warnings ul", "getComputedStyle(one).maxHeight !== 'none'") == []
    printed = page.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")


def test_tables_can_be_heard(page):
    assert page.run("return document.documentElement.lang") == "en"
    assert page.where("th:not([scope])") == []
    assert page.where("table", "!one.caption.textContent.trim()") == []
    assert len(page.where("table.sortable")) == 5
    assert page.where("table.sortable thead button", "one.closest('th').ariaSort !== 'none'") == []
    assert page.where("#tensors tbody tr, #sensitivity tbody tr", "!one.querySelector('th[scope=row]')") == []


def test_everything_has_a_name(page):
    named = "one.ariaHidden || one.ariaLabel || one.labels?.length"
    assert page.where("[role=img], svg, input, nav, [role=region], form", f"!({named})") == []
    assert page.where("section", "!document.getElementById(one.getAttribute('aria-labelledby'))?.textContent") == []
    assert page.where("h1, h2, button", "!one.textContent.trim()") == []


def test_200_tensors_are_quick(driver, tmp_path):
    path = tmp_path / "big.html"
    path.write_text(report_cases.big_page(), encoding="utf-8")
    page = Page(driver)
    page.open(path)
    seconds = page.run("return performance.getEntriesByType('navigation')[0].domComplete") / 1000
    assert len(page.names()) == 200
    assert page["#histogram canvas"].is_displayed()
    assert 0 < seconds < 10
    assert page.log() == []


def test_a_button_copies_what_to_paste(page):
    """Chromium denies the clipboard to a page without focus, so the text is taken where it is written."""
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    buttons = page.run("return [...document.querySelectorAll('section.warnings .copy')]")
    for button, begin in zip(buttons, ("overrides={", "--override "), strict=True):
        assert button.is_displayed()
        button.click()
        page.settle()
        assert page.run("return window.copied").startswith(begin)
        assert button.text == "Copied"


def test_near_ties_are_shaded(page, report):
    tensor = next(tensor for tensor in report.tensors if tensor.name == "features.6.conv")
    page[pick(tensor.name)].click()
    middle = (tensor.curve.tie_low + tensor.curve.tie_high) / 2 / tensor.amax
    assert page.run(LIKENESS, "divergence", middle, "band") == 0
    assert page.run(LIKENESS, "divergence", tensor.curve.tie_low / tensor.amax - 0.05, "band") > 10


def test_on_a_phone_the_numbers_that_matter_are_seen(page):
    page.emulate(width=390)
    shown = "one.checkVisibility() && one.getBoundingClientRect().right < innerWidth"
    heads = page.run(
        "return [...document.querySelectorAll('#tensor-table thead th')]"
        f".filter((one) => {shown}).map((one) => one.textContent.trim())"
    )
    assert heads == ["Tensor", "Warnings", "SQNR exp.", "SQNR meas."]
