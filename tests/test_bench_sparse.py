"""The benchmark of sparse fine-tuning: ours is right, and work is counted right."""

import pytest

from tilewright.bench import bench_sparse, run


@pytest.mark.parametrize("name", bench_sparse.CASES)
def test_ours_computes_what_it_says(name):
    case = bench_sparse.CASES[name]
    here = {n: v for n, v in bench_sparse.VARIANTS.items() if v.applies(case)}
    assert next(iter(here)) == "tilewright" and len(here) == (3 if case["step"] == "train" else 2)
    for mode in case["modes"]:
        errors = run.check(bench_sparse, case, "bf16", mode, "cpu", here)
        error, wrong = errors["tilewright"]
        assert wrong == "" and error < 4e-3
        if case["step"] == "search":
            assert error == 0.0
        else:
            assert errors["torch scatter"][0] < 1e-2 < errors["torch frozen"][0]


def test_work_counts_both_products_and_what_is_read():
    case = dict(bench_sparse.CASES["train-512"], T=8, I=100, O=50)
    assert bench_sparse.work(case, 2, "fwd") == (2 * 8 * 5050, 5000 * 2.06 + 2 * 8 * 150)
    operations, n_bytes = bench_sparse.work(case, 2, "fwd+bwd")
    assert operations == pytest.approx(2 * 8 * (2 * 5000 + 3 * 50))
    assert n_bytes == pytest.approx(2 * (10300 + 2400))
    case["step"] = "search"
    assert bench_sparse.work(case, 2, "fwd") == (2 * 8 * 5000, 2 * 8 * 150 + 400)
