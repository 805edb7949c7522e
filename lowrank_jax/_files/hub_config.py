"""Read the quantization that config.json of a Hugging Face model's folder describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

CONFIG, CONFIG_LIMIT = "config.json", 1 << 24


class Quantization(NamedTuple):
    """How the tensors of a model's folder are quantized.

    Args:
      method: `quant_method` as the file has it, not validated: any JSON value.
      is_4bit: whether weights have 4 bits.
    """

    method: Any
    is_4bit: bool

    @property
    def is_bitsandbytes(self) -> bool:
        """Whether bitsandbytes quantized the tensors."""
        return self.method == "bitsandbytes"


def parse_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Return the quantization that a configuration describes, or None if the model is dense.

    >>> settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    >>> parse_quantization({"quantization_config": settings})
    Quantization(method='bitsandbytes', is_4bit=True)
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    settings = settings if isinstance(settings, dict) else {}
    return Quantization(settings.get("quant_method"), bool(settings.get("load_in_4bit")))
