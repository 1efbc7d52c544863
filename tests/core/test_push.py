"""Models shared on the hub and had back: the real client, a server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import tomevit
from tests.helpers import images_for, randomise, tiny
from tests.outcomes import survives
from tests.server import Fault, Server, objections
from tests.tasks.test_cli import run
from tomevit import zoo
from tomevit.cards import Card
from tomevit.cli.weights import push as push_command
from tomevit.config import Figure, Preset, Source
from tomevit.errors import CheckpointError, DownloadError, UploadError
from tomevit.models import VisionTransformer
from tomevit.weights import checkpoint
from tomevit.weights.push import Base, find_base, model_card

# huggingface_hub's way to send a large file is one that its HTTP library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_token"
REPO = "owner/repo"
MINE = Figure(top1=97.25, r=3, source="a test")
COMMIT = f"/api/models/{REPO}/commit/main"


@pytest.fixture(autouse=True)
def log_in(server: Server, set_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    server.accounts[TOKEN] = "owner"
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    set_environment(HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")


@pytest.fixture
def digits() -> VisionTransformer:
    """A trained model of the zoo's smallest architecture, and nothing in it that a default would bring back."""
    model = tomevit.create("digits_p1", pretrained=True, r=(2, -0.5), prop_attn=False)
    randomise(model)
    model.card = replace(
        model.card,
        preprocess=replace(model.card.preprocess, crop_pct=0.9),
        class_names=tuple("abcdefghij"),
        origin=Source(format="timm", url="https://example.org/digits.pth", sha256="ab" * 32),
        figures=(Figure(top1=50, source="the published weights"),),
    )
    return model


def published_as(name: str, **fields: object) -> VisionTransformer:
    """A tiny model with the card that it would have were it made from weights of the zoo."""
    model, card = tiny(), zoo.card(name)
    model.card = replace(card, origin=replace(card.sources[0], sha256="cd" * 32), config=model.config, **fields)
    return model


def files(server: Server, repo: str = REPO) -> dict[str, bytes]:
    found = server.repos[repo]
    return found.files.get(found.revisions.get("main", ""), {})


def readme(server: Server, repo: str = REPO) -> ModelCard:
    """As the hub's library reads it; the server has checked its metadata when it was pushed."""
    return ModelCard(files(server, repo)["README.md"].decode())


def assert_same(ours: VisionTransformer, theirs: VisionTransformer) -> None:
    assert (ours.r, ours.config) == (theirs.r, theirs.config)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


# There and back.


@pytest.mark.parametrize("as_file", [False, True])
def test_what_is_pushed_comes_back(server: Server, digits: VisionTransformer, tmp_path: Path, as_file: bool) -> None:
    pushed: VisionTransformer | Path = digits
    if as_file:
        pushed = tmp_path / "mine.safetensors"
        tomevit.save(digits, pushed)
    address = tomevit.push(
        pushed, REPO, figures=[MINE], dataset="digits", licence="Apache-2.0", notes="Trained twice.", message="First"
    )
    (commit,) = set(server.repos[REPO].revisions.values())
    assert address == f"{server.url}/{REPO}/commit/{commit}"
    assert server.repos[REPO].messages == {commit: "First"}
    assert files(server).keys() == {"model.safetensors", "README.md"}

    back = tomevit.create("digits_p1", pretrained=f"hf-hub:{REPO}")
    assert_same(back, digits)
    images = images_for(digits)
    assert torch.equal(back(images), digits(images))
    assert (back.card.preprocess, back.card.class_names) == (digits.card.preprocess, digits.card.class_names)
    assert (back.card.licence, back.card.notes) == ("apache-2.0", "Trained twice.")
    assert back.card.figures == (replace(MINE, source="digits: a test"),)
    assert back.card.origin == digits.card.origin

    out = tmp_path / "back.safetensors"
    tomevit.convert(f"hf-hub:{REPO}@{commit}", out)
    assert_same(tomevit.load(out), digits)
    assert all(check.passed for check in tomevit.verify(out))


def test_an_older_revision_stays(server: Server, digits: VisionTransformer, tmp_path: Path) -> None:
    first = tomevit.push(digits, REPO).rpartition("/")[2]
    old = {name: tensor.clone() for name, tensor in digits.state_dict().items()}
    randomise(digits, seed=1)
    second = tomevit.push(digits, REPO).rpartition("/")[2]
    assert first != second
    for revision, state in ((first, old), (second, digits.state_dict()), ("main", digits.state_dict())):
        out = tmp_path / f"{revision}.safetensors"
        tomevit.convert(f"hf-hub:{REPO}@{revision}", out)
        assert all(torch.equal(tensor, state[name]) for name, tensor in tomevit.load(out).state_dict().items())
    server.requests.clear()
    assert tomevit.push(digits, REPO).endswith(second)  # nothing changed, nothing committed
    assert COMMIT not in server.paths("POST")


