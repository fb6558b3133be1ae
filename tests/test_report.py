"""The report's page, in Chromium: what it shows, that nothing in it is run or fetched, and that all can use it."""

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from tests import records, video_files
from tests.reports import ASKED, HOSTILE, RECORDS, evaluation, record
from vau_jax.common import files
from vau_jax.common.files import InputError
from vau_jax.eval import charts, gallery, report, tables
from vau_jax.eval.records import load
from vau_jax.rl.judge import AXES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations and two runs, with texts that would like to be code."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "videos").mkdir()
    video_files.write(folder / "videos" / "v0.mp4", count=40)
    evaluation(folder / "eval" / "a", RECORDS, f"first {HOSTILE}", folder / "videos")
    evaluation(folder / "eval" / "b", RECORDS[:3], "second", folder / "videos", "test_msad.csv")
    (folder / "eval" / "b" / "judged").mkdir()
    mark = {"value": 7.0, "low": 6.0, "high": 8.0, "n": 3}
    marks = {"model": HOSTILE, "axes": dict.fromkeys(AXES, mark), "total": mark, "unmarked": {"x": "why"}}
    (folder / "eval" / "b" / "judged" / "strict.json").write_text(json.dumps(marks))
    for run in ("sft", "rft"):
        (folder / run).mkdir()
        steps = [{"step": i, "loss": 1 / i, "reward": i, "seconds/step": 1.5} for i in range(1, 9)]
        (folder / run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        (folder / run / "config.json").write_text(json.dumps({"stage": run, "model": HOSTILE}))
    report.write([folder], folder / "report.html")
    return folder


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    """The page, opened from its file; whatever it logs or asks for is in `page.told`."""
    page = browser.new_page()
    page.told = []
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.on("request", lambda request: page.told.append(request.url[:99]))
    page.goto(f"file://{folder}/report.html")
    yield page
    page.close()


def shown(page: Page) -> list[str]:
    return page.locator(".card:visible h3 span:first-child").all_text_contents()


def test_it_works_from_a_file_without_errors_or_requests(page: Page, folder: Path) -> None:
    for number, place in enumerate(page.locator("[data-chart]").all()):
        place.scroll_into_view_if_needed()
        page.wait_for_selector(f"[data-chart='{number}'] .main-svg")
    assert [t for t in page.told if not t.startswith(("data:", "blob:", f"file://{folder}/report.html"))] == []


def test_texts_of_models_and_files_stay_texts(page: Page) -> None:
    for place in page.locator("[data-chart]").all():
        place.scroll_into_view_if_needed()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    text = page.locator(".card").first.inner_text() + page.locator("table").first.inner_text()
    assert text.count("<script>window.hacked = 1</script>") >= 2


ATTEMPTS = (
    "const s = document.createElement('script'); s.textContent = 'window.hacked = 3'; document.body.append(s)",
    "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 4\">')",
    "document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.com/seen.png\">')",
    "fetch('https://example.com/seen').catch(() => 0)",
    "const f = document.createElement('iframe'); f.src = 'https://example.com/'; document.body.append(f)",
)


def test_the_page_may_run_and_fetch_nothing_else(page: Page) -> None:
    """Even when markup or a call gets in."""
    for attempt in ATTEMPTS:
        with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
            page.evaluate(f"() => {{ {attempt} }}")
    assert page.evaluate("window.hacked") is None


LABEL = "<a href='javascript:window.hacked=5'>run</a> <b>x</b><br>&lt;i&gt; https:$x$"


def test_labels_in_charts_are_never_links_or_markup(browser: Browser, tmp_path: Path) -> None:
    """Names of runs stand as they are, in legends and under the pointer."""
    name = LABEL.replace("/", "\u2215")  # no folder has a slash in its name
    for run in (name, "other"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n')
    report.write([tmp_path], tmp_path / "report.html")
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/report.html")
    place = page.locator("[aria-label='Loss'][data-chart]")
    place.scroll_into_view_if_needed()
    place.locator(".nsewdrag").first.wait_for(state="attached")
    page.evaluate("() => Plotly.Fx.hover(document.querySelector('[data-chart]'), [{curveNumber: 0, pointNumber: 0}])")
    place.locator(".hoverlayer text").first.wait_for(state="attached")
    assert any(name in found for found in place.locator(".hoverlayer text").all_text_contents())
    assert any(name == found for found in place.locator("text").all_text_contents())
    assert place.locator("a, [style*=bold]").count() == 0
    page.close()


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": null}\n'
    )
    report.write([tmp_path], tmp_path / "report.html")
    data = re.search(r'id="chart-data">(.*?)</script>', (tmp_path / "report.html").read_text(), re.DOTALL).group(1)
    assert json.loads(data, parse_constant=pytest.fail)[0]["data"][0]["y"] == [None, 2.0, None]


def test_the_table_says_what_the_metrics_say(page: Page) -> None:
    rows = {r.split("\t")[0]: r.split("\t")[1:] for r in page.locator("table").first.inner_text().splitlines()}
    assert rows["QA accuracy"][1].startswith("0.50 [") and rows["QA accuracy"][0].startswith("1.00 [")
    assert rows["Grounding mIoU"][1].startswith("0.57 [")  # 1 and 1/7


def test_tables_of_the_page_begin_with_the_newest_and_the_printed_one_with_the_oldest(
    page: Page, folder: Path, tmp_path: Path
) -> None:
    for table in ("results", "made"):
        text = page.locator(f"section[aria-labelledby={table}] table").first.inner_text()
        assert text.index("second") < text.index("first")
    printed = report.write([folder], tmp_path / "report.html").splitlines()[0]
    assert printed.index("first") < printed.index("second")


def test_evaluations_are_in_the_order_of_their_own_times(folder: Path, tmp_path: Path) -> None:
    """Those of their files change when a folder is copied."""
    for name, when in (("b", "2026-01-02 00:00:00 UTC"), ("a", "2026-01-01 00:00:00 UTC")):
        path = evaluation(tmp_path / name, RECORDS[:1], name, folder) / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"about": {"time": when}}))
    assert [result["name"] for result in tables.evaluations([tmp_path])] == ["a", "b"]


