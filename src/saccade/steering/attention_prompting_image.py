"""Show the model only the picture, dimmed where it has nothing to do with the question.

    c_i    of CLIP's vector what its class token takes from patch i in one layer, times the question's vector
    p_i    the patch's own state behind that layer, read as such a vector, times the question's vector
    c      <- sigmoid(coe * (c - mean) / std)          c from 0 to 1 before
    p      <- (max - p) / (max - min)
    m      = c + p - c * p                             c and p smoothed over 3 x 3, m from 0 to 1 in the end
    shown  = m * picture + (1 - m) * grey

Where the model itself is asked, c is the attention of all that it says on the picture's tokens, mean over heads, and
m = c.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import OptionError
from saccade.core.method import Method
from saccade.core.passes import HiddenCall
from saccade.core.question import Answer, Question
from saccade.core.samples import to_model
from saccade.core.session import Session, attach
from saccade.core.site import match
from saccade.core.system import option
from saccade.steering._parts.glance import glances
from saccade.steering._parts.likeness import ClipLikeness, clip
from saccade.steering.vicrop import shown


@dataclass(eq=False)
class AttentionPromptingImage(Driver):
    card = Card(
        slug="attention_prompting_image",
        name="Attention Prompting on Image (API)",
        kind="driver",
        family="steering",
        form="method",
        target="vlm",
        paper="Attention Prompting on Image for Large Vision-Language Models (Yu et al., 2024)",
        summary="Dim the picture where a CLIP, or the model itself, sees nothing of the question",
        needs=("image",),
        neutral={"strength": 0.0},
        code="yu-rp/apiprompting",
        choices=(
            "Without a CLIP the map is the asked model's own, the paper's LLaVA variant, with its grey of 200; "
            "the paper's CLIP is clip=openai/clip-vit-large-patch14-336, with a grey of 0.",
            "m is resized in floating point and clipped; the released code rounds it to 256 levels first.",
            "CLIP's map is laid over the whole picture, as released, although CLIP sees its middle.",
            "Layer 22 of 24 is the last but one of any tower; layer 20 of LLaVA's 32 scales with the depth.",
            "Every picture of a question has its own map.",
        ),
        headline="LLaVA-1.5: +3.8% on MM-Vet, +2.9% on LLaVA-Wild",
        tags=("visual prompting", "heatmap", "CLIP", "masking", "attention"),
    )

    clip: str | ClipLikeness | None = option(
        None,
        "who makes the map: a folder or hub name of a CLIP of transformers, such as "
        "openai/clip-vit-large-patch14-336, or one that is loaded; the asked model unless given",
    )
    coe: float = option(5.0, "sharpness of the map", low=0)
    grey: int | None = option(
        None, "level of what is hidden, 0 to 255; the paper's for who makes the map unless given"
    )
    strength: float = option(1.0, "how far the picture is dimmed; 0 leaves it as it is", low=0, high=1)
    layer: str = option("vision.-2.self", "the layer of a CLIP")
    sites: str = option("text.62%.self", "the layer of the asked model; the paper's 20 of 32")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grey is not None and not 0 <= self.grey <= 255:
            raise OptionError(f"No level of grey is {self.grey}.", "grey: from 0, black, to 255, white")

    def run(self, session: Session, question: Question) -> Answer:
        maps = [self.heat(session, question, picture) for picture in question.images]
        grey = self.grey if self.grey is not None else (200 if self.clip is None else 0)
        dimmed = [
            blended(picture, 1 - self.strength * (1 - resized(m, picture.size)), grey)
            for picture, m in zip(question.images, maps, strict=True)
        ]
        answer = question.ask(session, dimmed)
        answer.found = {"maps": maps}
        for number, (picture, m, seen) in enumerate(zip(question.images, maps, dimmed, strict=True)):
            of = f" {number}" if number else ""
            answer.pictures |= {f"map{of}": shown(m, picture), f"dimmed{of}": seen}
        return answer

    def heat(self, session: Session, question: Question, picture: Image.Image) -> Tensor:
        """m: (rows, columns), 0 to 1."""
        if self.clip is None:
            words = int(question.options.get("max_new_tokens", 64))
            _, looks = glances(session, question, picture, question.text, self.sites, words)
            return smooth(sharpened(looks.mean((0, 1)), self.coe))
        found = clip(self.clip) if isinstance(self.clip, str) else self.clip
        of_class, of_patches = clip_maps(found, picture, question.text, self.layer)
        return merged(of_class, of_patches, self.coe)


# ---- maps ------------------------------------------------------------------------------------------------


def rising(m: Tensor) -> Tensor:
    """From 0 to 1; zeros where all is the same."""
    return (m - m.min()) / (m.max() - m.min()).clamp_min(torch.finfo(m.dtype).tiny)


def sharpened(m: Tensor, coe: float) -> Tensor:
    m = rising(m)
    return torch.sigmoid(coe * (m - m.mean()) / m.std().clamp_min(torch.finfo(m.dtype).tiny))


def smooth(m: Tensor) -> Tensor:
    """The mean over 3 x 3, the border going on as it is."""
    return F.avg_pool2d(F.pad(m[None, None], (1, 1, 1, 1), "replicate"), 3, 1)[0, 0]


def merged(of_class: Tensor, of_patches: Tensor, coe: float) -> Tensor:
    c, p = smooth(sharpened(of_class, coe)), smooth(rising(-of_patches))
    return rising(c + p - c * p)


def resized(m: Tensor, size: tuple[int, int]) -> Tensor:
    """As (height, width) of a picture of `size`."""
    level = Image.fromarray(m.float().numpy()).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(level).copy()).clamp(0, 1)


def blended(picture: Image.Image, m: Tensor, grey: float) -> Image.Image:
    """m * picture + (1 - m) * grey, m (height, width)."""
    share = m.double().numpy()[..., None]
    return Image.fromarray((share * np.asarray(picture) + (1 - share) * grey).round().astype(np.uint8))


# ---- CLIP ------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_maps(found: ClipLikeness, picture: Image.Image, text: str, layer: str) -> tuple[Tensor, Tensor]:
    """How much of the text the class token takes from every patch, and how much the patch says itself: both (rows,
    columns)."""
    inputs = found.processor(
        text=[text], images=[picture], padding=True, truncation=True, return_tensors="pt"
    )
    given = {name: to_model(found.model, value) for name, value in inputs.items()}
    with attach(found.model) as session:
        states = match(layer.replace(".self", ".layer"), session.sites)[0].name
        parts = Parts(sites={"observe": layer, "hidden": (layer, states, "vision.-1.layer")})
        out = session.forward(given, [parts])
        depth = len(match("vision.*.self", session.sites))
    height, width = given["pixel_values"].shape[-2:]
    maps = []
    for vectors in parts.vectors(depth):
        scores = (vectors @ out.text_embeds[0])[1:].double().cpu()  # behind the class token
        maps.append(scores.view(round((len(scores) * height / width) ** 0.5), -1))
    return maps[0], maps[1]


@dataclass(eq=False)
class Parts(Method):
    """Of one picture what a layer's class token takes from every token, the states behind that layer, the class
    token's last, and what reads it."""

    kept: dict[str, Tensor] = field(default_factory=dict)
    readout: tuple[nn.LayerNorm, nn.Linear] | None = None

    def observe(self, call: AttentionCall) -> None:
        assert call.out is not None
        w = call.weights(0)[0, :, 0, :, None].to(call.v.dtype)
        self.kept["heads"] = w * call.v.repeat_interleave(call.groups, 1)[0]
        self.kept["given"] = call.out.transpose(1, 2).flatten(2)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        if call.site.kind == "self":
            heads = self.kept["heads"]
            weight, bias = call.run.taking(call.site, self.kept["given"], h)
            out = weight.unflatten(0, (len(heads), -1))  # (heads, dim, width)
            self.kept["taken"] = torch.einsum("hnd,hdw->nw", heads, out) + bias / heads.shape[1]
        else:
            self.readout = call.run.readout()
            self.kept.setdefault("states", h[0])
            self.kept["last"] = h[0, 0]
        return h

    def vectors(self, depth: int) -> tuple[Tensor, Tensor]:
        """What was taken from every token and every token's state, as parts of the picture's vector, which is the sum
        of what 2 * depth + 1 modules add to the stream: both (tokens, width)."""
        assert self.readout
        norm, projection = self.readout
        last, taken, states = self.kept["last"], self.kept["taken"], self.kept["states"]
        std = (last.var(correction=0) + norm.eps).sqrt()
        length = projection(norm(last)).norm()

        def read(part: Tensor, share: float) -> Tensor:
            centred = (part - share * last.mean()) * norm.weight / std
            return (centred @ projection.weight.mT + share * projection(norm.bias)) / length

        share = 1 / (2 * depth + 1)
        return read(taken, share / len(taken)), read(states, share)
