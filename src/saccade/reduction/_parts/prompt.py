"""Judging by the prompt's last words."""

from __future__ import annotations

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.tokens import TokensCall


def check_whole(call: AttentionCall | TokensCall) -> None:
    """Refuse a prompt of which more will come."""
    if not call.pass_.complete:
        raise InputError(
            f"{type(call.run.method).__name__} judges by the last words of the prompt, and the prompt comes in "
            "pieces.",
            "generate without prefill_chunk_size",
        )
