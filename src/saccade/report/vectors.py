"""A page to look around in the queries and keys of all heads."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saccade.core.errors import InputError

if TYPE_CHECKING:
    from saccade.probes.attentionviz import Input, Vectors

MOST = 2**25  # attention weights in one page, a byte each
STEPS = 32767  # of a place, from the centre to the edge
LONG = 60  # letters of an input's name


def page(found: Vectors, title: str) -> str:
    """One file that needs no network."""
    size = sum(one.weights.numel() for one in found.inputs)
    if size > MOST:
        raise InputError(
            f"A page of these inputs would hold {size} attention weights, more than {MOST}.",
            "narrow with sites= or heads=, or show fewer inputs",
        )
    parts, comparable = files("saccade.report"), found.comparable
    places = torch.stack(found.embedded(), 2)  # (sites, heads, 2, tokens, 2)
    places = places / places.abs().amax((2, 3, 4), keepdim=True).clamp_min(1e-30)
    data = {
        "sites": found.sites,
        "heads": found.heads,
        "tokens": found.q.shape[2],
        "places": _bytes((places * STEPS).round(), np.int16),
        "norms": _bytes(torch.stack([found.q.norm(dim=-1), found.k.norm(dim=-1)], 2), np.float32),
        "scale": comparable.scale.flatten().tolist(),
        "correlation": comparable.after.flatten().tolist(),
        "inputs": [_input(one, number) for number, one in enumerate(found.inputs)],
    }
    return Template(parts.joinpath("vectors.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        style=parts.joinpath("vectors.css").read_text("utf-8"),
        script=parts.joinpath("vectors.js").read_text("utf-8"),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _input(one: Input, number: int) -> dict[str, Any]:
    written = "".join(one.texts).strip()
    told: dict[str, Any] = {
        "name": f"{number + 1}: {written[:LONG]}" if written else f"{number + 1}",
        "kinds": one.kinds,
        "texts": one.texts,
        "weights": _bytes((one.weights.clamp(0, 1).sqrt() * 255).round(), np.uint8),  # (sites, heads, n, n)
    }
    if one.picture is not None:
        data = io.BytesIO()
        one.picture.image().save(data, "WEBP", quality=88)
        told["picture"] = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
        sides = torch.tensor([one.picture.width, one.picture.height] * 2)
        shares = (one.boxes / sides).clamp(0, 1)
        known = shares.isfinite().all(-1).tolist()
        told["boxes"] = [
            [round(side, 5) for side in box] if whole else None for box, whole in zip(shares.tolist(), known)
        ]
    return told


def _bytes(t: Tensor, kind: Any) -> str:
    return base64.b64encode(t.numpy().astype(kind).tobytes()).decode()