def test_other_files_of_the_repository_stay(server: Server, digits: VisionTransformer) -> None:
    server.put_hub(REPO, "training.log", b"epoch 1")
    tomevit.push(digits, REPO)
    assert files(server).keys() == {"training.log", "model.safetensors", "README.md"}


@pytest.mark.parametrize("name", ["", "mine", "digits_p1"])
def test_a_shape_of_ones_own(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = tiny(r=[3, 0, 2])
    model.card = replace(model.card, name=name)  # the zoo's name, maybe, but not its architecture
    tomevit.push(model, REPO)
    monkeypatch.chdir(tmp_path)
    assert_same(run_usage(server)["model"], model)


def test_private_needs_the_token(
    server: Server, digits: VisionTransformer, set_environment: Callable[..., None], tmp_path: Path
) -> None:
    tomevit.push(digits, REPO, private=True)
    assert_same(tomevit.create("digits_p1", pretrained=f"hf-hub:{REPO}"), digits)
    tomevit.push(digits, REPO, private=True, notes="Again.")
    for token in ("", "hf_other"):
        set_environment(HF_TOKEN=token, HF_HOME=str(tmp_path / "elsewhere"))
        with pytest.raises(DownloadError, match=f"there is no {REPO} on the hub, or it is private: .*HF_TOKEN"):
            tomevit.create("digits_p1", pretrained=f"hf-hub:{REPO}")


def test_private_never_becomes_public(server: Server, digits: VisionTransformer) -> None:
    server.put_hub(REPO, "other", b"")
    with pytest.raises(UploadError, match=f"{REPO} exists and is public, nothing was uploaded"):
        tomevit.push(digits, REPO, private=True)
    assert files(server).keys() == {"other"}


# The model card.


def run_usage(server: Server, repo: str = REPO) -> dict[str, object]:
    """Run the code of a model card, beside an image."""
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 100, 50)).save("image.png")
    code = readme(server, repo).text.partition("```python\n")[2].partition("```")[0]
    scope: dict[str, object] = {}
    exec(code, scope)
    return scope


