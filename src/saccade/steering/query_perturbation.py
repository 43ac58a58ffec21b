"""Turn queries towards the objects of a picture, by the directions in which an object's keys vary.

    K_w  = keys of a layer and head, each times the share of its patch inside the box
    E    = eigenvectors of K_w^T K_w, the largest that hold less than `energy` of the whole, at least one
    P    = alpha * E E^T,   of several boxes the mean
    q    <- q + q P

In the cross-attention of a Q-Former, so for contrast and for matching; keys, values and the text stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.steering._parts.regions import Box, inside, patch_boxes


@dataclass(eq=False)
class QueryPerturbation(Method):
    card = Card(
        slug="query_perturbation",
        name="Query Perturbation (Q-Pert)",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Object-Aware Query Perturbation for Cross-Modal Image-Text Retrieval (Sogi et al., 2024)",
        summary="Turn a Q-Former's queries towards the keys of the objects in a picture",
        neutral={"alpha": 0.0},
        code="NEC-N-SOGI/query-perturbation",
        choices=(
            "E is made of columns of the eigenvectors, as in the paper's formula; the released code takes rows, whose "
            "product is not the subspace of the keys.",
            "The keys of the running pass make P, so that one pass is enough; the released code reads them before.",
            "The relative area of a box is the share of the patches that it covers.",
        ),
        tags=("retrieval", "Q-Former", "object", "subspace", "cross-attention", "small objects"),
    )

    boxes: tuple[tuple[Box, ...], ...] = option(
        (),
        "of every picture, or of all alike: boxes x0 y0 x1 y1, in pixels of the pictures given to session.locate, or "
        "else of what the tower is given",
    )
    alpha: float = option(8.0, "strength; 0 changes nothing", low=0)
    by_area: bool = option(False, "times the relative area of the box")
    energy: float = option(
        0.99, "share of the keys' energy that the kept directions stay below", low=0, high=1
    )
    keep_norm: bool = option(False, "give queries the length that they had")
    sites: Sites = option("qformer.*.cross", "layers")

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not any(self.boxes):
            return q, k, v
        patches = patch_boxes(call)
        if len(self.boxes) not in (1, len(patches)):
            raise InputError(
                f"There are boxes of {len(self.boxes)} pictures for {len(patches)}.",
                "give some for each, or one for all",
            )
        boxes = self.boxes if len(self.boxes) > 1 else self.boxes * len(patches)
        p = torch.stack(
            [self._mean(keys, at, mine) for keys, at, mine in zip(k, patches, boxes, strict=True)]
        )
        turned = q + q @ p.repeat_interleave(call.groups, 1).to(q.dtype)
        if self.keep_norm:
            turned = turned * (q.norm(dim=-1, keepdim=True) / turned.norm(dim=-1, keepdim=True))
        return turned, k, v

    def _mean(self, keys: Tensor, patches: Tensor, boxes: tuple[Box, ...]) -> Tensor:
        """P of one picture: (heads, dim, dim), of keys (heads, keys, dim) with places (keys, 4)."""
        found = [torch.zeros_like(keys[:, :1].transpose(1, 2) @ keys[:, :1])]
        for box in boxes:
            share = inside(patches[None], [box])[0]
            if not bool(share.any()):
                raise InputError(
                    f"The box {box} lies outside of what the tower sees.", "give x0 y0 x1 y1 in pixels"
                )
            area = share.sum() / patches.isfinite().all(-1).sum() if self.by_area else 1
            found.append(self.alpha * area * projector(keys * share[:, None].to(keys.dtype), self.energy))
        return torch.stack(found).sum(0) / max(1, len(boxes))


def projector(keys: Tensor, energy: float) -> Tensor:
    """On the directions that keys (..., keys, dim) mostly lie in: (..., dim, dim)."""
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    values, vectors = torch.linalg.eigh(wide.transpose(-1, -2) @ wide)
    values, vectors = values.flip(-1), vectors.flip(-1)
    kept = values.cumsum(-1) < energy * values.sum(-1, keepdim=True)
    kept[..., 0] = True
    chosen = vectors * kept[..., None, :]
    return (chosen @ chosen.transpose(-1, -2)).to(keys.dtype)
