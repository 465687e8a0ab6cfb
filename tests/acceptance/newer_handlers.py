"""
A handler that only some workers have, as while a new version is rolled out.
"""

from __future__ import annotations

from asyncflow import handler


@handler
async def novelty() -> str:
    """
    Do what older workers cannot.
    """
    return "new"
