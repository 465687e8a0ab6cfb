"""
Generates the report, `benchmarks.md` and its plots, from raw lines. Nothing is measured here, and
the prose contains no figures.
"""

from __future__ import annotations

import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import plots
from bench.entrants import ENTRANTS, OURS, Entrant
from bench.lines import Lines, Spread, read_lines
from bench.method import CONTENTS, METHOD
from bench.targets import Target, targets

WIDTH = 100


def write_report(raw: Path, folder: Path) -> Path:
    """
    Write `benchmarks.md` into `folder`, with the plots and the raw lines in `benchmarks/`.
    """
    lines = read_lines(raw)
    pictures = folder / "benchmarks"
    pictures.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(raw, pictures / "raw.jsonl")
    page = folder / "benchmarks.md"
    sections = [
        _head(lines),
        _targets(lines),
        _http(lines, pictures),
        _submit(lines, pictures),
        _drain(lines, pictures),
        _heavier(lines),
        _cpu(lines),
        _latency(lines, pictures),
        _slots(lines),
        _waiting(lines, pictures),
        _sustained(lines, pictures),
        _history(lines),
        _footprint(lines),
        METHOD,
        _configurations(lines),
        _versions(lines),
        _errors(lines),
    ]
    page.write_text("\n\n".join(section for section in sections if section) + "\n")
    return page


def _head(lines: Lines) -> str:
    e = lines.environment
    servers, repetitions = e["servers"], e["sizes"]["repetitions"]
    commands = ", ".join(f"`{command}`" for command in _commands(lines))
    loads = lines.loads() or [e["load_before"]]
    day = time.strftime("%Y-%m-%d", time.gmtime(e["at"]))
    measured = f"""
Measured on {day} on {e["cores"]} cores ({e["cpu"]}), {e["memory_gb"]} GB, {e["system"]}, with
Python {e["python"]}, PostgreSQL {servers["PostgreSQL"]} and RabbitMQ {servers["RabbitMQ"]}, by
{commands}. Load generator, clients, workers, PostgreSQL and RabbitMQ share these cores, so each
figure describes the whole system on this machine. It is the median of {repetitions}
repetition{"s" if repetitions != 1 else ""}, with the lowest and highest in brackets; figures
without brackets were measured once. The load average was {e["load_before"]:g} at the start and
{min(loads):g} to {max(loads):g} before single measurements, which includes the work of the
previous one."""
    return f"# Benchmarks\n\n{CONTENTS}\n\n{_wrapped(measured)}"


def _wrapped(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False
    )


def _commands(lines: Lines) -> list[str]:
    texts = [" ".join(["bin/bench", *arguments]) for arguments in lines.commands]
    return list(dict.fromkeys(texts))


def _targets(lines: Lines) -> str:
    rows = [
        [t.what, _bounds(t.must, t), _bounds(t.aim, t), _figure(t), t.verdict]
        for t in targets(lines)
    ]
    return "## Targets\n\n" + _table(["", "must", "aim", "this run", ""], rows)


def _bounds(bound: float | None, target: Target) -> str:
    if bound is None:
        return ""
    sign = "≥" if target.at_least else "≤"
    return f"{sign} {_number(bound)} {target.unit}"


def _figure(target: Target) -> str:
    return "" if target.figure is None else f"{_number(target.figure)} {target.unit}"


def _http(lines: Lines, pictures: Path) -> str:
    cases: list[tuple[str, dict[str, Any]]] = [
        (f"{c} connection{'s' if c > 1 else ''}", {"connections": c, "tasks_per_request": 1})
        for c in (1, 32, 128)
    ]
    rows = []
    for name, case in cases:
        for key in ("asyncflow", "naive"):
            if lines.of("http", key, **case):
                rows.append([name, ENTRANTS[key].title, *_http_figures(lines, key, case)])
    for line in lines.of("http", "asyncflow"):
        if line["case"]["tasks_per_request"] > 1:
            name = "{connections} connections, {tasks_per_request} tasks each".format(
                **line["case"]
            )
            figures = _http_figures(lines, "asyncflow", line["case"])
            rows.append([name, ENTRANTS["asyncflow"].title, *figures])
            break
    if not rows:
        return ""
    picture = _picture(
        pictures / "http.svg",
        "POST, tasks per second",
        plots.bars,
        lines,
        field="per_second",
        scenario="http",
        cases=[(name, partial(_same, case)) for name, case in cases[1:]],
        label="tasks per second",
    )
    return _section(
        "POST over HTTP",
        "One API process. AsyncFlow responds once the row is committed, naive once it is committed "
        "and the message is confirmed. CPU is in µs per task.",
        picture,
        _table(["", "", "tasks/s", "p50 ms", "p99 ms", "API", "PostgreSQL", "RabbitMQ"], rows),
    )