def test_scores_by_source_are_folded(page: Page) -> None:
    folded = page.locator("details", has=page.locator("summary", has_text="classification, by source"))
    assert not folded.locator("table").is_visible()
    folded.locator("summary").click()
    rows = [row.split("\t") for row in folded.locator("table").inner_text().splitlines()[1:]]
    assert [(row[0], row[1][:4], row[2][:4]) for row in rows] == [("msad", "1.00", "1.00"), ("ucf", "-", "0.00")]


def test_marks_of_judges_stand_in_a_table(page: Page) -> None:
    table = page.locator("section[aria-labelledby=judged] table").inner_text().splitlines()
    assert table[0].strip().startswith("second, strict (<script>")
    assert [row.split("\t")[0] for row in table[1:]] == [*AXES, "total, of 50", "not marked"]
    assert table[1].split("\t")[1] == "7.00 [6.00, 8.00]" and table[-1].split("\t")[1] == "1"


def test_marks_of_earlier_answers_are_said(folder: Path, tmp_path: Path) -> None:
    marked = shutil.copytree(folder / "eval" / "b", tmp_path / "b")
    path, answers = marked / "judged" / "strict.json", marked / "predictions.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"predictions": files.content_hash(answers)}))
    assert tables.judged(tables.evaluations([marked]))[0][1] == f"second, strict ({HOSTILE})"
    answers.write_text("")
    assert tables.judged(tables.evaluations([marked]))[0][1] == f"second, strict ({HOSTILE}), of earlier answers"


def test_the_page_shows_the_weights_of_the_total(folder: Path) -> None:
    assert "<td>1.0 accuracy, 0.5 format</td>" in (folder / "report.html").read_text()


def test_published_numbers_stand_beside_the_same_data_alone(page: Page) -> None:
    """The only evaluation of a test file is of another protocol and model: that is said, beside no published number."""
    table = page.locator("section[aria-labelledby=published] table")
    head, *rows = table.inner_text().splitlines()
    assert head.endswith("why it is not comparable")
    assert any(row.startswith("second\tqa\tMSAD") and "protocol clean" in row for row in rows)
    assert not any("first" in row or "89.58" in row for row in rows)


