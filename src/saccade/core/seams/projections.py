"""Which rows of which linear layers make queries, keys and values of every head, and what takes its output.

Families name and order them as they like, so one small forward shows it: a head's queries have a gradient at
their own columns of a linear layer's output and at no other, and a layer behind attention is given the heads'
outputs one after the other. All is checked against the forward's own numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core.errors import AttachError, InputError
from saccade.core.method import Method
from saccade.core.seams.discovery import is_linear
from saccade.core.seams.plain import PlainHost
from saccade.core.seams.unembed import close, is_norm, prompt
from saccade.core.site import Site
from saccade.models.towers import READOUT

if TYPE_CHECKING:
    from saccade.core.call import AttentionCall


@dataclass(frozen=True)
class Matrices:
    """Of one attention, without the norms and rotations of queries and keys."""

    q: Tensor  # (heads, width, dim)
    k: Tensor  # (key heads, width, dim)
    v: Tensor  # (key heads, width, dim)
    o: Tensor  # (heads, dim, width)
    q_bias: Tensor | float = 0.0  # (heads, 1, dim)
    k_bias: Tensor | float = 0.0  # (key heads, 1, dim)

    def value(self, head: int) -> Tensor:
        """W_v of a head, which those of its group share: (width, dim)."""
        return self.v[head * len(self.v) // len(self.o)]


Rows = list[tuple[nn.Module, Tensor]]  # by head: a linear layer, and which of its outputs


@dataclass(frozen=True)
class Linears:
    """The linear layers of one attention."""

    made: tuple[Rows, Rows, Rows]  # queries, keys, values
    taken: nn.Module

    def matrices(self) -> Matrices:
        q, k, v = (torch.stack([weight(linear)[:, at] for linear, at in rows]) for rows in self.made)
        o = weight(self.taken)
        q_bias, k_bias = (biases(rows) for rows in self.made[:2])
        return Matrices(q, k, v, o.view(len(q), -1, o.shape[-1]), q_bias, k_bias)

    def parameters(self, parts: str) -> dict[nn.Parameter, Tensor]:
        """The weights and biases that make them, of `q`, `k` and `v`, and which of their elements do."""
        found: dict[nn.Parameter, Tensor] = {}
        for linear, at in (row for part in parts for row in self.made["qkv".index(part)]):
            for name, parameter in linear.named_parameters(recurse=False):
                mask = found.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))
                (mask.T if name == "weight" and type(linear).__name__ == "Conv1D" else mask)[at] = True
        return found

    def cut(self, heads: set[int]) -> None:
        """Take heads out of the weights, for good; key heads go with all of those that share them."""
        q, k, _ = self.made
        groups = len(q) // len(k)
        shared = {key for key in range(len(k)) if heads >= {*range(key * groups, (key + 1) * groups)}}
        if not heads < {*range(len(q))} or len(shared) * groups != len(heads):
            raise InputError(
                f"Heads {sorted(heads)} cannot be taken out of {len(q)} heads, of which {groups} share a key head.",
                "take whole groups, and leave one; or switch heads off instead",
            )
        several = [{linear for linear, _ in rows} for rows in self.made]
        linears = set().union(*several)
        if len(linears) != 3 or any(type(linear) is not nn.Linear for linear in (*linears, self.taken)):
            raise InputError(
                "Queries, keys and values do not come from a linear layer each, whose rows could be taken out.",
                "switch the heads off instead",
            )
        for rows, gone in zip(self.made, (heads, shared, shared), strict=True):
            at = torch.cat([at for head, (_, at) in enumerate(rows) if head not in gone])
            _narrow(rows[0][0], at, 0)
        taken: Any = self.taken
        at = torch.arange(taken.in_features).view(len(q), -1)
        _narrow(taken, at[[head for head in range(len(q)) if head not in heads]].flatten(), 1)


def _narrow(linear: Any, at: Tensor, axis: int) -> None:
    """Leave these of a linear layer's outputs (axis 0) or inputs (axis 1)."""
    at = at.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, at), linear.weight.requires_grad)
    if axis == 1:
        linear.in_features = len(at)
        return
    linear.out_features = len(at)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[at], linear.bias.requires_grad)


@dataclass(frozen=True)
class Anatomy:
    """By the names of sites: the linear layers of attention, or why they are not known; and the norms before
    attention and mlps."""

    linears: dict[str, Linears | str]
    norms: dict[str, nn.Module]


