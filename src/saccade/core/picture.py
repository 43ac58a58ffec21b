"""The pictures that a model was given, kept beside what was seen."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

THUMBNAIL = 1024  # pixels of the longer side of a picture that is kept


@dataclass
class Picture:
    """A picture as it was given to the model, or smaller."""

    width: int  # of the original
    height: int
    png: Tensor  # (bytes,), uint8

    @staticmethod
    def of(image: Image.Image) -> Picture:
        small, data = image.convert("RGB"), io.BytesIO()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(data, "PNG")
        return Picture(*image.size, torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8))

    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png.numpy().tobytes())).convert("RGB")
