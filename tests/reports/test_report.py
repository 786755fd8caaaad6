"""The report: its page through the command, on real runs, and in a real browser without a network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import trainer
from playwright.sync_api import Browser, Page, sync_playwright

from dist_train.reports import figures
from dist_train.reports.groups import PageRun
from dist_train.reports.statistics import interval, proportion
from dist_train.runs.run import Run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "no-first-run"]
BAD = "</script><script>window.bad=1</script><img src=x onerror=window.bad=1><b>&amp;\"'%{x}{{x}}"


@pytest.fixture(scope="session")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A group: two seeds, a run with other settings, and one that was stopped on its way."""
    group = tmp_path_factory.mktemp("report") / "group"
    common = ["--preset", "digits", f"data.dir={digits}", "epochs=2", "batch_size=128", "precision=fp32"]
    common += ["record.wandb=disabled"]
    settings = {
        "seed1": ["seed=1"],
        "seed2": ["seed=2"],
        "wide": ["seed=1", "model.blocks.0.channels=48", "tta=mirror", "holdout=100", "train.select.fraction=0.5"],
    }
    with ThreadPoolExecutor() as pool:
        for done in pool.map(lambda name: trainer(*common, *settings[name], "--run-dir", group / name), settings):
            assert done.returncode == 0, done.stderr
    stopped = shutil.copytree(group / "seed1", group / "stopped", ignore=shutil.ignore_patterns("*.json", "plots"))
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[: len(lines) * 2 // 3]) + '{"kind": "st')
    history = (stopped / "history.jsonl").read_text()
    (stopped / "history.jsonl").write_text(history.replace('"done"', '"preempted"'))
    config = (stopped / "config.toml").read_text()
    (stopped / "config.toml").write_text(config.replace("\nseed = 1\n", "\nseed = 3\n"))
    return group


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    return trainer(*arguments, module="dist_train report", timeout=120)


@pytest.fixture(scope="session")
def group_page(runs: Path) -> Path:
    done = report(runs, "--out", runs.parent / "group.html", "--title", "Seeds & widths")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return runs.parent / "group.html"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with all figures drawn. said: what its console and the network did."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(60_000)
        self.page: Page = self.context.new_page()
        self.page.route(re.compile("^(?!file:)"), lambda route: route.abort())
        self.page.on("request", lambda request: self._request(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def _request(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.said.append(url)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def undrawn(self) -> list[str]:
        """Figures in sight without a line or a cell of plotly's."""
        return list(
            self.page.evaluate(
                """() => [...document.querySelectorAll(".plot")].filter((plot) => plot.clientWidth
                && !plot.querySelector(".trace path, .hm image, .heatmaplayer image, .points path"))
                .map((plot) => plot.id)"""
            )
        )

    def lines(self, figure: str) -> int:
        """Lines of a figure in sight."""
        return self.page.locator(f"#{figure} .scatterlayer .trace").count()

    def range(self, figure: str) -> list[float]:
        return list(self.page.evaluate(f"document.getElementById('{figure}')._fullLayout.xaxis.range"))


def text_of(path: Path) -> str:
    """The page's own words, without scripts and styles."""
    page = path.read_text()
    page = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\u2013", "-").split())


class Links(HTMLParser):
    """The addresses that a page's own markup has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


# what the page says


def test_the_table(runs: Path, group_page: Path) -> None:
    words = text_of(group_page)
    summaries = {name: json.loads((runs / name / "summary.json").read_text()) for name in ("seed1", "seed2", "wide")}
    accuracies = [100 * summaries[name]["test_accuracy"] for name in ("seed1", "seed2")]
    mean, half = sum(accuracies) / 2, interval(accuracies)
    deviation = float(np.std(accuracies, ddof=1))
    assert f"2 of 3 {mean:.2f} {deviation:.2f} {mean - half:.2f} to {mean + half:.2f} over 2 runs (t)" in words
    wide = summaries["wide"]
    low, high = (100 * end for end in proportion(round(360 * wide["test_accuracy"]), 360))
    alone = f"{100 * wide['test_accuracy']:.2f} - {low:.2f} to {high:.2f} of 360 images (Wilson)"
    assert f"1 {alone} {100 * wide['test_accuracy_tta']:.2f} - " in words
    assert "model.blocks.0.channels = 48" in words
    assert "Not finished: stopped (preempted at step" in words
    assert "Seeds & widths" in words
    assert f"{wide['parameters']:,}" in words
    assert "data.holdout 100 0 evaluate.tta mirror none model.blocks.0.channels 48 32" in words
    assert f"{runs}/seed2/config.toml --run-dir {runs}/seed2-again" in words
    assert f"--config {runs}/stopped/config.toml --run-dir {runs}/stopped" in words
    assert wide["versions"]["torch"] in words


def test_proportion_is_wilsons() -> None:
    n, p, z = 360, 350 / 360, 1.959964
    middle, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * (p * (1 - p) / n + (z / 2 / n) ** 2) ** 0.5
    assert proportion(350, n) == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_a_run_of_an_older_version(runs: Path, tmp_path: Path) -> None:
    """Without evaluation.json, and with fewer fields in its lines."""
    old = shutil.copytree(runs / "seed1", tmp_path / "old")
    (old / "evaluation.json").unlink()
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    lines = [
        json.dumps({key: value for key, value in row.items() if key not in ("grad_norm", "flops", "coefficients")})
        for row in rows
    ]
    (old / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    done = report(old, "--out", tmp_path / "old.html")
    assert done.returncode == 0, done.stderr
    words = text_of(tmp_path / "old.html")
    assert f"dist-train evaluate {old} --write creates it" in words
    assert "No mixing coefficients were recorded by old" in words
    assert "Gradient" not in words
    assert "Training loss" in words


def test_before_the_first_step(runs: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(runs / "seed1" / "config.toml", begun)
    assert report(begun, "--out", tmp_path / "begun.html").returncode == 0
    assert "Not finished: begun is at its start." in text_of(tmp_path / "begun.html")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere: there is no such folder; name run folders, or the folder above them"),
        (["."], ".: holds no runs"),
        (["{runs}", "--out", "{runs}/none/page.html"], "there is no folder {runs}/none"),
    ],
)
def test_mistakes(runs: Path, arguments: Sequence[str], sentence: str) -> None:
    done = report(*(argument.format(runs=runs) for argument in arguments))
    assert done.returncode == 2
    assert sentence.format(runs=runs) in done.stderr
    assert "Traceback" not in done.stderr


def test_only_its_own_page_is_overwritten(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    for _ in range(2):
        assert report(runs / "seed1", "--out", out).returncode == 0
    page = out.read_bytes()
    (tmp_path / "link.html").symlink_to(out)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "other.html").write_text("<html><p>written by hand, with dist-train report</p></html>")
    for name in ("link", "folder", "other"):
        kept = tmp_path / f"{name}.html"
        done = report(runs / "seed1", "--out", kept)
        told = f"dist_train: --out {kept}: is there, and was not written by dist-train report; name another file"
        assert (done.returncode, done.stderr) == (2, f"{told} with --out\n")
    assert out.read_bytes() == page
    assert "by hand" in (tmp_path / "other.html").read_text()


def test_long_runs_are_thinned_and_keep_their_spikes() -> None:
    values = np.sin(np.arange(100_000) / 1000)
    values[[777, 55_555]] = 9.0, np.nan
    kept, every = figures._thinned(values, 1000)
    assert every == 200
    assert len(kept) <= 1003
    assert {0, 777, 55_555, 99_999} <= {*kept}
    assert min(values[kept][:900]) == min(values[: kept[900]])
    assert figures._thinned(values[:1000], 1000) == (list(range(1000)), 1)


def test_the_captions_name_runs_that_select_images(runs: Path) -> None:
    pages = [PageRun(Run(runs / name), name, "--c0") for name in ("seed1", "wide")]
    words = "trained on the hardest 50 % of each microbatch."
    for page_runs, sentence in ((pages, f"wide {words}"), (pages[1:], words.capitalize()), (pages[:1], None)):
        captions = {figure.id: figure.caption for figure in figures.curves(page_runs)}
        told = {id for id, caption in captions.items() if (sentence or words) in caption}
        assert told == ({"loss", "accuracy", "loss-by-epoch"} if sentence else set())


def test_the_data(runs: Path, digits: Path, group_page: Path, tmp_path: Path) -> None:
    """Classes, numbers and pictures, as far as the betons are still those of the run."""
    words, classes = text_of(group_page), ", ".join(f"digit {number}" for number in range(10))
    assert "digits: 1,437 train and 360 test images of 32x32 pixels" in words
    assert f"Classes 10: {classes} Training images, one of each class digit 0" in words
    assert group_page.read_text().count('<li><img src="data:image/png;base64,') >= 10
    # other betons in their place, and none
    other = shutil.copytree(runs / "seed1", tmp_path / "other")
    history = (other / "history.jsonl").read_text()
    sha256 = json.loads(history.splitlines()[0])["images"]["train"]
    (other / "history.jsonl").write_text(history.replace(sha256, "0" * 64))
    gone = shutil.copytree(runs / "seed2", tmp_path / "gone")
    config = (gone / "config.toml").read_text()
    (gone / "config.toml").write_text(config.replace(str(digits), str(tmp_path / "nowhere")))
    for folder in (other, gone):
        assert report(folder, "--out", tmp_path / "page.html").returncode == 0
        words = text_of(tmp_path / "page.html")
        assert "Data digits: 360 test images Network" in words
        assert f"Classes 10: {classes} Result" in words


def test_runs_on_different_images_are_not_averaged(runs: Path, tmp_path: Path) -> None:
    group = tmp_path / "group"
    for name in ("seed1", "seed2"):
        shutil.copytree(runs / name, group / name)
    history = group / "seed2" / "history.jsonl"
    images = json.loads(history.read_text().splitlines()[0])["images"]
    history.write_text(history.read_text().replace(images["train"], "f00d" + "0" * 60))
    assert report(group, "--out", tmp_path / "page.html").returncode == 0
    words = text_of(tmp_path / "page.html")
    assert "Runs with the same settings were trained on different images" in words
    assert "over 2 runs" not in words
    assert f"images = train f00d0000 test {images['test'][:8]}" in words
    done = trainer(group, module="dist_train table")
    header, _, *rows = done.stdout.splitlines()
    assert header.startswith("| images | n | test accuracy, % |")
    assert [row.split("|")[2].strip() for row in rows] == ["1", "1"]
    # a run that does not say on what images it was trained is with neither; where no two differ, it is with the others
    history.write_text("")
    assert trainer(group, module="dist_train table").stdout.startswith("| n | test accuracy, % |")


def classes_of(folder: Path, count: int) -> None:
    """Makes a run one of `count` classes with long names, none of which is found in more than half of its images."""
    path = folder / "evaluation.json"
    details = json.loads(path.read_text())
    details["classes"] = [f"a class with a long name, number {number}" for number in range(count)]
    confusion = np.zeros((count, count), int)
    for number in range(count):
        confusion[number, number] = number % 3
        confusion[number, (7 * number + 3) % count] += 1 + number % 5
    details |= {"confusion": confusion.tolist(), "images": int(confusion.sum())}
    for block in details["coefficients"]:
        block["by_class"] = [[0.1 * (number % 7) for _ in block["branches"]] for number in range(count)]
    path.write_text(json.dumps(details))


# what the browser makes of it


@pytest.mark.parametrize("count", [15, 200])
def test_many_classes(browser: Browser, runs: Path, tmp_path: Path, count: int) -> None:
    """No name covers another, and no cell is too small for its number, on a phone and beside it."""
    folder = shutil.copytree(runs / "seed1", tmp_path / "many")
    classes_of(folder, count)
    assert report(folder, "--out", tmp_path / "page.html").returncode == 0
    boxes = """([axis, side]) => [...document.querySelectorAll(".panel .plot")].map((plot) =>
        [...plot.querySelectorAll(`.${axis}tick text`)].map((text) => {
            const box = text.getBoundingClientRect();
            return (box[side] + box[side === "top" ? "bottom" : "right"]) / 2;
        }).sort((a, b) => a - b))"""
    for width in (1280, 390):
        with Opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 800}) as opened:
            page = opened.page
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert opened.undrawn() == []
            for middles in page.evaluate(boxes, ["y", "top"]):
                assert min(np.diff(middles), default=99) > 9
            confusion = page.evaluate(boxes, ["x", "left"])[0]
            assert min(np.diff(confusion)) > 9
            cell = page.locator(".panel .plot.square .hm image, .panel .plot.square .heatmaplayer image").first
            box = cell.bounding_box()
            assert box is not None
            assert box["width"] / min(count, 21 if count > 40 else count) > 4.5
            numbers = page.locator(".panel .plot.square .heatmap-label text").all()
            sizes = [found["width"] for number in numbers if (found := number.bounding_box())]
            assert 0 < max(sizes) < box["width"] / min(count, 21)
    shown = 20 if count > 40 else count
    assert page_figure(tmp_path / "page.html", "run0-confusion")["data"][0]["z"][shown - 1 :] != []
    assert len(page_figure(tmp_path / "page.html", "run0-classes")["data"][0]["y"]) == min(count, 40)
    of_rows = page_figure(tmp_path / "page.html", "run0-confusion")["data"][0]["customdata"]
    details = json.loads((folder / "evaluation.json").read_text())
    totals = sorted(sum(row) for row in details["confusion"])
    assert {sum(row) for row in of_rows} <= {*totals}  # no image of a class that is shown is left out


def page_figure(path: Path, name: str) -> Any:
    """A figure of the page, as plotly's JSON."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])[name]


def test_percent_is_written_in_one_way(browser: Browser, group_page: Path) -> None:
    assert not re.search(r"\d%", text_of(group_page))
    with Opened(browser, group_page) as opened:
        assert "%" not in "".join(opened.page.locator(".xtick text, .ytick text").all_text_contents())
        opened.page.locator(".panel:visible .plot.square").hover(position={"x": 150, "y": 150})
        opened.page.wait_for_selector(".panel .hoverlayer :text('% of the class')")
        assert not re.search(r"\d%", opened.page.locator(".panel .hoverlayer").first.text_content() or "")


@pytest.mark.parametrize("width", [1280, 390])
def test_tables_and_commands_are_whole(browser: Browser, group_page: Path, width: int) -> None:
    """A table that is wider than the page says so; commands do not, and are copied by a button."""
    with Opened(browser, group_page, viewport={"width": width, "height": 800}) as opened:
        page = opened.page
        opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
        for each in page.locator("summary").all():
            each.evaluate("each => { each.parentElement.open = true; }")
        page.wait_for_timeout(200)
        for table in page.locator(".scroll").all():
            cut, wide = table.evaluate("each => [each.scrollWidth > each.clientWidth, each.className.includes('wide')]")
            assert cut == wide
        assert page.locator(".scroll.wide").count() > 0 or width == 1280
        layers = page.locator(".network td.wrap").all()
        assert min(box["width"] for each in layers if (box := each.bounding_box())) > 100
        for text in page.locator(".command code, pre").all():
            assert text.evaluate("each => each.scrollWidth <= each.clientWidth")
        command = page.locator(".command").last
        command.locator("button").click()
        page.wait_for_selector(".copy:text('copied')")
        assert page.evaluate("navigator.clipboard.readText()") == command.locator("code").text_content()
        assert opened.said == []


def test_in_a_browser(browser: Browser, group_page: Path) -> None:
    """All is drawn, without a network and without a complaint; runs and lines can be switched; hover and zoom."""
    with Opened(browser, group_page) as opened:
        page = opened.page
        assert opened.undrawn() == []
        assert page.locator("#curves .plot").count() == 8
        assert opened.lines("loss-by-epoch") == 10  # of four runs train and test, of one held-out and TTA too
        assert "seed1 from 2." in (page.locator("#loss [role=img]").get_attribute("aria-label") or "")
        assert opened.lines("loss") == 7  # of three runs each batch and the smoothed line, of one that is too short one
        page.click(".runs button:has-text('wide')")
        assert opened.lines("loss") == 5
        page.click("[data-figure=loss][data-part=each]")
        assert opened.lines("loss") == 3
        page.dblclick(".runs button:has-text('seed2')")
        assert opened.lines("loss") == 1
        page.dblclick(".runs button:has-text('seed2')")
        page.click("[data-figure=loss][data-part=each]")
        assert opened.lines("loss") == 7
        box = page.locator("#loss .nsewdrag").bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 5, y)
        page.mouse.move(x, y)
        page.wait_for_selector("#loss .hoverlayer :text('smoothed')")
        before = opened.range("loss")
        page.mouse.down()
        page.mouse.move(x + 100, y + 60, steps=5)
        page.mouse.up()
        page.wait_for_function(f"document.getElementById('loss')._fullLayout.xaxis.range[0] > {before[0]} + 1")
        page.click(".runs button:has-text('wide')")
        assert opened.range("loss") != before  # still zoomed
        page.select_option("#panel", label="seed2")
        assert page.locator(".panel:visible").count() == 1
        assert opened.undrawn() == []
        cells = page.locator(".panel:visible .plot.square").first
        cells.hover(position={"x": 150, "y": 150})
        page.wait_for_selector(".panel .hoverlayer :text('taken for')")
        assert opened.said == []


def test_dark_and_light(browser: Browser, group_page: Path) -> None:
    def colors() -> list[str]:
        script = """() => [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector("#loss .js-line")).stroke,
            getComputedStyle(document.querySelector("#loss .xtick text")).fill,
            getComputedStyle(document.querySelector(".drawing svg")).color]"""
        return list(opened.page.evaluate(script))

    with Opened(browser, group_page, color_scheme="light") as opened:
        light = colors()
        opened.page.emulate_media(color_scheme="dark")
        opened.page.wait_for_timeout(300)
        assert all(one != other for one, other in zip(light, colors(), strict=True))
        opened.page.emulate_media(color_scheme="light")
        opened.page.wait_for_timeout(300)
        assert colors() == light


def test_on_a_phone(browser: Browser, group_page: Path) -> None:
    size = {"width": 375, "height": 700}
    with Opened(browser, group_page, viewport=size, has_touch=True, is_mobile=True) as opened:
        page = opened.page
        for each in page.locator("summary").all():
            each.evaluate("each => { each.parentElement.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        assert opened.undrawn() == []
        edges = "[...document.querySelectorAll('.plot .main-svg')].map((svg) => svg.getBoundingClientRect().right)"
        assert max(page.evaluate(edges)) < 376
        # a finger that moves over a chart scrolls the page, and one that taps it sees its values
        page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
        page.locator("#accuracy").evaluate("plot => plot.scrollIntoView({block: 'center'})")
        touch = page.context.new_cdp_session(page)
        box = page.locator("#accuracy .nsewdrag").bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        before = page.evaluate("scrollY")
        for step in range(12):
            kind = "touchMove" if step else "touchStart"
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y - 10 * step}]})
            page.wait_for_timeout(20)
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        page.wait_for_function(f"scrollY > {before} + 50")
        page.wait_for_timeout(500)
        page.locator("#accuracy .nsewdrag").tap()
        page.wait_for_selector("#accuracy .hoverlayer :text('%')")
        assert opened.said == []


