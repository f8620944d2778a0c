"""The benchmark harness: what it times, what it refuses to time, and the figures it derives."""

import csv
import dataclasses
import json
import time

import pytest
import torch

import tilewright
from tilewright import choose, native
from tilewright.bench import bench_attention, ceilings, report, run, timing
from tilewright.bench.variant import Variant, call
from tilewright.ops.attention import reference

TINY = {
    "dense": dict(B=1, L=96, H=2, D=16, is_causal=True, **bench_attention.TRAINED),
    "shifted": dict(B=1, L=128, H=4, D=16, is_causal=True, G=32, **bench_attention.SHIFTED),
    "decode": dict(B=2, S=70, H=4, Hkv=2, D=16, **bench_attention.DECODED),
}


@pytest.fixture
def tiny(monkeypatch):
    """The attention benchmark in shapes that take milliseconds, without FlexAttention."""
    variants = {n: v for n, v in bench_attention.VARIANTS.items() if not v.compiles}
    monkeypatch.setattr(bench_attention, "CASES", TINY)
    monkeypatch.setattr(bench_attention, "VARIANTS", variants)
    known = ceilings.Ceilings(fma=100.0, bf16_dot=200.0, int8_dot=None, read=10.0, how="made up")
    monkeypatch.setattr(ceilings, "measure", lambda device: known)


def run_tiny(*arguments):
    return run.main(["attention", "--quick", "--seconds", "0.05", *arguments])


# --- time ---


