"""A headless Chromium, and a page with the queries that tests need."""

import base64
import shutil
import struct

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_OPTIONS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", "hide-scrollbars")  # fmt: skip

# Every text that is seen, and every colour that charts write in, with its contrast to what is behind it, as WCAG counts
CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const ratio = (...colours) => {
  const [dark, bright] = colours.map(luminance).sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3) return colour;
    if (colour[3] !== 0) throw new Error(`half transparent: ${at.outerHTML}`);
  }
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (own && element.checkVisibility()) {
    found.push([ratio(parse(getComputedStyle(element).color), behind(element)), element.outerHTML.slice(0, 80)]);
  }
}
const probe = document.body.appendChild(document.createElement("i"));
for (const name of ["entropy", "mse", "percentile", "max", "fixed", "soft"]) {
  probe.style.color = `var(--${name})`;
  found.push([ratio(parse(getComputedStyle(probe).color), behind(document.body)), name]);
}
probe.remove();
return found;
"""


def start(folder):
    """Return a driver of a new browser, which keeps its files in an empty folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*_OPTIONS, f"user-data-dir={folder}"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(DRIVER))


class Page:
    """A page that was just opened, with the queries that tests need."""

    def __init__(self, driver):
        self.driver = driver

    def __getitem__(self, selector):
        return self.driver.find_element("css selector", selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def emulate(self, *, width=1280, scheme="light", media=""):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self.settle()

    def settle(self):
        """Wait until the last change is drawn."""
        done = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        self.driver.execute_async_script(done)

    def open(self, path):
        self.driver.get(path.as_uri())

    def screenshot(self, path):
        size = self.run("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(shot["data"]))
        return struct.unpack(">II", path.read_bytes()[16:24])

    def names(self):
        """Return the visible tensors, from top to bottom."""
        rows = "[...document.querySelectorAll('#tensor-table tbody tr')].filter((row) => row.checkVisibility())"
        return self.run(f"return {rows}.map((row) => row.dataset.name)")

    def where(self, selector, condition="true"):
        """Return the start tags of the elements that meet a condition."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])]"
            f".filter((one) => {condition}).map((one) => one.outerHTML.slice(0, 80))", selector,
        )  # fmt: skip

    def heading(self, text):
        return self.run(
            "return [...document.querySelectorAll('#tensor-table thead button')]"
            ".find((button) => button.textContent === arguments[0])", text,
        )  # fmt: skip

    def drawn(self, chart):
        return self.run(f"return document.querySelector('#{chart} canvas').toDataURL()")

    def log(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]