def test_filters_and_order(page: Page) -> None:
    assert len(shown(page)) == 6
    page.select_option("[name=task]", "grounding")
    assert shown(page) == ["v0.mp4/grounding", "v1.mp4/grounding"]
    page.select_option("[name=outcome]", "broken")
    assert shown(page) == ["v1.mp4/grounding"]
    assert page.locator("#count").inner_text() == "1 shown"
    page.get_by_role("button", name="Show all").click()
    assert page.locator("#count").inner_text() == "6 shown"
    page.select_option("[name=order]", "worst")
    assert shown(page)[0].startswith("v1.mp4")
    page.select_option("[name=outcome]", "corrected")
    assert shown(page) == ["v0.mp4/qa"]


def test_cards_are_filtered_by_what_changed(browser: Browser, folder: Path, tmp_path: Path) -> None:
    """From the evaluation before, and from the first."""
    answers = {"first": "BBBCC", "second": "BBCBC", "third": "BCBBC"}  # B is right
    for name, letters in answers.items():
        found = [record(i, "qa", letter, "B") for i, letter in enumerate(letters)]
        evaluation(tmp_path / name, found, name, folder)
    report.write([tmp_path], tmp_path / "report.html")
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/report.html")
    fitting = {}
    for change in page.locator("[name=change] option").all_text_contents()[1:]:
        page.select_option("[name=change]", change)
        fitting[change] = [name[:2] for name in shown(page)]
    assert fitting == {
        "fixed": ["v2"],
        "broken": ["v1"],
        "fixed since the first": ["v3"],
        "broken since the first": ["v1"],
    }
    page.close()


def test_a_card_has_frames_a_time_line_and_folded_sections(page: Page) -> None:
    page.select_option("[name=task]", "grounding")
    card = page.locator(".card:visible").nth(1)
    assert [t.strip() for t in card.locator(".track").all_text_contents()] == [
        "2.0 to 6.0 s",
        "5.0 to 9.0 s",
        "1.0 to 5.0 s",
    ]
    bar = card.locator(".bar.predicted")
    assert bar.evaluate("e => [e.style.left, e.style.width]") == ["50%", "40%"]
    assert page.locator(".card:visible .strip").count() == 1  # v1.mp4 is not there
    section = card.locator("details", has_text="reflect").locator("p")
    assert not section.is_visible()
    card.locator("summary", has_text="reflect").click()
    assert section.inner_text() == "It burns, I see."


