"""The benchmark of sparse fine-tuning: ours is right, and work is counted right."""

import pytest

from tilewright.bench import bench_sparse, run


@pytest.mark.parametrize("name", bench_sparse.CASES)
def test_ours_computes_what_it_says(name):
    case = bench_sparse.CASES[name]
    here = {n: v for n, v in bench_sparse.VARIANTS.items() if v.applies(case)}
    assert next(iter(here)) == "tilewright" and len(here) == (7 if case["step"] == "train" else 2)
    here = {n: v for n, v in here.items() if v.why_not() is None}
    for mode in case["modes"]:
        errors = run.check(bench_sparse, case, "bf16", mode, "cpu", here)
        error, wrong = errors["tilewright"]
        assert wrong == "" and error < 4e-3
        if case["step"] == "search":
            assert error == 0.0
        else:
            # of a copy with values added, of PEFT's as of torch's, the error is that of a rounding
            same = {"torch scatter", "torch masked gradient", "peft supertuning", "peft shira"}
            for peer in same & set(here):
                assert errors[peer][0] < 1e-2, (peer, errors[peer])
            for other in {"torch frozen", "peft lora"} & set(here):
                assert errors[other][0] > 1e-2, other


def test_work_counts_both_products_and_what_is_read():
    case = dict(bench_sparse.CASES["train-512"], T=8, I=100, O=50)
    assert bench_sparse.work(case, 2, "fwd") == (2 * 8 * 5050, 5000 * 2.06 + 2 * 8 * 150)
    operations, n_bytes = bench_sparse.work(case, 2, "fwd+bwd")
    assert operations == pytest.approx(2 * 8 * (2 * 5000 + 3 * 50))
    assert n_bytes == pytest.approx(2 * (10300 + 2400))
    case["step"] = "search"
    assert bench_sparse.work(case, 2, "fwd") == (2 * 8 * 5000, 2 * 8 * 150 + 400)
