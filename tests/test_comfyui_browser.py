"""The pack in a real browser: templates open, Run draws, help opens, and nothing complains.

With $VORTEX_SCREENSHOTS naming a folder, the pictures of the templates and of the help pages are made on the way.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy_host
import pytest
import stand_in
import workflow_format
from comfy_host import PACK, Host
from PIL import Image

import workflows

SHOTS = os.environ.get("VORTEX_SCREENSHOTS")
closest: dict[Path, int] = {}  # how wide the picture of a node is that was kept
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1800,1140"),
)
selenium = pytest.importorskip("selenium", reason="NOT RUN, in a browser: selenium is not installed")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.slow,
    pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="NOT RUN, in a browser: no chromium and chromedriver here"),
]


class Page:
    """ComfyUI's front end."""

    def __init__(self, driver: Any, host: Host) -> None:
        self.driver, self.host = driver, host
        driver.get(host.url)
        self.until(lambda: self.js("return !!(window.app && app.graph && app.extensionManager && app.canvas)"))
        self.js("app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
        driver.get_log("browser")

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait for something true, and return it."""
        from selenium.common.exceptions import WebDriverException

        deadline, problem = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            try:
                if found := condition():
                    return found
            except WebDriverException as error:  # half-built pages
                problem = error
            time.sleep(0.2)
        raise TimeoutError(f"not in {seconds} s: {problem}; page says {self.text()[:500]!r}")

    def text(self) -> str:
        return self.js("return document.body.innerText")

    def dialog(self) -> str:
        """What the open dialog says."""
        return self.js("return [...document.querySelectorAll('[role=dialog]')].map(e => e.innerText).join()")

    def click(self, css: str) -> None:
        self.until(lambda: self.js("const e = document.querySelector(arguments[0]); e && e.click(); return !!e", css))

    def click_text(self, text: str) -> None:
        """The innermost element that says just this."""
        code = """
            const found = [...document.querySelectorAll('li, span, button, a')].filter(
                e => e.innerText && e.innerText.trim() === arguments[0] && e.offsetParent)
            if (found.length) found[found.length - 1].click()
            return found.length > 0"""
        self.until(lambda: self.js(code, text))

    def open_template(self, name: str) -> None:
        """As a user does: Browse Templates, the pack, the card."""
        self.js("app.graph.clear()")
        self.js("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.click_text(PACK)
        card = f'[data-testid="template-workflow-{name}"]'
        # old front ends make more cards only once the list is scrolled
        scrolled = """
            const lists = [...document.querySelectorAll('[role=dialog] *')].filter(e => e.scrollHeight > e.clientHeight)
            lists.forEach(e => { e.scrollTop = e.scrollHeight; e.dispatchEvent(new Event('scroll')) })
            return !!document.querySelector(arguments[0])"""
        self.until(lambda: self.js(scrolled, card))
        self.click(card)
        wanted = len(json.loads((workflows.FOLDER / f"{name}.json").read_text())["nodes"])
        self.until(lambda: self.js("return app.graph.nodes.length") == wanted)

    def resize_picture(self, side: int) -> None:
        self.js(
            "app.graph.nodes.find(n => n.type === 'VortexSchnellSampler').widgets"
            ".filter(w => ['width', 'height'].includes(w.name)).forEach(w => { w.value = arguments[0] })",
            side,
        )

    def unknown_nodes(self) -> list[str]:
        return self.js(
            "return app.graph.nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)"
        )

    def frame(self, box: Sequence[float] | None = None) -> None:
        """Show `[x, y, width, height]` of the graph as large as it fits below the bars; all of it by default."""
        self.js(
            """
            const groups = app.graph.groups.map(g => g.bounding ?? g._bounding)
            const [x, y, width, height] = arguments[0] ?? [
                -20, 0, Math.max(...groups.map(b => b[0] + b[2])) + 40, Math.max(...groups.map(b => b[1] + b[3]))]
            const ds = app.canvas.ds, scale = Math.min(arguments[0] ? 3 : 1, 1620 / width, 790 / height)
            ds.scale = scale
            ds.offset[0] = 110 / scale - x
            ds.offset[1] = 110 / scale - y
            app.canvas.setDirty(true, true)""",
            box,
        )
        time.sleep(1.5)

    def shot(self, box: Sequence[float] | None = None) -> Image.Image:
        """The window, or `[x, y, width, height]` of the graph."""
        image = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        if box is None:
            return image
        code = """
            const d = app.canvas.ds, r = app.canvas.canvas.getBoundingClientRect()
            return [d.scale, d.offset[0] + r.left / d.scale, d.offset[1] + r.top / d.scale]"""
        scale, dx, dy = self.js(code)
        ratio = image.width / self.js("return window.innerWidth")
        x, y, width, height = box
        corners = ((x + dx) * scale, (y + dy) * scale, (x + width + dx) * scale, (y + height + dy) * scale)
        return image.crop(tuple(round(c * ratio) for c in corners))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console that name the pack or its nodes."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING") and "ortex" in entry["message"]
            if "/en.md" not in entry["message"]  # the front end first looks for a translation
            if "api.comfy.org" not in entry["message"]  # the front end asks the registry, which the host forbids
            if not (SHOTS and ".jpg" in entry["message"])  # the pictures that are only now being made
        ]


@pytest.fixture(scope="module", params=comfy_host.trees() or [Path("no tree")], ids=lambda tree: tree.name)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Iterator[Page]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp(request.param.name)
    base = folder / "base"
    stand_in.write_checkpoint(tiny_dir, folder / workflows.CHECKPOINT)
    (base / "models" / "loras").mkdir(parents=True)
    shutil.copy(
        comfy_host.ROOT / "vortex_core" / "assets" / "tiny-outlines-lora.safetensors", base / "models" / "loras"
    )
    host = Host(request.param, base, "--preview-method", "latent2rgb")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = None
    try:
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        yield Page(driver, host)
    finally:
        if driver is not None:
            driver.quit()
        host.stop()


def put_the_checkpoint(page: Page, name: str) -> None:
    """As a user does: open the template, read what is missing, put it there, press R."""
    target = page.host.base / "models" / "checkpoints" / workflows.CHECKPOINT
    target.unlink(missing_ok=True)
    page.js("return app.refreshComboInNodes()")
    page.open_template(name)
    # a dialog in older front ends, a warning beside the graph in newer ones
    page.until(lambda: workflows.CHECKPOINT in page.dialog() or f"{workflows.CHECKPOINT} is missing" in page.text())
    press_download(page)
    page.js("document.querySelectorAll('.p-dialog-close-button').forEach(e => e.click())")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(page.host.base.parent / workflows.CHECKPOINT, target)
    page.js("return app.refreshComboInNodes()")
    # a CPU draws 512 or 1024 slowly; what is asked here is that Run works
    page.resize_picture(workflows.TINY_SIDE)


def press_download(page: Page) -> None:
    """What is missing has a button that asks the browser for its address."""
    page.js(
        "window.pressed = []; window.open = url => { pressed.push(url); return null };"
        "HTMLAnchorElement.prototype.click = function () { pressed.push(this.href) }"
    )
    code = """
        const shown = [...document.querySelectorAll('button')].filter(e => e.offsetParent)
        const found = shown.find(e => /^Download(?! all)/.test((e.innerText || e.ariaLabel || '').trim()))
            ?? shown.find(e => e.innerText.trim() === 'View details')
        if (found) found.click()
        return pressed.length > 0"""
    page.until(lambda: page.js(code))
    # older front ends open the repository's page where they cannot ask for the file's size, as here without a network
    url = workflows.DOWNLOAD["url"]
    assert set(page.js("return pressed")) in ({url}, {url.partition("/resolve/")[0]})


@pytest.mark.parametrize("name", workflows.WORKFLOWS)
def test_template_opens_and_draws(page: Page, name: str) -> None:
    if name.startswith("schnell"):
        put_the_checkpoint(page, name)
    else:
        page.open_template(name)
    assert page.unknown_nodes() == []
    if name == "controlnet":  # whose file is not here
        if SHOTS:
            take(page, name)
        return
    before = set(page.host.get("/history"))
    page.click('[data-testid="queue-button"] button, button[data-testid="queue-button"]')
    prompt = page.until(lambda: set(page.host.get("/history")) - before, 120).pop()
    entry = page.host.wait(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    assert page.host.pictures(entry)
    page.until(lambda: page.js("return app.graph.nodes.some(n => n.imgs && n.imgs.length > 0)"))
    assert page.complaints() == []
    if SHOTS:
        take(page, name)


@pytest.mark.parametrize("key", workflow_format.load_pack().NODE_CLASS_MAPPINGS)
def test_help_opens(page: Page, key: str) -> None:
    page.open_template(
        {"VortexLatencyProbe": "latency-probe", "VortexLoRA": "lora", "VortexNAG": "nag"}.get(key, "batch-vram-monitor")
    )
    page.js(
        "const n = app.graph.nodes.find(n => n.type === arguments[0]);"
        "app.canvas.selectNode ? app.canvas.selectNode(n) : app.canvas.select(n); app.canvas.setDirty(true, true)",
        key,
    )
    first_line = (comfy_host.ROOT / "web" / "docs" / f"{key}.md").read_text().splitlines()[2]
    page.click(
        '[data-testid="info-button"], [data-testid="selection-toolbox-info"], .selection-toolbox .pi-question-circle'
    )
    page.until(lambda: first_line[:40] in page.text())
    code = """
        const found = [...document.querySelectorAll('img')].filter(e => e.src.includes(arguments[0]))
        return found.length > 0 && found.every(e => e.complete && e.naturalWidth > 100)"""
    page.until(lambda: page.js(code, f"{key}.jpg"))
    assert page.complaints() == []


def take(page: Page, name: str) -> None:
    """Keep the window, the template's thumbnail and pictures of the nodes."""
    folder = Path(str(SHOTS)) / page.host.tree.name
    (folder / "nodes").mkdir(parents=True, exist_ok=True)
    if name.startswith("schnell"):
        page.resize_picture(int(name.removeprefix("schnell-")))
    page.frame()
    page.shot().save(folder / f"{name}.png")
    for node in workflows.WORKFLOWS[name].nodes.values():
        if node.type.startswith("Vortex"):
            code = "const n = app.graph.nodes.find(n => n.type === arguments[0]); return [...n.pos, ...n.size]"
            x, y, width, height = page.js(code, node.type)
            path, shot = folder / "nodes" / f"{node.type}.jpg", page.shot([x - 20, y - 50, width + 40, height + 70])
            if shot.width > closest.get(path, 0):
                closest[path] = shot.width
                shot.save(path, quality=90)
    box = thumbnail_box(name)
    page.frame(box)
    page.shot(box).resize((512, 512), Image.Resampling.LANCZOS).save(folder / f"{name}.jpg", quality=88)


def thumbnail_box(name: str) -> tuple[float, float, float, float]:
    """The square of the graph that says most: the prompt of a real checkpoint, the pictures, or the measurements."""
    workflow = workflows.WORKFLOWS[name]
    if name.startswith("schnell"):
        (x, y), (width, _) = workflow.nodes[2].at, workflow.nodes[2].size
        return x - 20, y - 50, width + 40, width + 40
    if name == "controlnet":
        applies = next(node for node in workflow.nodes.values() if node.type == "ControlNetApplyAdvanced")
        (x, y), (width, _) = applies.at, applies.size
        return x - 20, y - 50, width + 40, width + 40
    if name == "latency-probe":
        _, x, y, width, height = workflow.groups[-1]
        return x + width - height, y, height, height
    node = next(node for node in workflow.nodes.values() if node.type == "SaveImage")
    (x, y), (width, height) = node.at, node.size
    side = 220 if node.inputs["filename_prefix"] != "vortex/batch" else 340
    return x + (width - side) / 2, y + (height + 50 - side) / 2, side, side  # in the middle of what its widget leaves
