"""The report in a browser: headless Chromium opens the file, filters, points, sorts and reads, and no request leaves the page."""

from __future__ import annotations

import os
import random
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from multirun_analysis import load, report
from tests.analysis.conftest import Rows, node, settings
from tests.conftest import long
from tests.synthetic_samples import whole_run

# Of a failed row: it would end the data's script, run another and break a table if it were read as anything but text.
ODD = '</script><script>window.broken = 1</script> CUDA out of memory: tried <b>7.83 GiB</b> & "more"; use offload=full'
GPU: dict[str, Any] = dict(device_type="cuda", gpus=["NVIDIA H200"], hosts=["host-a"], versions=[("python", "3.12.3")])
WIDTHS = pytest.mark.parametrize("width", [320, 1280])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "no chromium; Debian: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models at two lengths in three configurations: the larger one fits into GPU memory at the shorter length only."""
    rows = Rows(tmp_path_factory.mktemp("report") / "results")
    for model, seconds in (("llama3_1b", 1.0), ("llama3_8b", 8.0)):
        for tokens, length in ((32768, "32k"), (131072, "128k")):
            for offload, slower in (("none", 1.0), ("optimizer", 1.2), ("full", 1.5)):
                of = settings(f"model={model}", f"seq_len={length}", f"offload={offload}", "launch.device=cuda")
                if (model, length, offload) == ("llama3_8b", "128k", "none"):
                    rows.add(**of, **GPU, status="oom_device", error_message=ODD)
                    continue
                time = seconds * slower * tokens / 8192
                numbers: dict[str, Any] = dict(
                    iteration_s=[time] * 3, peak_host_gib=20 * slower, peak_vram_allocated_gib=[40.0]
                )
                if (model, length, offload) == ("llama3_1b", "32k", "full"):
                    numbers |= dict(peak_host_gib=300.0, samples=whole_run(random.Random(1)))
                if (model, length, offload) == ("llama3_1b", "128k", "full"):
                    numbers |= dict(tokens_per_s=None, peak_host_gib=None)
                rows.add(**of, **GPU, **numbers, predicted_host_gib=21.0, nodes=[node(0, 9.0), node(1, 3.0)])
    path = rows.folder / "report.html"
    report.write(load(rows.folder), path, "results")
    return path


class Opened:
    """A page, with everything that it asked for and complained about."""

    def __init__(self, browser: Browser, url: str, width: int, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **context)
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.goto(url)


