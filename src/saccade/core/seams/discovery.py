"""Finding the places where a model attends, from what its modules' code names, not from its family."""

from __future__ import annotations

import functools
import inspect
import re
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from saccade.core.site import Seam, Site
from saccade.models.towers import CROSS_NAMES, SEES, TOWERS


def discover(model: nn.Module) -> list[Site]:
    """Every attention module as a site, then the layers, mlps, neurons and embeddings around them."""
    places = _attention_modules(model)
    drafts: list[dict[str, Any]] = []
    counters: dict[tuple[str, ...], int] = {}
    for path, module, seam in places:
        tower = tower_of(model, path)
        kind = _kind(model, path, module)
        layer = getattr(module, "layer_idx", None)
        leaf = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
        key = (tower, kind, leaf, "single" if "single" in path else "")
        number = counters[key] = counters.get(key, -1) + 1
        if isinstance(layer, int) and tower == "text":
            number = layer
        found: dict[str, Any] = {
            "path": path,
            "module": module,
            "tower": tower,
            "index": number,
            "kind": kind,
        }
        drafts.append({**found, "seam": seam, "leaf": leaf})
    depths: dict[str, int] = {}
    for draft in drafts:
        stack = _stack_length(model, draft["path"], draft["index"])
        depths[draft["tower"]] = max(depths.get(draft["tower"], 0), draft["index"] + 1, stack)
    sites, taken = [], set()
    for draft in drafts:
        leaf = draft.pop("leaf")
        name = _name(draft)
        if name in taken:  # a pooling head beside the layers, or a second attention in a layer
            name = f"{draft['tower']}.{leaf}.{draft['index']}.{draft['kind']}"
            draft["index"] = None
        if name in taken:
            name = f"{draft['tower']}.{draft['path']}.{draft['kind']}"
        taken.add(name)
        if draft["tower"] == "unet":
            draft["index"] = None
        sites.append(Site(name=name, depth=depths[draft["tower"]], **draft))
    return sites + _hidden_sites(model, sites)


def _stack_length(model: nn.Module, path: str, index: int) -> int:
    """Length of the list of layers of which the module is in number `index`: not every layer attends."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part == str(index):
            layers = model.get_submodule(".".join(parts[:i]))
            return len(layers) if isinstance(layers, nn.ModuleList) else 0
    return 0


def tower_of(model: nn.Module, path: str) -> str:
    """`text`, `vision`, ... of a module, from its path and from what the model is."""
    library = type(model).__module__
    if library.startswith("diffusers"):
        return "unet" if "unet" in library else "dit"
    if library.startswith("timm"):
        return "vision"
    config = getattr(model, "config", None)
    if config is not None and _only_sees(config):
        return "decoder" if re.search(r"(^|\.)decoder\.", path) else "vision"
    tower = next(name for name, pattern in TOWERS if re.search(pattern, path))
    if tower == "encoder" and not getattr(config, "is_encoder_decoder", False):
        return "text"
    return tower


def _only_sees(config: Any) -> bool:
    """A configuration of pictures alone: it names their size, patches or tower, and no words."""
    words = any(hasattr(config, name) for name in ("vocab_size", "text_config", "decoder"))
    return not words and any(hasattr(config, name) for name in SEES)


def _kind(model: nn.Module, path: str, module: nn.Module) -> str:
    leaf = ".".join(path.lower().split(".")[-2:])  # some keep `crossattention.self`
    cross = getattr(module, "is_cross_attention", None)
    if hasattr(module, "processor") and cross is not None and path.endswith("attn2"):
        return "cross" if cross else "self"  # SD3.5 calls a second self-attention so
    if tower_of(model, path) == "dit" and _joins(model, path, module):
        return "joint"
    return "cross" if cross is True or any(name in leaf for name in CROSS_NAMES) else "self"


def _joins(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Text and image attend to each other in one sequence."""
    if getattr(module, "added_kv_proj_dim", None) or "single" in path:
        return True
    processor = getattr(type(getattr(module, "processor", None)), "__call__", None)  # noqa: B004
    code = getattr(processor, "__code__", None)
    if code is None or "cat" not in code.co_names or "encoder_hidden_states" not in code.co_varnames:
        return False
    block = model.get_submodule(path.rpartition(".")[0])
    return not any(getattr(sibling, "is_cross_attention", False) for sibling in block.children())


def _name(draft: dict[str, Any]) -> str:
    tower, path = draft["tower"], draft["path"]
    if tower == "unet":
        block = re.match(r"(down|mid|up)_block", path)
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", path)
        return ".".join([tower, block.group(1) if block else "block", *numbers, draft["kind"]])
    if tower == "dit" and "single" in path:
        return f"{tower}.single.{draft['index']}.{draft['kind']}"
    return f"{tower}.{draft['index']}.{draft['kind']}"


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module, Seam]]:
    found: list[tuple[str, nn.Module, Seam]] = []
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in inside):
            continue
        seam = seam_of(module)
        if seam is not None:
            found.append((path, module, seam))
            inside.append(path + ".")
    return found


