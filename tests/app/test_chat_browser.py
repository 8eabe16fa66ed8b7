"""The chat page in a real browser. With VISPLICE_SCREENSHOT=FILE the first test leaves a picture of the page there."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from visplice.app import chat
from visplice.app.conversation import WAITING
from visplice.app.make_examples import EXAMPLES, assets
from visplice.lm.extension import EMBEDDED
from visplice.lm.generate import Sampling

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

MODEL = EMBEDDED
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield opened
        opened.close()


class Tab:
    """The page in a tab of its own, and the hosts it asked for anything."""

    def __init__(self, browser: Any, url: str) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        self.hosts: set[str] = set()
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname or ""))
        self.page.set_default_timeout(60_000)  # another process may be busy
        self.page.goto(url)
        self.question = self.page.locator("#question textarea")
        self.answers = self.page.locator('#chat [data-testid="bot"]')
        self.warning = self.page.locator('[data-testid="toast-body"]')
        playwright.expect(self.question).to_be_visible(timeout=60_000)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def upload(self, file: Path) -> None:
        self.page.locator('#picture input[type="file"]').set_input_files(file)

    def answered(self, number: int) -> str:
        """The answer of that number, once it is whole."""
        playwright.expect(self.answers).to_have_count(number, timeout=60_000)
        playwright.expect(self.answers.nth(number - 1)).not_to_have_text(WAITING, timeout=60_000)
        playwright.expect(self.button("Stop")).to_be_disabled(timeout=60_000)
        return str(self.answers.nth(number - 1).inner_text()).strip()


@pytest.fixture
def command() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`visplice chat` as a person starts it, and the address it prints."""
    line = [sys.executable, "-m", "visplice.app.cli", "chat", "--port", str(free_port()), "--model", MODEL]
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run as a background job inherit that Ctrl-C is ignored, and so would the server.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", said)
        assert found, f"{said}{process.communicate(timeout=10)[1]}"
        yield process, found.group()
    finally:
        process.kill()
        process.communicate()


def test_a_picture_is_talked_about(browser: Any, command: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    process, url = command
    tab = Tab(browser, url)
    first, second = EXAMPLES[0], "How many shapes are there?"

    tab.upload(assets() / first.name)
    playwright.expect(tab.page.locator("#picture img")).to_be_visible(timeout=60_000)
    tab.question.fill(first.question)
    tab.button("Send").click()
    assert tab.answered(1)
    tab.question.fill(second)
    tab.question.press("Enter")
    assert tab.answered(2)
    questions = tab.page.locator('#chat [data-testid="user"]').all_inner_texts()
    assert [text.strip() for text in questions] == [first.question, second]

    if picture := os.environ.get("VISPLICE_SCREENSHOT"):
        tab.question.fill("Is the square left of the star?")
        tab.question.press("Enter")
        tab.answered(3)
        tab.page.mouse.move(0, 0)
        tab.page.wait_for_timeout(500)  # the buttons fade
        tab.page.screenshot(path=picture)

    whole = (assets() / first.name).read_bytes()
    for name, content, message in (
        ("cut.png", whole[: len(whole) // 2], "cut.png is cut off or damaged"),
        ("text.png", b"this is no picture", "text.png is not an image"),
    ):
        (tmp_path / name).write_bytes(content)
        tab.upload(tmp_path / name)
        playwright.expect(tab.warning.filter(has_text=message)).to_be_visible(timeout=60_000)
        playwright.expect(tab.page.locator("#picture img")).to_be_visible()  # the old picture is there again
    assert tab.answers.count() >= 2

    tab.page.locator("#examples button").nth(1).click()
    playwright.expect(tab.answers).to_have_count(0, timeout=60_000)
    playwright.expect(tab.question).to_have_value(EXAMPLES[1].question)
    tab.button("Send").click()
    assert tab.answered(1)

    assert tab.hosts == {"127.0.0.1"}
    tab.page.close()
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=60)
    assert (process.returncode, said, complaints.strip()) == (0, "", "")


class Slow:
    """Counts, four numbers a second, for `max_new_tokens` numbers; a question that begins with "fail" fails."""

    lm = SimpleNamespace(config=SimpleNamespace(max_seq_len=1024))

    def stream(self, messages: list[dict[str, Any]], sampling: Sampling) -> Iterator[str]:
        question = messages[-1]["content"][-1]["text"]
        if question.startswith("fail"):
            raise ValueError("the <b>prompt</b> has 2000 tokens")
        for number in range(sampling.max_new_tokens):
            time.sleep(0.25)
            yield f"{question}{number} "


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("no_proxy", "NO_PROXY"):  # launch adds to them
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = chat.create_app(Slow(), title="slow", note="")  # type: ignore[arg-type]
    yield chat.launch(page, host="127.0.0.1", port=free_port())
    page.close(verbose=False)


def test_stop_and_several_tabs(browser: Any, slow: str) -> None:
    left, right = Tab(browser, slow), Tab(browser, slow)

    left.question.fill("a")
    left.button("Send").click()
    playwright.expect(left.answers).to_contain_text("a1 ", timeout=20_000)  # in pieces: the whole would take 32 s
    right.question.fill("b")
    right.button("Send").click()
    playwright.expect(right.answers).to_have_text(WAITING, timeout=60_000)
    left.page.wait_for_timeout(1000)
    playwright.expect(right.answers).to_have_text(WAITING)
    left.button("Stop").click()
    partial = left.answered(1)
    assert partial.startswith("a0 a1 ") and "b" not in partial

    # The stop has made room for the other tab; when that is closed in mid-answer, for the first one again.
    playwright.expect(right.answers).to_contain_text("b1 ", timeout=20_000)
    assert left.answered(1) == partial
    right.page.close()
    left.question.fill("c")
    left.button("Send").click()
    playwright.expect(left.answers.nth(1)).to_contain_text("c1 ", timeout=60_000)

    # A new conversation ends the answer, and what was under way does not come back.
    left.button("New conversation").click()
    playwright.expect(left.button("Stop")).to_be_disabled(timeout=60_000)
    left.page.wait_for_timeout(500)
    assert left.answers.count() == 0

    left.question.fill("fail please")
    left.button("Send").click()
    playwright.expect(left.warning).to_contain_text("the <b>prompt</b> has 2000 tokens.", timeout=60_000)
    playwright.expect(left.question).to_have_value("fail please")
    left.page.close()
