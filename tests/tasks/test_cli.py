"""The commands, run as a user runs them."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from PIL import Image

import tomevit
from tests.helpers import tiny
from tomevit import cli
from tomevit.cards import read_contents
from tomevit.config import Preset


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `tomevit ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_list_shows_every_model(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    _, *rows, below = out.splitlines()
    assert [row.split()[0] for row in rows] == tomevit.list_models()
    assert below == "* Not by a head: k-NN, zero-shot."
    (clip,) = (row for row in rows if row.startswith("clip_b16 "))
    assert "  68.34*  " in clip


def test_list_filters_and_names_weights(capsys):
    _, out, _ = run(capsys, "list", "deit_s16*", "--weights")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["deit_s16.fb_in1k", "deit_s16.tome_r13"]


def test_list_json(capsys):
    _, out, _ = run(capsys, "list", "swag*", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows.keys() == set(tomevit.list_models("swag*"))
    assert rows["swag_h14_518"]["img_size"] == [518, 518]
    assert rows["swag_h14_518"]["params"] == 633_470_440
    assert rows["swag_h14_518"]["licence"] == "cc-by-nc-4.0"


def test_info_says_what_r_does(capsys):
    status, out, _ = run(capsys, "info", "vit_b16", "--r", "13")
    assert status == 0
    assert "197 184 171 158 145 132 119 106 93 80 67 54 41" in out
    assert "10.37 GFLOPs, 1.69 times fewer" in out
    assert "apache-2.0" in out


def test_info_and_list_show_presets(capsys, tmp_path):
    status, out, _ = run(capsys, "info", "deit_s16", "--r", "diffrate-2.9g")
    assert status == 0
    assert "197 197 194 176 156 141 133 121 107 88 64 56 3" in out
    assert 'here r = [0,"2+1 diffrate",' in out
    assert "diffrate-2.9g: 2.905 GFLOPs, 1.58 times fewer, 3 tokens after the last block; top-1 79.54 % (deit" in out
    assert "top-1 79.54 % at r = diffrate-2.9g (OpenGVLab/DiffRate@91ae3e3" in out
    _, out, _ = run(capsys, "info", "deit_s16", "--json")
    (preset,) = [preset for preset in json.loads(out)["presets"] if preset["name"] == "diffrate-2.3g"]
    assert (preset["tokens"][-1], preset["num_tokens"], len(preset["r"])) == (3, 197, 12)
    assert [figure["top1"] for figure in preset["figures"]] == [78.75]
    _, out, _ = run(capsys, "list", "deit_s16", "--json")
    assert preset in json.loads(out)[0]["presets"]
    assert "diffrate" not in run(capsys, "info", "vit_s16")[1]
    _, out, _ = run(capsys, "info", "deit_s16", "--img-size", "384", "--json")
    assert json.loads(out)["presets"] == []
    path = tmp_path / "model.safetensors"
    tomevit.save(tomevit.create("deit_ti16", r="2x"), path)
    _, out, _ = run(capsys, "info", str(path))
    assert "diffrate-0.6g: 0.65" in out


def test_info_json_at_another_size(capsys):
    _, out, _ = run(capsys, "info", "mae_l16.tome_r8", "--img-size", "224x320", "--json")
    card = json.loads(out)
    assert card["config"]["img_size"] == [224, 320]
    assert card["tokens"][0] == 1 + 14 * 20
    assert card["tokens"][-1] == 1 + 14 * 20 - 24 * 8
    assert [weights["weights"] for weights in card["all_weights"]] == ["tome_r8"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("8", 8),
        ("8,-1", (8, -1.0)),
        ("[20,0,7]", [20, 0, 7]),
        ("0.08", 0.08),
        ("2x", "2x"),
        ("60%", "60%"),
        ("2x,0.5", ("2x", 0.5)),
        ("2x late", "2x late"),
        ("1.5x grid", "1.5x grid"),
        ("8 pitome", "8 pitome"),
        ('[0,"8+3 diffrate"]', [0, "8+3 diffrate"]),
    ],
)
def test_every_form_of_r_can_be_written(capsys, written, meant):
    _, out, _ = run(capsys, "info", "deit_ti16", "--r", written, "--json")
    assert tuple(json.loads(out)["tokens"]) == tomevit.create("deit_ti16", r=meant).token_counts()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["info", "vit_b61"], "did you mean vit_b16"),
        (["info"], "NAME"),
        (["sing"], "sing"),
        (["--sing"], "--sing"),
        (["list", "resnet*"], "no model matches 'resnet*'"),
        (["info", "vit_b16.best"], "augreg_in21k_ft_in1k"),
        (["info", "vit_b16", "--img-size", "100"], "96x96"),
        (["info", "vit_b16", "--img-size", "big"], "224x320"),
        (["info", "vit_b16", "--r", "0.9"], "0.5"),
        (["info", "vit_b16", "--r", "-3"], "negative"),
        (["info", "vit_b16", "--r", "8,-2"], "inflection"),
        (
            ["info", "vit_b16", "--r", "8,1"],
            "may be two r, or r = 8 with the inflection 1: write --r 8 1, or --r 8,1.0",
        ),
        (
            ["info", "vit_b16", "--r", "8,8,13"],
            "may be several r, or one for each block: write --r 8 13, or --r [8,8,13]",
        ),
        (["info", "vit_b16", "--r", "8,13,2x"], "is no r"),
        (["classify", "a.png", "--r", "8,13"], "'8,13' names several r, and this takes one"),
        (["info", "vit_b16", "--r", "eight"], "8,-1"),
        (["info", "vit_b16", "--r", "9x"], "cannot be reached"),
        (["info", "vit_b16", "--r", "2x early"], "'early' is neither a shape (late, deferred) nor a matching"),
        (["info", "vit_b16", "--r", "8 grid"], "say '1.5x grid'"),
        (["info", "vit_b16", "--r", '["grid","grid"]', "--img-size", "16"], "cannot merge neighbours 2x2"),
        (["info", "vit_b16", "--r", "diffrate-0.1g"], "is no preset of this model"),
        (["info", "vit_b16", "--r", "[1,2"], "[20,0,7]"),
        (["bench", "deit_ti16", "--r", "[1,1,1,1,1,1,1,1,1,1,1,1,1]"], "the model has 12"),
        (["bench", "deit_ti16", "--r", "2x", "9x"], "cannot be reached"),
        (["bench", "deit_ti16", "--r", "2x", "diffrate-0.1g"], "is no preset of this model"),
        (["bench", "--dtype", "int8"], "bfloat16"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--device", "abacus"], "abacus"),
        (["bench", "--device", "meta"], "no device 'meta' here"),
        (["bench", "--plot", "a.png", "--out", "./a.png"], "named for two results"),
        (["bench", "digits_p1", "--dtype", "tf32"], "CUDA"),
        (["bench", "digits_p1", "--timm"], "no name for digits_p1"),
        (["bench", "--target", "1"], "--target"),
        (["bench", "--mode", "fast"], "compiled"),
        (["bench", "--out", "/nowhere/table.txt"], "no directory /nowhere"),
        (["bench", "--plot", "picture.xyz"], ".png, .svg or .pdf"),
        (["bench", "--json", "--markdown"], "--json and --markdown ask for two forms of one report"),
        (["bench", "--csv", "--json"], "--csv and --json ask for two forms"),
        (["classify", "a.png", "--csv", "--json"], "--csv and --json ask for two forms"),
        (["eval", "--data", ".", "--model", "vit_b16", "--markdown", "--json"], "--markdown and --json ask for two"),
        (["tune", ".", "--model", "vit_b16", "--json", "--csv"], "--json and --csv ask for two forms"),
        (["demo", "--r", "-1"], "negative"),
        (["demo", "--r", "8", "9x"], "cannot be reached"),
        (["demo", "-o", "/dev/null/demo"], "/dev/null/demo cannot be written: Not a directory"),
        (["export", "digits_p1.plain", "--format", "timm", "-o", "/dev/null/a/"], "/dev/null/a cannot be written"),
        (["train", "digits", "--model", "digits_p1", "-o", "/dev/null/run"], "/dev/null/run cannot be written"),
        (["lsit"], "there is no command 'lsit'; did you mean list"),
        (["zzz"], "there is no command 'zzz'; there are list, info"),
        (["list", "--weights=1"], "(see tomevit list --help)"),
        (["demo", "--r"], "(see tomevit demo --help)"),
    ],
)
def test_a_mistake_gets_one_clear_line(capsys, arguments, says):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("tomevit: ")
    assert says in err


WITH_R = ["bench", "classify", "demo", "embed", "eval", "export", "info", "train", "visualize"]


def test_every_verb_with_an_r_names_its_forms_and_explains_a_wrong_one(capsys, tmp_path):
    verbs = [name for name in cli.VERBS if "--r" in {opt for p in cli.load_command(name).params for opt in p.opts}]
    assert sorted(verbs) == WITH_R
    image, out = tmp_path / "a.png", tmp_path / "a.html"
    Image.new("L", (8, 8)).save(image)
    digits, picture = ("--model", "digits_p1.plain"), str(image)
    calls = {
        "bench": ("digits_p1",),
        "classify": (picture, *digits),
        "demo": (),
        "embed": (picture, *digits, "-o", str(tmp_path / "a.safetensors")),
        "eval": ("--data", str(tmp_path), *digits),
        "export": ("digits_p1.plain", "--format", "pt2", "-o", str(tmp_path / "a.pt2")),
        "info": ("digits_p1.plain",),
        "train": ("digits", "--model", "digits_p1", "--out", str(tmp_path / "run")),
        "visualize": (picture, *digits, "-o", str(out)),
    }
    for verb in verbs:
        status, shown, _ = run(capsys, verb, "--help")
        assert status == 0
        for form in ("8,-1", "2x", "60%", "'2x late'", "'8 pitome'", "preset"):
            assert form in " ".join(shown.split()), (verb, form)
        for wrong, says in (("fast", "'fast' is no r; give 8, 8,-1"), ("9x", "r = '9x' cannot be reached")):
            if verb != "eval" or wrong != "9x":
                status, shown, err = run(capsys, verb, *calls[verb], "--r", wrong)
                assert (status, shown, len(err.splitlines())) == (2, "", 1), (verb, err)
                assert says in err


@pytest.mark.parametrize(
    "call", ["classify a.png", "embed a.png -o a.parquet", "export a --format pt2 -o a.pt2", "train"]
)
def test_a_second_r_where_one_is_taken_is_no_file(capsys, call):
    for more in (["8", "13"], ["8,13"], ["8 13"]):
        status, out, err = run(capsys, *call.split(), "--r", *more)
        assert (status, out) == (2, "")
        assert re.search(rf"names several r, and (this|{call.split()[0]}) takes one", err), err


def test_several_r_can_be_written_in_every_way(capsys):
    ways = (["--r", "8", "13"], ["--r=8", "13"], ["--r=8,13"], ["--r", "8 13"], ["--r", "8", "--r", "13"])
    answers = [run(capsys, "info", "vit_b16", "--json", *way) for way in ways]
    assert {status for status, *_ in answers} == {0}
    assert [[at["r"] for at in json.loads(out)["schedules"]] for _, out, _ in answers] == [[8, 13]] * len(ways)


def test_an_empty_path_is_not_the_current_directory(capsys, tmp_path, monkeypatch):
    """As of -o "$OUT", where OUT is not set."""
    monkeypatch.chdir(tmp_path)
    tried = 0
    for verb in cli.VERBS:
        for param in cli.load_command(verb).params:
            if isinstance(param.type, click.Path):
                given = [param.opts[0], ""] if isinstance(param, click.Option) else [""]
                status, out, err = run(capsys, verb, *given)
                assert (status, out, len(err.splitlines())) == (2, "", 1), (verb, err)
                assert "the path is empty" in err
                tried += 1
    assert tried > 20
    assert run(capsys, "classify", "")[2] == "tomevit: the path of an image is empty; the current folder is .\n"
    assert not [*tmp_path.iterdir()]


def test_what_follows_an_r_is_one_more_or_the_model(capsys, tmp_path, monkeypatch):
    """A budget and the name of a preset are values, a model's name and a file are not, whatever the file is called."""
    monkeypatch.chdir(tmp_path)
    preset = Preset(name="diffrate-0.1g", r=(4, "2+3 diffrate", 0, 0), num_tokens=65, source="a paper")
    model = tiny()
    tomevit.save(model, "mine.safetensors", card=replace(model.card, presets=(preset,)))
    _, out, _ = run(
        capsys, "info", "--json", "--r", "8", "1.5x", "60%", "diffrate-0.1g", "1.2x late", "mine.safetensors"
    )
    found = json.loads(out)["schedules"]
    assert [at["r"] for at in found] == [8, "1.5x", "60%", "diffrate-0.1g", "1.2x late"]
    assert found[3]["plain"] == found[3]["schedule"] == [4, "2+3 diffrate", 0, 0]
    for at in found:
        assert tuple(at["tokens"]) == model.token_counts(at["plain"])
    costs = [tomevit.flops(model.config, r, computed=True) for r in (0, found[1]["plain"] - 1, found[1]["plain"])]
    assert costs[0] / costs[1] < 1.5 <= costs[0] / costs[2]
    assert found[1]["gflops_computed"] == costs[2] / 1e9

    tomevit.save(model, "diffrate-0.1g.safetensors", card=replace(model.card, presets=(preset,)))
    (tmp_path / "diffrate-0.1g.safetensors").rename("diffrate-0.1g")
    _, out, _ = run(capsys, "info", "--r", "8", "diffrate-0.1g")
    assert next(line for line in out.splitlines() if line.startswith("r = ")).startswith("r = 8 ")
    assert out.count("\nr = ") == 1


