"""The command `tilewright`: one sub-command for each job, one line on stderr for what goes wrong.

Exit codes: 0 done; 2 bad input, a full disk or a loss that is not finite; 130 stopped by Ctrl-C;
1 anything that nobody foresaw.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from tilewright.files import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DONE, BAD_INPUT, UNFORESEEN, INTERRUPTED = 0, 2, 1, 130


class _Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one line, and names are written out."""

    def __init__(self, **settings):
        super().__init__(**{**settings, "allow_abbrev": False})

    def error(self, message: str):
        self.exit(BAD_INPUT, f"{self.prog}: {message}; {self.prog} --help lists the options\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # these two own their other options
    rest = [a for a in arguments[1:] if a != "--debug"]
    if arguments[:1] == ["doctor"]:
        return _guarded("doctor", "--debug" in arguments, lambda: _doctor(rest))
    if arguments[:1] == ["bench"]:
        return _guarded("bench", "--debug" in arguments, lambda: _bench(rest))
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:
        name = f"tilewright {args.command}"
        print(f"{name}: no option {unknown[0]}; {name} --help lists them", file=sys.stderr)
        return BAD_INPUT
    return _guarded(args.command, args.debug, lambda: args.run(args))


def _guarded(command: str, debug: bool, run) -> int:
    name = f"tilewright {command}"
    try:
        return run()
    except KeyboardInterrupt as stop:
        print(f"{name}: {stop or 'stopped'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if debug:
            raise
        from tilewright.train import TrainingError

        message = " ".join(str(error).split()) or "no message"
        if isinstance(error, (ValueError, OSError, TrainingError)):
            print(f"{name}: {message}", file=sys.stderr)
            return BAD_INPUT
        print(f"{name}: {type(error).__name__}: {message}; --debug shows where", file=sys.stderr)
        return UNFORESEEN


def _parser() -> _Parser:
    import tilewright

    parser = _Parser(prog="tilewright", description=tilewright.__doc__)
    parser.add_argument("--version", action="version", version=tilewright.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_, add in (
        ("demo", "train, extend, generate and quantize, side by side with stock", _add_demo),
        ("finetune", "train a model on text, all of it or an adapter", _add_finetune),
        ("generate", "continue prompts", _add_generate),
        ("quantize", "pack a model's weights, and measure what that costs", _add_quantize),
        ("bench", "time operators, or a model, against stock", None),
        ("doctor", "what this machine has, and which implementation runs", None),
    ):
        command = commands.add_parser(name, help=help_, description=help_)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        if add is not None:
            add(command)
    return parser


def option_help(dataclass_type: type[DataclassInstance]) -> dict[str, str]:
    """Each field's text in the dataclass's docstring: `name   text`, and what is indented below."""
    found: dict[str, str] = {}
    name = None
    for line in (dataclass_type.__doc__ or "").splitlines():
        start = re.match(r"    (\w+)\s\s+(\S.*)", line)
        if start and start[1] in dataclass_type.__dataclass_fields__:
            name = start[1]
            found[name] = start[2]
        elif name and line.startswith("        "):
            found[name] += " " + line.strip()
        else:
            name = None
    return {name: text.replace("%", "%%") for name, text in found.items()}


def _add_options(
    command: argparse.ArgumentParser, dataclass_type: type[DataclassInstance], skip=()
) -> None:
    """An option for each field; one that is not given is not in the namespace."""
    # python -OO leaves no docstrings, and so no texts
    texts = dict.fromkeys(dataclass_type.__dataclass_fields__, "") | option_help(dataclass_type)
    hints = get_type_hints(dataclass_type)
    group = command.add_argument_group("settings")
    for name, field in dataclass_type.__dataclass_fields__.items():
        if name in skip:
            continue
        flag, hint = "--" + name.replace("_", "-"), hints[name]
        if hint is bool:
            group.add_argument(
                flag, action="store_true", default=argparse.SUPPRESS, help=texts[name]
            )
            continue
        is_whole, is_number = hint in (int, int | None), hint in (float, float | None)
        kind = int if is_whole else float if is_number else str
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        group.add_argument(
            flag, type=kind, default=argparse.SUPPRESS, help=f"{texts[name]} (default {default})",
            metavar="N" if is_whole else "X" if is_number else "A,B" if hint is not str else "NAME",
        )  # fmt: skip


def _given(args: argparse.Namespace, dataclass_type: type[DataclassInstance]) -> dict:
    return {
        name: value
        for name, value in vars(args).items()
        if name in dataclass_type.__dataclass_fields__
    }


def _add_finetune(command: argparse.ArgumentParser) -> None:
    from tilewright.config import TrainOptions

    command.add_argument(
        "--model",
        required=True,
        help="a model folder, a config.json (new weights) or tiny-llama",
    )
    command.add_argument("--data", required=True, help="a text file, a .jsonl file or a folder")
    command.add_argument("--out", required=True, help="folder for the model, checkpoints and log")
    command.add_argument("--resume", action="store_true", help="continue the run in OUT")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code from the model folder"
    )
    _add_options(command, TrainOptions)
    command.set_defaults(run=_finetune)


def _finetune(args: argparse.Namespace) -> int:
    from tilewright.config import TrainOptions
    from tilewright.train import finetune

    start_s = time.perf_counter()
    result = finetune(
        args.model, args.data, out=args.out, resume=args.resume, overwrite=args.overwrite,
        progress=True, trust_remote_code=args.trust_remote_code, **_given(args, TrainOptions),
    )  # fmt: skip
    if result.tuner is not None:
        print(f"adapter       {str(result.tuner).splitlines()[0]}")
    print(f"steps         {len(result.losses)}")
    print(f"tokens        {result.n_tokens}")
    print(f"first loss    {result.losses[0]:.4f}")
    print(f"last loss     {result.losses[-1]:.4f}")
    print(f"seconds       {time.perf_counter() - start_s:.1f}")
    print(f"model         {result.out}")
    return DONE


def _add_generate(command: argparse.ArgumentParser) -> None:
    from tilewright.sampling import Sampling

    command.add_argument("--model", required=True, help="a model folder or a PEFT adapter's folder")
    command.add_argument("--prompt", action="append", default=[], help="may be given several times")
    command.add_argument(
        "--prompt-file", action="append", default=[], help="a file that is one prompt; - is stdin"
    )
    command.add_argument("--stop", action="append", default=[], help="may be given several times")
    command.add_argument("--json", action="store_true", help="results as one JSON list")
    command.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--stock", action="store_true", help="transformers' own operators")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code from the model folder"
    )
    _add_options(command, Sampling, skip=("stop",))
    command.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    from tilewright import pretrained
    from tilewright.config import DTYPES, pick_device
    from tilewright.generate import generate
    from tilewright.sampling import Sampling

    sampling = Sampling(**{**_given(args, Sampling), "stop": tuple(args.stop)})
    if args.dtype not in DTYPES:
        raise InputError(f"dtype is {args.dtype!r}, need {' or '.join(DTYPES)}")
    device = pick_device(args.device)
    prompts = args.prompt + [_prompt_file(name) for name in args.prompt_file]
    if not prompts:
        raise InputError("no prompt, need --prompt TEXT or --prompt-file FILE")
    loaded = pretrained.load(
        args.model, dtype=DTYPES[args.dtype], needs_weights=True,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    model = loaded.model.to(device)
    if not args.stock:
        from tilewright import adapt

        adapt.accelerate(model)
    # each prompt its own seed, so that equal prompts give different texts
    seeds = [sampling.seed + i for i in range(len(prompts))]
    start_s = time.perf_counter()
    pieces = generate(
        model, prompts, tokenizer=loaded.tokenizer, sampling=sampling, seed=seeds, stream=True
    )
    n_tokens = _print_pieces(pieces, prompts, args.json)
    seconds = time.perf_counter() - start_s
    print(
        f"tilewright generate: {n_tokens} tokens in {seconds:.2f} s, "
        f"{n_tokens / seconds:.1f} tokens/s with the prompts' time",
        file=sys.stderr,
    )
    return DONE


def _prompt_file(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {name} cannot be read as text: {error}") from error


def _print_pieces(pieces, prompts: list[str], as_json: bool) -> int:
    """Print one prompt's text as it comes, several one after the other; returns the tokens."""
    texts, n_tokens = [""] * len(prompts), [0] * len(prompts)
    reasons: list[str | None] = [None] * len(prompts)
    shown = 0  # the prompt whose text is being printed
    for piece in pieces:
        texts[piece.index] += piece.text
        n_tokens[piece.index] += 1
        reasons[piece.index] = piece.reason
        if as_json:
            continue
        if len(prompts) == 1:
            print(piece.text, end="", flush=True)
            continue
        while shown < len(prompts) and reasons[shown] is not None:
            print(f"[{shown}] {prompts[shown]}{texts[shown]}", flush=True)
            shown += 1
    if as_json:
        results = [
            {"prompt": p, "text": t, "tokens": n, "reason": r}
            for p, t, n, r in zip(prompts, texts, n_tokens, reasons, strict=True)
        ]
        print(json.dumps(results, ensure_ascii=False, indent=1))
    elif len(prompts) == 1:
        print()
    return sum(n_tokens)


def _add_quantize(command: argparse.ArgumentParser) -> None:
    from tilewright.quantized import FORMATS

    command.add_argument("--model", required=True, help="a model folder")
    command.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    command.add_argument("--out", required=True, help="folder for the quantized model")
    command.add_argument("--overwrite", action="store_true", help="replace the model in OUT")
    command.add_argument("--json", metavar="FILE", help="write the report there as well")
    of_format = command.add_argument_group("options of the format")
    for flag, help_ in (
        ("--group-size", "inputs that share a scale, or row for one scale a row (int4, nf4, int8)"),
        ("--solver", "hqq or minmax (int4)"),
        ("--scaling", "what shares a scale: tensor, row or block (fp8)"),
    ):
        of_format.add_argument(flag, default=argparse.SUPPRESS, help=help_)
    of_format.add_argument(
        "--double-quant", action="store_true", default=argparse.SUPPRESS,
        help="scales in 8 bits as well (nf4, fp4)",
    )  # fmt: skip
    of_format.add_argument(
        "--asymmetric", dest="symmetric", action="store_false", default=argparse.SUPPRESS,
        help="an offset for each group (int4)",
    )  # fmt: skip
    command.add_argument("--skip", action="append", default=[], help="a layer to leave dense")
    command.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    command.add_argument("--device", default="auto", help="where to compare: auto, cpu, cuda:N")
    measured = command.add_argument_group("text that both models are compared on")
    measured.add_argument("--text", help="a file or folder (default Python's standard library)")
    measured.add_argument("--context", type=int, default=512, metavar="N", help="tokens of a row")
    measured.add_argument("--tokens", type=int, default=16384, metavar="N", help="at most")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code from the model folder"
    )
    command.set_defaults(run=_quantize)


def _quantize(args: argparse.Namespace) -> int:
    from tilewright.files import write_json
    from tilewright.quantize_folder import quantize_folder

    names = ("group_size", "solver", "scaling", "double_quant", "symmetric")
    options = {name: value for name, value in vars(args).items() if name in names}
    if "group_size" in options:
        options["group_size"] = _group_size(options["group_size"])
    done = quantize_folder(
        args.model, args.format, args.out, text=args.text, skip=args.skip, dtype=args.dtype,
        device=args.device, context=args.context, tokens=args.tokens, overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code, progress=True, **options,
    )  # fmt: skip
    print(done)
    print(f"{'model':<14}  {args.out}")
    if args.json:
        write_json(args.json, done.as_dict())
    return DONE


def _group_size(text: str) -> int | None:
    if text == "row":
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"group-size is {text!r}, need a whole number or row") from None


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", default="demo-output", help="folder for the report and models")
    command.add_argument("--seconds", type=float, default=180.0, help="time to aim at")
    command.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    command.add_argument("--resume", action="store_true", help="keep finished phases in OUT")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier demo in OUT")
    command.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from tilewright.demo import run_demo

    return run_demo(
        args.out, seconds=args.seconds, quick=args.quick, resume=args.resume,
        overwrite=args.overwrite,
    )  # fmt: skip


def _doctor(arguments: list[str]) -> int:
    from tilewright.doctor import main as doctor

    return doctor(arguments)


def _bench(arguments: list[str]) -> int:
    try:
        from tilewright.bench.run import main as bench
    except ModuleNotFoundError as error:
        if error.name not in ("tilewright.bench", "tilewright.bench.run"):
            raise
        raise InputError("the benchmarks are not installed: run from the source tree") from error
    return bench(arguments)