def test_each_variant_comes_first_equally_often():
    orders = [timing.rotated(["a", "b", "c"], turn) for turn in range(6)]
    assert [order[0] for order in orders] == ["a", "b", "c", "a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_median_and_quantiles():
    times = timing.summary([float(n) for n in range(1, 12)])
    assert (times.median_us, times.q20_us, times.q80_us, times.samples) == (6.0, 3.0, 9.0, 11)


def test_interleaved_times_are_those_of_the_functions():
    def refuses():
        raise NotImplementedError("not on a CPU\nand more lines")

    functions = {
        "short": lambda: time.sleep(0.002),
        "refuses": refuses,
        "long": lambda: time.sleep(0.008),
    }
    times = timing.time_interleaved(functions, seconds=0.05)
    assert list(times) == list(functions)
    assert times["refuses"] == "NotImplementedError: not on a CPU"
    assert 2000 <= times["short"].median_us < times["long"].median_us
    assert times["long"].median_us >= 8000
    assert times["long"].samples >= 5


def test_short_functions_are_called_many_times_a_sample():
    calls = []
    timing.time_interleaved({"nothing": lambda: calls.append(0)}, seconds=0.0, min_samples=1)
    assert len(calls) > 100


# --- the machine ---


def test_ceilings_are_measured():
    found = ceilings.measure("cpu", seconds=0.01)
    assert found.fma > 0 and found.read > 0
    if native.native().best_isa() in ("avx512_bf16", "amx"):
        assert found.bf16_dot > 0 and found.int8_dot > 0


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_the_memory_ceiling_reads_every_float(streams):
    data = torch.randint(0, 9, (100_003,)).float()
    for threads in (1, 2, 3):
        total = native.native().ceiling_read(data.data_ptr(), data.numel(), streams, threads)
        assert total == data.double().sum().item()
    assert native.native().ceiling_read(data.data_ptr(), 5, streams, 2) == data[:5].sum().item()


def test_the_loops_count_what_they_do():
    module = native.native()
    for loop in (module.ceiling_fma, module.ceiling_bf16_dot, module.ceiling_int8_dot):
        assert loop(300, 2) == 6 * loop(100, 1)
    with pytest.raises(ValueError, match="streams is 3, need 1, 2, 4 or 8"):
        module.ceiling_read(torch.ones(8).data_ptr(), 8, 3, 1)
    with pytest.raises(ValueError, match="threads is 0, need at least 1"):
        module.ceiling_fma(1, 0)


def test_the_higher_of_two_bounds_counts():
    machine = ceilings.Ceilings(fma=100.0, bf16_dot=None, int8_dot=None, read=10.0, how="")
    assert machine.least_us(1e9, 1e3, torch.float32) == (10_000.0, "compute")
    assert machine.least_us(1e3, 1e9, torch.bfloat16) == (100_000.0, "memory")
    nothing = ceilings.Ceilings(None, None, None, None, "")
    assert nothing.least_us(1.0, 1.0, torch.float32) == (None, "")


# --- attention's data ---


@pytest.mark.parametrize("case", [TINY["dense"], TINY["shifted"]], ids=["dense", "shifted"])
@pytest.mark.parametrize("change", [{}, {"is_causal": False}, {"L": 97}, {"H": 3}], ids=str)
def test_pairs_are_those_that_the_reference_sees(case, change):
    case = {**case, **change}
    inputs = bench_attention.make_inputs(case, torch.float32, "cpu")
    rule = bench_attention._rule(case)
    problem = choose.OPERATORS["flash_attention"].problem(*inputs.values(), **rule)
    assert bench_attention.visible_pairs(case) == int(reference.visible_pairs(problem).sum())


def test_work_counts_products_and_tensors_once():
    dense = {**TINY["dense"], "is_causal": False}  # 2 heads, 96 x 96 pairs, width 16
    operations, n_bytes = bench_attention.work(dense, 2, "fwd")
    assert operations == 2 * 2 * 2 * 96 * 96 * 16
    assert n_bytes == 2 * 4 * 96 * 2 * 16
    assert bench_attention.work(dense, 2, "fwd+bwd")[0] == 3.5 * operations
    operations, n_bytes = bench_attention.work(TINY["decode"], 4, "fwd")
    assert operations == 2 * 2 * 16 * 2 * 4 * 70
    assert n_bytes == 4 * 2 * 16 * (2 * 4 + 2 * 70 * 2)


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_every_variant_computes_what_it_says(case, dtype):
    taking_part = {
        name: v
        for name, v in bench_attention.VARIANTS.items()
        if v.applies(case) and not v.compiles
    }
    mode = case["modes"][-1]
    errors = run.check(bench_attention, case, dtype, mode, "cpu", taking_part)
    assert set(errors) == set(taking_part)
    for name, (error, wrong) in errors.items():
        assert wrong == "", name
        assert error < (1e-5 if dtype == "float32" else 1e-2), name


def test_gradients_of_all_layouts_see_the_same_upstream():
    case = TINY["dense"]
    inputs = bench_attention.make_inputs(case, torch.float32, "cpu")
    results = []
    for name in ("tilewright", "torch sdpa"):
        variant = bench_attention.VARIANTS[name]
        parts = call(variant, case, inputs, ("q", "k", "v"))()
        results.append([variant.restore(part) for part in parts])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- the run ---


@pytest.mark.usefixtures("tiny")
def test_a_run_leaves_table_json_csv_and_png(tmp_path, capsys):
    paths = {"--json": tmp_path / "r.json", "--csv": tmp_path / "r.csv", "--plot": tmp_path / "p"}
    arguments = [str(word) for pair in paths.items() for word in pair]
    assert run_tiny(*arguments, "--dtype", "float32") == 0
    assert run_tiny(*arguments[:4], "--case", "decode", "--dtype", "bf16") == 0

    lines = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1, "a Markdown table has one width"

    first, second = (json.loads(line) for line in paths["--json"].read_text().splitlines())
    assert {row["case"] for row in first["results"]} == set(TINY)
    assert {row["dtype"] for row in second["results"]} == {"bf16"}
    for key in ("machine", "revision", "torch", "threads", "level"):
        assert first["environment"][key]
    for row in first["results"]:
        microseconds = row["times"]["median_us"]
        assert row["gflops"] == pytest.approx(row["operations"] / microseconds / 1e3)
        assert row["time_over_ours"] == pytest.approx(microseconds / row["ours_us"])
        assert row["share_of_ceiling"] == pytest.approx(row["least_us"] / microseconds)
        assert row["error"] < 1e-5

    with paths["--csv"].open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(first["results"]) + len(second["results"])
    assert table[0]["kernel_name"] == "attention" and table[0]["metric_unit"] == "ms"
    assert (tmp_path / "p/bench_attention.png").stat().st_size > 1000


@pytest.mark.usefixtures("tiny")
def test_a_kernel_wrong_by_one_percent_gets_no_time(monkeypatch, capsys):
    def spoilt(case, q, k, v):
        return 1.01 * bench_attention.ours(case, q, k, v)

    variants = {**bench_attention.VARIANTS, "tilewright": Variant(spoilt)}
    monkeypatch.setattr(bench_attention, "VARIANTS", variants)
    assert run_tiny("--case", "dense", "--mode", "fwd") == 1
    printed = capsys.readouterr()
    ours = [line for line in printed.out.splitlines() if "| tilewright " in line]
    assert len(ours) == 2 and all("wrong: output errs by" in line for line in ours)
    assert not any(" us " in line or " ms " in line for line in ours)
    assert "wrong result, so no speed is shown" in printed.err


@pytest.mark.usefixtures("tiny")
def test_what_is_timed_is_the_variants_own_meaning(monkeypatch):
    timed = []

    def remember(case, q, k, v):
        timed.append(case["G"])
        return bench_attention.ours(case, q, k, v)

    variants = {"tilewright": Variant(remember, computes=dict(G=None))}
    monkeypatch.setattr(bench_attention, "VARIANTS", variants)
    assert run_tiny("--case", "shifted", "--dtype", "float32") == 0
    assert set(timed) == {None}


@pytest.mark.usefixtures("tiny")
def test_a_baseline_that_cannot_run_is_a_row_with_its_reason(monkeypatch, capsys):
    def refuses(case, q, k, v):
        raise NotImplementedError("no such card")

    variants = {**bench_attention.VARIANTS, "other": Variant(refuses)}
    monkeypatch.setattr(bench_attention, "VARIANTS", variants)
    assert run_tiny("--case", "dense", "--mode", "fwd", "--dtype", "bf16") == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "| other " in line]
    assert "NotImplementedError: no such card" in row


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "long,dense"], "--case names long; known are dense, shifted, decode"),
        (["--providers", "xla"], "--providers names xla; known are tilewright"),
        (["--threads", "0"], "--threads is 0, need at least 1"),
        (["--case", "decode", "--mode", "fwd+bwd"], r"none of the cases decode has mode fwd\+bwd"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_tiny(*arguments)


@pytest.mark.usefixtures("tiny")
def test_an_unwritable_file_is_known_before_the_run(tmp_path, capsys):
    with pytest.raises(OSError):
        run_tiny("--json", str(tmp_path / "none/r.json"))
    assert capsys.readouterr().out == ""


def test_every_operator_of_the_front_desk_has_a_benchmark():
    rooms = {getattr(tilewright.ops, n).__module__.split(".")[2] for n in choose.OPERATORS}
    assert rooms <= set(run.benchmarks())


def test_a_row_without_times_shows_no_figure():
    row = report.Row("c", "bf16", "fwd", "v", None, "because", 1.0, 1.0, 1.0, "compute", 1.0, None)
    assert (row.gflops, row.gbps, row.share, row.ratio) == (None,) * 4
    assert "because" in report.table_line(row)
    counting = dataclasses.replace(row, counts={"words": 5, "letters": 20})
    assert counting.per_second == {}
    plain, with_rates = report.table_head(), report.table_head(counting.counts)
    for head, line in ((plain, row), (with_rates, counting)):
        assert report.table_line(line).count("|") == head.splitlines()[0].count("|")
    assert with_rates.splitlines()[0].endswith("| words/s    | letters/s  |")


@pytest.mark.parametrize(
    ("us", "text"), [(0.25, "0.2 us"), (999.0, "999.0 us"), (1500.0, "1.500 ms"), (2e6, "2.000 s")]
)
def test_durations(us, text):
    assert report.duration(us) == text


def test_a_missing_git_folder_is_no_revision(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "__file__", str(tmp_path / "bench/report.py"))
    assert report.revision() is None