def test_the_code_of_the_card_runs(
    server: Server, digits: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    tomevit.push(digits, REPO)
    assert f'tomevit.create("digits_p1", pretrained="hf-hub:{REPO}")' in readme(server).text
    monkeypatch.chdir(tmp_path)
    scope = run_usage(server)
    assert scope["logits"].shape == (1, 10)
    assert capsys.readouterr().out.strip() == "abcdefghij"[scope["logits"].argmax()]


def test_the_card_says_what_there_is_to_know(server: Server) -> None:
    model = published_as("mae_b16.tome_r16")
    model.card = replace(model.card, preprocess=replace(model.card.preprocess, crop_pct=0.75), class_names=())
    tomevit.push(model, REPO, figures=[MINE], dataset="a|b", notes="*Mine.*")
    card = readme(server)
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "tomevit"
    (result,) = card.data.eval_results
    assert (result.metric_value, result.metric_type) == (97.25, "accuracy")
    assert (result.dataset_name, result.dataset_type) == ("a|b", "a|b")
    assert "r = 3" in result.metric_name
    for expected in ("mae_b16.tome_r16", "cd" * 32, "arxiv.org/abs/2111.06377", "arxiv.org/abs/2210.09461", "*Mine.*"):
        assert expected in card.text
    for expected in ("| 3 | 97.25 % | a\\|b: a test |", "32x32 pixels", "centre crop of 0.75", "r = 0", "cc-by-nc-4.0"):
        assert expected in card.text


@pytest.mark.parametrize("name", zoo.list_models(weights=True))
def test_every_card_of_the_zoo_makes_valid_metadata(name: str) -> None:
    card = zoo.card(name)
    if card.sources:
        card = replace(card, origin=replace(card.sources[-1], sha256="ef" * 32))
    base = find_base(card)
    written = ModelCard(model_card(card, REPO, base))
    assert objections(written.content) == []
    # The hub has no words for Meta's own of DINOv3 and EUPE.
    own = card.licence in ("dinov3-license", "fair-noncommercial-research-license")
    expected = ("other", card.licence) if own else (card.licence, None)
    assert (written.data.license, written.data.license_name) == expected
    figures = [(result.metric_value, result.metric_name) for result in written.data.eval_results or ()]
    assert [value for value, _ in figures] == [figure.top1 for figure in card.figures]
    assert all(
        figure.by == "head" or f"by {figure.by}" in name
        for figure, (_, name) in zip(card.figures, figures, strict=True)
    )
    hubs = {source.hub for source in card.sources} | {None}
    assert written.data.base_model in hubs
    assert (written.data.base_model is None) == (hubs == {None} or base is None)


@pytest.mark.parametrize(
    ("licence", "metadata"),
    [
        ("MIT", {"license": "mit"}),
        ("My Licence, v2", {"license": "other", "license_name": "my-licence-v2"}),
        (None, {}),
    ],
)
def test_licences_as_the_hub_names_them(server: Server, licence: str | None, metadata: dict[str, str]) -> None:
    tomevit.push(tiny(), REPO, licence=licence)
    written = readme(server).data.to_dict()
    assert {name: value for name, value in written.items() if name.startswith("license")} == metadata


def test_hostile_words_stay_in_their_place(server: Server) -> None:
    model = tiny()
    model.card = replace(model.card, title='"]: [', class_names=("a|b", "c\nd", "---", "<e>", "'f", "#g", ": {"))
    tomevit.push(model, REPO, licence='no: "licence"\n---\n', figures=[replace(MINE, source="x\n|y")], dataset="d: -")
    card = readme(server)
    assert card.data.license_name == "no-licence"
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") in (3, 4) for line in rows)
    assert "a\\|b, c d, ---" in card.text


LINES = "a\n\n## Claim\n---\nlicense: mit\n---\n| 1 | 2 |\n{notes} ?card.notes {0}"


def test_no_text_of_a_card_starts_a_line_of_its_own() -> None:
    def written(text: str) -> ModelCard:
        card = Card(
            name=text,
            title=text,
            licence=text,
            papers=(text,),
            class_names=(text,),
            figures=(Figure(top1=1, source=text),),
            presets=(Preset(name=text, r=(8,) * 12, num_tokens=197, source=text),),
            origin=Source(format="timm", url=text, hub="a/b", sha256=text),
        )
        return ModelCard(model_card(card, REPO, find_base(card), dataset=text))

    card, plain = written(LINES), written("a")
    assert objections(card.content) == []
    assert (card.data.license, card.data.base_model) == ("other", "a/b")
    assert [line[:2] for line in card.text.splitlines()] == [line[:2] for line in plain.text.splitlines()]
    assert r"a ## Claim --- license: mit --- \| 1 \| 2 \| {notes} ?card.notes {0}" in card.text


def test_presets_are_listed_where_they_fit() -> None:
    card = zoo.card("deit_s16")
    text = model_card(card, REPO)
    assert "| diffrate-2.9g | 3 | 2.905 | OpenGVLab/DiffRate@91ae3e3, compression_rate.json |" in text
    assert "| diffrate-2.9g | 79.54 % | OpenGVLab/DiffRate@91ae3e3, README.md; crop 224 of 256 |" in text
    assert not re.search(r"^\?|\n\n\n", text, re.MULTILINE)
    larger = replace(card, config=replace(card.config, img_size=(384, 384)), figures=())
    assert "diffrate" not in model_card(larger, REPO)


def test_sections_without_content_are_left_out() -> None:
    text = model_card(Card(name=""), REPO)
    headings = ["# repo", "## Use", "## Model", "## Merging", "## Licence and origin", "## Papers"]
    assert [line for line in text.splitlines() if line.startswith("#")] == headings
    assert "A vision transformer\nwith" in text
    assert "Licence: not stated.\n\n## Papers" in text
    assert not re.search(r"^\?|[{}]|\n\n\n", text, re.MULTILINE)
    full = model_card(Card(name="", notes="{a}\n\n## b", figures=(MINE,)), REPO)
    assert [line for line in full.splitlines() if line.startswith("#")] == [
        *headings[:4], "## Figures", headings[4], "## Notes", "## b", headings[5]
    ]  # fmt: skip
    assert "\n\n{a}\n\n## b\n\n## Papers" in full


# What is claimed of a model made from others.


def test_nothing_of_the_base_is_claimed(server: Server, digits: VisionTransformer) -> None:
    tomevit.push(digits, REPO)
    back = tomevit.create("digits_p1", pretrained=f"hf-hub:{REPO}").card
    assert (back.weights, back.figures, back.notes) == (None, (), "")
    assert back.sources == (Source(format="tomevit", hub=REPO),)
    assert readme(server).data.eval_results is None
    assert "whose figures are not this model's" in readme(server).text


def test_a_model_made_from_a_shared_one(server: Server) -> None:
    model = published_as("vit_b16.augreg_in21k_ft_in1k")
    tomevit.push(model, "owner/first")
    root = zoo.card("vit_b16.augreg_in21k_ft_in1k").sources[0].hub
    assert readme(server, "owner/first").data.base_model == root
    model.card = checkpoint.card_of(model, pushed_card(server, "owner/first"))
    tomevit.push(model, "owner/second")
    assert readme(server, "owner/second").data.base_model == "owner/first"
    tomevit.push(model, "owner/first", notes="Better.")  # no repository is its own base
    assert readme(server, "owner/first").data.base_model == root


def pushed_card(server: Server, repo: str = REPO) -> Card:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(files(server, repo)["model.safetensors"])
        return checkpoint.read(file.name)[0].card


@pytest.mark.parametrize("licence", ["mit", "apache-2.0", "Mine"])
def test_no_commercial_licence_for_what_is_made_from_non_commercial_weights(server: Server, licence: str) -> None:
    model = published_as("mae_b16.tome_r16")
    with pytest.raises(ValueError, match=f"licence cannot be {licence}: .* under cc-by-nc-4.0"):
        tomevit.push(model, REPO, licence=licence)
    assert server.requests == []
    tomevit.push(model, REPO, licence="cc-by-nc-sa-4.0")
    assert readme(server).data.license == "cc-by-nc-sa-4.0"
    model.card = pushed_card(server)  # nor in the next generation
    with pytest.raises(ValueError, match=f"licence cannot be {licence}"):
        tomevit.push(model, "owner/second", licence=licence)


def test_fresh_weights_owe_nothing(server: Server) -> None:
    model = tiny()
    model.card = replace(zoo.card("mae_b16.tome_r16"), config=model.config)  # as create(pretrained=False) has it
    tomevit.push(model, REPO)
    data = readme(server).data
    assert (data.license, data.base_model) == (None, None)
    assert "ade from" not in readme(server).text
    tomevit.push(model, REPO, licence="mit")
    assert readme(server).data.license == "mit"
    tomevit.push(model, REPO, licence="cc-by-nc-4.0")
    model.card = pushed_card(server)  # what is made from them does
    with pytest.raises(ValueError, match="licence cannot be mit"):
        tomevit.push(model, "owner/second", licence="mit")


def test_bases() -> None:
    npz = "https://example.org/mine.npz"
    assert find_base(Card(name="x")) is None
    assert find_base(Card(name="x", origin=Source(format="timm", file="a.pth"))) == Base("a.pth", None)
    assert find_base(Card(name="x", origin=Source(format="timm", url=npz))) == Base(npz, None)
    assert find_base(Card(name="x", origin=Source(format="timm", hub="a/b"))) == Base("a/b", "a/b")
    augreg = zoo.card("vit_b16.augreg_in21k_ft_in1k")
    for source in augreg.sources:
        assert find_base(Card(name="x", origin=source)) == Base(augreg.full_name, augreg.sources[0].hub)


# What is refused before anything is sent.


@pytest.mark.parametrize("repo", ["repo", "a/b/c", "owner/", "/repo", "owner/a b", "owner/-x", "owner/a..b", ""])
def test_bad_names(server: Server, repo: str) -> None:
    with pytest.raises(ValueError, match="owner/repo"):
        tomevit.push(tiny(), repo)
    assert server.requests == []


def test_bad_arguments(server: Server, tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="2 class_names for 7 classes"):
        tomevit.push(model, REPO, class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"97.*per cent"):
        tomevit.push(model, REPO, figures=[replace(MINE, top1=9725)], dataset="d")
    with pytest.raises(ValueError, match="the model has 7 classes: name the dataset"):
        tomevit.push(model, REPO, figures=[MINE])
    with pytest.raises(FileNotFoundError, match="missing"):
        tomevit.push(tmp_path / "missing.safetensors", REPO)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="of no known format"):
        tomevit.push(tmp_path / "foreign.safetensors", REPO)
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinity, in head\.bias"):
        tomevit.push(model, REPO)
    assert server.requests == []


