"""tilewright quantize, and finetune over a packed base: what they print, write and refuse."""

import json

import pytest
import torch
import transformers as hf

import tilewright as tw
from tilewright import cli, pretrained
from tilewright.quantized import QuantizedLinear

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257, "initializer_range": 0.2,
}  # fmt: skip
TEXT = "one two three four five six seven\n" * 30


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: a model, one that is packed already, a text."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    model.save_pretrained("dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def quantize(**changes):
    options = {"model": "dense", "format": "nf4", "out": "packed", "text": "text.txt", **changes}
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is None else [flag, str(value)]
    return ["quantize", *words]


def refused(capsys, arguments):
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as leave:
        code = leave.code
    printed = capsys.readouterr()
    assert code == cli.BAD_INPUT and printed.out == "", printed
    lines = printed.err.splitlines()
    assert len(lines) == 1 and "Traceback" not in printed.err, lines
    return lines[0]


def test_the_table_the_json_and_the_folder_agree(folder, capsys):
    assert cli.main(quantize(json="report.json", group_size=32, double_quant=True)) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {name: value.strip() for name, value in shown.items()}
    report = json.loads((folder / "report.json").read_text())
    assert report["format"] == shown["format"] == "nf4 (group_size 32, double_quant True)"
    assert shown["model"] == "packed"

    dense, packed = pretrained.load("dense").model, pretrained.load("packed").model
    layers = [m for m in packed.modules() if type(m) is QuantizedLinear]
    weights = sum(m.in_features * m.out_features for m in layers)
    assert report["layers"] == len(layers) == 14 and report["weights"] == weights
    bits = 8 * sum(m.packed.nbytes for m in layers) / weights
    assert report["bits_per_weight"] == pytest.approx(bits)
    assert shown["bits a weight"] == f"{bits:.3f}" and bits > 4
    assert report["bytes_before"] == sum(t.nbytes for t in [*dense.parameters(), *dense.buffers()])
    file_bytes = (folder / "packed/model.safetensors").stat().st_size
    assert report["file_bytes"] == file_bytes < 0.6 * report["bytes_before"]

    ids = torch.tensor([list(TEXT.encode())[:64]])
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (dense, packed))
    quality = report["quality"]
    # the text's first row, of all that was measured
    assert 0.3 < (p.exp() * (p - q)).sum(-1)[0, :-1].mean() / quality["kl"] < 3
    assert 0 < quality["same_top"] < 1 and quality["n_tokens"] > 900
    change = quality["perplexity_after"] / quality["perplexity_before"] - 1
    assert f"({change:+.3%})" in shown["perplexity"]


def test_every_option_reaches_the_format(folder):
    for number, (changes, format) in enumerate(
        [
            ({"format": "int4", "group_size": "row"}, tw.Int4(group_size=None)),
            ({"format": "int4", "asymmetric": True}, tw.Int4(symmetric=False)),
            ({"format": "int4", "solver": "minmax"}, tw.Int4(solver="minmax")),
            ({"format": "fp8", "scaling": "block"}, tw.FP8(scaling="block")),
            ({"format": "mxfp4", "dtype": "bfloat16"}, tw.MXFP4()),
            ({"format": "int8", "skip": "down_proj"}, tw.Int8()),
        ]
    ):
        assert cli.main(quantize(out=f"out{number}", tokens=100, context=32, **changes)) == 0
        model = hf.AutoModelForCausalLM.from_pretrained(f"out{number}")
        assert model.config.quantization_config.record == format
        down = model.model.layers[0].mlp.down_proj
        assert (type(down) is QuantizedLinear) == ("skip" not in changes)
        assert model.dtype == (torch.bfloat16 if "dtype" in changes else torch.float32)


def test_the_standard_library_is_the_text_where_none_is_given(folder, capsys):
    assert cli.main(quantize(text=None, tokens=200)) == 0
    assert "tokens of Python's standard library" in capsys.readouterr().out


def test_overwrite_leaves_nothing_of_the_earlier_model(folder):
    model = hf.AutoModelForCausalLM.from_pretrained("dense")
    model.save_pretrained("packed", max_shard_size="50KB")
    assert len(list((folder / "packed").glob("model-*.safetensors"))) > 1
    assert cli.main(quantize(overwrite=True, tokens=100)) == 0
    names = sorted(p.name for p in (folder / "packed").glob("*.safetensors*"))
    assert names == ["model.safetensors"]
    assert not [p for p in (folder / "packed").iterdir() if p.name.startswith(".")]


