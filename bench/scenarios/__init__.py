"""
One module per kind of measurement, in the order of the report.

A module has `NAME` and `measurements(run)`, and its docstring says what is measured.
"""

from __future__ import annotations

from bench.scenarios import (
    drain,
    footprint,
    history,
    http,
    latency,
    slots,
    submit,
    sustained,
    waiting,
)

SCENARIOS = {
    module.NAME: module
    for module in (http, submit, drain, latency, slots, waiting, sustained, history, footprint)
}