@dataclass(eq=False, kw_only=True)
class Watch(Method):
    """Keeps queries, keys, values and outputs of every site's call."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.made: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.out: dict[str, Tensor] = {}

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.made[call.site.name] = q, k, v
        return q, k, v

    def observe(self, call: AttentionCall) -> None:
        assert call.out is not None
        self.out[call.site.name] = call.out.transpose(1, 2).flatten(2)  # (batch, tokens, heads * dim)


def find(host: PlainHost, forward: Callable[[dict[str, Any], tuple[Method, ...]], Any]) -> Anatomy:
    """Of the main tower. `forward` runs the model with methods, gradients on, beside everything else."""
    model: Any = host.model
    mine = [site for site in host.sites if site.tower == host.main_tower]
    attention = [site for site in mine if site.kind == "self" and site.seam in ("interface", "sdpa")]
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if words is None or not attention:
        raise _refused(model, "its attention is written out by hand" if words else "it reads no words")
    watch = Watch(sites=tuple(site.name for site in attention))
    given: dict[nn.Module, Tensor] = {}
    made: dict[nn.Module, Tensor] = {}

    def began(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if (first := next(tensors, None)) is not None:
            given[module] = first.detach()

    def ended(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        made[module] = output.detach()
        if not is_linear(module):
            return None
        made[module].requires_grad_()
        return made[module].clone()

    seen = {site.module for site in mine} | {m for m in model.modules() if is_linear(m) or is_norm(m)}
    hooks = [module.register_forward_pre_hook(began, with_kwargs=True) for module in seen]
    hooks += [module.register_forward_hook(ended) for module in seen]
    try:
        forward(prompt(host, words), (watch,))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as e:
        raise _refused(model, f"a forward of words alone fails ({type(e).__name__}: {e})") from e
    finally:
        for hook in hooks:
            hook.remove()
    linears = {site.name: _linears(site, watch, given, made) for site in attention}
    norms = {
        site.name: norm
        for site in mine
        if site.kind in ("mlp", "self")
        for norm in made
        if is_norm(norm) and _same(made[norm], given.get(site.module))
    }
    return Anatomy(linears, norms)


def _linears(
    site: Site, watch: Watch, given: dict[nn.Module, Tensor], made: dict[nn.Module, Tensor]
) -> Linears | str:
    """Of one attention, or why they are not known."""
    if site.name not in watch.out:
        return "a forward of words alone does not come to it"
    inside = [m for m in site.module.modules() if is_linear(m) and m in made]
    found = [_rows(t, inside, made) for t in watch.made[site.name]]
    for what, rows in zip(("queries", "keys", "values"), found, strict=True):
        if rows is None:
            return f"its {what} do not come from one linear layer, head by head"
        for linear, _ in rows:
            if not _same(given[linear], given[site.module]):
                return f"its {what} are not made of what the layer is given"
            if not close(given[linear] @ weight(linear), made[linear].detach() - bias(linear)):
                return f"{type(linear).__name__} does more than multiply by its weight"
    for head, (linear, at) in enumerate(found[2]):  # type: ignore[arg-type]
        if not _same(made[linear].detach()[..., at], watch.made[site.name][2][:, head].detach()):
            return "its values are changed on their way from the linear layer"
    taken = next((m for m in given if is_linear(m) and _same(given[m], watch.out[site.name])), None)
    if taken is None:
        return "what its heads give goes through more before the next linear layer"
    return Linears(tuple(found), taken)  # type: ignore[arg-type]


def _rows(t: Tensor, linears: Sequence[nn.Module], made: dict[nn.Module, Tensor]) -> Rows | None:
    """Which outputs of a linear layer each head of `t` (batch, heads, tokens, dim) is made of."""
    if not t.requires_grad or not linears:
        return None
    rows: Rows = []
    for head in t.unbind(1):
        uneven = torch.arange(head.numel(), device=t.device).sin().view_as(head).to(head.dtype)
        leaves = [made[linear] for linear in linears]
        slopes = torch.autograd.grad((head * uneven).sum(), leaves, retain_graph=True, allow_unused=True)
        ways = [
            (linear, slope.flatten(0, -2).abs().sum(0).nonzero()[:, 0])
            for linear, slope in zip(linears, slopes, strict=True)
            if slope is not None
        ]
        ways = [(linear, at) for linear, at in ways if len(at)]
        if len(ways) != 1 or len(ways[0][1]) != t.shape[-1]:
            return None
        rows += ways
    return rows


def weight(linear: Any) -> Tensor:
    """(width in, width out)"""
    matrix: Tensor = linear.weight.detach()
    return matrix if type(linear).__name__ == "Conv1D" else matrix.T


def biases(rows: Rows) -> Tensor | float:
    """(heads, 1, dim), 0 where there are none"""
    if any(linear.bias is None for linear, _ in rows):
        return 0.0
    return torch.stack([bias(linear)[None, at] for linear, at in rows])  # type: ignore[index]


def bias(linear: Any) -> Tensor | float:
    return 0.0 if linear.bias is None else linear.bias.detach()


def _same(a: Tensor, b: Tensor | None) -> bool:
    """Equal numbers, one row of tokens after the other."""
    return b is not None and a.shape[-1] == b.shape[-1] and torch.equal(a.flatten(0, -2), b.flatten(0, -2))


def taking(module: nn.Module, given: Tensor, made: Tensor) -> nn.Module:
    """The linear layer of an attention that takes its heads' outputs, told by what the attention makes of them."""
    for linear in module.modules():
        fits = is_linear(linear) and weight(linear).shape == (given.shape[-1], made.shape[-1])
        if fits and close(linear(given), made):
            return linear
    raise AttachError(
        f"{type(module).__name__} does more with its heads' outputs than one linear layer does.",
        "use a tower whose attention ends in its output projection",
    )


def readout(model: nn.Module) -> tuple[nn.LayerNorm, nn.Linear]:
    """The norm and the projection that make one vector of a picture of its first token's last state."""
    found = [
        next((m for name, m in model.named_modules() if name.split(".")[-1] == wanted), None)
        for wanted in READOUT
    ]
    norm, projection = found
    if not isinstance(norm, nn.LayerNorm) or not isinstance(projection, nn.Linear):
        raise AttachError(
            f"{type(model).__name__} does not make one vector of a picture: it lacks {' and '.join(READOUT)}.",
            "use a CLIP of transformers, such as CLIPModel or CLIPVisionModelWithProjection",
        )
    return norm, projection


def _refused(model: nn.Module, why: str) -> AttachError:
    return AttachError(
        f"{type(model).__name__} does not show the matrices of its heads: {why}.",
        "use a language model that attends through transformers' interface",
    )