REFUSED = {
    "no such model": ({"model": "nowhere"}, "model nowhere does not exist, need a model folder"),
    "no such format": ({"format": "int3"}, "no format 'int3'. Known: nf4, fp4, int4, int8, fp8"),
    "foreign option": ({"scaling": "row"}, "format 'nf4' has no option 'scaling', it takes group"),
    "group": ({"group_size": "12"}, "NF4: group_size is 12, need a positive multiple of 8"),
    "group in words": ({"group_size": "many"}, "group-size is 'many', need a whole number or row"),
    "solver": ({"format": "int4", "solver": "x"}, "Int4: solver is 'x', need one of hqq, minmax"),
    "dtype": ({"dtype": "float8"}, "dtype is 'float8', need float32 or bfloat16"),
    "device": ({"device": "tpu"}, "device is 'tpu', need auto, cpu, cuda or cuda:N"),
    "context": ({"context": "1"}, "context is 1, need a whole number of at least 2"),
    "tokens": ({"tokens": "0"}, "tokens is 0, need a whole number of at least 2"),
    "no such text": ({"text": "none.txt"}, "data none.txt does not exist, need a text file"),
    "empty text": ({"text": "empty.txt"}, "data empty.txt is empty, need text"),
    "nothing left": ({"skip": "proj"}, "LlamaForCausalLM has no linear layer to pack outside"),
    "own folder": ({"out": "dense"}, "out dense is the model's own folder, need another one"),
    "a file": ({"out": "text.txt"}, "out text.txt is a file, need a folder"),
    "full folder": ({"out": "full"}, "out full is not empty; pass --overwrite to replace the mod"),
    "no weights": ({"model": "new"}, "model new has a config but no weights; train it first"),
    "cut short": ({"model": "cut"}, "cut/model.safetensors is truncated or damaged"),
    "damaged": ({"model": "mad"}, "mad/config.json is not valid JSON"),
    "an adapter": ({"model": "adapter"}, "model adapter is a PEFT adapter, need a whole model"),
    "packed": ({"model": "done"}, "model done is quantized already (int8), need a dense one"),
}


@pytest.fixture
def traps(folder):
    (folder / "empty.txt").write_text(" ")
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    for name in ("new", "cut", "mad", "adapter"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text((folder / "dense/config.json").read_text())
    weights = (folder / "dense/model.safetensors").read_bytes()
    (folder / "cut/model.safetensors").write_bytes(weights[:-8])
    (folder / "mad/config.json").write_text('{"model_type": ')
    (folder / "adapter/adapter_config.json").write_text("{}")
    model = hf.AutoModelForCausalLM.from_pretrained("dense")
    tw.quantize(model, tw.Int8())
    model.save_pretrained("done")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_quantize_refuses(case, traps, capsys):
    changes, message = REFUSED[case]
    before = sorted(str(p) for p in traps.rglob("*"))
    assert message in refused(capsys, quantize(**changes))
    assert sorted(str(p) for p in traps.rglob("*")) == before


def test_a_missing_argument_is_named(folder, capsys):
    assert "required: --format" in refused(capsys, ["quantize", "--model", "a", "--out", "b"])


# training over a packed base


def finetune(*more, model="dense", out="tuned"):
    arguments = ["--model", model, "--data", "text.txt", "--out", out, "--context", "64"]
    return ["finetune", *arguments, "--steps", "3", "--rows", "2", *more]


def test_an_adapter_over_a_packed_base_is_loaded_with_it(folder, capsys):
    over = ["--base", "nf4", "--adapter", "lora", "--learning-rate", "1e-2"]
    assert cli.main(finetune(*over)) == 0
    adapter = json.loads((folder / "tuned/adapter_config.json").read_text())
    assert adapter["r"] == 16
    loaded = pretrained.load("tuned").model
    packed = [m for m in loaded.modules() if type(m) is QuantizedLinear]
    assert len(packed) == 14 and {m.format for m in packed} == {"nf4"}
    in_memory = tw.finetune(
        "dense", "text.txt", base="nf4", adapter="lora", learning_rate=1e-2, context=64, steps=3,
        rows=2,
    )  # fmt: skip
    ids = torch.tensor([list(b"one two three")])
    want = in_memory.model(ids).logits
    assert (loaded.eval()(ids).logits - want).abs().max() <= 2e-5
    assert {r.kind for r in in_memory.report.replaced} >= {"attention", "lora"}
    capsys.readouterr()
    assert (
        cli.main(["generate", "--model", "tuned", "--prompt", "one", "--max-new-tokens", "3"]) == 0
    )


def test_a_packed_folder_trains_with_an_adapter_and_resumes(folder):
    assert cli.main(quantize(tokens=100)) == 0
    more = ["--adapter", "lora", "--lora-rank", "2"]
    assert cli.main(finetune(*more, model="packed", out="whole")) == 0
    losses = [json.loads(line)["loss"] for line in open("whole/log.jsonl")]
    assert all(torch.isfinite(torch.tensor(losses)))
    loaded = pretrained.load("whole").model
    assert len([m for m in loaded.modules() if type(m) is QuantizedLinear]) == 14


@pytest.mark.parametrize(
    ("more", "model", "message"),
    [
        (["--base", "nf4"], "dense", "base 'nf4' is packed and cannot train by itself: pass adap"),
        (["--base", "nf5", "--adapter", "lora"], "dense", "no format 'nf5'. Known: nf4, fp4"),
        (["--adapter", "prompt"], "dense", "adapter is 'prompt', need none or lora"),
        ([], "done", "model done is quantized, and packed weights do not train: pass adapter"),
        (["--base", "nf4", "--adapter", "lora"], "done", "model done is quantized already (int8)"),
    ],
)
def test_finetune_refuses(more, model, message, traps, capsys):
    assert message in refused(capsys, finetune(*more, model=model))


def test_finetune_refuses_a_second_packing_of_an_object(folder):
    model = hf.AutoModelForCausalLM.from_pretrained("dense")
    tw.quantize(model, tw.Int8())
    with pytest.raises(ValueError, match="base: the model is quantized already; leave it out"):
        tw.finetune(model, [[1, 2, 3]], base="nf4", adapter="lora", steps=1)
