"""The quantization benchmark: every variant computes what it says, and work is counted right."""

import importlib.util

import pytest

from tilewright.bench import bench_quant, quant_errors, run


@pytest.mark.parametrize("name", bench_quant.CASES)
def test_every_variant_computes_what_it_says(name):
    case = bench_quant.CASES[name]
    here = {n: v for n, v in bench_quant.VARIANTS.items() if v.applies(case)}
    assert next(iter(here)) == "tilewright" and len(here) == (3 if case["format"] == "nf4" else 2)
    if importlib.util.find_spec("bitsandbytes") is None:
        here.pop("bitsandbytes", None)
    errors = run.check(bench_quant, case, "bf16", "fwd", "cpu", here)
    assert set(errors) == set(here)
    for variant, (error, wrong) in errors.items():
        assert wrong == "" and error < 4e-3, variant


def test_work_counts_weights_codes_and_scales_once():
    case = dict(bench_quant.CASES["quantize-nf4"], O=16, I=128)
    assert bench_quant.work(case, 2, "fwd") == (4096, 16 * 128 * (2 + 0.5) + 4 * 32)
    case["format"] = "int8"
    assert bench_quant.work(case, 2, "fwd")[1] == 16 * 128 * 3 + 4 * 16


def test_the_table_of_errors_has_a_row_for_each_format(monkeypatch, capsys):
    monkeypatch.setattr(quant_errors, "SHAPE", (16, 256))
    quant_errors.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(quant_errors.FORMATS)
    assert all(line.count("|") == 5 for line in lines)