@pytest.fixture
def open_page(browser, file) -> Iterator[Any]:
    """Opens the report; afterwards nothing may have been asked of the network, and nothing complained about."""
    opened: list[Opened] = []

    def build(fragment: str = "", width: int = 1280, **context: Any) -> Page:
        opened.append(Opened(browser, f"file://{file}{fragment}", width, **context))
        return opened[-1].page

    yield build
    for one in opened:
        one.context.close()
        assert [url for url in one.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert one.complaints == []


def lines(page: Page) -> list[list[str]]:
    """Model, length and configuration of the table's lines, from the top."""
    return [
        [text.strip() for text in line.locator("td").all_text_contents()[:3]]
        for line in page.locator("#cells tbody tr").all()
    ]


def column(page: Page, name: str) -> list[str]:
    return [text.strip() for text in page.locator(f'#cells td[data-label="{name}"]').all_text_contents()]


def points(page: Page, figure: str) -> int:
    page.locator(f"#figure-{figure}").scroll_into_view_if_needed()
    page.locator(f"#figure-{figure} .main-svg").first.wait_for()
    return page.locator(f"#figure-{figure} .point").count()


def test_a_newcomer_finds_the_best_why_the_other_failed_and_how_to_run_it(open_page) -> None:
    page = open_page()
    line = page.locator("#best tbody tr", has_text="llama3_8b").filter(has_text="128k")
    expect(line).to_contain_text("offload=optimizer")
    expect(line).to_contain_text("2 of 3")
    line.locator("button").click()
    dialog = page.locator("#details")
    command = dialog.locator(".command code").inner_text()
    assert shlex.split(command)[:4] == ["python", "-m", "ldft", "model=llama3_8b"] and "offload=optimizer" in command
    expect(dialog).to_contain_text("host-a")  # the environment
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.locator("#grid .mark.oom_device").click()
    expect(dialog.locator("pre.error")).to_have_text(ODD)  # as text, to the letter
    expect(dialog).to_contain_text("out of GPU memory")
    assert "offload=none" in dialog.locator(".command code").inner_text()
    assert page.evaluate("window.broken") is None


def test_the_command_is_copied(open_page) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.locator("#grid .mark.oom_device").click()
    page.locator("#details .copy").first.click()
    expect(page.locator("#details .copy").first).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("#details .command code").first.inner_text()


def test_filters_apply_everywhere_and_a_link_reproduces_them(open_page) -> None:
    page = open_page()
    assert len(lines(page)) == 12
    everywhere = points(page, "host")
    page.locator('[data-filter="model"] summary').click()
    page.locator('[data-filter="model"] label', has_text="llama3_8b").click()
    page.locator('[data-filter="status"] summary').click()
    page.get_by_label("ok", exact=False).first.check()
    assert {model for model, _, _ in lines(page)} == {"llama3_8b"} and len(lines(page)) == 5
    assert 0 < points(page, "host") < everywhere
    assert page.locator("#grid .mark").count() == 5
    assert set(page.url.partition("#")[2].split("&")) == {"model=llama3_8b", "status=ok"}
    expect(page.locator("#filters output")).to_have_text("5 of 12 cells")
    again = open_page("#" + page.url.partition("#")[2])
    assert lines(again) == lines(page)
    again.evaluate(
        "location.hash = '#offload=offload%3Dfull&gone=1&model=unknown'"
    )  # another link, opened in the same tab
    expect(again.locator("#filters output")).to_have_text("4 of 12 cells")
    again.locator("#filters .clear").click()
    expect(again.locator("#filters output")).to_have_text("12 cells")


def test_a_search_finds_messages_and_nothing_is_said_to_be_nothing(open_page) -> None:
    page = open_page()
    page.locator('input[type="search"]').fill("cuda 7.83")
    assert lines(page) == [["llama3_8b", "128k", "offload=none"]]
    page.locator('input[type="search"]').fill("no such word")
    expect(page.locator("#none")).to_be_visible()
    expect(page.locator("#cells")).to_be_hidden()
    page.locator("#none .clear").click()
    assert len(lines(page)) == 12


@long
def test_columns_sort_both_ways_and_what_is_missing_comes_last(open_page) -> None:
    page = open_page()
    head = page.locator('#cells th[data-sort="tokens_per_s"]')
    for direction, sign in (("descending", -1), ("ascending", 1)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        found = column(page, "tokens/s")
        assert found[-2:] == ["-", "-"]
        speeds = [float(text.replace(",", "")) for text in found[:-2]]
        assert speeds == sorted(speeds, key=lambda speed: sign * speed) and len(set(speeds)) > 3
    assert "sort=tokens_per_s" in page.url
    page.locator('#cells th[data-sort="tokens"] button').click()
    assert column(page, "Length")[:6] == ["128k"] * 6


@long
def test_a_price_gives_costs_and_a_link_keeps_it(open_page) -> None:
    page = open_page("#model=llama3_1b&sort=-tokens_per_s")
    hours = [float(text.replace(",", "")) for text in column(page, "GPU h/1e9")[:-1]]
    # 8192 tokens a second at the most.
    assert hours[0] == pytest.approx(1e9 / 8192 / 3600, rel=0.01) and column(page, "GPU h/1e9")[-1] == "-"
    expect(page.locator("#cells td.cost").first).to_be_hidden()
    page.locator("#cells .price input").fill("2.5")
    expect(page.locator("#cells td.cost").first).to_be_visible()
    costs = [float(text.replace(",", "")) for text in column(page, "Cost/1e9")[:-1]]
    assert costs == pytest.approx([2.5 * one for one in hours], rel=0.02)
    assert "price=2.5" in page.url
    again = open_page("#" + page.url.partition("#")[2])
    assert column(again, "Cost/1e9") == column(page, "Cost/1e9")
    again.locator("#cells .price input").fill("-1")
    expect(again.locator("#cells td.cost").first).to_be_hidden()


def hovered(page):
    """What is said of the only mark of the throughput, with the mouse on it."""
    box = page.locator("#figure-throughput .point").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    return page.locator("#figure-throughput .hoverlayer")


@long
def test_a_mark_says_its_config_and_opens_its_cell(open_page) -> None:
    page = open_page("#model=llama3_8b&length=131072&offload=offload%3Doptimizer")
    assert points(page, "throughput") == 1
    said = hovered(page)
    expect(said).to_contain_text("llama3_8b, 128k")
    expect(said).to_contain_text("tokens/s")
    expect(said).to_contain_text("offload.optimizer=cpu")
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#details-title")).to_have_text("llama3_8b, 128k tokens")
    assert "cell=" in page.url


@long
def test_a_failed_mark_says_its_message_as_text(open_page) -> None:
    page = open_page("#model=llama3_8b&length=131072&offload=offload%3Dnone")
    assert points(page, "throughput") == 1
    said = hovered(page)
    expect(said).to_contain_text("</script><script>window.broken")
    expect(said).to_contain_text("<b>7.83")  # a tag that plotly would read
    expect(page.locator("#figure-vram figcaption")).to_have_text("No cell has both its speed and its GPU memory.")


def test_what_was_not_measured_says_so(open_page) -> None:
    page = open_page("#model=llama3_1b&length=131072&offload=offload%3Dfull")
    assert column(page, "tokens/s") == ["-"]
    page.locator("#cells tbody tr").click()
    speed = page.locator("#details dl div", has=page.get_by_text("speed", exact=True))
    expect(speed.locator("dd")).to_have_text("not measured")


@long
def test_a_trace_is_drawn_in_the_details(open_page) -> None:
    page = open_page("#length=32768&model=llama3_1b&offload=offload%3Dfull")
    page.locator("#cells td button").click()
    expect(page.locator("#details .over-time .legendtext").first).to_have_text("node 0")


@long
def test_everything_can_be_reached_by_keyboard(open_page) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the table
    assert page.evaluate("document.activeElement.id") == "cells"
    page.keyboard.press("Tab")
    page.keyboard.type("3")
    assert "price=3" in page.url
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first head sorts
    assert "sort=model" in page.url
    first = page.locator("#cells tbody button").first
    first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#details")).to_be_visible()
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")
    expect(first).to_be_focused()
    page.locator('[data-filter="model"] summary').focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")
    assert "model=llama3_1b" in page.url
    expect(page.locator('[data-filter="model"] .menu')).to_be_hidden()


@long
@WIDTHS
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_and_colours_follow_the_reader(open_page, width, scheme) -> None:
    page = open_page(width=width, color_scheme=scheme)
    for figure in ("throughput", "vram", "host", "memory", "nodes"):
        assert points(page, figure) > 0
        box = page.locator(f"#figure-{figure}").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#grid .mark.oom_device").click()
    box = page.locator("#details").bounding_box()
    assert box and box["x"] >= 0 and box["width"] <= width
    assert page.evaluate("(d => d.scrollWidth <= d.clientWidth)(document.querySelector('#details .body'))")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in background[4:-1].split(",")) / 3
    assert light > 200 if scheme == "light" else light < 50


@long
def test_a_narrow_screen_shows_cards_that_sort(open_page) -> None:
    page = open_page(width=320)
    expect(page.locator("#cells thead")).to_be_hidden()
    card = page.locator("#cells tbody tr").first.bounding_box()
    assert card and card["width"] <= 320
    page.locator("#cells select").select_option("-tokens_per_s")
    assert lines(page)[0] == ["llama3_1b", "32k", "offload=none"]
    page.locator('[data-filter="model"] summary').click()
    box = page.locator('[data-filter="model"] .menu').bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 320
