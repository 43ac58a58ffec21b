"""Short programs that a model writes to edit pictures: read, never run."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

Tools = Mapping[str, Callable[..., Image.Image]]
"""By name: from a picture, names, and boxes by name."""


class ActionError(Exception):
    """What the model is told of its program."""


def program(reply: str) -> str:
    found = re.search(r"```(?:python)?\s*\n(.*?)```", reply, re.DOTALL)
    if not found:
        raise ActionError("there is no ACTION: write a program between ```python and ```.")
    return found[1]


def execute(code: str, names: dict[str, Any], tools: Tools) -> Image.Image:
    """The last picture that a program makes; what it assigns is added to the names."""
    made: Image.Image | None = None
    try:
        for line in ast.parse(code).body:
            match line:
                case ast.Assign(targets=[ast.Name(name)], value=value):
                    if name in tools:
                        raise ActionError(f"{name} is a tool, and cannot be assigned.")
                    names[name] = new = _value(value, names, tools)
                case (
                    ast.Expr(value=ast.Call(func=ast.Name("display"), args=[value], keywords=[]))
                    | ast.Expr(value=value)
                ):
                    new = _value(value, names, tools)
                case _:
                    raise ActionError(f"only calls of tools are allowed, not: {ast.unparse(line)}")
            made = new if isinstance(new, Image.Image) else made
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ActionError(f"the program cannot be read: {error}") from error
    if made is None:
        raise ActionError("the program makes no picture.")
    return made


def _value(node: ast.expr, names: Mapping[str, Any], tools: Tools) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(name) if name in names:
            return names[name]
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, names, tools) for part in parts]
        case ast.Call(func=ast.Name(name), args=args, keywords=[]) if name in tools and len(args) == 3:
            image, chosen, boxes = (_value(arg, names, tools) for arg in args)
            if isinstance(image, Image.Image) and isinstance(chosen, list) and isinstance(boxes, Mapping):
                return tools[name](image, [str(one) for one in chosen], boxes)
            raise ActionError(f"{name} takes a picture, a list of names, and boxes.")
    raise ActionError(f"this is no tool, name or constant: {ast.unparse(node)}")
