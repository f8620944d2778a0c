"""The recipe that compares the methods of tuning: it runs, and no paragraph is in two parts."""

import json
import math

import pytest

from tilewright.bench.recipes import methods
from tilewright.files import InputError

pytestmark = pytest.mark.slow  # it trains sixteen tiny models


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The report of `--quick`, and what was printed."""
    file = tmp_path_factory.mktemp("recipe") / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *a, **o: printed.append(" ".join(map(str, a))))
        assert methods.main(["--quick", "--json", str(file)]) == 0
    return json.loads(file.read_text()), printed[-1]


def test_every_method_has_its_line(quick):
    report, printed = quick
    assert len(report["methods"]) == 16
    for name, line in zip(report["methods"], printed.split("\n")[2:], strict=False):
        assert line.startswith(name)
    for name, m in report["methods"].items():
        assert 0 < m["share"] <= 1 and m["step_ms"] > 0, name
        assert math.isfinite(m["english"]) and math.isfinite(m["python"]), name
        tries = {float(rate): loss for rate, loss in m["tries"].items()}
        assert m["rate"] == min(tries, key=tries.get), name
    assert report["methods"]["all weights"]["share"] == 1
    assert report["methods"]["all weights"]["english"] < report["before"]["english"] - 0.05


def test_methods_with_a_choice_train_about_as_much_and_files_follow(quick):
    of = quick[0]["methods"]
    lora = of["lora"]["trained"]
    for name in ("parallel, linear layers", "parallel, mlp", "sequential", "mask, random",
                 "mask, fisher", "sparse, fixed places", "sparse, by gradient",
                 "prefix + parallel (MAM)"):  # fmt: skip
        assert abs(of[name]["trained"] - lora) <= 0.1 * lora, name
    for name, m in of.items():
        assert 4 * m["trained"] <= m["file_bytes"] <= 7 * m["trained"] + 20_000, name


def test_a_paragraph_stands_in_one_part_only():
    parts = methods.english_parts(200_000)
    paragraphs = [{p for text in part for p in text.split("\n\n")} for part in parts]
    assert all(paragraphs)
    assert sum(map(len, paragraphs)) == len(set.union(*paragraphs))
    assert sum(len(t.encode()) for t in parts[0]) >= 100_000
    assert methods.is_prose("It is the first of the words that are in this text, and so on. " * 3)
    assert not methods.is_prose("for i in range(10): x[i] = f(i) + g(i); print(x, y, z)\n" * 4)


def test_too_little_text_and_bad_arguments(capsys):
    from tilewright.data import byte_tokenizer

    with pytest.raises(InputError, match="methods: 4 tokens of text, need at least 64"):
        methods.rows_of(byte_tokenizer(), ["one"], 64)
    with pytest.raises(SystemExit):
        methods.main(["--seconds", "0"])
    assert "--seconds is 0.0, need a positive number" in capsys.readouterr().err