def test_keys_reach_everything(page: Page) -> None:
    page.locator("[name=task]").focus()
    for name in ("class", "outcome", "change", "order"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.name") == name
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_contrast_and_names_meet_aa(page: Page, scheme: str, width: int) -> None:
    """axe-core's rules for WCAG 2.1 A and AA; no scrolling sideways on a phone."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    found = Axe().run(page, options=rules).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:120], v["nodes"][0]["failureSummary"][:200]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_curves_of_all_runs_share_a_chart(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    charts = json.loads(re.search(r'id="chart-data">(.*?)</script>', text, re.DOTALL).group(1))
    loss = next(chart for chart in charts if chart["title"] == "Loss")
    assert [line["name"] for line in loss["data"]] == ["rft", "sft"]
    assert len({line["line"]["color"] for line in loss["data"]}) == 2
    assert sum(chart["title"].startswith("Times: ") for chart in charts) == 2


def test_a_run_has_one_colour_in_all_charts() -> None:
    drawn = charts.curves({"a": [{"step": 1, "loss": 1.0}], "b": [{"step": 1, "loss": 1.0, "reward": 1.0}]})
    colours = {line["line"]["color"] for chart in drawn for line in chart["data"] if line["name"] == "b"}
    assert [chart["title"] for chart in drawn] == ["Reward", "Loss"] and len(colours) == 1


def test_a_curve_is_smoothed_with_its_values_behind_it(tmp_path: Path, rng: np.random.Generator) -> None:
    values = [None if i == 50 else float(x) for i, x in enumerate(rng.normal(size=120))]
    (tmp_path / "run").mkdir()
    steps = [{"step": i, "loss": value} for i, value in enumerate(values)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    raw, smooth = charts.curves({"run": report.read_metrics(tmp_path / "run")})[0]["data"]
    assert raw["showlegend"] is False and raw["opacity"] < 1 and raw["line"] == smooth["line"]
    assert raw["y"] == values and raw["x"] == list(range(120)) and smooth["y"][50] is None
    assert smooth["y"][60] == pytest.approx(sum(values[56:65]) / 9, rel=1e-5)
    assert smooth["y"][52] == pytest.approx(sum(v for v in values[48:57] if v is not None) / 8, rel=1e-5)
    assert sum(line.get("showlegend", True) for line in (raw, smooth)) == 1


def test_missing_values_stay_missing_in_a_smoothed_curve_and_count_nowhere() -> None:
    assert charts.moving_mean([1.0, None, 4.0, 5.0], 1) == [1.0, None, 4.5, 4.5]
    assert charts.moving_mean([1e30, 1.0, 1.0, 2.0, 3.0], 1)[3] == 2.0  # no trace of what is far away


def test_an_example_is_one_card_with_what_changed(tmp_path: Path) -> None:
    before = [record(0, "grounding", "[5.0, 9.0]", "Anomaly [5.0, 9.0]"), record(0, "qa", "B", "B")]
    after = [record(0, "grounding", "[2.0, 6.0]", "Anomaly [2.0, 6.0]"), record(0, "qa", "C", "B")]
    found = [gallery.card([("rft", new), ("sft", old)]) for new, old in zip(after, before, strict=True)]
    assert [[a.evaluation for a in card.answers] for card in found] == [["rft", "sft"]] * 2
    assert [card.answers[0].change for card in found] == ["wrong → right, tIoU 0.14 → 1.00", "right → wrong"]
    assert [card.changes for card in found] == [("fixed",), ("broken",)]
    assert found[0].gain == pytest.approx(6 / 7) and found[1].gain == -1
    bars = [(bar.kind, bar.name, bar.text) for bar in found[0].bars]
    assert bars == [
        ("true", "true", "2.0 to 6.0 s"),
        ("predicted", "rft", "2.0 to 6.0 s"),
        ("predicted", "sft", "5.0 to 9.0 s"),
        ("draft", "draft", "2.0 to 6.0 s"),
    ]


def test_a_gain_that_makes_no_answer_right_is_an_improvement() -> None:
    before, after = (record(0, "grounding", f"[{start}, {start + 4}]", "Anomaly") for start in (5.5, 5.0))
    card = gallery.card([("rft", after), ("sft", before)])
    assert card.changes == ("improved",) and card.answers[0].change == "tIoU 0.07 → 0.14"


def test_an_example_with_another_question_or_truth_has_a_card_of_its_own(folder: Path, tmp_path: Path) -> None:
    """As two data sets may use the same id."""
    one = record(0, "qa", "B", "B")
    evaluation(tmp_path / "a", [one], "a", folder)
    evaluation(tmp_path / "b", [replace(one, question="another?")], "b", folder)
    evaluation(tmp_path / "c", [replace(one, target="C")], "c", folder)
    evaluation(tmp_path / "d", [one], "d", folder)
    report.write([tmp_path], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count('<li class="card"') == 3


def test_all_intervals_of_an_answer_are_drawn() -> None:
    bar = gallery.bar("true", "Anomaly [1.0, 2.0], [5.0, 20.0]", 10.0)
    assert bar.spans == [(10.0, 10.0), (50.0, 50.0)] and bar.text == "1.0 to 2.0 s, 5.0 to 10.0 s"
    assert gallery.bar("true", "Normal", 10.0).spans == []


def test_the_page_begins_with_the_newest_evaluation(page: Page) -> None:
    assert page.locator("h2").first.inner_text() == "Newest evaluation: second"
    numbers = page.locator(".numbers").inner_text()
    assert "QA accuracy" in numbers and "1.00 [" in numbers
    contents = page.locator("nav a").all_text_contents()
    assert contents[:2] == ["Newest evaluation", "All results"] and contents[-1] == "How it was made"
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1


def test_a_change_is_from_the_evaluation_before_of_the_same_annotations(folder: Path, tmp_path: Path) -> None:
    for name, found in (("a", RECORDS), ("b", RECORDS[:3])):
        evaluation(tmp_path / name, found, name, folder)
    found = tables.newest(tables.evaluations([tmp_path]))
    assert found["name"] == "b" and found["before"] == "a"
    assert next(n for n in found["numbers"] if n["title"] == "QA accuracy")["change"] == "+0.50"
    assert tables.newest([]) == {}


def copied(page: Page, kind: str, table: int = 0) -> str:
    page.evaluate("document.querySelectorAll('[role=status]').forEach(e => e.textContent = '')")
    page.get_by_role("button", name=f"Copy as {kind}").nth(table).click()
    page.locator("[role=status]", has_text="copied").first.wait_for()
    return page.evaluate("navigator.clipboard.readText()")


@pytest.fixture
def copying(browser: Browser, folder: Path, tmp_path: Path) -> Iterator[Page]:
    """The page of an evaluation whose name would like to be more than a cell, where the clipboard can be read."""
    found = evaluation(tmp_path / "a", RECORDS, '=1+"2", |x|\ny', folder)
    report.write([found], tmp_path / "report.html")
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"file://{tmp_path}/report.html")
    yield page
    context.close()


def test_a_table_is_copied_as_markdown(copying: Page) -> None:
    lines = copied(copying, "Markdown").splitlines()
    assert lines[0] == r'|  | =1+"2", \|x\| y | constant guess | n |' and set(lines[1]) == set("| -")
    assert {line.replace(r"\|", "").count("|") for line in lines} == {5}


def test_a_table_is_copied_as_csv_without_formulas(copying: Page) -> None:
    text = copied(copying, "CSV")
    head, *rows = csv.reader(io.StringIO(text))
    assert head == ["", """'=1+"2", |x| y""", "constant guess", "n"] and text.endswith("\r\n")
    assert rows[0][0] == "QA accuracy" and rows[0][1].startswith("0.50 [")


FORMULAS = ("=1", "+1+cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0", "@SUM(1)", "-1-1", "-A1")
NUMBERS = ("-0.02", "-0.02 [-0.03, 0.01]", "-", "+0.10", "1.5")


def test_cells_that_a_spreadsheet_would_compute_are_marked_as_text(page: Page) -> None:
    cells = page.evaluate("cells => formats.csv([cells])", [*FORMULAS, *NUMBERS])
    assert next(csv.reader(io.StringIO(cells))) == [*(f"'{formula}" for formula in FORMULAS), *NUMBERS]


def test_a_table_is_copied_where_there_is_no_clipboard(copying: Page) -> None:
    copying.evaluate("Object.defineProperty(navigator, 'writable', {}); navigator.clipboard.writeText = undefined")
    copying.evaluate("Object.defineProperty(window, 'isSecureContext', {value: false})")
    assert copied(copying, "CSV").startswith(",")


def test_every_table_can_be_copied(page: Page) -> None:
    assert page.locator("table").count() * 2 == page.locator("[data-copy]").count()


def test_a_confusion_matrix_shows_counts_and_shares_of_the_true_class(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    path = evaluation(tmp_path / "a", RECORDS, "a", folder) / "metrics.json"
    result = json.loads(path.read_text())
    result["tasks"]["classification"]["confusion"] = {"labels": [LABEL, "B"], "counts": [[3, 1, 0], [0, 0, 0]]}
    path.write_text(json.dumps(result))
    report.write([tmp_path], tmp_path / "report.html")
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/report.html")
    rows = page.evaluate("cellsOf(document.querySelector('.matrix'))")
    assert rows[0] == ["true \\ predicted", LABEL, "B", "unreadable"]
    assert rows[1:] == [[LABEL, "3 75%", "1 25%", "0 0%"], ["B", "0 0%", "0 0%", "0 0%"]]
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_shades_differ_in_lightness_and_their_text_is_readable(theme: str) -> None:
    """To be read without telling colours apart; WCAG AA asks for a contrast of 4.5."""

    def lightness(colour: str) -> float:
        return charts.luminance([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) + 0.05

    pairs = [(lightness(back), lightness(text)) for back, text in charts.shades(theme)]
    assert all(max(pair) / min(pair) >= 4.5 for pair in pairs)
    steps = np.diff([back for back, _ in pairs])
    assert len(pairs) == 11 and (np.all(steps > 0) or np.all(steps < 0))


def test_evaluations_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    for run in ("x", "y"):
        evaluation(tmp_path / run / "eval", RECORDS[:1], "evaluate", folder)
    report.write([tmp_path], tmp_path / "report.html")
    assert "Newest evaluation: y/eval" in (tmp_path / "report.html").read_text()


def test_large_evaluations_stay_small(tmp_path: Path) -> None:
    """1,000 examples of as many, evenly chosen, with long answers: under 25 MB."""
    (tmp_path / "videos").mkdir()
    path = video_files.write(tmp_path / "videos" / "v0.mp4", count=40)
    for i in range(1, 400):
        shutil.copy(path, tmp_path / "videos" / f"v{i}.mp4")
    long = ("The smoke rises. " * 120,)
    many = [
        replace(r, example=f"v{i}.mp4/{r.task}", video=f"v{i}.mp4", completions=[r.completions[0] + long[0]])
        for i in range(400)
        for r in RECORDS[:3]
    ]
    evaluation(tmp_path / "eval", many, "large", tmp_path / "videos")
    report.write([tmp_path], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count('<li class="card"') == 1000 and "1000 of 1200 examples" in text
    assert len(text.encode()) < 25e6


def test_differences_between_two_evaluations(folder: Path, tmp_path: Path) -> None:
    better = [replace(r, scores=[1.0]) for r in RECORDS]
    other = evaluation(tmp_path / "c", better[1:], "c", folder)
    lines = tables.compare(folder / "eval" / "a", other).splitlines()
    table = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:5]}
    assert table["qa"][:3] == ["0.000", "1.000", "+1.000"] and table["qa"][-1] == "1"
    assert table["grounding"][:3] == ["0.571", "1.000", "+0.429"]
    assert lines[-1] == "Only in A: 1 examples, only in B: 0."


def test_a_failed_video_is_wrong_in_differences_and_cards(folder: Path, tmp_path: Path) -> None:
    failed = [record(*asked, failure="moov atom not found", **changed) for asked, changed in ASKED]
    other = evaluation(tmp_path / "c", failed, "c", folder)
    lines = tables.compare(folder / "eval" / "a", other).splitlines()
    table = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:5]}
    assert [row[1] for row in table.values()] == ["0.000"] * 3 and [row[-1] for row in table.values()] == ["2"] * 3
    assert lines[-1] == "Videos that failed, whose score is 0: 0 in A, 6 in B."
    for found in load(other):
        card = gallery.card([("c", found)])
        (answer,) = card.answers
        assert card.states == ("wrong", "failed") and answer.failure == "moov atom not found"
        assert (card.score, answer.prediction, answer.draft, answer.sections) == (0.0, "", "", [])


