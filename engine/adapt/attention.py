"""The table's entry for attention: which modules our attention function serves, and the switch."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from tilewright.adapt import undo
from tilewright.adapt.interface import (
    MAX_HEAD_DIM,
    SETTINGS,
    AttentionSettings,
    tilewright_attention,
)
from tilewright.adapt.masks import tilewright_mask
from tilewright.adapt.stock import eager_function
from tilewright.adapt.table import Replacement, Request, Site

NOT_SHIFTED = "not causal: dense"
NAME = "tilewright"  # must not hold "flash" nor "/": transformers gives those a meaning

SOURCE_MISSING = "(source not found)"

# what a layer may hand over by name; anything else may change the result, so it stays stock
_UNDERSTOOD = {
    "attention_mask", "dropout", "scaling", "softcap", "s_aux", "sliding_window", "is_causal",
    "position_ids", "output_attentions", "deterministic", "query", "key", "value",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip


def register() -> None:
    """Make the name known to transformers; both are needed, or no mask is built at all."""
    AttentionInterface.register(NAME, tilewright_attention)
    AttentionMaskInterface.register(NAME, tilewright_mask)


def is_candidate(module: nn.Module) -> bool:
    """An attention layer: it asks for an attention function, or it is named so and is innermost."""
    if handed_over(type(module)) is not None:
        return True
    if not type(module).__name__.endswith("Attention"):
        return False
    return not any(
        handed_over(type(child)) is not None or type(child).__name__.endswith("Attention")
        for child in module.modules()
        if child is not module
    )


def handed_over(cls: type) -> frozenset[str] | None:
    """The arguments that a class passes by name to transformers' attention function.

    None if it does not ask for that function, {SOURCE_MISSING} if what it passes cannot be read.
    """
    forward = inspect.unwrap(getattr(cls, "forward", lambda: None))
    if "get_interface" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    return _read(forward)


@functools.cache
def _read(forward: Callable) -> frozenset[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):  # defined at a prompt, or in a file that has gone
        return frozenset({SOURCE_MISSING})
    called = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and _asks_for_interface(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    return frozenset(
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in called
        for keyword in node.keywords
        if keyword.arg is not None
    )


def _asks_for_interface(value) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == "get_interface" for node in ast.walk(value)
    )


def why_not(site: Site, request: Request) -> str | None:
    """Why this attention layer cannot be replaced, or None."""
    module, owner = site.module, site.owner
    names = handed_over(type(module))
    if names is None:
        return "its class does not ask transformers' AttentionInterface for its attention"
    config = getattr(module, "config", None)
    if owner is None or config is None:
        return "there is no PreTrainedModel with a configuration around it"
    if getattr(config, "output_attentions", False):
        return "its configuration asks for output_attentions"
    if not (owner._supports_sdpa or owner._supports_flash_attn):
        return f"{type(owner).__name__} supports eager attention only"
    if SOURCE_MISSING in names:
        return "the source of its forward method cannot be read, so neither what it hands over"
    unknown = sorted(names - _UNDERSTOOD)
    if unknown:
        return f"it hands over {', '.join(unknown)}, which flash_attention does not take"
    eager = eager_function(type(module))
    if eager is not None and "sinks" in eager.__code__.co_names and "s_aux" not in names:
        return "its eager attention has sinks that it does not hand over"
    for attribute in ("head_dim", "attention_head_size", "qk_head_dim", "v_head_dim"):
        width = getattr(module, attribute, None)
        if isinstance(width, int) and width > MAX_HEAD_DIM:
            return f"{attribute} is {width}, need at most {MAX_HEAD_DIM}"
    return _why_not_layer_rule(module, config, names)


def _why_not_layer_rule(module, config, names) -> str | None:
    """The window reaches us by name, apart from the mask: both must speak of the same layers."""
    layer_types = getattr(config, "layer_types", None)
    kind = _layer_type(module, config)
    if kind not in (None, "full_attention", "sliding_attention"):
        return f"its layer type is {kind}"
    if not getattr(module, "is_causal", True):
        return None  # windows to both sides are written out, never read from the argument
    width = getattr(config, "sliding_window", None)
    if width is None or (layer_types and "sliding_attention" not in layer_types):
        return None
    hands_over = "sliding_window" in names
    if kind == "full_attention":
        if hands_over and getattr(module, "sliding_window", width) is not None:
            return "it hands over a sliding window in a layer of full attention"
        return None
    masked = any(
        hasattr(inspect.getmodule(cls), "create_sliding_window_causal_mask")
        for cls in type(module).__mro__
    )
    if masked and not hands_over:
        return "its mask has a sliding window that it does not hand over"
    if hands_over and not masked:
        return "it hands over a sliding window that its mask does not have"
    return None


def _layer_type(module, config) -> str | None:
    layer_types = getattr(config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if layer_types and isinstance(layer, int) and layer < len(layer_types):
        return layer_types[layer]
    return None


def install(fitting: list[Site], unfit: list[tuple[Site, str]], request: Request) -> list[str]:
    """Point the layers' configurations, already the model's own, at our attention function."""
    register()
    warned: set[str] = set()
    was = {id(site.module.config): site.module.config._attn_implementation for site in fitting}
    notes = []
    for site in fitting:
        causal = getattr(site.module, "is_causal", True)
        group_size = request.group_size if causal else 0
        settings = AttentionSettings(group_size, was[id(site.module.config)], warned=warned)
        undo.set_attribute(site.module, SETTINGS, settings)
        if group_size:
            notes.append(f"shifted in training, group_size {group_size}")
        elif request.group_size:
            notes.append(NOT_SHIFTED)
        elif not causal and _layer_type(site.module, site.module.config) == "sliding_attention":
            notes.append("its own where a window to both sides hides a key")
        else:
            notes.append("")
    for site, reason in unfit:  # may share a configuration with one that is replaced
        config = getattr(site.module, "config", None)
        if id(config) in was:
            settings = AttentionSettings(0, was[id(config)], reason, warned)
            undo.set_attribute(site.module, SETTINGS, settings)
    for site in fitting:
        site.module.config._attn_implementation_internal = NAME
    return notes


REPLACEMENT = Replacement("attention", "flash_attention", is_candidate, why_not, install)