def test_damage_is_not_sealed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    tomevit.save(tiny(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors was damaged"):
        tomevit.push(path, REPO)
    assert server.requests == []


# Refusals and faults of the hub: one sentence each, and no half of a model.


def fails(model: VisionTransformer, *says: str, repo: str = REPO) -> None:
    with pytest.raises(UploadError) as caught:
        tomevit.push(model, repo)
    assert str(caught.value).startswith(repo)
    assert "\n" not in str(caught.value)
    for expected in says:
        assert expected in str(caught.value)


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_not_logged_in(server: Server, set_environment: Callable[..., None], token: str) -> None:
    set_environment(HF_TOKEN=token)
    fails(tiny(), "401", "log in with `hf auth login`, or set HF_TOKEN")
    assert server.repos == {}


def test_no_right_to_write(server: Server) -> None:
    fails(tiny(), "403", "the right to write", "You don't have the rights", repo="other/repo")
    server.put_hub("other/there", "file", b"")
    fails(tiny(), "403", "the right to write", repo="other/there")
    assert files(server, "other/there").keys() == {"file"}


def test_offline(server: Server, set_environment: Callable[..., None]) -> None:
    set_environment(HF_HUB_OFFLINE="1")
    fails(tiny(), "HF_HUB_OFFLINE is set")
    assert server.requests == []


def test_network_down(server: Server, set_environment: Callable[..., None]) -> None:
    set_environment(HF_ENDPOINT="http://127.0.0.1:1")
    fails(tiny(), "could not be uploaded to http://127.0.0.1:1: ", "refused")


STEPS = (
    "/api/repos/create",
    "/api/validate-yaml",
    f"/api/models/{REPO}/preupload/main",
    f"/{REPO}.git/info/lfs/objects/batch",
    "",  # where the large file goes
    COMMIT,
)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault(status=503), ("503", "try again later")),
        (Fault(status=403, body=b'{"error": "Private repository storage limit reached"}'), ("limit reached", "room")),
        (Fault(status=429), ("429", "try again later")),
        (Fault(cut=0), ("could not be uploaded",)),
    ],
)
@pytest.mark.parametrize("path", STEPS)
def test_faults_of_the_hub(server: Server, path: str, fault: Fault, says: tuple[str, ...]) -> None:
    if path == STEPS[0] and fault.status == 403:
        pytest.skip("who may not make repositories may still write to this one")
    if path == STEPS[1] and fault.status and not fault.body:  # the client reads the answer before its status
        says = ("try again later",)
    if fault.cut is not None:
        fault = replace(fault, headers={"Content-Length": "5"}, status=200)
    fault = replace(fault, headers={"Content-Type": "application/json", **fault.headers})
    model = tiny()
    tomevit.push(model, REPO)
    before, revisions = files(server), dict(server.repos[REPO].revisions)
    randomise(model, seed=1)
    tomevit.push(model, REPO)
    after = files(server)
    # Back in time, knowing what will be sent.
    server.repos[REPO].revisions = revisions
    digest = hashlib.sha256(after["model.safetensors"]).hexdigest()
    del server.files[f"/storage/{digest}"]
    server.forever[path or f"/upload/{digest}"] = fault
    fails(model, *says)
    assert files(server) == before
    server.forever.clear()
    tomevit.push(model, REPO)
    assert files(server) == after


