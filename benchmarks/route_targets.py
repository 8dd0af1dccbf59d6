"""What the routing kernel is to reach on a GPU, and whether the numbers of route_gpu.py do.

    python benchmarks/route_targets.py RESULTS.json [--all]

Without --all only the six rows that decide are judged. The exit status is 0 where every target is met, 1
where one is missed, 2 where one that is required was not measured. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADLINE = "T=16 E=128 k=4"
DECIDING = {
    HEADLINE: "gpt-oss at batch 16: the paper's headline, and the row of the absolute target",
    "T=1 E=128 k=4": "one request alone: nothing to share, so that routing is all cost",
    "T=32 E=128 k=8": "Qwen3 at 32 requests: twice the experts per row, where sharing saves most",
    "T=64 E=256 k=8 grouped": "DeepSeek-V3, 16 requests with 3 drafts each: group limits, a full cluster",
    "T=16 E=384 k=8": "Kimi-K2: the most experts of all recipes, so the most registers",
    "T=256 E=128 k=4": "gpt-oss at 256 requests: the largest step of one launch, the largest cluster",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """`column` at most `most`, at all rows or at one."""

    what: str
    column: str
    most: float
    row: str | None = None
    is_required: bool = True

    def judge(self, results: dict[str, Row], names: list[str]) -> dict[str, Any]:
        names = [name for name in names if self.row in (None, name)]
        values = {name: results[name][self.column] for name in names if self.column in results.get(name, {})}
        judged: dict[str, Any] = {
            "target": self.what,
            "required": self.is_required,
            "measured": len(values),
            "missing": [name for name in names if name not in values],
            "missed": [name for name, value in values.items() if value > self.most],
        }
        if values:
            judged["worst_at"] = max(values, key=values.__getitem__)
            judged["worst"] = values[judged["worst_at"]]
        return judged


TARGETS = (
    Target(f"at most 8 us at {HEADLINE}", "xshare_us", 8.0, HEADLINE),
    Target("at most 1.5x plain top-k", "over_plain", 1.5),
    Target("at most 1.5x the best public kernel", "over_public", 1.5),
    Target("at most 1/10 of PyTorch, eager", "over_eager", 1 / 10),
    Target("at most 1/3 of PyTorch, compiled", "over_compiled", 1 / 3, is_required=False),
    Target(f"in a model at most 8 us at {HEADLINE}", "in_model_us", 8.0, HEADLINE),
    Target("in a model at most 1.5x plain top-k", "in_model_over_plain", 1.5),
    Target("in a model at most 1.5x the best public kernel", "in_model_over_public", 1.5),
)
MET, MISSED, INCOMPLETE = range(3)


def judge(results: dict[str, Row], names: list[str]) -> list[dict[str, Any]]:
    return [target.judge(results, names) for target in TARGETS]


def status_of(judged: list[dict[str, Any]]) -> int:
    if any(one["missed"] for one in judged):
        return MISSED
    return INCOMPLETE if any(one["missing"] for one in judged if one["required"]) else MET


def describe(one: dict[str, Any]) -> str:
    if not one["measured"]:
        return f"{'NOT MEASURED' if one['required'] else 'not measured':12} {one['target']}"
    outcome = "MISSED" if one["missed"] else "incomplete" if one["missing"] else "met"
    counts = f"missed at {len(one['missed'])} of {one['measured']}, " if one["missed"] else ""
    missing = f", not measured at {', '.join(one['missing'])}" if one["missing"] and one["required"] else ""
    return f"{outcome:12} {one['target']}: {counts}worst {one['worst']:.3g} at {one['worst_at']}{missing}"


def table(results: dict[str, Row], names: list[str]) -> list[str]:
    """Our time and the ratios that are judged, a row per line, and what went wrong there."""
    columns = dict.fromkeys(target.column for target in TARGETS)
    lines = [f"{'':26}" + "".join(f"{column:>{len(column) + 2}}" for column in columns)]
    for name in names:
        row = results.get(name, {})
        cells = (f"{row[c]:{len(c) + 2}.2f}" if c in row else f"{'-':>{len(c) + 2}}" for c in columns)
        lines.append(f"{name:26}" + "".join(cells))
        lines += [f"    {key}: {value}" for key, value in row.items() if key.endswith("_error")]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what route_gpu.py --json wrote")
    parser.add_argument("--all", action="store_true", help="judge every row that was measured")
    arguments = parser.parse_args()
    try:
        results = json.loads(arguments.results.read_text())["results"]
    except (OSError, ValueError, KeyError) as error:
        print(f"{arguments.results}: no results ({error})")
        sys.exit(INCOMPLETE)
    names = list(results) if arguments.all else list(DECIDING)
    judged = judge(results, names)
    print("\n".join([*table(results, names), *map(describe, judged)]))
    sys.exit(status_of(judged))


if __name__ == "__main__":
    main()