def _http_figures(lines: Lines, key: str, case: Mapping[str, Any]) -> list[str]:
    fields = (
        "p50_ms",
        "p99_ms",
        *(f"cpu_us_per_task.{k}" for k in ("API", "PostgreSQL", "RabbitMQ")),
    )
    return [
        _spread(lines.spread("per_second", "http", key, **case)),
        *(_median(lines.median(field, "http", key, **case)) for field in fields),
    ]


def _submit(lines: Lines, pictures: Path) -> str:
    ours = lines.median("per_second", "submit", "asyncflow", api="one")
    rows = []
    for entrant in _present(lines, "submit"):
        for callers in entrant.producers:
            spread = lines.spread("per_second", "submit", entrant.key, api="one", callers=callers)
            rows.append(
                [entrant.title, f"{callers}", _spread(spread), _times(ours, spread)]
                + [_spread(lines.spread("per_second", "submit", entrant.key, api="bulk"))]
            )
    if not rows:
        return ""
    picture = _picture(
        pictures / "submit.svg",
        "Submitting from Python, tasks per second",
        plots.bars,
        lines,
        field="per_second",
        scenario="submit",
        cases=[
            ("one by one", lambda entrant: {"api": "one", "callers": max(entrant.producers)}),
            ("in bulk", lambda entrant: {"api": "bulk"}),
        ],
        label="tasks per second",
    )
    return _section(
        "Submitting from Python",
        "One process: single submissions from concurrent callers, and 1,000 per call of a bulk "
        "API.",
        picture,
        _table(["", "callers", "tasks/s", "AsyncFlow's speedup", "in bulk"], rows),
    )


def _drain(lines: Lines, pictures: Path) -> str:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("1 worker", {"workers": 1, "payload": "small"}),
        ("2 workers", {"workers": 2, "payload": "small"}),
    ]
    best = [lines.median("per_second", "drain", "asyncflow", **case) for _, case in cases]
    rows = []
    for entrant in _present(lines, "drain"):
        spreads = [lines.spread("per_second", "drain", entrant.key, **case) for _, case in cases]
        rows.append(
            [entrant.title, entrant.keeps, _spread(spreads[0]), _times(best[0], spreads[0])]
            + [_spread(spreads[1]), _times(best[1], spreads[1])]
        )
    if not rows:
        return ""
    picture = _picture(
        pictures / "drain.svg",
        "Draining a backlog, tasks per second",
        plots.bars,
        lines,
        field="per_second",
        scenario="drain",
        cases=[(name, partial(_same, case)) for name, case in cases],
        label="tasks per second",
    )
    heads = [
        "",
        "state",
        "1 worker, tasks/s",
        "AsyncFlow's speedup",
        "2 workers, tasks/s",
        "AsyncFlow's speedup",
    ]
    return _section(
        "Draining a backlog",
        "A no-op handler. The rate counts until every task is finished in durable state.",
        picture,
        _table(heads, rows),
    )


def _heavier(lines: Lines) -> str:
    rows = []
    for payload in ("small", "1 KB", "64 KB", "10 % fail once"):
        found = [
            lines.spread("per_second", "drain", o.key, workers=1, payload=payload) for o in OURS
        ]
        if any(found):
            rows.append([payload, *map(_spread, found)])
    if len(rows) < 2:
        return ""
    return _section(
        "Larger payloads, failing tasks",
        "In tasks per second, one worker. With `10 % fail once`, one in ten tasks raises at its "
        "first attempt and is retried after up to half a second.",
        _table(["", *(o.title for o in OURS)], rows),
    )


def _cpu(lines: Lines) -> str:
    kinds = ("workers", "PostgreSQL", "RabbitMQ")
    rows = []
    for entrant in _present(lines, "drain"):
        figures = [
            lines.median(f"cpu_us_per_task.{k}", "drain", entrant.key, workers=1, payload="small")
            for k in kinds
        ]
        total = sum(figure for figure in figures if figure is not None)
        rows.append([entrant.title, *map(_median, figures), _median(total)])
    if not rows:
        return ""
    return _section(
        "CPU per drained task",
        "In µs, one worker. AsyncFlow's relay is included under workers.",
        _table(["", *kinds, "all"], rows),
    )


