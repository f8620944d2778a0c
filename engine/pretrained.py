"""Model folders of transformers and PEFT: read, checked before anything is built, and written."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright.data import TokenizerLike, byte_tokenizer
from tilewright.files import InputError, check_safetensors, read_json, replacing_files

# a model of about 3.4 million parameters for trying things out; the vocabulary is the tokenizer's
PRESETS = {
    "tiny-llama": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
    },
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER = "adapter.safetensors"  # of a method that PEFT has no file for, and
RECORD = "tilewright_adapter.json"  # beside it: {"base_model_name_or_path": ...}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass
class Loaded:
    """A model with what belongs to it.

    source  the folder, file or preset that it came from
    is_new  the weights are random, not read
    """

    model: nn.Module
    tokenizer: TokenizerLike | None
    source: str
    is_new: bool


def config_of(model: nn.Module):
    """The model's configuration. InputError: it has none, so it is not one of transformers."""
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(
            f"model {type(model).__name__} has no config, need a model of transformers or PEFT"
        )
    return config


def base_of(model: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped, or the model itself."""
    return method_of(model, "get_base_model")() if hasattr(model, "peft_config") else model


def method_of(model: nn.Module | type[nn.Module], name: str) -> Callable:
    """A method that the models of transformers and PEFT have beyond those of torch.

    InputError: this model has none of that name.
    """
    method = getattr(model, name, None)
    if not callable(method):
        kind = model if isinstance(model, type) else type(model)
        raise InputError(
            f"model {kind.__name__} has no {name}(), need a model of transformers or PEFT"
        )
    return method


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and advice of transformers and PEFT; errors are exceptions."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load(
    source: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    needs_weights: bool = False,
    rope_target_length: int | None = None,
    trust_remote_code: bool = False,
    quantization=None,
) -> Loaded:
    """Build the model that `source` names, with its tokenizer.

    source              a model folder; the folder of an adapter; a config.json, or a folder with
                        nothing but one: random weights from `seed`; or a preset's name
    needs_weights       refuse random weights
    rope_target_length  stretch RoPE to this context
    trust_remote_code   transformers' own switch: run Python code from the model folder
    quantization        a QuantConfig: pack the linear layers, one by one as they are read

    A folder without a tokenizer gets the byte tokenizer. Weights are read as safetensors only.
    InputError: what is missing, damaged or refused, and what to do about it.
    """
    source = str(source)
    path = Path(source)
    if not path.exists():
        if source in PRESETS:
            config = _config(source, PRESETS[source])
            loaded = _new(config, None, source, dtype, seed, rope_target_length)
            return _packed(loaded, quantization)
        raise InputError(
            f"model {source} does not exist, need a model folder, a config.json "
            f"or one of the presets: {', '.join(PRESETS)}"
        )
    if is_adapter(path):
        if quantization is not None:
            raise InputError(f"model {path} is an adapter, need the model it belongs to")
        return _load_adapter(path, dtype, trust_remote_code)
    config_path = path / "config.json" if path.is_dir() else path
    if not config_path.exists():
        raise InputError(f"model folder {path} has no config.json, need a model folder")
    config = _config(str(config_path), read_json(config_path), trust_remote_code)
    tokenizer = _tokenizer(config_path.parent, trust_remote_code)
    shards = _weight_files(path) if path.is_dir() else []
    if not shards:
        if needs_weights:
            raise InputError(
                f"model {source} has a config but no weights; train it first: "
                f"tilewright finetune --model {source} --data ... --out ..."
            )
        loaded = _new(config, tokenizer, source, dtype, seed, rope_target_length)
        return _packed(loaded, quantization)
    present = getattr(config, "quantization_config", None)
    if quantization is not None and present is not None:
        method = present.get("format") or present.get("quant_method")
        raise InputError(f"model {source} is quantized already ({method}), need a dense one")
    for shard in shards:
        check_safetensors(shard)
    if rope_target_length:
        stretch_rope(config, rope_target_length)
    model = _from_weights(path, config, dtype, trust_remote_code, quantization)
    return Loaded(model, tokenizer or byte_tokenizer(_context(config)), source, is_new=False)


def _config(name: str, values: dict, trust_remote_code: bool = False):
    from transformers import AutoConfig

    if "model_type" not in values:
        raise InputError(f'{name} has no "model_type", need a transformers config.json')
    if "auto_map" in values and not trust_remote_code:
        raise InputError(
            f"{name} asks to run Python code from its folder (auto_map); "
            "read that code, then pass --trust-remote-code if you trust it"
        )
    try:
        if trust_remote_code:
            return AutoConfig.from_pretrained(str(Path(name).parent), trust_remote_code=True)
        values = dict(values)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # transformers raises whatever the field's own check raises
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{name} is not a config that transformers accepts: {first}") from error


def _packed(loaded: Loaded, quantization) -> Loaded:
    if quantization is not None:
        from tilewright.quantized import quantize

        quantize(loaded.model, quantization.record)
    return loaded


def _context(config) -> int | None:
    return getattr(config, "max_position_embeddings", None)


def _tokenizer(folder: Path, trust_remote_code: bool):
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"the tokenizer in {folder} cannot be read: {first}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; empty if it holds no weights at all."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f'{index} has no "weight_map"; copy or download it again')
        return sorted({folder / str(name) for name in names.values()})
    shards = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles and not shards:
        raise InputError(
            f"model folder {folder} has its weights as pickle ({pickles[0]}), which can run code "
            "when it is read; convert it to safetensors where you trust it, with transformers' "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return shards


def _new(config, tokenizer, source, dtype, seed, rope_target_length) -> Loaded:
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer or byte_tokenizer(rope_target_length or _context(config))
    if source in PRESETS:
        config.vocab_size = len(tokenizer)
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        config.bos_token_id = None
    if config.get_text_config().vocab_size < len(tokenizer):
        raise InputError(
            f"model {source} has vocab_size {config.get_text_config().vocab_size}, "
            f"need at least the tokenizer's {len(tokenizer)} tokens"
        )
    if rope_target_length:
        stretch_rope(config, rope_target_length)
    torch.manual_seed(seed)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"model {source} cannot be built from its config: {first}") from error
    return Loaded(model, tokenizer, source, is_new=True)


def _from_weights(path: Path, config, dtype, trust_remote_code, quantization=None):
    from transformers import AutoModelForCausalLM

    import tilewright.quantizer  # noqa: F401  for folders that it has written

    try:
        with quiet_transformers():
            # a pair because of output_loading_info, which the annotation there knows nothing of
            pair: Any = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True,
                output_loading_info=True, trust_remote_code=trust_remote_code,
                quantization_config=quantization,
            )  # fmt: skip
            model, report = pair
    except (ValueError, KeyError, RuntimeError, OSError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"model folder {path} cannot be loaded: {first}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"model folder {path} lacks {len(missing)} of the weights that its config asks for, "
            f"such as {missing[0]}; copy or download it again"
        )
    return model


def is_adapter(path: Path) -> bool:
    """Whether it is a folder of PEFT's, or of `finetune` for a method that PEFT has no file for."""
    return any((path / name).exists() for name in ("adapter_config.json", RECORD))


def _load_adapter(path: Path, dtype, trust_remote_code) -> Loaded:
    is_peft = (path / "adapter_config.json").exists()
    record = "adapter_config.json" if is_peft else RECORD
    base = read_json(path / record).get("base_model_name_or_path")
    if not base:
        raise InputError(f'{path}/{record} has no "base_model_name_or_path"')
    if not Path(base).is_dir():
        raise InputError(f"the adapter {path} belongs to the model {base}, which is not here")
    if not is_peft:
        from tilewright.adapt.call import load_adapted

        loaded = _base_as_trained(path, base, dtype, trust_remote_code)
        load_adapted(loaded.model, path / ADAPTER)
        return loaded
    peft = import_peft()
    if not (path / "adapter_model.safetensors").exists() and any(
        p.suffix in PICKLES for p in path.iterdir()
    ):
        raise InputError(
            f"the adapter {path} is stored as pickle, which can run code when it is read; convert "
            "it where you trust it, with PEFT's PeftModel.from_pretrained(...).save_pretrained(...)"
        )
    check_safetensors(path / "adapter_model.safetensors")
    loaded = _base_as_trained(path, base, dtype, trust_remote_code)
    with quiet_transformers():
        loaded.model = peft.PeftModel.from_pretrained(loaded.model, path)
    return loaded


def _base_as_trained(path: Path, base: str, dtype, trust_remote_code) -> Loaded:
    """The base of an adapter with the adapter's tokenizer, its RoPE stretched and weights packed
    as they were."""
    kept = path / "config.json"  # of the base as it was trained: RoPE stretched, weights packed
    values = read_json(kept) if kept.exists() else {}
    loaded = load(
        base, dtype=dtype, needs_weights=True, trust_remote_code=trust_remote_code,
        quantization=_packed_by(values, Path(base)),
    )  # fmt: skip
    model = loaded.model
    if values:
        config = _config(str(kept), values)
        rope = _rope(config)
        if rope is not None and rope != _rope(model.config):
            _set_rope(model, rope, config.max_position_embeddings)
    return Loaded(model, _tokenizer(path, False) or loaded.tokenizer, str(path), is_new=False)


def _packed_by(values: dict, base: Path):
    """How finetune had packed a base that is dense on the disk, or None."""
    described = values.get("quantization_config") or {}
    if described.get("quant_method") != "tilewright":
        return None
    if "quantization_config" in read_json(base / "config.json"):
        return None
    from tilewright.quantizer import QuantConfig

    config = QuantConfig.from_dict(described)
    config.layouts = None  # of the tensors of a saved model
    return config


def import_peft():
    try:
        import peft
    except ImportError as error:
        raise InputError("LoRA needs the package peft: pip install 'tilewright[peft]'") from error
    return peft


def _rope(config) -> dict | None:
    return getattr(config, "rope_parameters", None)


def stretch_rope(model_or_config, target: int) -> int:
    """Let RoPE reach `target` positions by linear interpolation, and return the factor.

    Positions are divided by ceil(target / max_position_embeddings). A model's rotary modules are
    rebuilt in place. InputError: no RoPE, or one that is scaled already.

    Source: Chen et al., Extending Context Window via Positional Interpolation, arXiv 2306.15595.
    """
    is_model = isinstance(model_or_config, nn.Module)
    config = config_of(model_or_config) if is_model else model_or_config
    rope, original = _rope(config), _context(config)
    if not rope or "rope_type" not in rope or not original:
        raise InputError(f"rope_target_length: a {config.model_type} model has no plain RoPE")
    if rope["rope_type"] != "default":
        raise InputError(
            f"rope_target_length: the model's RoPE is scaled already ({rope['rope_type']!r}), "
            "need a model with the default one"
        )
    if target < original:
        raise InputError(f"rope_target_length is {target}, need at least the model's {original}")
    factor = math.ceil(target / original)
    scaled = {**rope, "rope_type": "linear", "factor": float(factor)}
    if is_model:
        _set_rope(model_or_config, scaled, target)
    else:
        config.rope_parameters, config.max_position_embeddings = scaled, target
    return factor


def _set_rope(model: nn.Module, rope: dict, context: int) -> None:
    config = config_of(model)
    config.rope_parameters, config.max_position_embeddings = dict(rope), context
    found = False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            frequencies = getattr(child, "inv_freq", None)
            if isinstance(frequencies, torch.Tensor) and hasattr(child, "rope_type"):
                setattr(parent, name, type(child)(config).to(frequencies.device))
                found = True
    if not found:
        raise InputError(f"rope_target_length: no rotary module found in {type(model).__name__}")


def save(model: nn.Module, tokenizer: TokenizerLike | None, folder: str | Path) -> None:
    """Write what plain transformers (or PEFT, for an adapter) loads: weights, config, tokenizer.

    Each file is written beside and renamed, the config last. An adapter also gets its base model's
    config, because PEFT keeps no record of a stretched RoPE.
    """
    with replacing_files(folder, last="config.json") as beside:
        write_folder(model, tokenizer, beside)


def write_folder(model: nn.Module, tokenizer: TokenizerLike | None, folder: Path) -> None:
    """The same files, straight into a folder that is new."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        method_of(model, "save_pretrained")(folder)
        if hasattr(model, "peft_config"):
            config_of(base_of(model)).save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