def test_on_paper(browser: Browser, group_page: Path, tmp_path: Path) -> None:
    with Opened(browser, group_page, color_scheme="dark") as opened:
        page = opened.page
        page.evaluate(
            """() => addEventListener("beforeprint", () => {
                window.seen = {
                    folded: document.querySelectorAll("details:not([open])").length,
                    page: getComputedStyle(document.body).backgroundColor,
                    widths: [...document.querySelectorAll(".plot")].filter((plot) => plot.clientWidth).map((plot) =>
                        plot.querySelector(".main-svg").getBoundingClientRect().right),
                    tick: getComputedStyle(document.querySelector("#loss .xtick text")).fill,
                };
            })"""
        )
        folded = page.locator("details:not([open])").count()
        printed = page.pdf(path=tmp_path / "page.pdf", format="A4")
        assert printed.startswith(b"%PDF")
        seen = page.evaluate("window.seen")
        assert folded > 0
        assert seen["folded"] == 0
        assert seen["page"] == "rgb(255, 255, 255)"
        assert seen["tick"] == "rgb(27, 32, 38)"
        assert max(seen["widths"]) < 691
        assert page.locator("details:not([open])").count() == folded
        assert opened.said == []


def test_names_are_only_names(browser: Browser, runs: Path, tmp_path: Path) -> None:
    """Whatever the names of runs, folders and classes are, nothing of them is markup or runs."""
    folder = shutil.copytree(runs / "seed1", tmp_path / "a<b>&'c'")
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace('\nname = ""', f"\nname = {json.dumps(BAD)}"))
    details = json.loads((folder / "evaluation.json").read_text())
    odd = {0: "it's", 1: 'say "hi"', 2: "--c0", 3: BAD, 4: "--ink 0.3", 5: "&quot;"}
    for number, name in odd.items():
        details["classes"][number] = name
    details["wrong"] = [{**image, "label": 3} for image in details["wrong"]]
    (folder / "evaluation.json").write_text(json.dumps(details))
    history = (folder / "history.jsonl").read_text()
    (folder / "history.jsonl").write_text(history.replace('"reason": ""', f'"reason": {json.dumps(BAD)}'))
    done = report(folder, runs / "seed2", "--out", tmp_path / "page.html", "--title", BAD)
    assert done.returncode == 0, done.stderr
    links = Links((tmp_path / "page.html").read_text()).found
    assert {link[:5] for link in links if not link.startswith("#")} == {"data:"}
    with Opened(browser, tmp_path / "page.html") as opened:
        page = opened.page
        assert page.evaluate("window.bad") is None
        assert page.locator("h1").inner_text() == BAD
        assert page.locator("h1 *, .runs b, td b, dd b, figcaption *").count() == 0
        assert page.locator("img[src=x]").count() == 0
        assert BAD in page.locator(".runs").inner_text()
        assert opened.undrawn() == []
        ticks = page.locator(".panel:visible .ytick text").all_text_contents()
        assert any(tick.startswith("</script>") for tick in ticks)
        assert {*odd.values()} - {BAD} <= {*ticks}
        page.locator("#loss .nsewdrag").hover()
        page.wait_for_selector("#loss .hoverlayer :text('smoothed')")
        assert "<b>" in (page.locator("#loss .hoverlayer").text_content() or "")
        assert opened.said == []
