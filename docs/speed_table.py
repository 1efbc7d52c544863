"""The tables of speed, made from what `benchmarks.efficiency --store` kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomevit
from docs import tables, weights_table
from tomevit.cli.options import with_range

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
NATIVE = RESULTS / "avx512_bf16"  # of a processor with instructions for bfloat16
NAMES = {"vit_s16": "ViT-S/16", "vit_b16": "ViT-B/16", "vit_l16": "ViT-L/16", "vit_h14": "ViT-H/14"}
FIRST = "efficiency_vit_b16_224_float32_b8_cpu.json"
HEAD = (
    "",
    "dtype",
    "batch",
    "r",
    "images/s",
    "unmerged",
    "speed-up",
    "FLOPs",
    "efficiency",
    "over timm",
    "over reference",
)
#: What the README begins with: the best trade-off, one at fewer pixels, and one that is free for commerce.
THREE = ("swag_l16_512.ft_in1k", "swag_b16_384.ft_in1k", "vit_b16.augreg_in21k_ft_in1k")
Row = dict[str, Any]


def three_models() -> str:
    """Published accuracies of three sets of weights, and beside them how much faster they are with merging."""
    columns = ("model", "r", "top-1, %", "merged, %", "points", "FLOPs, times fewer", "times as fast", "licence")
    found = {row.card.full_name: row for row in tables.merged_figures()}
    rows = []
    for name in THREE:
        row = found[name]
        card, r = row.card, row.merged.r
        rows.append(
            (
                f"`{card.name}`",
                r,
                f"{row.plain.top1:.2f}",
                f"{row.merged.top1:.2f}",
                f"{row.merged.top1 - row.plain.top1:+.2f}".replace("-", "−"),
                f"{row.flop_ratio:.2f}",
                measured_speed_up(card.config, r),
                weights_table.LICENCES[card.licence or ""],
            )
        )
    return "\n".join(
        [
            tables.table(columns, rows),
            "",
            "Accuracies on ImageNet-1k, as published, merging off the shelf; FLOPs by the ToMe paper's count.",
            "Times as fast: measured in bfloat16, on two cores of an AMD EPYC with AVX-512, batches of 8, against",
            "the fastest that merges nothing, ours or timm's ([more](docs/speed.md)).",
        ]
    )


def measured_speed_up(config: tomevit.Config, r: object) -> str:
    """Over the fastest unmerged model, as stored for this architecture and r in bfloat16 and batches of 8."""
    for result in map(stored_result, NATIVE.glob("efficiency_*_bfloat16_b8_cpu.json")):
        measured = tomevit.card(result["model"]).config
        if replace(measured, img_size=tuple(result["img_size"]), init=config.init) == config:
            (comparison,) = result["comparisons"]
            ours = fastest(row for row in comparison["rows"] if row["implementation"] == "tomevit" and row["r"] == r)
            if ours is not None:
                return f"{ours['speed_up']:.2f}"
    return "not measured"


def stored_result(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def first() -> str:
    """ViT-B/16 as users meet it first, of one run: as created and as optimized, over timm's fastest."""
    result = stored_result(RESULTS / FIRST)
    (comparison,) = result["comparisons"]
    speed = {(row["implementation"], row["mode"], row["r"]): row["images_per_second"] for row in comparison["rows"]}
    timm = max(rate for (implementation, *_), rate in speed.items() if implementation == "timm")
    lines = ["| | tokens that remain | GFLOPs | images/s | over timm | optimized | over timm |", "|" + "---|" * 7]
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
            f"[stored](../benchmarks/results/{FIRST}).",
        ]
    )


def section(folder: Path = RESULTS) -> str:
    """A line for each setting and r: the fastest of ours, over the fastest of all that merge nothing."""
    cells: list[list[str]] = []
    places = set()
    for result in sorted(map(stored_result, folder.glob("efficiency_*.json")), key=order):
        places.add(", ".join(f"{name} {result[name]}" for name in ("torch", "python")) + f", {result['device']}")
        cells += rows(result)
    assert len(places) == 1, f"the table must say which row is of which: {places}"
    return tables.table(HEAD, cells, text=2)


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
    name = f"{NAMES[result['model']]}{f' at {size}' if size != 224 else ''}"
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
    """Images per second; how they were had, where that is not what most are: tomevit's, optimized."""
    how = {"tomevit optimized": "", "tomevit eager": " (eager)"}
    had = f"{row['implementation']} {row['mode']}"
    return f"{row['images_per_second']:.2f}{how.get(had, f' ({had})')}"
