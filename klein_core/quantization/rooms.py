"""How many inputs of a product are converted at a time, which bounds what converting takes. Torch-free."""

FLOAT8_VALUES = 1 << 24
FLOAT4_VALUES = 1 << 22
"""Fewer, because finding blocks' scales and codes takes several copies in fp32."""