@survives(
    "cache and network", "a hub whose words are hostile, or have no end", "one printable line, in which no token is"
)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=403, body=b'{"error": "\\u001b[31m\\u202e' + TOKEN.encode() + b'"}'),
        Fault(status=403, body=b'{"error": "' + b"a" * 10**6 + b'"}'),
        Fault(status=500, body=bytes(10**8)),
        Fault(status=200, body=bytes(10**8)),
        Fault(status=302, headers={"Location": "/none"}, body=bytes(10**8)),
        Fault(status=400, headers={"X-Error-Message": f"Bearer {TOKEN}"}),
    ],
)
def test_hostile_words(server: Server, fault: Fault) -> None:
    server.forever[COMMIT] = fault
    with pytest.raises(UploadError) as caught:
        tomevit.push(tiny(), REPO)
    assert str(caught.value).isprintable()
    assert TOKEN not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_token_that_no_header_can_hold_is_not_shown(server: Server, set_environment: Callable[..., None]) -> None:
    set_environment(HF_TOKEN="hf_wrong\x01secret")
    fails(tiny(), "could not be uploaded")
    with pytest.raises(UploadError) as caught:
        tomevit.push(tiny(), REPO)
    assert "secret" not in str(caught.value)


def test_xet_refused(server: Server, set_environment: Callable[..., None]) -> None:
    """With hf_xet installed, large files go to another storage, which this server has not."""
    set_environment(HF_HUB_DISABLE_XET="0")
    fails(tiny(), "404")
    assert files(server) == {}


