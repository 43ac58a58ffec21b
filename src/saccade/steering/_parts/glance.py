"""Where the newest word looks, on the picture too, and the features of pictures that are chosen by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn

from saccade.core.boxes import picture_boxes
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.geometry import cells, spread
from saccade.core.layout import Layout
from saccade.core.method import Method
from saccade.core.question import Answer, Question
from saccade.core.session import Session, attach


def last_glance(call: AttentionCall) -> Tensor:
    """Attention of the last row, mean over heads, by place in the conversation: (rows, tokens), 0 for those
    that left."""
    w = call.weights("last")[:, :, 0]  # (rows, heads, keys)
    place = call.kpos
    if place.ndim == 2:
        place = place[:, None]
    elif place.ndim == 3:
        place = place.repeat_interleave(call.groups, 1)
    spread = w.new_zeros(*w.shape[:2], call.pass_.sequence.length)
    spread.scatter_add_(2, place.clamp_min(0).expand_as(w), w * (place >= 0))
    return spread.mean(1)


def by_kind(layout: Layout, values: Tensor) -> dict[str, Tensor]:
    """Of values of a prompt's tokens (samples, tokens) those of its features, all items in order."""
    return {kind: values[layout.where(kind)] for kind in ("image", "video")}


def of_item(item: Item, values: Mapping[str, Tensor]) -> Tensor:
    """Those of one item's features: (tokens,)."""
    return values[item.kind][item.first : item.first + len(item.x)].to(item.x.device)


@dataclass(eq=False)
class Glances(Method):
    """What the newest word of every pass gives the pictures' tokens."""

    seen: list[Tensor] = field(default_factory=list)  # layer after layer, pass after pass: (visual tokens,)

    def observe(self, call: AttentionCall) -> None:
        layout = call.pass_.sequence.layout()
        self.seen.append(by_kind(layout, last_glance(call))["image"].double().cpu())


def glances(
    session: Session, question: Question, picture: Image.Image, text: str, sites: str, words: int
) -> tuple[Answer, Tensor]:
    """What the model alone says of one picture, and where it looks for every word of that: (words, layers, rows,
    columns) over the picture."""
    watch = Glances(sites=sites)
    options = {**question.options, "max_new_tokens": words, "do_sample": False, "num_beams": 1}
    with session.paused(), attach(session.model, watch) as alone:
        said = dataclasses.replace(question, images=[picture], text=text, options=options).ask(alone)
        layers = len(alone.plans)
    boxes = placed(picture_boxes(session.model, question.processor, picture.size), session.model)
    share = spread(boxes, picture.size, cells(boxes, picture.size))
    return said, torch.einsum("wlt,trc->wlrc", torch.stack(watch.seen).unflatten(0, (-1, layers)), share)


def placed(boxes: Tensor, model: nn.Module) -> Tensor:
    """Boxes of visual tokens, some of which there are."""
    if not boxes.isfinite().all(-1).any():
        raise InputError(
            f"The visual tokens of {type(model).__name__} show no places of the picture.",
            "use a model whose visual tokens are patches, or queries that read patches",
        )
    return boxes
