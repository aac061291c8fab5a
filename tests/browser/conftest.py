"""One server and one browser a session and front end; what is missing skips, with the reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from browser_notebooks import write_notebook
from browser_pages import HEIGHT_PX, WIDTH_PX, NotebookPage
from browser_servers import FRONT_ENDS, FrontEnd, Server, start_server

# no service of the browser's own may look for a network, and there is no GPU to draw with
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_HAS_FAILED = pytest.StashKey[bool]()
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def _skip(reason: str) -> NoReturn:
    """Skip the test; or fail it, where whoever started the tests said that all is installed."""
    if os.environ.get("COLAB_QLORA_BROWSER_REQUIRED") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a browser."""
    here = Path(__file__).resolve().parent
    for item in items:
        if here in item.path.resolve().parents:
            item.add_marker(pytest.mark.browser)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Remember whether a test failed, for the picture of its page."""
    report = yield
    if report.when == "call":
        item.stash[_HAS_FAILED] = report.failed
    return report


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, that of COLAB_QLORA_CHROMIUM or the first on the path."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _skip("needs the Python package playwright")
    named = os.environ.get("COLAB_QLORA_CHROMIUM")
    path = shutil.which(named) if named else next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        _skip(f"needs Chromium: {named or ', '.join(_BROWSERS)} is not on the path")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        yield found
        found.close()


@pytest.fixture(scope="session", params=sorted(FRONT_ENDS))
def front_end(request: pytest.FixtureRequest) -> FrontEnd:
    """JupyterLab, then classic notebook with Colab's ipywidgets and IPython."""
    found = FRONT_ENDS[request.param]
    if reason := found.missing():
        _skip(reason)
    return found


@pytest.fixture(scope="session")
def server(
    front_end: FrontEnd, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A running server of the front end."""
    found = start_server(front_end, tmp_path_factory.mktemp(front_end.name))
    yield found
    found.stop()


@pytest.fixture
def open_notebook(
    browser: Any, front_end: FrontEnd, server: Server, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """A function that opens a new notebook with the given cells at 800 px width."""
    pages = []

    def open_one(name: str, cells: list[str], **settings: Any) -> NotebookPage:
        write_notebook(server.folder / f"{name}.ipynb", name.replace("_", " "), cells)
        size = {"width": WIDTH_PX, "height": HEIGHT_PX}
        context = browser.new_context(viewport=size, **settings)
        page = NotebookPage(context.new_page(), front_end, server)
        pages.append(page)
        page.open(f"{name}.ipynb")
        return page

    yield open_one
    for page in pages:
        if request.node.stash.get(_HAS_FAILED, False):
            page.screenshot(f"failed-{request.node.originalname}")
        page.page.context.close()
    server.stop_kernels()