@pytest.mark.parametrize("many", [["0", "8", "13"], ["0,8,13"], ["0,8", "13"], ["0", "--r=8,13"]])
def test_several_r_are_written_apart_or_with_commas(capsys, many):
    _, out, _ = run(capsys, "info", "--json", "--r", *many, "vit_b16")
    assert [at["r"] for at in json.loads(out)["schedules"]] == [0, 8, 13]


@pytest.mark.parametrize("verb", ["bench", "demo", "eval", "info", "visualize"])
def test_every_verb_that_takes_several_r_takes_commas(verb):
    command = cli.load_command(verb)
    needed = {
        "eval": ["--data", ".", "--model", "vit_b16"],
        "info": ["vit_b16"],
        "visualize": ["a.png", "-o", "a.html"],
    }
    for several in (["8", "13"], ["8,13"]):
        assert command.make_context(verb, [*needed.get(verb, []), "--r", *several]).params["r_values"] == (8, 13)
    assert command.make_context(verb, [*needed.get(verb, []), "--r", "8,-1"]).params["r_values"] == ((8, -1.0),)
    assert command.make_context(verb, [*needed.get(verb, []), "--r", "8,1.0"]).params["r_values"] == ((8, 1.0),)


def test_other_values_may_have_commas_too():
    context = cli.load_command("bench").make_context(
        "bench", ["--batch", "1,8", "--dtype", "float32,bfloat16", "--r=8"]
    )
    assert (context.params["batches"], context.params["dtypes"]) == ((1, 8), ("float32", "bfloat16"))