# The command.


def test_the_command(server: Server, digits: VisionTransformer, tmp_path: Path, capsys) -> None:
    path = tmp_path / "mine.safetensors"
    tomevit.save(digits, path)
    options = (
        "--dataset",
        "digits",
        "--top1",
        "0=98.5",
        "--top1",
        "8=97",
        "--licence",
        "mit",
        "--message",
        "From here",
    )
    status, out, _ = run(capsys, "push", str(path), REPO, *options, "--notes", "Mine.", "--private")
    (commit,) = set(server.repos[REPO].revisions.values())
    assert (status, out) == (0, f"uploaded    {server.url}/{REPO}/commit/{commit}\n")
    assert server.repos[REPO].messages[commit] == "From here"
    card = pushed_card(server)
    assert [(figure.r, figure.top1) for figure in card.figures] == [(0, 98.5), (8, 97.0)]
    assert {figure.source for figure in card.figures} == {"digits: measured by owner"}
    assert (card.licence, card.notes) == ("mit", "Mine.")
    assert server.repos[REPO].token == TOKEN


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--top1", "97"), "'97' is not like 8=81.2"),
        (("--top1", "8,-1=97"), "'8,-1=97' is not like 8=81.2"),
        (("--top1", "fast=97"), "'fast' is no r"),
        (("--top1", "3=97"), "dataset"),
        (("--dataset", "d", "--top1", "diffrate-9g=97"), "'diffrate-9g', which is none of the presets"),
        (("--licence", "mit", "--private", "extra"), "extra"),
    ],
)
def test_mistakes_on_the_command_line(server: Server, tmp_path: Path, capsys, arguments: tuple[str, ...], says: str):
    tomevit.save(tiny(), tmp_path / "mine.safetensors")
    status, out, err = run(capsys, "push", str(tmp_path / "mine.safetensors"), REPO, *arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert server.requests == []


def test_accuracies_may_be_of_presets() -> None:
    arguments = ["mine.safetensors", REPO, "--top1", "8=97", "--top1", "diffrate-2.9g=79.5"]
    assert push_command.make_context("push", arguments).params["top1"] == [(8, 97.0), ("diffrate-2.9g", 79.5)]


# What hf-hub: says of repositories that it cannot read.


def test_repositories_that_cannot_be_read(server: Server, digits: VisionTransformer) -> None:
    def read(name: str) -> None:
        tomevit.create("digits_p1", pretrained=f"hf-hub:{name}")

    with pytest.raises(DownloadError, match="there is no owner/none on the hub, or it is private"):
        read("owner/none")
    with pytest.raises(ValueError, match="hf-hub:owner/repo@revision"):
        read("owner")
    tomevit.push(digits, REPO)
    with pytest.raises(DownloadError, match=f"{REPO} on the hub has no revision v2"):
        read(f"{REPO}@v2")
    server.put_hub("owner/text", "README.md", b"# Nothing")
    with pytest.raises(
        DownloadError, match=r"owner/text on the hub has no model\.safetensors and no pytorch_model\.bin"
    ):
        read("owner/text")
    with pytest.raises(CheckpointError, match=r"holds digits_p1, which is no deit_ti16: .*embed_dim 64"):
        tomevit.create("deit_ti16", pretrained=f"hf-hub:{REPO}")


def test_a_private_repository_of_timms(server: Server, tmp_path: Path, set_environment: Callable[..., None]) -> None:
    model = tomevit.create("deit_ti16", num_classes=3, img_size=64)
    tomevit.export(model, tmp_path / "timm", "timm")
    for file in (tmp_path / "timm").iterdir():
        server.put_hub("someone/private", file.name, file.read_bytes())
    server.repos["someone/private"].token = "hf_theirs"
    with pytest.raises(DownloadError, match="there is no someone/private on the hub, or it is private"):
        tomevit.create("deit_ti16", pretrained="hf-hub:someone/private")
    set_environment(HF_TOKEN="hf_theirs")
    back = tomevit.create("deit_ti16", pretrained="hf-hub:someone/private")
    assert_same(back, model)
    set_environment(HF_TOKEN=TOKEN)
    tomevit.push(back, REPO)
    assert readme(server).data.base_model == "someone/private"
