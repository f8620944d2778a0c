"""All entries of the table, in the order in which they are applied."""

from tilewright.adapt import attention
from tilewright.adapt.table import Replacement

TABLE: tuple[Replacement, ...] = (attention.REPLACEMENT,)
