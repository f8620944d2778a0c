"""The command line: what it prints, its exit codes, and one clear line for each bad input."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import transformers as hf

from tilewright import cli, train
from tilewright.config import TrainOptions
from tilewright.sampling import Sampling

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
SHORT = ["--steps", "3", "--context", "64", "--rows", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: a config, and a text of about 2,000 bytes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    hf.LlamaConfig(**SIZES).to_json_file(tmp_path / "tiny" / "config.json")
    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 60)
    return tmp_path


@pytest.fixture
def trained(folder):
    arguments = ["--model", "tiny", "--data", "text.txt", "--out", "trained"]
    assert cli.main(["finetune", *arguments, *SHORT]) == 0
    return folder / "trained"


def refused(capsys, arguments):
    """The one line on stderr of a command that must be refused."""
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as leave:  # argparse
        code = leave.code
    printed = capsys.readouterr()
    assert code == cli.BAD_INPUT, printed.err
    assert printed.out == "" and "Traceback" not in printed.err
    lines = printed.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"tilewright {arguments[0]}: ")
    return lines[0]


def finetune(*changes):
    options = {"--model": "tiny", "--data": "text.txt", "--out": "out"}
    rest = []
    for name, value in zip(changes[::2], changes[1::2], strict=True):
        if name in options:
            options[name] = value
        else:
            rest += [name, value] if value is not None else [name]
    return ["finetune", *(part for pair in options.items() for part in pair), *SHORT[2:], *rest]


# what is done


def test_finetune_then_generate(folder, capsys):
    assert cli.main([*finetune("--steps", "4")]) == 0
    printed = capsys.readouterr()
    shown = dict(
        line.split(maxsplit=1) for line in printed.out.replace(" loss", "_loss").split("\n") if line
    )
    assert shown["steps"] == "4" and shown["model"] == "out"
    progress = [line for line in printed.err.splitlines() if line.startswith("finetune ")]
    assert len(progress) == 4  # not a terminal: a line a step
    assert re.fullmatch(r"finetune 4/4  loss \d\.\d{4}  \d+ tokens/s  rate \S+", progress[-1])
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert f"{log[-1]['loss']:.4f}" == shown["last_loss"]
    assert int(shown["tokens"]) == sum(record["valid_tokens"] for record in log)

    hf.AutoModelForCausalLM.from_pretrained(folder / "out", local_files_only=True)
    generate = ["generate", "--model", "out", "--max-new-tokens", "9"]
    assert cli.main([*generate, "--prompt", "one "]) == 0
    one = capsys.readouterr().out
    assert cli.main([*generate, "--prompt", "one ", "--prompt", "tw", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [r["prompt"] for r in both] == ["one ", "tw"]
    assert both[0]["text"] + "\n" == one and both[0]["tokens"] <= 9
    (folder / "prompt.txt").write_text("one ")
    assert cli.main([*generate, "--prompt-file", "prompt.txt", "--stock"]) == 0
    assert capsys.readouterr().out == one
    assert cli.main([*generate, "--prompt", "one ", "--prompt", "tw"]) == 0
    listed = capsys.readouterr().out
    assert listed == f"[0] one {both[0]['text']}\n[1] tw{both[1]['text']}\n"


def test_sampled_text_depends_on_the_seed_alone(trained, capsys):
    generate = ["generate", "--model", "trained", "--prompt", "o", "--temperature", "1"]
    texts = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        assert cli.main([*generate, "--seed", seed, "--max-new-tokens", "20", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)[0]["text"])
    assert texts[0] == texts[1] != texts[2]


def test_presets_and_bfloat16(folder):
    arguments = finetune("--model", "tiny-llama", "--dtype", "bfloat16", "--steps", "1")
    assert cli.main(arguments) == 0
    assert json.loads((folder / "out" / "config.json").read_text())["vocab_size"] == 258


def test_a_folder_and_jsonl_are_data(folder):
    (folder / "texts" / "deep").mkdir(parents=True)
    (folder / "texts" / "deep" / "a.txt").write_text("alpha " * 20)
    (folder / "texts" / "b.jsonl").write_text('{"text": "beta beta"}\n\n{"text": "gamma"}\n')
    (folder / "texts" / ".hidden").write_bytes(b"\xff\xff")
    assert cli.main(finetune("--data", "texts", "--steps", "1", "--rows", "3")) == 0
    log = json.loads((folder / "out" / "log.jsonl").read_text())
    # every document's bytes and its end token; each piece's first token has no label
    n_bytes, n_pieces = 120 + 1 + 9 + 1 + 5 + 1, 2 + 1 + 1
    assert log["valid_tokens"] == n_bytes - n_pieces


def test_overwrite_replaces_a_run(trained, capsys):
    arguments = finetune("--out", "trained", "--steps", "2", "--overwrite", None)
    assert cli.main(arguments) == 0
    assert len((trained / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("options", [TrainOptions, Sampling])
def test_every_option_has_its_help(options):
    assert set(cli.option_help(options)) == set(options.__dataclass_fields__)


@pytest.mark.parametrize("command", ["demo", "finetune", "generate", "bench", "doctor"])
def test_each_command_is_listed_with_help(command, capsys):
    with pytest.raises(SystemExit) as leave:
        cli.main(["--help"])
    assert leave.value.code == 0 and f"    {command} " in capsys.readouterr().out


def test_doctor_runs_through_the_command(capsys):
    assert cli.main(["doctor"]) in (0, 1)
    assert "flash_attention" in capsys.readouterr().out


# what goes wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--model", "nowhere"), "model nowhere does not exist, need a model folder, a config"),
        (("--data", "nothing.txt"), "data nothing.txt does not exist, need a text file"),
        (("--steps", "-3"), "steps is -3, need a whole number of at least 1"),
        (("--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (("--dtype", "float8"), "dtype is 'float8', need float32 or bfloat16"),
        (("--lora-rank", "4", "--lora-targets", "wq"), "'wq' matches no linear layer of the model; "
         "it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"),
        (("--context", "4096"), "context is 4096, but the model reaches 64 positions; lower"),
        (("--resume", None), "out out holds no checkpoint to resume; leave out --resume"),
        (("--resume", None, "--overwrite", None), "resume and overwrite exclude each other"),
        (("--learning-rat", "1"), "no option --learning-rat; tilewright finetune --help lists"),
        (("--out", "text.txt"), "out text.txt is a file, need a folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_bad_options_are_refused(folder, capsys, changes, message):
    assert message in refused(capsys, finetune(*changes))
    assert not (folder / "out").exists()


def test_bad_data_is_refused(folder, capsys):
    (folder / "empty.txt").write_text("  \n")
    assert "data empty.txt is empty, need text" in refused(capsys, finetune("--data", "empty.txt"))
    (folder / "none").mkdir()
    assert "data none is empty" in refused(capsys, finetune("--data", "none"))
    (folder / "image.png").write_bytes(b"\x89PNG\r\n")
    line = refused(capsys, finetune("--data", "image.png"))
    assert "data file image.png is not text: byte 0x89 at offset 0 is not UTF-8" in line
    (folder / "zero.txt").write_bytes(b"ab\0c")
    assert "a zero byte at offset 2" in refused(capsys, finetune("--data", "zero.txt"))
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    line = refused(capsys, finetune("--data", "bad.jsonl"))
    assert 'data file bad.jsonl, line 2, has no string under "text"' in line
    assert not (folder / "out").exists()


def test_a_used_folder_is_refused(trained, capsys):
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    line = refused(capsys, finetune("--out", "trained"))
    assert "out trained is not empty; pass --resume to continue" in line
    line = refused(capsys, finetune("--out", "trained", "--steps", "9", "--resume", None))
    assert "resume: steps was 3 when the run in trained started and is 9 now" in line
    assert before == {p.name: p.read_bytes() for p in trained.iterdir()}


@pytest.mark.parametrize("cut", ["header", "tensors", "garbage"])
def test_damaged_weights_are_refused(trained, capsys, cut):
    weights = trained / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(
        {"header": whole[:100], "tensors": whole[:-1000], "garbage": b"\x10" + b"\0" * 40}[cut]
    )
    expected = {
        "header": "model.safetensors is truncated or not a safetensors file (100 bytes",
        "tensors": f"describes {len(whole)} bytes, the file has {len(whole) - 1000}; copy",
        "garbage": "model.safetensors has a damaged safetensors header",
    }[cut]
    generate = ["generate", "--model", "trained", "--prompt", "x"]
    assert expected in refused(capsys, generate)
    assert expected in refused(capsys, finetune("--model", "trained"))


def test_missing_weights_are_refused(trained, capsys):
    from safetensors.torch import load_file, save_file

    tensors = load_file(trained / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, trained / "model.safetensors", {"format": "pt"})
    line = refused(capsys, finetune("--model", "trained"))
    assert "lacks 1 of the weights that its config asks for, such as model.norm.weight" in line


def test_pickle_is_refused(trained, capsys):
    (trained / "model.safetensors").rename(trained / "pytorch_model.bin")
    for arguments in (
        finetune("--model", "trained"),
        ["generate", "--model", "trained", "--prompt", "x"],
    ):
        line = refused(capsys, arguments)
        assert "has its weights as pickle (pytorch_model.bin)" in line
        assert "convert it to safetensors where you trust it" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "lla', "config.json is not valid JSON"),
        ("[1]", "holds a JSON list, need an object"),
        ('{"hidden_size": 8}', 'has no "model_type", need a transformers config.json'),
        ('{"model_type": "nonesuch"}', "is not a config that transformers accepts"),
        ('{"model_type": "llama", "vocab_size": 100}', "vocab_size 100, need at least"),
        ('{"model_type": "llama", "auto_map": {}}', "pass --trust-remote-code if you trust it"),
    ],
)
def test_corrupt_configs_are_refused(folder, capsys, text, message):
    (folder / "tiny" / "config.json").write_text(text)
    assert message in refused(capsys, finetune())


def test_generate_refuses(trained, capsys, folder):
    generate = ["generate", "--model", "trained"]
    assert "no prompt, need --prompt TEXT" in refused(capsys, generate)
    line = refused(capsys, [*generate, "--prompt", "x" * 64])
    assert "prompt 0 has 64 tokens, need fewer than the model's context of 64" in line
    assert "top_p is 2.0" in refused(capsys, [*generate, "--prompt", "x", "--top-p", "2"])
    assert "prompt file none.txt" in refused(capsys, [*generate, "--prompt-file", "none.txt"])
    line = refused(capsys, ["generate", "--model", "tiny", "--prompt", "x"])
    assert "model tiny has a config but no weights; train it first" in line


def test_a_loss_that_is_not_finite(folder, capsys):
    arguments = finetune("--steps", "5", "--learning-rate", "1e30", "--clip-norm", "0")
    assert cli.main(arguments) == cli.BAD_INPUT
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"tilewright finetune: (loss|gradient) is not finite at step 2; ", last)


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="does not exist"):
        cli.main(finetune("--model", "nowhere", "--debug", None))


def test_the_unforeseen_is_one_line_too(folder, capsys, monkeypatch):
    def fail(*unused, **also_unused):
        raise KeyError("surprise")

    monkeypatch.setattr(train, "finetune", fail)
    assert cli.main(finetune()) == cli.UNFORESEEN
    assert capsys.readouterr().err == (
        "tilewright finetune: KeyError: 'surprise'; --debug shows where\n"
    )


def test_ctrl_c_writes_a_checkpoint_and_resumes(folder):
    command = [sys.executable, "-P", "-m", "tilewright", *finetune("--steps", "400")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    for line in run.stderr:
        lines.append(line)
        if line.startswith("finetune 3/"):
            run.send_signal(signal.SIGINT)
            break
    lines += run.stderr.read().splitlines()
    assert run.wait(60) == cli.INTERRUPTED, lines
    stopped = re.search(
        r"tilewright finetune: stopped after step (\d+) of 400, .*--resume", lines[-1]
    )
    assert stopped, lines
    step = int(stopped[1])
    state = json.loads((folder / "out" / f"checkpoint-{step:06d}" / "state.json").read_text())
    assert state["step"] == step and "Traceback" not in "".join(lines)
    # the rest, in this process
    assert cli.main(finetune("--steps", "400", "--resume", None)) == 0
    log = [json.loads(line)["step"] for line in (folder / "out" / "log.jsonl").open()]
    assert log == list(range(1, 401))
