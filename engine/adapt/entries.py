"""All entries of the table, in the order in which they are applied."""

from tilewright.adapt import attention, lora
from tilewright.adapt.table import Replacement

TABLE: tuple[Replacement, ...] = (attention.REPLACEMENT, lora.REPLACEMENT)
