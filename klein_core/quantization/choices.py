"""What plain weights can be made into while they are loaded. Torch-free."""

from __future__ import annotations

NO_QUANTIZATION = "none"
FLOAT8 = "fp8"
INT8 = "int8"
QUANTIZATIONS = (NO_QUANTIZATION, FLOAT8, INT8)
