"""
A handler that only some workers offer, as during a rollout.
"""

from __future__ import annotations

from asyncflow import handler


@handler
async def novelty() -> str:
    """
    Do what older workers cannot.
    """
    return "new"