def seam_of(module: nn.Module) -> Seam | None:
    """The narrowest way into this module's attention, None where it does not attend itself."""
    if isinstance(module, nn.MultiheadAttention):
        return "sdpa"
    if hasattr(module, "processor") and hasattr(module, "to_q"):
        linear = "Linear" in type(module.processor).__name__  # which has no softmax
        return None if linear else "sdpa"
    if isinstance(module, nn.ModuleList) or any(seam_of(child) for child in module.children()):
        return None
    names = names_used(type(module))  # type: ignore[arg-type]
    if "ALL_ATTENTION_FUNCTIONS" in names:
        return "interface"
    if names & {"scaled_dot_product_attention", "dispatch_attention_fn"}:
        return "softmax" if _unfused(module, names) else "sdpa"
    by_hand = bool(names & {"softmax", "Softmax"}) and re.search("Atten|Attn", type(module).__name__)
    return "softmax" if by_hand and any(True for _ in module.children()) else None


def _unfused(module: nn.Module, names: frozenset[str]) -> bool:
    """Told to attend by hand, though its code has the fused operator too."""
    if "_attn_implementation" in names:
        return getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"
    return getattr(module, "fused_attn", True) is False


@functools.cache
def names_used(cls: type) -> frozenset[str]:
    """Global names and attributes that the methods of a class read, its library bases included."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "transformers.modeling_", "builtins")):
            continue
        for value in vars(base).values():
            function = inspect.unwrap(value) if isinstance(value, FunctionType) else None
            if isinstance(function, FunctionType):
                names |= _names_in(function.__code__)
    return frozenset(names)


def _names_in(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names |= _names_in(const)
    return names


# ---- what stands around attention -----------------------------------------------------------------------


def _hidden_sites(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Layer: the outermost item of a list with exactly one self-attention, or with cross-attention alone, and
    the items of that list without any. Input: what goes into it, which is not always what the layer before
    gave. Mlp: what in it adds to the stream after attention. Neurons: the input of the mlp's last linear.
    Embed: the input of layer 0."""
    found: list[Site] = []
    numbered = [site for site in sites if site.index is not None]
    own = {(site.tower, site.index) for site in numbered if site.kind == "self"}
    selves = [
        s for s in numbered if s.kind == "self" or (s.kind == "cross" and (s.tower, s.index) not in own)
    ]
    for path, (tower, index, depth) in _layers(model, selves, sites).items():
        layer = model.get_submodule(path)

        def add(
            kind: str, inner: str, module: nn.Module, at: tuple[str, int, int] = (tower, index, depth)
        ) -> None:
            tower, index, depth = at
            name = f"{tower}.embed" if kind == "embed" else f"{tower}.{index}.{kind}"
            found.append(Site(name, inner, module, tower, index, kind, "module", depth))

        if index == 0:
            add("embed", path, layer)
        add("input", path, layer)
        add("layer", path, layer)
        mlp = _mlp(layer, [s.path[len(path) + 1 :] for s in sites if s.path.startswith(path + ".")])
        if mlp is not None:
            add("mlp", f"{path}.{mlp}", layer.get_submodule(mlp))
            down = _last_linear(layer.get_submodule(mlp))
            if down is not None:
                inner = f"{mlp}.{down}" if down else mlp
                add("neurons", f"{path}.{inner}", layer.get_submodule(inner))
    return found


def _layers(model: nn.Module, selves: list[Site], sites: list[Site]) -> dict[str, tuple[str, int, int]]:
    """Tower, index and depth of every layer by its path, those that do not attend in their places."""
    found: dict[str, tuple[str, int, int]] = {}
    for site in selves:
        path = _layer_path(site, selves)
        if path is None or site.index is None:
            continue
        stem, _, number = path.rpartition(".")
        stack = model.get_submodule(stem)
        if number == str(site.index) and isinstance(stack, nn.ModuleList):
            for i in range(len(stack)):
                if not any(other.path.startswith(f"{stem}.{i}.") for other in sites):
                    found.setdefault(f"{stem}.{i}", (site.tower, i, site.depth))
        found[path] = (site.tower, site.index, site.depth)
    towers = list(dict.fromkeys(tower for tower, _, _ in found.values()))
    return dict(sorted(found.items(), key=lambda item: (towers.index(item[1][0]), item[1][1])))


def _layer_path(site: Site, selves: list[Site]) -> str | None:
    parts = site.path.split(".")
    for stop in range(1, len(parts)):
        if parts[stop - 1].isdigit():
            path = ".".join(parts[:stop])
            if sum(other.path.startswith(path + ".") for other in selves) == 1:
                return path
    return None


def _mlp(layer: nn.Module, attention: list[str], prefix: str = "") -> str | None:
    """The last part of a layer that holds linear layers, is no attention, and takes the stream alone."""
    best = None
    for name, child in layer.named_children():
        path = prefix + name
        if any(inner.startswith(path + ".") for inner in attention) or _normalises(child):
            best = _mlp(child, attention, path + ".") or best
        elif path not in attention and any(
            is_linear(m) or "xpert" in type(m).__name__ for m in child.modules()
        ):
            best = path
    return best if best is None or _takes_one(layer.get_submodule(best.removeprefix(prefix))) else None


def _normalises(module: nn.Module) -> bool:
    """A sublayer that normalises and adds by itself (T5's): the mlp is inside."""
    return not is_linear(module) and any("Norm" in type(child).__name__ for child in module.children())


def _takes_one(module: nn.Module) -> bool:
    needed = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 1


def _last_linear(mlp: nn.Module) -> str | None:
    linears = [name for name, module in mlp.named_modules() if is_linear(module)]
    experts = any(
        isinstance(module, nn.ModuleList) or "xpert" in type(module).__name__ for module in mlp.modules()
    )
    return linears[-1] if linears and not experts else None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear", "LinearLayer")
