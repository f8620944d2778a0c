"""PEFT's LoRA layer over a weight of bitsandbytes, with the fused forward.

A module of its own, because PEFT has the class only where bitsandbytes is installed.
"""

from peft.tuners.lora.bnb import Linear4bit

from tilewright.adapt.lora_layers import FusedLora


class FusedLinear4bit(FusedLora, Linear4bit):
    """Over a weight that bitsandbytes has packed to 4 bits."""