def _latency(lines: Lines, pictures: Path) -> str:
    rows = []
    fields = ("p50_ms", "p95_ms", "p99_ms")
    for entrant in _present(lines, "latency"):
        idle = [lines.median(f, "latency", entrant.key, load="idle") for f in fields]
        half = [lines.median(f, "latency", entrant.key, load="half") for f in fields]
        flow = lines.median("flow_per_second", "latency", entrant.key, load="half")
        rows.append([entrant.title, *map(_median, idle), *map(_median, half), _median(flow)])
    if not rows:
        return ""
    picture = _picture(
        pictures / "latency.svg",
        "Latency from submission to start, p50 in ms",
        plots.bars,
        lines,
        field="p50_ms",
        scenario="latency",
        cases=[("idle", lambda _: {"load": "idle"}), ("half load", lambda _: {"load": "half"})],
        label="p50 in ms, logarithmic",
        logarithmic=True,
    )
    heads = ["", "idle p50", "p95", "p99", "half load p50", "p95", "p99", "at tasks/s"]
    return _section(
        "Latency from submission to start",
        "In ms. Half load is half of what the system sustained while submitting and working at the "
        "same time; the last column is that rate.",
        picture,
        _table(heads, rows),
    )


def _slots(lines: Lines) -> str:
    rows = []
    for line in lines.of("slots", OURS[0].key):
        case = line["case"]
        if line["repetition"] == 1:
            rates = [_spread(lines.spread("per_second", "slots", o.key, **case)) for o in OURS]
            ideal = _number(line["ideal_per_second"])
            rows.append([f"{case['wait_seconds']:g} s", *rates, ideal])
    if not rows:
        return ""
    return _section(
        "Keeping slots busy",
        "One worker of 10 slots, the default, on tasks that only wait; in tasks per second. `every "
        "slot in use` is the mathematical limit.",
        _table(["duration", *(o.title for o in OURS), "every slot in use"], rows),
    )


def _waiting(lines: Lines, pictures: Path) -> str:
    rows = []
    for entrant in OURS:
        one = lines.median("per_second", "waiting", entrant.key, workers=1)
        for workers in (1, 3, 5):
            spread = lines.spread("per_second", "waiting", entrant.key, workers=workers)
            if spread is not None:
                ideal = lines.median("ideal_per_second", "waiting", entrant.key, workers=workers)
                factor = "" if one is None else f"{spread.median / one:.2f} ×"
                rows.append([entrant.title, f"{workers}", _spread(spread), _median(ideal), factor])
    if not rows:
        return ""
    picture = _picture(
        pictures / "waiting.svg", "Workers and tasks per second", plots.waiting, lines
    )
    return _section(
        "Adding workers",
        "Tasks that wait 0.5 to 5 seconds, 100 slots per worker.",
        picture,
        _table(["", "workers", "tasks/s", "every slot in use", "compared to 1"], rows),
    )


def _sustained(lines: Lines, pictures: Path) -> str:
    parts = []
    for entrant in OURS:
        for line in lines.of("sustained", entrant.key):
            file = pictures / f"sustained-{entrant.key}.svg"
            plots.sustained(file, line["samples"])
            title = f"{entrant.title}: {line['flow_per_second']:,.0f} tasks/s"
            parts += [f"![{title}](benchmarks/{file.name})", _sustained_table(entrant, line)]
    if not parts:
        return ""
    return _section(
        "Submitting and draining for minutes",
        "At half of what the system sustains; sizes are table + indexes. Vacuum keeps the live "
        "table small; the finished one grows with every task.",
        *parts,
    )


