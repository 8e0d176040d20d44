"""Reports: one page that stands alone, the same bytes each time, honest tables."""

import html.parser
import re

import numpy as np
import pytest
from matplotlib.text import Text

from experiments import claims, figures, report, run_folder, scatter
from experiments.claims import Claim
from experiments.studies import _regime_arms, _stream_arms, _stream_report

CLAIMS = [
    Claim("a < b", "[1]", "five seeds", 1.2345, 0.067, "reproduced"),
    Claim("b | c", "[2]", "five seeds", -2.0, None, "not reproduced", "a note"),
    Claim("c", "[3]", "nothing", None, None, "not testable here"),
]


def drawing():
    figure, axes = figures.new(1, 3, width=12)
    figures.points(axes[0, 0], {"x": ([1, 2], [0.1, 0.2])}, ["a", "b"], y="loss")
    figures.lines(
        axes[0, 1],
        {"one": ([0, 1], [1, 2], [0.1, 0.1]), "two": ([0, 1], [2, 1], [0, 0])},
        x="step",
        y="loss",
    )
    values = np.array([[0.5, np.nan], [1.0, 2.0]])
    figures.heat_map(axes[0, 2], values, "ab", "cd", x="x", y="y", diverging_at=1.0)
    return figure


def content():
    return report.Report(
        tables=[
            report.Table("t", "A <table>", ("arm", "loss"), [("a|b", (1.0, 0.25))])
        ],
        figures=[report.Figure(n, "A figure", drawing(), "See.") for n in ("f", "g")],
        claims=CLAIMS,
        summary="One & two.\n\nThree.",
    )