def test_info_says_what_words_mean(capsys, tmp_path):
    picture = tmp_path / "tokens.svg"
    status, out, _ = run(capsys, "info", "deit_s16", "--r", "2x", "2x late", "1.5x grid", "--plot", str(picture))
    assert status == 0
    assert "as computed 2.05, 2.09 times fewer; here r = 18\n" in out
    assert '[0,0,0,0,0,"grid",0,' in out
    assert "tokens 197 197 197 197 197 197 50 50 50 50 50 50 50\n" in out
    assert "r = 2x late: 2.143 GFLOPs" in picture.read_text(encoding="utf-8")


def test_traceback_on_request():
    with pytest.raises(ValueError, match="no model 'vit_b61'"):
        cli.main(["--traceback", "info", "vit_b61"])


def test_no_arguments_show_the_verbs(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert {"list", "info", "demo", "bench"} <= set(out.split())


def test_help_has_groups_whole_summaries_and_where_the_docs_are(capsys, monkeypatch):
    for columns in ("80", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = run(capsys, "--help")
        assert max(map(len, out.splitlines())) <= int(columns)
        words = " ".join(out.split())
        for title, verbs in cli.GROUPS.items():
            assert f"{title}:\n" in out
            for name, verb in verbs.items():
                assert f"{name} {verb.help}" in words
        assert f"Documentation: {cli.documentation()}." in words


@pytest.mark.parametrize(
    ("urls", "where"),
    [
        (None, "README.md and docs/ in the repository"),
        (["Homepage, https://a.org"], "https://a.org"),
        (["Homepage, https://a.org", "Documentation, https://a.org/docs"], "https://a.org/docs"),
    ],
)
def test_where_the_docs_are_is_what_the_package_says(monkeypatch, urls, where):
    class Package:
        def get_all(self, name):
            assert name == "Project-URL"
            return urls

    monkeypatch.setattr(cli, "metadata", lambda name: Package())
    assert cli.documentation() == where


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_an_example_that_it_takes(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    verb, *arguments = shlex.split(cli.VERBS[name].example)
    assert verb == name
    for file in ("eval.json", "checkpoint.pth", "mine.safetensors", "photo.jpg"):
        Path(file).touch()
    cli.load_command(name).make_context(name, arguments)
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert f"  Example: tomevit {cli.VERBS[name].example}\n" in out
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"\w-$|\\b", out, re.MULTILINE), "an address is cut, or a mark of click's is shown"


def test_the_installed_command_and_an_import_without_side_effects():
    late = ("PIL", "matplotlib", "huggingface_hub", "timm", "torch._dynamo")
    code = f"import sys, tomevit; tomevit.create; print([m for m in {late} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("library", ["libtorch", "libtorch_python"])
def test_interrupted_while_torch_is_imported(library: str) -> None:
    command = [sys.executable, "-m", "tomevit", "verify", "none.safetensors"]
    # A shell's background jobs ignore Ctrl-C, and what they start does too.
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and f"{library}." not in maps.read_text():
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "tomevit: interrupted\n")


def test_torch_is_imported_without_passes_over_its_heap() -> None:
    code = """
import gc
from tomevit.cli import import_torch
passes = []
gc.callbacks.append(lambda phase, info: passes.append(info["generation"]) if phase == "stop" else None)
import_torch()
print(passes, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[] True True\n"


def test_info_says_all_that_a_file_says_of_itself(capsys, tmp_path):
    model = tomevit.create("deit_ti16", r=(8, -1.0), num_classes=2)
    model.card = replace(model.card, class_names=("cat", "d\x1b[31mog"), licence="mit", notes="two\nlines")
    path = tmp_path / "pets.safetensors"
    tomevit.save(model, path)
    status, out, _ = run(capsys, "info", str(path))
    assert status == 0
    assert "\x1b" not in out
    for said in (
        "r = 8,-1",
        "cat, d\\x1b[31mog",
        "licence        mit",
        "two\\nlines",
        "5.52 M, 2 classes",
        "152 float32",
    ):
        assert said in out, said
    _, out, _ = run(capsys, "info", str(path), "--json")
    found = json.loads(out)
    assert found["r"] == {"mean": 8, "inflection": -1.0}
    assert found["file"]["dtypes"] == {"float32": 152}
    assert found["config"]["num_classes"] == 2
    assert found["file"]["sha256"] == read_contents(path).sha256


def test_a_damaged_file_is_not_taken_for_a_name(capsys, tmp_path):
    path = tmp_path / "vit_b16"
    path.write_bytes(b"nothing")
    status, out, err = run(capsys, "info", str(path))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(path) in err


@pytest.mark.parametrize("name", ["nope.safetensors", "folder/nope", "nope.pth"])
def test_what_looks_like_a_file_is_a_missing_file(capsys, name):
    assert run(capsys, "info", name) == (2, "", f"tomevit: there is no file {name}\n")


def test_a_directory_of_results_does_not_hide_the_model_of_its_name(capsys, tmp_path, monkeypatch):
    (tmp_path / "vit_b16").mkdir()
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "info", "vit_b16")
    assert (status, out.splitlines()[0]) == (0, "vit_b16: Vision Transformer (vit_base_patch16_224 in timm)")


def test_list_says_what_merging_costs_and_which_r_to_take(capsys):
    _, out, _ = run(capsys, "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    swag, vit, deit = rows["swag_l16_512"], rows["vit_b16"], rows["deit_s16"]
    assert (swag["top1"], swag["merged"], swag["recommended"]) == (
        88.06,  # beside 87.80; SWAG itself has 88.07
        {"r": 40, "top1": 87.8},
        {"r": 40, "known": True},
    )
    # r = 13 costs 1.97 points: half of the 16 that leave next to nothing.
    assert (vit["merged"], vit["recommended"]) == ({"r": 13, "top1": 82.6}, {"r": 8, "known": False})
    assert deit["recommended"] == {"r": "diffrate-2.9g", "known": True}
    assert rows["dinov2_b14"]["merged"] is None
    _, out, _ = run(capsys, "list", "deit_s16*", "--weights", "--json")
    assert [row["recommended"]["r"] for row in json.loads(out)] == ["diffrate-2.9g", 13]
    _, out, _ = run(capsys, "list", "vit_b16")
    heads, cells = (line.split() for line in out.splitlines())
    assert heads == [
        "name",
        "pixels",
        "params",
        "M",
        "GFLOPs",
        "classes",
        "top-1",
        "merged",
        "take",
        "r",
        "weights",
        "presets",
    ]
    assert cells[1:3] + cells[5:10] == ["224", "86.57", "84.57", "82.60", "at", "13", "~8"]
    _, out, _ = run(capsys, "list", "swag_l16_512")
    assert out.splitlines()[1].split()[5:8] == ["88.06", "87.80", "40"]  # at the r to take


def test_list_sorts_and_selects(capsys):
    def rows(*arguments):
        return json.loads(run(capsys, "list", "--json", *arguments)[1])

    params = [row["params"] for row in rows("--sort", "params")]
    assert params == sorted(params)
    top1 = [row["top1"] for row in rows("--sort", "top1")]
    known = [value for value in top1 if value is not None]
    assert known == sorted(known, reverse=True)
    assert top1[len(known) :] == [None] * (len(top1) - len(known))
    assert [row["name"] for row in rows("--family", "mae", "--sort", "name")] == ["mae_b16", "mae_h14", "mae_l16"]
    assert {row["licence"] for row in rows("--licence", "CC-*")} == {"cc-by-nc-4.0"}
    assert {row["licence"] for row in rows("--weights", "--licence", "mit", "--family", "EVA02")} == {"mit"}
    (bsd,) = rows("vit_b16", "--licence", "bsd-3-clause")
    assert (bsd["name"], bsd["default_weights"]) == ("vit_b16.tv_in1k", "augreg_in21k_ft_in1k")
    assert [row["name"] for row in rows("digits_p1.plain")] == ["digits_p1.plain"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sort", "beauty"], "top1"),
        (["deit_s61"], "no model matches 'deit_s61'; did you mean deit_s16"),
        (["nothing*"], "no model matches 'nothing*'; tomevit list shows all"),
        (["--family", "deitt"], "no family 'deitt'; did you mean deit"),
        (["--licence", "gpl"], "no weights have the licence 'gpl'; there are apache-2.0,"),
        (["--licence", "mit", "--family", "dinov2"], "no model is of this licence, family and pattern together"),
    ],
)
def test_what_list_cannot_select_is_told(capsys, arguments, says):
    status, out, err = run(capsys, "list", *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
