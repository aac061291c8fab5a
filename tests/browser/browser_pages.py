"""A notebook in a real browser: runs cells, finds outputs, moves controls, measures boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser_servers import FrontEnd, Server

ARTEFACTS = Path(__file__).resolve().parent / "artefacts"
WIDTH_PX, HEIGHT_PX = 800, 1100
_PAGE_MS, _CELL_MS = 60_000, 60_000

# every widget that has no other one inside, and what was drawn or said, with the place on the page
_BOXES = """
(root) => {
  const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== 'hidden';
  const controls = [...root.querySelectorAll('.widget-inline-hbox, .widget-checkbox')];
  const leaves = controls.filter((e) => !controls.some((o) => o !== e && e.contains(o)));
  const rest = [...root.querySelectorAll('IMAGE, HEADER, WORDS')];
  return [...leaves, ...rest].filter(shown).map((e) => {
    const box = e.getBoundingClientRect();
    return {name: e.tagName + ' ' + (e.innerText || e.className).trim().slice(0, 40),
            x: box.x, y: box.y, right: box.right, bottom: box.bottom};
  });
}
"""
# the parts inside each control: description, slider or field, number
_PARTS = """
(root) => [...root.querySelectorAll('.widget-inline-hbox')].filter(
  (e) => e.getClientRects().length
).map((e) => [...e.children].filter((c) => c.getClientRects().length).map((c) => {
  const box = c.getBoundingClientRect();
  return {name: e.innerText.trim().slice(0, 30) + ' > ' + c.className.split(' ').pop(),
          x: box.x, y: box.y, right: box.right, bottom: box.bottom};
}))
"""
# elements whose content is wider than they are: scrolled sideways, or cut with an ellipsis
_CUT = """
(root) => [root, ...root.querySelectorAll('*')].filter((e) => {
  const style = getComputedStyle(e);
  const canCut = ['auto', 'scroll', 'hidden'].includes(style.overflowX);
  const slack = style.textOverflow === 'ellipsis' ? 0 : 1;
  return e.getClientRects().length && canCut && e.scrollWidth > e.clientWidth + slack
    && e.clientWidth > 1;
}).map((e) => e.tagName + '.' + e.className + ': ' + e.innerText.slice(0, 40))
"""
# notes, at every frame that is shown, how many pictures there are, which, where, and how tall
_WATCH = """
(root) => {
  window.pictureStates = [];
  let last = '';
  const note = () => {
    const found = [...root.querySelectorAll('img')];
    if (found.length || window.pictureStates.length) {
      const place = root.getBoundingClientRect().top;
      const box = found.length ? found[0].getBoundingClientRect() : {top: place, height: 0};
      const state = {count: found.length, top: Math.round(box.top - place),
                     height: Math.round(box.height),
                     source: found.map((e) => e.src.slice(-2000)).join(' ')};
      const text = JSON.stringify(state);
      if (text !== last) window.pictureStates.push(state);
      last = text;
    }
    requestAnimationFrame(note);
  };
  requestAnimationFrame(note);
}
"""


@dataclass(frozen=True)
class Selectors:
    """How a front end calls the parts of a notebook; `ready` tells that its kernel is there."""

    cell: str
    editor: str
    prompt: str
    output: str
    ready: str
    image: str
    words: str
    save: str


SELECTORS = {
    "lab": Selectors(
        cell=".jp-CodeCell",
        editor=".jp-InputArea-editor",
        prompt=".jp-InputPrompt",
        output=".jp-Cell-outputArea",
        ready="window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
        " === 'idle'",
        image=".jp-RenderedImage img",
        words=".jp-RenderedHTMLCommon",
        save="[data-command='docmanager:save'], .jp-ToolbarButtonComponent[title*='Save']",
    ),
    "classic": Selectors(
        cell=".code_cell",
        editor=".CodeMirror",
        prompt=".input_prompt",
        output=".output_wrapper",
        # the extension that shows widgets is loaded after the notebook
        ready="window.Jupyter?.notebook?.kernel?.is_connected() && !Jupyter.notebook.kernel_busy"
        " && Jupyter.notebook.kernel.widget_manager",
        image=".output_png img",
        words=".rendered_html",
        save="[data-jupyter-action='jupyter-notebook:save-notebook']",
    ),
}


class NotebookPage:
    """One notebook that is open in a tab of 800 px width."""

    def __init__(self, page: Any, front_end: FrontEnd, server: Server) -> None:
        self.page, self.front_end, self.server = page, front_end, server
        self.selectors = SELECTORS[front_end.name]

    def open(self, notebook: str) -> None:
        """Open a notebook of the server's folder and wait for its kernel."""
        self.page.goto(self.front_end.address(self.server, notebook), timeout=_PAGE_MS)
        self.page.wait_for_selector(self.selectors.cell, timeout=_PAGE_MS)
        self.page.wait_for_function(self.selectors.ready, timeout=_PAGE_MS)
        if self.front_end.name == "classic":
            # after it has asked the kernel for earlier widgets, the page draws all outputs again;
            # this asks a second time, so the first is answered when it returns
            self.page.evaluate("Jupyter.notebook.kernel.widget_manager._loadFromKernel()")
        else:
            # the list of files takes a third of a narrow window
            self.page.keyboard.press("Control+b")

    def cell(self, number: int) -> Any:
        """The code cell of that number, from 0."""
        return self.page.locator(self.selectors.cell).nth(number)

    def output(self, number: int) -> Any:
        """The outputs of a code cell."""
        return self.cell(number).locator(self.selectors.output).first

    def start(self, number: int) -> None:
        """Run a cell as a user does: click into it, then Ctrl+Enter."""
        self.cell(number).locator(self.selectors.editor).first.click()
        self.page.keyboard.press("Control+Enter")

    def wait_until_run(self, number: int) -> None:
        """Wait until a cell has its number, and fail with what an error said."""
        prompt = self.cell(number).locator(self.selectors.prompt).first
        self.wait_for(lambda: any(c.isdigit() for c in prompt.inner_text()), _CELL_MS)
        said = self.output(number).inner_text()
        assert "Traceback" not in said, said

    def is_running(self, number: int) -> bool:
        """Whether a cell has been started and has not ended."""
        return "*" in str(self.cell(number).locator(self.selectors.prompt).first.inner_text())

    def saved_outputs(self, number: int) -> list[dict[str, Any]]:
        """Save the notebook as a user does, and read the outputs of a cell from the file."""
        name = self.page.url.split("?")[0].rsplit("/", 1)[1]
        path = self.server.folder / name
        saved = path.stat().st_mtime_ns
        self.page.locator(self.selectors.save).first.click()
        self.wait_for(lambda: path.stat().st_mtime_ns != saved and path.stat().st_size > 0)
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return list([c for c in cells if c["cell_type"] == "code"][number]["outputs"])

    def run(self, number: int) -> None:
        """Run a cell to its end."""
        self.start(number)
        self.wait_until_run(number)

    def wait_for(self, is_true: Callable[[], bool], timeout_ms: int = 30_000) -> None:
        """Ask again and again, letting the page work in between."""
        waited = 0
        while not is_true():
            assert waited < timeout_ms, f"did not happen in {timeout_ms / 1000:.0f} s"
            self.page.wait_for_timeout(50)
            waited += 50

    def image(self, number: int) -> Any:
        """The picture among the outputs of a cell."""
        return self.output(number).locator(self.selectors.image)

    def source(self, number: int) -> str:
        """What the picture of a cell shows, as its address."""
        return str(self.image(number).get_attribute("src"))

    def words(self, number: int) -> str:
        """The text under the picture of a cell."""
        return str(self.output(number).locator(self.selectors.words).last.inner_text())

    def changes_picture(self, number: int, act: Callable[[], Any]) -> str:
        """Do something, wait until the picture is another one, and give its address."""
        before = self.source(number)
        act()
        self.wait_for(lambda: self.source(number) != before)
        return self.source(number)

    def watch_pictures(self, number: int) -> None:
        """Note every picture of a cell, frame by frame, from now on."""
        self.output(number).evaluate(_WATCH)

    def picture_states(self) -> list[dict[str, Any]]:
        """Count, place, height and content of the pictures, whenever one of them changed."""
        return list(self.page.evaluate("window.pictureStates"))

    def handle(self, number: int, description: str) -> Any:
        """What takes the keyboard in the control with this description."""
        control = self.control(number, description)
        return control.locator(".noUi-handle, .ui-slider-handle, input, select").first

    def control(self, number: int, description: str) -> Any:
        """The control with this description."""
        return (
            self.output(number)
            .locator(".widget-inline-hbox, .widget-checkbox")
            .filter(has=self.page.get_by_text(description, exact=True))
            .first
        )

    def overlaps(self, number: int) -> list[str]:
        """Pairs of controls, pictures and words that cover each other."""
        names = {
            "IMAGE": self.selectors.image,
            "HEADER": ".p-Collapse-header, .jupyter-widget-Collapse-header",
            "WORDS": self.selectors.words,
        }
        code = _BOXES
        for name, selector in names.items():
            code = code.replace(name, selector)
        found = _overlapping(self.output(number).evaluate(code))
        for parts in self.output(number).evaluate(_PARTS):
            found += _overlapping(parts)
        return found

    def boxes_to_compare(self, number: int) -> int:
        """How many parts `overlaps` looks at, so that a test of none is seen."""
        return sum(len(parts) for parts in self.output(number).evaluate(_PARTS))

    def cut_off(self, number: int) -> list[str]:
        """Elements of a cell's output that are wider than their place; and the page, if it is."""
        found = list(self.output(number).evaluate(_CUT))
        wide = self.page.evaluate("document.scrollingElement.scrollWidth")
        return found + ([f"page of {wide} px"] if wide > WIDTH_PX else [])

    def screenshot(self, name: str) -> Path:
        """Save what the window shows."""
        ARTEFACTS.mkdir(exist_ok=True)
        path = ARTEFACTS / f"{self.front_end.name}-{name}.png"
        self.page.screenshot(path=str(path))
        return path


def _overlapping(boxes: list[dict[str, Any]]) -> list[str]:
    found = []
    for index, a in enumerate(boxes):
        for b in boxes[index + 1 :]:
            wide = min(a["right"], b["right"]) - max(a["x"], b["x"])
            high = min(a["bottom"], b["bottom"]) - max(a["y"], b["y"])
            # neighbours may share a border
            if wide > 1 and high > 1:
                found.append(f"{a['name']!r} and {b['name']!r}: {wide:.0f} x {high:.0f} px")
    return found