class Page(html.parser.HTMLParser):
    """Collects tags, ids and references."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = {"study": "toy", "config": {"seeds": 3, "arms": ["a", "b"]}}
    config["config_hash"] = "0"
    run_folder.write_json(folder / "config.json", config)
    return folder, report.write(folder, content()).read_text()


def test_page_needs_nothing_but_itself(written):
    _, text = written
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert {"svg", "table", "figure"} <= page.tags


def test_two_figures_share_no_ids_and_each_reference_has_its_target(written):
    page = Page()
    page.feed(written[1])
    assert len(set(page.ids)) == len(page.ids)
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets and targets <= set(page.ids)
    inner = re.findall(r"url\(#([^)]*)\)", written[1])
    assert inner and set(inner) <= set(page.ids)


def test_page_shows_everything_and_escapes_it(written):
    text = written[1]
    for part in (
        "A &lt;table&gt;",
        "a &lt; b",
        "One &amp; two.",
        "1.00 ± 0.25",
        "a, b",
    ):
        assert part in text
    assert "a < b" not in text
    assert text.count('class="verdict') == 3
    assert "prefers-color-scheme: dark" in text


def test_writing_twice_gives_the_same_bytes(written, tmp_path):
    folder, _ = written
    before = {p: p.read_bytes() for p in folder.rglob("*.*")}
    report.write(folder, content())
    assert {p: p.read_bytes() for p in folder.rglob("*.*")} == before
    assert {p.suffix for p in before} == {".json", ".md", ".svg", ".png", ".html"}


def test_markdown_cells_cannot_break_the_table(written):
    lines = (written[0] / "tables" / "t.md").read_text().splitlines()
    assert lines[2:5] == [
        "| arm | loss |",
        "| --- | --- |",
        "| a\\|b | 1.00 ± 0.25 |",
    ]


def test_claims_table_has_mean_error_and_verdict():
    lines = claims.to_markdown(CLAIMS).splitlines()
    assert lines[2] == "| a < b | [1] | five seeds | 1.234 ± 0.067 | reproduced |  |"
    assert lines[3].split(" | ")[3:5] == ["-2", "not reproduced"]
    assert lines[4].split(" | ")[3:5] == ["-", "not testable here"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "has the verdict 'maybe'"),
        ({"measured": None}, "'reproduced' without a measurement"),
    ],
)
def test_claim_that_says_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        claims.check([CLAIMS[0]._replace(**change)])


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, None, "1.235"),
        (1.23456, 0.0213, "1.235 ± 0.021"),
        (1234.5, 67.0, "1234 ± 67"),
        (0.0, 0.0, "0 ± 0"),
        (2e7, 3e5, "2e+07 ± 3e+05"),
        (float("nan"), 0.1, "nan"),
        (1.0, float("nan"), "1"),
        (1e-9, 2e-10, "1e-09 ± 2e-10"),
    ],
)
def test_numbers_show_the_digits_their_error_supports(value, error, text):
    assert claims.format_number(value, error) == text


def test_rows_that_do_not_fit_the_columns_are_named():
    with pytest.raises(ValueError, match="a row has 1 cells where the table has 2"):
        report.markdown_table(("a", "b"), [(1,)])


def test_axes_without_labels_are_refused():
    _, axes = figures.new()
    with pytest.raises(ValueError, match="both axes need a label"):
        figures.label(axes[0, 0], "", "y")


def test_mean_and_error_by_hand():
    mean, error = figures.mean_and_error(np.array([[1.0], [2.0], [6.0]]))
    # Deviations -2, -1, 3: variance 14 / 2 = 7, and 7 / 3 under the root.
    np.testing.assert_allclose((mean[0], error[0]), (3.0, (7 / 3) ** 0.5))
    assert figures.mean_and_error(np.ones((1, 2)))[1].tolist() == [0.0, 0.0]


def test_colours_of_series_are_distinct():
    looks = [tuple(figures.style(i).values()) for i in range(16)]
    assert len(set(looks)) == 16


def test_every_arm_of_the_studies_has_a_colour_and_a_marker():
    for arm in _stream_arms.ARMS.values():
        assert arm.routing in scatter.ROUTINGS
        assert arm.family.removesuffix(f"-{arm.routing}") in scatter.METHODS
    assert {*_regime_arms.ROUTINGS, "replay"} <= set(scatter.ROUTINGS)
    assert set(_regime_arms.RULES) <= set(scatter.METHODS)
    assert len(set(scatter.ROUTINGS.values())) == len(scatter.ROUTINGS)
    assert len(set(scatter.METHODS.values())) == len(scatter.METHODS)


def test_names_of_crowded_points_hide_no_name_and_no_point():
    rng = np.random.default_rng(0)
    where = rng.normal(0, 1, (12, 2))
    where[1] = where[0] + 0.01  # two arms that all but coincide
    marks = [
        scatter.Mark(f"some-arm-{i}", "max", "balance", (x, 0.05), (y, 0.05))
        for i, (x, y) in enumerate(where)
    ]
    figure, axes = figures.new(width=7, height=5)
    at = axes[0, 0]
    scatter.draw(at, marks)
    figures.label(at, "x", "y")
    scatter.explain_marks(figure, marks)
    scatter.name_marks(figure, at, marks)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in at.texts]
    assert [text.get_text() for text in at.texts] == [m.name for m in marks]
    frame = at.get_window_extent()
    for i, box in enumerate(boxes):
        assert box.x0 >= frame.x0 and box.x1 <= frame.x1, "cut at a side"
        assert not any(box.overlaps(other) for other in boxes[:i])
        points = at.transData.transform(where)
        assert not any(box.contains(x, y) for x, y in points)
    assert figures.to_svg(figure) == figures.to_svg(figure)


def test_a_name_does_not_lie_on_a_line():
    figure, axes = figures.new(width=7, height=5)
    at = axes[0, 0]
    at.plot([0.0, 2.0, 4.0], [1.0, 1.0, 0.98], color="#777777")
    at.set_ylim(0.0, 2.0)
    mark = scatter.Mark("some-arm", "none", "plain", (2.0, 0.01), (1.0, 0.01))
    scatter.draw(at, [mark])
    scatter.name_marks(figure, at, [mark])
    figure.draw_without_rendering()
    (box,) = [Text.get_window_extent(text) for text in at.texts]
    left = np.linspace([0.0, 1.0], [2.0, 1.0], 200)
    right = np.linspace([2.0, 1.0], [4.0, 0.98], 200)
    points = at.transData.transform(np.concatenate([left, right]))
    assert not any(box.contains(x, y) for x, y in points)


def test_many_arms_are_drawn_in_panels_by_kind():
    def marks(names):
        arms = [_stream_arms.ARMS[name] for name in names]
        return [
            scatter.Mark(
                a.name,
                a.routing,
                a.family.removesuffix(f"-{a.routing}"),
                (0.0, 0.0),
                (0.0, 0.0),
            )
            for a in arms
            if a.family != "plain"
        ]

    assert len(_stream_report._panels(marks(_stream_arms.CORE))) == 1
    panels = _stream_report._panels(marks(_stream_arms.ARMS))
    assert {title: len(group) for title, group in panels.items()} == {
        "subspace, fixed strength": 20,
        "subspace, strength by a rule": 20,
        "A-GEM and EWC": 8,
        "replay": 4,
    }


def test_json_has_no_nan(tmp_path):
    value = {"a": np.float32("nan"), "b": np.arange(2), "c": (1, float("inf"))}
    run_folder.write_json(tmp_path / "x.json", value)
    assert run_folder.read_json(tmp_path / "x.json") == {
        "a": None,
        "b": [0, 1],
        "c": [1, None],
    }
