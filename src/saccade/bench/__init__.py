"""Running models under stacks on tasks, and what came of it. `saccade.bench(...)` is `runner.bench`: the package can
be called, for its name is the function's too."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from saccade.bench.runner import bench

        return bench(*args, **options)


sys.modules[__name__].__class__ = _Called