def test_a_failed_description_is_wrong_too() -> None:
    found = records.record("description", "<answer>x</answer>", failure="moov atom not found")
    assert gallery.card([("c", found)]).states == ("wrong", "failed")


def test_numbers_of_examples_are_each_evaluations_own(page: Page) -> None:
    rows = {r.split("\t")[0]: r.split("\t")[1:] for r in page.locator("table").first.inner_text().splitlines()}
    assert rows["QA accuracy"][-1] == "1, 2"


def test_records_that_share_a_name_are_refused(folder: Path, tmp_path: Path) -> None:
    """As evaluations had them of several questions about one video."""
    other = evaluation(tmp_path / "c", [*RECORDS, replace(RECORDS[0], question="another")], "c", folder)
    with pytest.raises(InputError, match=r"1 ids more than once, v0\.mp4/qa first"):
        tables.compare(folder / "eval" / "a", other)


def test_runs_of_the_same_name_are_named_by_more_of_their_paths() -> None:
    runs = [Path("demo/a/rft"), Path("demo/b/rft")]
    assert report._names(runs) == ["a/rft", "b/rft"]
    assert report._names(runs[:1]) == ["rft"]


def test_what_cannot_be_reported_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="has no run"):
        report.write([tmp_path], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"must end in \.html"):
        report.write([folder], tmp_path / "report.md")
    with pytest.raises(InputError, match=r"no predictions\.jsonl"):
        tables.compare(tmp_path, folder / "eval" / "a")
    (tmp_path / "metrics.json").write_text('{"name": "old"}')
    with pytest.raises(InputError, match="written by another version"):
        report.write([tmp_path], tmp_path / "report.html")
    (tmp_path / "predictions.jsonl").write_text('{"old": 1}\n')
    with pytest.raises(InputError, match="evaluate again"):
        tables.compare(tmp_path, folder / "eval" / "a")


def test_sections_of_broken_completions_are_all_there() -> None:
    text = "well <think>a</think><answer>B</answer> and <glue>more"
    assert gallery.sections(text) == [
        ("outside", "well"),
        ("think", "a"),
        ("answer", "B"),
        ("outside", "and <glue>more"),
    ]
    assert gallery.sections("no tags") == [("text", "no tags")]
    assert gallery.choose(list(range(10)), 4) == [int(i) for i in np.linspace(0, 9, 4)]
