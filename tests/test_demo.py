"""The demo: what it leaves, that its table is its measurements, and that it stops and goes on."""

import json
import signal
import statistics

import pytest
import transformers as hf

from tilewright import cli, demo, demo_phases, demo_report, memory
from tilewright.demo_phases import PHASES
from tilewright.demo_quantize import PACKED
from tilewright.demo_shared import QUICK


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick demo that was stopped by Ctrl-C after two phases and then resumed."""
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("demo") / "out"
    real = demo_phases.PHASES["extend"]

    def stop_at_the_start(shared):
        signal.raise_signal(signal.SIGINT)

    demo_phases.PHASES["extend"] = (real[0], stop_at_the_start)
    # a shell that starts a job in the background may have it ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            demo.run_demo(out, seconds=6, quick=True)
    finally:
        demo_phases.PHASES["extend"] = real
        signal.signal(signal.SIGINT, before)
    kept = {p.name: p.read_bytes() for p in (out / "phases").iterdir()}
    assert demo.run_demo(out, seconds=6, quick=True, resume=True) == 0
    return out, str(stopped.value), kept


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished[0] / "report.json").read_text())


def test_a_stop_says_how_to_go_on_and_finished_phases_are_kept(finished):
    out, message, kept = finished
    assert "finished: measure, train; continue with: tilewright demo" in message
    assert f"--out {out} --quick --seconds 6 --resume" in message
    assert set(kept) == {"measure.json", "train.json"}
    for name, content in kept.items():
        assert (out / "phases" / name).read_bytes() == content


def test_report_says_where_it_was_made(report):
    assert list(report["phases"]) == list(PHASES)
    assert report["machine"]["torch_threads"] >= 1 and report["machine"]["cpu"]
    assert set(report["versions"]) >= {"python", "torch", "transformers", "peft"}
    assert report["revision"] and report["settings"]["seconds"] == 6
    assert report["text"]["held_out_tokens"] > 0


def test_both_sides_saw_the_same_and_agree(report):
    train = report["phases"]["train"]
    stock, ours = train["losses"]["stock"], train["losses"]["tilewright"]
    assert len(stock) == len(ours) == train["steps"] >= QUICK.least_steps
    assert ours[-1] < ours[0]  # something was learned
    gaps = [abs(a - b) for a, b in zip(stock, ours, strict=True)]
    assert train["largest_loss_gap"] == max(gaps)
    # float32 rounding only; bfloat16 products round at 2**-8
    tolerance = 1e-4 if train["dtype"] == "float32" else 2e-2
    assert max(gaps) < tolerance
    error = report["phases"]["measure"]["gradient_error"]
    assert 0 < error["tilewright"] < 2 * error["stock"]
    made = report["phases"]["generate"]
    assert made["tokens"] == QUICK.prompts * QUICK.new_tokens
    assert made["equal_tokens"] == made["tokens"]


def test_fewer_bits_are_fewer_bytes_and_closer_with_more(report):
    found = report["phases"]["quantize"]["formats"]
    assert list(found) == ["dense", *PACKED]
    assert found["dense"]["bits_per_weight"] == 32
    for name in PACKED:
        assert found[name]["bytes"] < found["dense"]["bytes"]
        assert 0 < found[name]["kl"] <= found[name]["kl_largest"]
        assert 0 < found[name]["same_top"] < 1 or found[name]["kl"] < 1e-4
    for name in ("nf4", "int4"):
        assert (
            4.25 <= found[name]["bits_per_weight"] < 5
        )  # float16 or float32 scales for 64, filling
        assert found["int8"]["kl"] < found[name]["kl"] / 5
    assert 8 < found["int8"]["bits_per_weight"] < 8.6
    phase = report["phases"]["quantize"]
    dense_bytes = 4 * phase["parameters"]
    assert dense_bytes <= found["dense"]["bytes"] < 1.01 * dense_bytes + 4096
    saved = phase["packed_weights"] * (32 - found["nf4"]["bits_per_weight"]) / 8
    assert found["dense"]["bytes"] - found["nf4"]["bytes"] == pytest.approx(saved, rel=0.02)


def test_both_sides_train_the_same_adapter_over_the_same_codes(report):
    qlora = report["phases"]["quantize"]["qlora"]
    stock, ours = qlora["losses"]["stock"], qlora["losses"]["tilewright"]
    assert len(stock) == len(ours) == qlora["steps"] >= QUICK.least_qlora_steps
    gaps = [abs(a - b) for a, b in zip(stock, ours, strict=True)]
    assert (qlora["first_loss_gap"], qlora["largest_loss_gap"]) == (gaps[0], max(gaps))
    assert max(gaps) < (1e-4 if qlora["dtype"] == "float32" else 2e-2)
    after = qlora["held_out_loss"]
    assert abs(after["stock"] - after["tilewright"]) < 2e-2
    assert after["tilewright"] != qlora["held_out_loss_of_base"]
    for side, rate in qlora["tokens_per_s"].items():
        seconds = statistics.median(qlora["step_ms"][side]) / 1e3
        assert rate == pytest.approx(QUICK.rows * QUICK.context / seconds)


def test_table_is_the_reports_numbers(report):
    text = demo_report.as_text(report)
    phases = report["phases"]
    for side in ("stock", "tilewright"):
        assert f"{statistics.median(phases['train']['step_ms'][side]):.1f}" in text
        assert f"{phases['generate']['tokens_per_s'][side]:.1f}" in text
        assert f"{phases['train']['held_out_loss'][side]:.4f}" in text
    for readings in phases["extend"]["quality"].values():
        for reading in readings.values():
            assert f"{reading['perplexity']:.2f}" in text
    for name, found in phases["quantize"]["formats"].items():
        (line,) = [ln for ln in text.splitlines() if ln.startswith(f"  {name} ")]
        cells = line.split()
        assert cells[1:4] == [
            f"{found['bits_per_weight']:.2f}", f"{found['bytes'] / 2**20:.2f}",
            f"{found['perplexity']:.3f}",
        ]  # fmt: skip
        assert cells[-1] == f"{found['tokens_per_s']:.1f}"
        if name != "dense":
            assert cells[4:6] == [f"{found['kl']:.2e}", f"{found['same_top']:.2%}"]
    qlora = phases["quantize"]["qlora"]
    for side in ("stock", "tilewright"):
        assert f"{qlora['tokens_per_s'][side]:.1f}" in text
        assert f"{qlora['losses'][side][-1]:.4f}" in text
        assert f"{qlora['held_out_loss'][side]:.4f}" in text
    assert f"{qlora['held_out_loss_of_base']:.4f}" in text
    assert report["revision"] in text


def test_a_loss_is_called_a_loss(report):
    slow = json.loads(json.dumps(report))
    slow["phases"]["train"]["step_ms"] = {"stock": [10.0], "tilewright": [20.0]}
    slow["phases"]["measure"]["peak_bytes"] = {"stock": 2**20, "tilewright": 3 * 2**20}
    slow["phases"]["generate"]["tokens_per_s"] = {"stock": 40.0, "tilewright": 10.0}
    text = demo_report.as_text(slow)
    assert "2.00x slower" in text and "3.00x more" in text and "4.00x slower" in text
    slow["phases"]["measure"]["peak_bytes"] = {"stock": None, "tilewright": None}
    assert "not measurable here" in demo_report.as_text(slow)


def test_models_load_in_plain_transformers(finished):
    out = finished[0]
    for name, context in (("model", 1), ("model-extended", QUICK.stretch)):
        model = hf.AutoModelForCausalLM.from_pretrained(out / name, local_files_only=True)
        assert model.config.max_position_embeddings == QUICK.context * context
        tokenizer = hf.AutoTokenizer.from_pretrained(out / name, local_files_only=True)
        assert tokenizer.decode(tokenizer("import os")["input_ids"]) == "import os"


def test_plot_is_written(finished):
    pytest.importorskip("matplotlib")
    assert (finished[0] / "report.png").read_bytes().startswith(b"\x89PNG")


def test_other_settings_and_used_folders_are_refused(finished, capsys):
    out = str(finished[0])
    for arguments, message in (
        ([], "is not empty; pass --resume"),
        (["--resume", "--quick", "--seconds", "7"], "resume: seconds was 6 when the demo"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--seconds", "0"], "seconds is 0.0, need a positive number"),
        (["--out", out + "/settings.json"], "is a file, need a folder"),
        (["--out", out + "/phases/none", "--resume"], "holds no demo to resume"),
    ):
        assert cli.main(["demo", "--out", out, *arguments]) == cli.BAD_INPUT
        assert message in capsys.readouterr().err


def test_text_is_the_same_each_time_and_its_parts_are_apart():
    first, second = (demo.collect_text(50_000, 20_000) for _ in range(2))
    assert first == second
    assert not set(first[0]) & set(first[1])
    assert sum(len(t.encode()) for t in first[0]) >= 50_000


def test_peak_memory_is_what_was_touched():
    def touch(mib):
        return lambda: bytearray(mib << 20).count(b"\1")

    small, large = (memory.peak_bytes(touch(mib)) for mib in (16, 96))
    if small is None:
        pytest.skip("this system does not restart VmHWM")
    assert 15 << 20 < small < 24 << 20
    assert 95 << 20 < large < 104 << 20
