"""The test zoo: tiny random models of real architectures, with real processors, nothing downloaded."""

from . import generators, text, timm_torch, vision, vlm, vlm_more
from .base import FAMILIES, Family, family, run, select

__all__ = [
    "FAMILIES",
    "Family",
    "family",
    "generators",
    "run",
    "select",
    "text",
    "timm_torch",
    "vision",
    "vlm",
    "vlm_more",
]
