"""The tables of speed, made from what `benchmarks.efficiency --store` kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tomevit.cli.options import with_range

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
NAMES = {"vit_s16": "ViT-S/16", "vit_b16": "ViT-B/16", "vit_l16": "ViT-L/16", "vit_h14": "ViT-H/14"}
FIRST = "efficiency_vit_b16_224_float32_b8_cpu.json"
HEAD = ["", "dtype", "batch", "r", "images/s", "best unmerged", "speed-up", "FLOP ratio", "efficiency", "over timm"]
HEAD += ["over the reference"]
Row = dict[str, Any]


def first() -> str:
    """ViT-B/16 as users meet it first, of one run: as created and as optimized, over timm's fastest."""
    result = json.loads((RESULTS / FIRST).read_text(encoding="utf-8"))
    (comparison,) = result["comparisons"]
    speed = {(row["implementation"], row["mode"], row["r"]): row["images_per_second"] for row in comparison["rows"]}
    timm = max(rate for (implementation, *_), rate in speed.items() if implementation == "timm")
    lines = ["| | tokens leaving | GFLOPs | images/s | over timm | optimized | over timm |", "|" + "---|" * 7]
    for row in sorted(comparison["rows"], key=lambda row: row["implementation"] != "timm"):
        implementation, mode, r = row["implementation"], row["mode"], row["r"]
        name = {"timm": f"timm {result['timm']}, {mode}", "tomevit": f"tomevit, r = {r}"}
        if implementation == "timm" or (implementation, mode) == ("tomevit", "eager"):
            optimized = speed.get((implementation, "optimized", r))
            rates = (
                f"{each:.2f} | {each / timm:.2f}" if each else " | " for each in (row["images_per_second"], optimized)
            )
            cells = name[implementation], str(row["tokens"]), f"{row['gflops']:.2f}", *rates
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Two CPU cores, batch {comparison['batch']}, {comparison['dtype']}, eager unless it says otherwise, "
            f"and from `tomevit.optimize`,",
            f"interleaved, medians of {comparison['rounds']} rounds:",
            f"{result['device']}, {result['threads']} threads, torch {result['torch']}, Python {result['python']};",
            f"[stored](benchmarks/results/{FIRST}).",
        ]
    )


def section() -> str:
    """A line for each setting and r: the fastest of ours, over the fastest of all that merge nothing."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("efficiency_*.json")]
    places = set()
    for result in sorted(stored, key=order):
        places.add(", ".join(f"{name} {result[name]}" for name in ("torch", "python")) + f", {result['device']}")
        lines += [f"| {' | '.join(cells)} |" for cells in rows(result)]
    assert len(places) == 1, f"the table must say which row is of which: {places}"
    return "\n".join(lines)


def order(result: dict[str, Any]) -> tuple[Any, ...]:
    (comparison,) = result["comparisons"]
    return (
        comparison["dtype"] != "float32",
        -comparison["batch"],
        list(NAMES).index(result["model"]),
        result["img_size"],
    )


def rows(result: dict[str, Any]) -> Iterator[list[str]]:
    (comparison,) = result["comparisons"]
    best = fastest(row for row in comparison["rows"] if not row["merges"])
    assert best is not None
    size = result["img_size"][0]
    name = NAMES[result["model"]] + (f" at {size}" if size != 224 else "")
    for r in dict.fromkeys(row["r"] for row in comparison["rows"] if row["merges"]):

        def alike(implementation: str, r: int = r) -> Row | None:
            return fastest(
                row
                for row in comparison["rows"]
                if row["implementation"] == implementation and (row["r"] == r or implementation == "timm")
            )

        ours = alike("tomevit")
        assert ours is not None
        others = [alike("timm"), alike("reference")]
        yield [
            name,
            comparison["dtype"],
            str(comparison["batch"]),
            str(r),
            rate(ours),
            rate(best),
            f"{ours['speed_up']:.2f}",
            f"{ours['flop_ratio_computed']:.2f}",
            with_range(ours["efficiency"], ours.get("efficiency_range"), 2),
            *("" if row is None else f"{ours['images_per_second'] / row['images_per_second']:.2f}" for row in others),
        ]


def fastest(found: Iterator[Row]) -> Row | None:
    return max(found, key=lambda row: row["images_per_second"], default=None)


def rate(row: Row) -> str:
    """Images per second, and how they were had."""
    implementation = "" if row["implementation"] == "tomevit" else f"{row['implementation']} "
    return f"{row['images_per_second']:.2f}, {implementation}{row['mode']}"
