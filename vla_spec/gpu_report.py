"""The page of a GPU check: Markdown from its results.json, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

MIB = 2**20
Tree = dict[str, Any]


def render(results: Tree) -> str:
    """The whole page."""
    gpu, steps = results["gpu"], results["steps"]
    lines = [
        "# GPU check",
        "",
        f"{results['verdict']}: {gpu['name']}, SM {gpu['sm']}, {results['library']}; model {results['model']} in "
        f"{results['precision']}.",
        "",
        f"`{results['command']}`, {results['created']}",
        "",
        *table(("step", "outcome", "s", ""), [(s["step"], s["outcome"], s["seconds"], s["message"]) for s in steps]),
    ]
    for step in steps:
        draw = _SECTIONS.get(step["step"])
        if draw is not None and step["facts"]:
            lines += ["", f"## {step['step']}", "", *draw(step["facts"])]
    lines += ["", "## machine", "", *table(("", ""), [*gpu.items(), *_flat(results["machine"])])]
    lines += ["", "## what the words mean", ""]
    lines += [f"- **{name}**: {text}" for name, text in results["meaning"].items()]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [_row(head), _row(["---"] * len(head))]
    return lines + [_row(row) for row in rows]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _flat(tree: Tree) -> list[tuple[str, object]]:
    return [(name, value) for name, value in tree.items() if isinstance(value, str | int | float)]


def _build(facts: Tree) -> list[str]:
    state = "found in the cache" if facts["was_cached"] else "built now"
    lines = [f"{state}: {facts['bytes'] / MIB:.1f} MiB in {facts['build_seconds']} s, tiers {facts['tiers']}", ""]
    rows = [
        (name, f"{g['bytes'] / MIB:.1f}", g["build_seconds"], "from its parts" if g["is_decomposed"] else "")
        for name, g in facts["graphs"].items()
    ]
    return lines + table(("graph", "MiB", "build s", "attention"), rows)


def _load(facts: Tree) -> list[str]:
    share = facts.get("reload_share")
    told = f", {share:.1%} of building" if share is not None else ""
    lines = [f"{facts['provider']}: reloaded in {facts['reload_seconds']} s{told}", ""]
    rows = [
        (name, None if half is None else f"{half:.0%}", f"{facts['scratch_bytes'].get(name, 0) / MIB:.1f}")
        for name, half in facts["half_share"].items()
    ]
    return lines + table(("graph", "in its precision", "scratch MiB"), rows)


def _verify(facts: Tree) -> list[str]:
    gates = facts["gates"]
    rows = [
        (name, value, gates.get(name, {}).get("good"), gates.get(name, {}).get("outcome"))
        for name, value in facts["metrics"].items()
    ]
    return table(("metric", "value", "passes from", "outcome"), rows)


def _tiers(facts: Tree) -> list[str]:
    rows = [
        (
            row["call"],
            *(row[kind][p] for kind in ("captured", "uncaptured") for p in ("p50_us", "p99_us")),
            row.get("device_us"),
        )
        for row in facts["table"]
    ]
    first = facts["table"][0]["captured"]
    lines = table(("call", "captured p50 us", "p99", "uncaptured p50 us", "p99", "on the device p50 us"), rows)
    return [*lines, "", f"{first['n']} calls each, behind {first['warm_up']} of warm-up."]


def _graphs(facts: Tree) -> list[str]:
    rows = [
        (call["call"], call["is_captured"], call["nodes"], "{} in, {} out".format(*call["copies"]), call["slow_reason"])
        for call in facts["calls"]
    ]
    return table(("call", "captured", "nodes", "copies", "why not"), rows)


def _cache(facts: Tree) -> list[str]:
    first, last = facts["rows"]
    return [
        f"A step over rows {first} to {last}, padded to {facts['tier']}, changed rows {facts['changed_rows']}; "
        f"committing nodes {facts['committed']} moved their rows and no others ({facts['cache_bytes'] / MIB:.2f} MiB "
        f"of cache)."
    ]


def _streams(facts: Tree) -> list[str]:
    rows = [
        (name.replace("_", " "), facts[name]["p50_us"], facts[name]["p99_us"], facts["prefills_beside"].get(name))
        for name in ("alone", "beside_low", "beside_same")
    ]
    return table((f"step {facts['step']} of the target", "p50 us", "p99", "prefills meanwhile"), rows)


def _loop(facts: Tree) -> list[str]:
    names = list(facts["rows"][0]) if facts["rows"] else []
    return table(names, [[row[name] for name in names] for row in facts["rows"]])


def _profile(facts: Tree) -> list[str]:
    names = list(facts["latency"][0]) if facts["latency"] else []
    return table(names, [[row[name] for name in names] for row in facts["latency"]])


_SECTIONS: dict[str, Callable[[Tree], list[str]]] = {
    "build": _build, "load": _load, "verify": _verify, "tiers": _tiers, "graphs": _graphs, "cache": _cache,
    "streams": _streams, "loop": _loop, "profile": _profile,
}  # fmt: skip
