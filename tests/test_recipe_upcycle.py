"""The recipe that makes a dense model a mixture, in its quick sizes, and the charts it draws."""

import xml.etree.ElementTree as xml

import pytest

from tilewright.bench.recipes import charts, upcycle

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def found():
    return upcycle.run(quick=True, seed=1)


def test_both_start_from_the_same_function(found):
    assert found.largest_logit > 0.5
    assert found.first_gap <= 1e-5 * found.largest_logit
    first = [ys[0] for ys in found.losses.values()]
    assert first[0] == pytest.approx(first[1], abs=1e-5)


def test_both_learn_and_are_measured_alike(found):
    assert found.steps == sorted(set(found.steps)) and found.steps[0] == 0
    assert list(found.losses) == ["dense, continued", "mixture"]
    for losses in found.losses.values():
        assert len(losses) == len(found.steps) and losses[-1] < losses[0] - 0.01
    assert found.losses["mixture"][-1] != found.losses["dense, continued"][-1]
    assert found.parameters["mixture"] > 2 * found.parameters["dense"]


def test_shares_of_experts(found):
    assert len(found.shares) == len(found.steps)
    for at in found.shares:
        assert len(at) == 2  # layers
        for layer in at:
            # no expert gets a token twice
            assert sum(layer) == pytest.approx(1) and max(layer) <= 1 / upcycle.TOP_K
    assert found.shares[0] != found.shares[-1]


def test_the_command_prints_and_draws(monkeypatch, capsys, tmp_path, found):
    monkeypatch.setattr(upcycle, "run", lambda quick, seed: found)
    picture = tmp_path / "curves.svg"
    upcycle.main(["--quick", "--svg", str(picture)])
    shown = capsys.readouterr().out
    last = [f"{ys[-1]:.4f}" for ys in found.losses.values()]
    assert f"held-out loss is {last[1]} as a mixture and {last[0]} as it was" in shown
    assert shown.count("share of the held-out tokens' slots, layer") == 2
    drawing = xml.parse(picture).getroot()
    lines = drawing.findall(f".//{SVG}polyline")
    assert len(lines) == 2 + 2 * upcycle.EXPERTS
    assert {len(line.get("points").split()) for line in lines} == {len(found.steps)}


def test_a_chart_as_text():
    chart = charts.Chart("up", "x", [0.0, 1.0, 2.0], {"a": [0.0, 1.0, 2.0], "b": [1.0, 1.0, 1.0]})
    assert charts.as_text(chart, width=9, height=3).splitlines() == [
        "up",
        "2 |      ..*",
        "  |o...o...o",
        "0 |*..",
        "  +---------",
        "   0     x 2",
        "   * a   o b",
    ]


def test_a_chart_as_a_picture():
    chart = charts.Chart("a < b", "x", [0.0, 4.0], {"line": [1.0, 3.0]}, low=0.0, high=4.0)
    root = xml.fromstring(charts.as_svg([chart, chart]))
    assert int(root.get("height")) == 2 * charts.HEIGHT
    (first, _) = root.findall(f".//{SVG}polyline")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in first.get("points").split())
    inner = charts.HEIGHT - charts.TOP - charts.BOTTOM
    assert (x0, x1) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert y0 == pytest.approx(charts.TOP + 0.75 * inner, abs=0.1)
    assert y1 == pytest.approx(charts.TOP + 0.25 * inner, abs=0.1)
    words = [t.text for t in root.findall(f".//{SVG}text")]
    assert {"a < b", "0", "1", "2", "3", "4", "x", "line"} <= set(words)


@pytest.mark.parametrize("lines, message", [
    ({}, "chart 't' has no points"),
    ({"a": [1.0]}, "line 'a' has 1 points, need 2"),
    ({"a": [1.0, float("nan")]}, "line 'a' is not finite"),
])  # fmt: skip
def test_refusals(lines, message):
    with pytest.raises(ValueError, match=message):
        charts.Chart("t", "x", [0.0, 1.0], lines)
