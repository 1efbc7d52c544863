"""The commands, run as a user runs them."""

import json
import subprocess
import sys

import pytest

import tomevit
from tomevit import cli


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `tomevit ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_list_shows_every_model(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == tomevit.list_models()


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


def test_info_json_at_another_size(capsys):
    _, out, _ = run(capsys, "info", "mae_l16.tome_r8", "--img-size", "224x320", "--json")
    card = json.loads(out)
    assert card["config"]["img_size"] == [224, 320]
    assert card["tokens"][0] == 1 + 14 * 20
    assert card["tokens"][-1] == 1 + 14 * 20 - 24 * 8
    assert [weights["weights"] for weights in card["all_weights"]] == ["tome_r8"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("8", 8), ("8,-1", (8, -1.0)), ("[20,0,7]", [20, 0, 7]), ("0.08", 0.08)],
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
        (["info", "vit_b16", "--r", "8,2"], "inflection"),
        (["info", "vit_b16", "--r", "eight"], "8,-1"),
        (["info", "vit_b16", "--r", "[1,2"], "[20,0,7]"),
        (["bench", "deit_ti16", "--r", "[1,1,1,1,1,1,1,1,1,1,1,1,1]"], "the model has 12"),
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
        (["demo", "--r", "-1"], "negative"),
    ],
)
def test_a_mistake_gets_one_clear_line(capsys, arguments, says):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("tomevit: ")
    assert says in err


def test_traceback_on_request():
    with pytest.raises(ValueError, match="there is no model"):
        cli.main(["--traceback", "info", "vit_b61"])


def test_no_arguments_show_the_verbs(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert {"list", "info", "demo", "bench"} <= set(out.split())


def test_the_installed_command_and_an_import_without_side_effects():
    late = ("PIL", "matplotlib", "huggingface_hub", "timm", "torch._dynamo")
    code = f"import sys, tomevit; print([m for m in {late} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
