"""The recipe of an expert for each domain, in its quick sizes on the real sentence encoder."""

import pytest

from tilewright.bench import bench_encoder
from tilewright.bench.recipes import contrastive_experts as recipe
from tilewright.files import InputError

SOURCE = '''
class Box:
    """A box that holds some things. It is opened by its lid alone, and closed again afterwards."""

    def open(self, force):
        """Open the lid of the box.

        The lid stays open until someone closes it again by hand, or drops it.
        """
        if force > self.limit:
            raise ValueError("the lid of the box is broken now")
        # the hinge takes a moment, and the lid
        # must not be touched meanwhile
        self.lid.wait(self.hinge.seconds_until_open())
        return self.lid
'''


@pytest.mark.slow
def test_experts_of_a_real_encoder():
    why_not = bench_encoder.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    result = recipe.run(quick=True)
    assert result.gap <= 1e-5
    for domain, row in enumerate(result.moved):
        assert [moved > 0 for moved in row] == [e == domain for e in range(len(recipe.DOMAINS))]
    for domain in recipe.DOMAINS:
        assert result.pairs[domain] > 50
        for first, reciprocal in (result.before[domain], result.after[domain]):
            assert 0 < first <= reciprocal <= 1
    assert result.wrong != result.after
    shown = recipe.report(result)
    assert "and the others by 0" in shown
    assert f"{result.after['code'][1]:.3f}" in shown


def test_pairs_of_a_file():
    pairs = recipe.pairs_of(SOURCE)
    rest = "It is opened by its lid alone, and closed again afterwards."
    assert ("A box that holds some things.", rest) in pairs["docstring"]
    ((query, code),) = pairs["code"]
    assert query == "Open the lid of the box."
    assert code.startswith("if force > self.limit:") and "The lid stays" not in code
    ((comment, after),) = pairs["comment"]
    assert comment == "the hinge takes a moment, and the lid must not be touched meanwhile"
    assert after.startswith("self.lid.wait(")


def test_training_and_held_out_pairs_are_apart():
    parts = recipe.read_pairs(40)
    queries = [query for train, kept in parts.values() for query, _ in train + kept]
    assert len(queries) == len(set(queries))
    for train, kept in parts.values():
        assert len(kept) == 40 and len(train) > 100


def test_without_the_model_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(bench_encoder, "why_not", lambda: "its model is not installed")
    with pytest.raises(InputError, match="contrastive_experts: its model is not installed"):
        recipe.run()
