"""What a training run can be told, and the check of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch

from tilewright.files import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION = ("dense", "shifted")
# those of `tilewright.adapt` that finetune builds by it
TUNED = ("dora", "ia3", "prefix", "parallel", "sequential", "bitfit", "mask", "sparse")
ADAPTERS = ("none", "lora", "half", *TUNED)
# weights that stand still may be packed
OVER_PACKED = ("lora", "dora", "ia3", "prefix", "parallel", "sequential", "bitfit", "sparse")
OPTIONS_OF = {  # of an adapter alone: name -> the adapters that it belongs to
    "half_ratio": ("half",), "half_level": ("half",), "half_round": ("half",),
    "adapter_rank": ("dora", "parallel", "sequential"),
    "adapter_scale": ("parallel", "sequential"), "adapter_at": ("parallel", "sequential"),
    "adapter_activation": ("parallel", "sequential"),
    "adapter_targets": ("dora", "ia3", "parallel", "sequential", "mask", "sparse"),
    "prefix_tokens": ("prefix",), "add_biases": ("bitfit",), "density": ("mask", "sparse"),
    "mask_by": ("mask",), "sparse_rule": ("sparse",),
}  # fmt: skip
RATES = {  # highest learning rates
    "dora": 2e-4, "ia3": 3e-3, "prefix": 3e-3, "parallel": 2e-4, "sequential": 2e-4,
    "bitfit": 1e-3, "mask": 2e-5, "sparse": 2e-4,
}  # fmt: skip
CHOICES = {
    "adapter_activation": ("relu", "none"), "mask_by": ("random", "fisher", "magnitude"),
    "sparse_rule": ("gradient", "extremes", "none"), "half_level": ("category", "layer", "model"),
}  # fmt: skip
USUAL_RANK = 16
# these say where and how often, not what is computed: a resumed run may change them
FREE_ON_RESUME = ("save_every", "device")


@dataclass(frozen=True)
class TrainOptions:
    """Options of `finetune`, the same on the command line (`--learning-rate` for learning_rate).

    steps               optimizer steps; None: as many as `epochs` passes over the data need
    epochs              passes over the data, used if steps is None
    context             tokens of one row; longer documents are cut, shorter ones packed together
    rows                rows of one micro-batch
    accumulate          micro-batches of one step; the loss is the mean over all their tokens
    learning_rate       peak; None: 1e-3 for a new model, 2e-5 for full and half fine-tuning and
                        masks, 2e-4 for LoRA, DoRA, adapters and sparse deltas (1e-2 by "extremes"),
                        1e-3 for biases, 3e-3 for ia3 and prefix
    final_rate          fraction of the peak that the cosine ends at
    warmup              steps of linear rise; None: 5 % of the steps
    weight_decay        of matrices, none of vectors
    beta1               AdamW's decay of the mean gradient
    beta2               AdamW's decay of the mean square
    state_bits          32, or 8: AdamW's state in 8 bits over blocks, a quarter of the memory
    clip_norm           largest norm of the gradient; 0: no clipping
    dtype               "float32", or "bfloat16": autocast over float32 weights
    seed                of new weights, LoRA's A, dropout and the order of rows
    device              "auto", "cpu", "cuda" or "cuda:N"
    stock               leave transformers' own operators in place, for comparison
    recompute           recompute activations in the backward instead of keeping them
    attention           "dense", or "shifted": shifted-sparse in training, dense in evaluation
    group_size          of shifted attention; None: a quarter of the context
    rope_target_length  context that RoPE is stretched to by linear interpolation
    train               parts of parameter names to train besides LoRA, such as ("embed", "norm");
                        without LoRA only these are trained; empty: everything
    base                pack the frozen weights to this format, such as "nf4"; "": as they are
    adapter             "none"; "lora", which is lora_rank 16 if that is not given; "half": half of
                        each layer's matrices, drawn by seed and half_round; or what
                        tilewright.adapt has besides: "dora", "ia3", "prefix", "parallel",
                        "sequential", "bitfit", "mask" or "sparse"
    adapter_rank        of dora, parallel and sequential; None: 16
    adapter_scale       of parallel and sequential; None: 4 and 1
    adapter_at          where these two stand: "linear", "attention", "ffn", or several; empty:
                        beside each linear layer, or behind each attention and MLP
    adapter_activation  of these two: "relu", or "none", so that parallel ones merge
    adapter_targets     last parts of the names of linear layers; empty: all but the output
                        embedding. Of ia3: those whose output is scaled; empty: PEFT's choice
    prefix_tokens       keys and values that are added to each layer
    add_biases          bitfit: a bias of zeros for the linear layers that have none
    density             share of a weight's entries; None: 0.1 for mask, 0.01 for sparse
    mask_by             entries that train: "random", "fisher", of the largest squared gradients in
                        the first 16 batches, or "magnitude", and the others become zero
    sparse_rule         what useless values of sparse give way to until two thirds of the steps:
                        "gradient", "extremes", or "none"
    half_ratio          share of the matrices that trains
    half_level          "category", "layer" or "model": what the share is met in
    half_round          number of the draw; another one for each stage of a training
    lora_rank           0: no LoRA
    lora_alpha          None: twice the rank
    lora_targets        module names, or ("all-linear",)
    lora_dropout        probability
    save_every          steps between checkpoints; 0: only at an interruption
    """

    steps: int | None = None
    epochs: float = 1.0
    context: int = 1024
    rows: int = 1
    accumulate: int = 1
    learning_rate: float | None = None
    final_rate: float = 0.1
    warmup: int | None = None
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    state_bits: int = 32
    clip_norm: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    device: str = "auto"
    stock: bool = False
    recompute: bool = False
    attention: str = "dense"
    group_size: int | None = None
    rope_target_length: int | None = None
    train: tuple[str, ...] = ()
    base: str = ""
    adapter: str = "none"
    adapter_rank: int | None = None
    adapter_scale: float | None = None
    adapter_at: tuple[str, ...] = ()
    adapter_activation: str = "relu"
    adapter_targets: tuple[str, ...] = ()
    prefix_tokens: int = 30
    add_biases: bool = False
    density: float | None = None
    mask_by: str = "random"
    sparse_rule: str = "gradient"
    half_ratio: float = 0.5
    half_level: str = "category"
    half_round: int = 0
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ("all-linear",)
    lora_dropout: float = 0.0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("train", "lora_targets", "adapter_at", "adapter_targets"):
            value = getattr(self, name)
            parts = value.split(",") if isinstance(value, str) else value
            object.__setattr__(self, name, tuple(p.strip() for p in parts if p.strip()))
        self._check_numbers()
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}, need {' or '.join(DTYPES)}")
        if self.state_bits not in (8, 32) or (self.state_bits == 8 and self.stock):
            beside = " with stock" if self.stock else ""
            raise InputError(
                f"state_bits is {self.state_bits!r}{beside}, need 32, or 8 without stock"
            )
        if self.attention not in ATTENTION:
            raise InputError(f"attention is {self.attention!r}, need {' or '.join(ATTENTION)}")
        if self.attention == "shifted" and self.stock:
            raise InputError("attention 'shifted' needs tilewright's operators: leave out stock")
        if self.group_size is not None and self.attention != "shifted":
            raise InputError("group_size belongs to attention 'shifted', which was not asked for")
        if self.adapter not in ADAPTERS:
            raise InputError(f"adapter is {self.adapter!r}, need {' or '.join(ADAPTERS)}")
        if self.adapter == "lora" and not self.lora_rank:
            object.__setattr__(self, "lora_rank", USUAL_RANK)
        self._check_adapter()
        if self.base:
            quant_config(self.base)
            if not self.trains_beside_packed:
                raise InputError(
                    f"base {self.base!r} is packed and cannot train by itself: pass adapter 'lora' "
                    f"or another of {', '.join(OVER_PACKED[1:])}"
                )
        if self.lora_rank and not self.lora_targets:
            raise InputError("lora_targets is empty, need module names or all-linear")

    @property
    def trains_beside_packed(self) -> bool:
        """Whether the model's own matrices stand still."""
        return bool(self.lora_rank) or self.adapter in OVER_PACKED

    def _check_adapter(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                most = ", ".join(known[:-1])
                raise InputError(f"{name} is {getattr(self, name)!r}, need {most} or {known[-1]}")
        for name, adapters in OPTIONS_OF.items():
            is_given = getattr(self, name) != type(self).__dataclass_fields__[name].default
            if is_given and self.adapter not in adapters:
                owners = " or ".join(repr(owner) for owner in adapters)
                raise InputError(f"{name} belongs to adapter {owners}, which was not asked for")
        adapter = f"adapter {self.adapter!r}"
        if self.adapter in ("none", "lora"):
            return
        if self.lora_rank:
            raise InputError(f"{adapter} and lora_rank {self.lora_rank}: need one of them")
        if self.train:
            raise InputError(f"{adapter} decides what trains: leave out train")
        if self.stock and self.adapter in ("mask", "sparse"):
            raise InputError(f"{adapter} needs tilewright's operators: leave out stock")
        if self.state_bits == 8 and self.adapter == "sparse":
            raise InputError(f"{adapter} moves its optimizer's state about: need state_bits 32")
        if self.adapter == "prefix":
            for name in ("recompute", "attention"):
                value = getattr(self, name)
                if value != type(self).__dataclass_fields__[name].default:
                    raise InputError(
                        f"{adapter} adds keys to the attention, which {name} {value!r} cannot "
                        "take: leave it out"
                    )

    def _check_numbers(self) -> None:
        whole = {  # name: smallest
            "steps": 1, "context": 2, "rows": 1, "accumulate": 1, "warmup": 0, "seed": 0,
            "group_size": 1, "rope_target_length": 2, "lora_rank": 0, "save_every": 0,
            "half_round": 0, "adapter_rank": 1, "prefix_tokens": 1,
        }  # fmt: skip
        for name, smallest in whole.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise InputError(f"{name} is {value!r}, need a whole number of at least {smallest}")
        intervals = {  # name: (smallest, largest, smallest is allowed, largest is allowed)
            "epochs": (0, math.inf, False, False), "learning_rate": (0, math.inf, False, False),
            "final_rate": (0, 1, True, True), "weight_decay": (0, math.inf, True, False),
            "beta1": (0, 1, True, False), "beta2": (0, 1, True, False),
            "clip_norm": (0, math.inf, True, False), "lora_alpha": (0, math.inf, False, False),
            "lora_dropout": (0, 1, True, False), "half_ratio": (0, 1, True, True),
            "adapter_scale": (-math.inf, math.inf, False, False), "density": (0, 1, False, True),
        }  # fmt: skip
        for name, (low, high, with_low, with_high) in intervals.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            above = is_number and (value > low or (with_low and value == low))
            below = is_number and (value < high or (with_high and value == high))
            if not (above and below):
                left = "" if low == -math.inf else f"{low} <= " if with_low else f"{low} < "
                right = f" {'<=' if with_high else '<'} {high}" if high != math.inf else ""
                raise InputError(f"{name} is {value!r}, need a number with {left}{name}{right}")

    def settings(self) -> dict:
        """What must not change between a run and its resumption, as plain JSON values."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in values.items() if k not in FREE_ON_RESUME}


def quant_config(format: str, **options):
    """tilewright.QuantConfig, whose refusals are an InputError here."""
    from tilewright.quantizer import QuantConfig

    try:
        return QuantConfig(format, **options)
    except ValueError as error:
        raise InputError(str(error).removeprefix("QuantConfig: ")) from error


OPTION_NAMES = tuple(f.name for f in fields(TrainOptions))


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N"."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device is {name!r}, need auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}, need auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device