def _sustained_table(entrant: Entrant, line: Mapping[str, Any]) -> str:
    samples = line["samples"]
    third = max(1, len(samples) // 3)
    rows = []
    for name, part in (("first third", samples[:third]), ("last third", samples[-third:])):
        last = part[-1]
        live = last["live_table_bytes"], last["live_index_bytes"]
        finished = last["finished_table_bytes"], last["finished_index_bytes"]
        rows.append(
            [name]
            + [_number(statistics.median(s[f] for s in part)) for f in ("p50_ms", "p99_ms")]
            + [f"{max(sample['dead'] for sample in part):,}", _mebibytes(*live)]
            + [_mebibytes(*finished), f"{max(sample['unfinished'] for sample in part):,}"]
        )
    heads = [f"{entrant.title}, {line['flow_per_second']:,.0f}/s for {line['seconds']:g} s"]
    heads += ["p50 ms", "p99 ms", "max dead tuples", "live MiB", "finished MiB"]
    return _table([*heads, "max unfinished"], rows)


def _mebibytes(table: int, indexes: int) -> str:
    return f"{table / 2**20:.0f} + {indexes / 2**20:.0f}"


def _history(lines: Lines) -> str:
    rows = []
    for line in lines.of("history", "asyncflow"):
        for length, name in (("empty", "none"), ("long", f"{line['finished'] / 1e6:g} million")):
            rounds = line["rounds"][length]
            rows.append([name, *(_spread(_of([r[verb] for r in rounds])) for verb in rounds[0])])
    if not rows:
        return ""
    return _section(
        "With a long history",
        "The store's functions on one connection, in batches of 100, each with its own commit.",
        _table(["finished tasks", "submit/s", "claim/s", "settle/s"], rows),
    )


def _of(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def _footprint(lines: Lines) -> str:
    rows = []
    for entrant in _present(lines, "footprint"):
        for process in ("worker", "api", "maintenance"):
            where = ("footprint", entrant.key)
            if not lines.of(*where, process=process):
                continue
            cpu = [
                lines.median(f"idle_cpu_percent.{k}", *where, process=process)
                for k in ("process", "PostgreSQL", "RabbitMQ")
            ]
            drain = {"workers": 1, "payload": "small"} if process == "worker" else {"workers": 0}
            loaded = lines.median("loaded.rss_mb", "drain", entrant.key, **drain)
            start = lines.median("first_task_seconds", "drain", entrant.key, **drain)
            rows.append(
                [entrant.title, process]
                + [_median(lines.median(f, *where, process=process)) for f in ("rss_mb", "uss_mb")]
                + [_median(loaded), _median(start), *map(_median, cpu)]
            )
    if not rows:
        return ""
    heads = ["", "", "idle RSS MiB", "unshared", "RSS after drain", "first task, s"]
    return _section(
        "Memory, startup, idle CPU",
        "All processes of a worker together; after a drain AsyncFlow's relay is included. CPU is "
        "in percent of one core.",
        _table([*heads, "idle CPU", "PostgreSQL", "RabbitMQ"], rows),
    )


def _configurations(lines: Lines) -> str:
    rows = [
        [entrant.title, entrant.keeps, entrant.settings]
        for entrant in ENTRANTS.values()
        if any(lines.of(s, entrant.key) for s in ("drain", "submit", "latency", "footprint"))
    ]
    return "## Configurations\n\n" + _table(["", "state", "settings"], rows) if rows else ""


def _versions(lines: Lines) -> str:
    packages = lines.environment["packages"]
    named = ", ".join(f"{name} {version}" for name, version in packages.items())
    return _section("Versions", f"Packages: {named}.")


def _errors(lines: Lines) -> str:
    errors = [
        f"- {line['scenario']}, {line['system']}, {line['case']}: `{line['error']}`"
        for line in lines.errors()
    ]
    return "## Measurements that failed\n\n" + "\n".join(errors) if errors else ""


def _present(lines: Lines, scenario: str) -> Iterator[Entrant]:
    return (entrant for entrant in ENTRANTS.values() if lines.of(scenario, entrant.key))


def _same(case: dict[str, Any], entrant: Entrant) -> dict[str, Any]:
    return case


def _picture(
    file: Path, title: str, draw: Callable[..., bool], lines: Lines, **options: Any
) -> str:
    return f"![{title}](benchmarks/{file.name})" if draw(file, lines, **options) else ""


def _section(title: str, *parts: str) -> str:
    texts = (_wrapped(part) if part[0] not in "|!" else part for part in parts if part)
    return "\n\n".join([f"## {title}", *texts])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    right = [n > 0 and all(_looks_like_a_figure(row[n]) for row in rows) for n in range(len(heads))]
    lines = [heads, ["--:" if is_right else "---" for is_right in right], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _looks_like_a_figure(cell: str) -> bool:
    return cell == "" or cell[0].isdigit() or cell[0] in "≥≤"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.repetitions == 1:
        return _number(spread.median)
    return f"{_number(spread.median)} [{_number(spread.lowest)}–{_number(spread.highest)}]"


def _median(value: float | None) -> str:
    return "" if value is None else _number(value)


def _times(ours: float | None, theirs: Spread | None) -> str:
    if ours is None or theirs is None:
        return ""
    return f"{ours / theirs.median:.2f} ×"


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
