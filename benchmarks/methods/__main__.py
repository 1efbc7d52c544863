"""Which way to merge is best at equal time: every matching and shape, and tuned schedules, on handwritten digits.

    python -m benchmarks.methods --store                       # the models that ship: some 25 minutes on two cores
    python -m benchmarks.methods --store --weights digits_p2.plain seed1.safetensors   # or others, files as well
    python -m benchmarks.methods --minutes 10                  # a part of it; the same command goes on
    python -m benchmarks.methods --limit 64 --rounds 2 --weights digits_p1.plain       # tries the program

Files whose cards name the same model and weights are taken for seeds of one kind. For each: the answers to the held-out
images at every candidate (accuracy, agreement with r = 0, KL divergence), and the best schedules that `tomevit.tune`
finds on images of the training part. For each architecture: rounds in which all schedules and r = 0 take turns, on one
thread. Each row is stored when it is measured, whatever ends the process then. In the end, in the folder:

    rows.jsonl      all that was measured; other versions or processors have rows of their own, in a folder within
    points.md       a table of every schedule
    methods.md      what docs/methods.md shows: which way wins at equal time, and by how much
    methods_*.png   accuracy and KL over throughput

--store puts them where docs/methods.md is made from, and writes that page. --rankings adds what DiffRate's way could
rank patches by, and a model without class token, trained here first; of these only answers are of interest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import tomevit
from benchmarks.gpu.store import Store, open_store
from benchmarks.methods import page
from benchmarks.methods.rankings import without_class_token
from benchmarks.methods.ways import BUDGETS
from benchmarks.methods.work import Settings, Subject, describe, waiting
from tomevit.measure.timing import environment
from tomevit.output import new_file
from tomevit.tasks.plots import require_matplotlib

WEIGHTS = ("digits_p2.plain", "digits_p2.tome_r13", "digits_p1.plain", "digits_p1.tome_r16")


def main(arguments: Sequence[str] | None = None) -> None:
    started, usual = time.monotonic(), Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description="ways to merge, at equal time")
    add = parser.add_argument
    add("--weights", nargs="+", default=list(WEIGHTS), metavar="NAME-OR-FILE", help="of digits models")
    add("--minutes", type=float, default=float("inf"), help="stop then; the same command goes on")
    add("--rounds", type=int, default=usual.rounds, help="of timed calls")
    add("--batch", type=int, help="images per timed call; by default 128 of digits_p1 and 32 of digits_p2")
    add("--limit", type=int, help="of the held-out images so many, to try the program")
    add("--budgets", nargs="+", default=list(BUDGETS), help="of FLOPs, for every way")
    add("--tune-images", type=int, default=usual.tune_images, help="of the training part; 0: no tuned schedules")
    add("--rankings", action="store_true", help="see above")
    add("--out", type=Path, default=Path("build/methods"), help="the folder; one that is there is gone on with")
    add("--store", action="store_true", help="into benchmarks/results/methods, and onto docs/methods.md")
    args = parser.parse_args(arguments)
    for name in ("rounds", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    settings = Settings(
        args.rounds, args.batch, args.limit, args.tune_images, tuple(args.budgets), rankings=args.rankings
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        require_matplotlib()
        store, told = open_store(
            page.RESULTS if args.store else args.out, environment() | {"tomevit": tomevit.__version__}
        )
        if told:
            print(told, flush=True)
        names = list(args.weights)
        if args.rankings:
            store.folder.mkdir(parents=True, exist_ok=True)
            names.append(str(without_class_token(store.folder / "without_class_token.safetensors")))
        subjects = [Subject(name, settings) for name in dict.fromkeys(names)]
        describe(store, subjects)
        left = go_on(store, subjects, settings, started + 60 * args.minutes)
        report(store, onto_page=args.store)
        if left:
            print(f"{left} steps are left: the same command goes on")
    except (ValueError, OSError) as error:
        print(f"benchmarks.methods: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("benchmarks.methods: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        torch.set_num_threads(threads)


def go_on(store: Store, subjects: Sequence[Subject], settings: Settings, until: float) -> int:
    """Measure what is missing, until a time; returns how many steps are left."""
    started, done = time.monotonic(), 0.0
    while steps := waiting(store, subjects, settings):
        step, all_left = steps[0], sum(each.work for each in steps)
        if time.monotonic() >= until:
            return len(steps)
        for share in step.run():
            taken, finished = time.monotonic() - started, done + share * step.work
            left = taken / finished * (all_left - share * step.work)
            print(
                f"{step.label}: {100 * share:.0f} %; {taken / 60:.1f} min so far, about {left / 60:.1f} left",
                flush=True,
            )
            if time.monotonic() >= until and share < 1:
                return len(steps)
        done += step.work
    return 0


def report(store: Store, *, onto_page: bool) -> None:
    """Write what came of it, as far as there are answers and times."""
    setting, groups = page.read(store.folder)
    if not groups:
        print("no times are stored yet, so there is nothing to compare")
        return
    text = page.section(setting, groups)
    texts = {store.folder / "points.md": page.points(groups), store.folder / "methods.md": text + "\n"}
    pictures = store.folder
    if onto_page:
        pictures = page.PAGE.parent / "images"
        texts[page.PAGE] = page.written(page.PAGE.read_text(encoding="utf-8"), text)
    for architecture in dict.fromkeys(group.architecture for group in groups):
        those = [group for group in groups if group.architecture == architecture]
        page.draw(pictures / page.picture_name(architecture), setting, those)
    for path, content in texts.items():
        with new_file(path) as draft:
            draft.write_text(content, encoding="utf-8")
    print(text)
    print(f"\nwritten to {store.folder}{f' and {page.PAGE}' if onto_page else ''}")


if __name__ == "__main__":
    main()
