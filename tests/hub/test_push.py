"""Push against the loopback Hub: what is on the server afterwards, whatever went wrong on the way."""

import json
import logging
import shutil
import tempfile
import time
import traceback
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import PUSHES
from full_disk import files_of_at_most
from hub_server import FOR_EVER, READER, STRANGER, WRITER, LoopbackHub, use_mode
from huggingface_hub import HfApi
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save_file

import swin_hf
from swin_hf import SwinHFForImageClassification, cli, push
from swin_hf.families import FAMILIES
from swin_hf.hub import Card, ConfusionMatrix, HubError, TrainingFacts, remote

pytestmark = PUSHES

REPO = "user/tiny"
MODES = ("basic", "multipart", "xet")
FAMILY = FAMILIES["swin_hf"]
CORE = [path.name for path in FAMILY.travelling_files("image-classification")]
BASE = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *CORE}


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    tiny_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def same_as(folder: Path, hub: LoopbackHub, revision: str = "main") -> bool:
    """Whether the server has the weights of the folder, byte for byte, and every other file of a push."""
    files = hub.files(REPO, revision)
    return set(files) == BASE and files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def pushes(hub: LoopbackHub) -> int:
    """Commits that were pushed, the one of the empty repository not counted."""
    return len([commit for commit in hub.log(REPO) if commit.title.startswith("Upload")]) if REPO in hub.repos else 0


@pytest.mark.parametrize("mode", MODES)
def test_push_makes_one_commit_with_exactly_the_files_of_a_model(hub, folder, monkeypatch, mode):
    use_mode(hub, mode, monkeypatch)
    result = push(folder, REPO, tag="v1", endpoint=hub.url)
    assert pushes(hub) == 1 and same_as(folder, hub)
    assert hub.repos[REPO].tags == {"v1": result.commit} and hub.log(REPO)[0].id == result.commit
    assert {file.name for file in result.files} == BASE and result.created
    assert ("xet_write_token" in hub.steps()) == (mode == "xet")
    assert ("lfs_part" in hub.steps()) == (mode == "multipart")
    for name in CORE:
        assert hub.files(REPO)[name] == (Path(swin_hf.__file__).parent / "model" / name).read_bytes()


def test_second_push_of_the_same_makes_no_commit(hub, folder):
    first = push(folder, REPO, tag="v1", endpoint=hub.url)
    hub.requests.clear()
    second = push(folder, REPO, tag="v1", endpoint=hub.url)
    assert second == replace(first, created=False) and pushes(hub) == 1
    assert not {"commit", "preupload", "lfs_batch", "tag"} & set(hub.steps())


def test_second_push_without_the_tag_keeps_the_card_that_pins_it(hub, folder):
    first = push(folder, REPO, tag="v1", endpoint=hub.url)
    second = push(folder, REPO, endpoint=hub.url)
    assert (second.commit, second.created, pushes(hub)) == (first.commit, False, 1)
    assert b'revision="v1"' in hub.files(REPO)["README.md"]
    third = push(folder, REPO, tag="v1", endpoint=hub.url)
    assert (third.commit, third.created, pushes(hub)) == (first.commit, False, 1)


def test_tag_whose_commit_holds_the_model_is_not_refused_when_the_branch_has_moved_on(hub, folder):
    first = push(folder, REPO, tag="v1", endpoint=hub.url)
    hub.put(REPO, {"README.md": b"---\nlicense: mit\n---\nby hand"})
    again = push(folder, REPO, tag="v1", endpoint=hub.url)
    assert (again.commit, again.created) == (first.commit, False) and "has moved on" in again.notes[0]
    assert push(folder, REPO, tag="v2", endpoint=hub.url).notes[0].startswith("the card on the Hub was edited by hand")


def test_other_weights_without_a_tag_are_not_pinned_to_the_tag_of_others(hub, folder, tiny_model):
    push(folder, REPO, tag="v1", endpoint=hub.url)
    tiny_model.classifier.bias.data += 1
    assert push(tiny_model, REPO, endpoint=hub.url).created
    assert b'revision="v1"' not in hub.files(REPO)["README.md"]


HEADS = ("SwinHFModel", "SwinHFForImageClassification", "SwinHFForMaskedImageModeling", "SwinHFBackbone")
QUICK = {("SwinHFModel", "bf16", "basic"), ("SwinHFForImageClassification", "fp32", "xet"),
         ("SwinHFForMaskedImageModeling", "bf16", "multipart"), ("SwinHFBackbone", "fp32", "basic")}  # fmt: skip


@pytest.mark.parametrize(
    ("head", "dtype", "mode"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product(HEADS, ("fp32", "bf16"), MODES)
    ],
)
def test_push_pull_load_gives_bit_equal_outputs(hub, tiny_config, monkeypatch, mode, head, dtype):
    use_mode(hub, mode, monkeypatch)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    cls = getattr(swin_hf, head)
    model = cls(tiny_config).to(dtype).eval()
    push(model, REPO, endpoint=hub.url)
    pulled = swin_hf.pull(REPO, endpoint=hub.url)
    loaded = cls.from_pretrained(pulled.path, use_safetensors=True).eval()
    assert loaded.dtype == dtype
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs), name
    pixels = torch.randn(2, 3, 32, 48, dtype=dtype)
    # The file is mapped into memory where it lies; on the same alignment the arithmetic is the same to the last bit.
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    loaded.load_state_dict({k: v.clone() for k, v in loaded.state_dict().items()}, assign=True)
    with torch.no_grad():
        for ours, theirs in zip(
            model(pixels, output_hidden_states=True).values(),
            loaded(pixels, output_hidden_states=True).values(),
            strict=True,
        ):
            for a, b in zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]:
                assert torch.equal(a, b)


def test_config_on_the_hub_has_every_auto_class_and_no_trace_of_this_machine(hub, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "a")
    model = SwinHFForImageClassification.from_pretrained(tmp_path / "a")
    push(model, REPO, endpoint=hub.url)
    config = json.loads(hub.files(REPO)["config.json"])
    assert config["auto_map"] == FAMILY.auto_map("image-classification")
    assert set(config["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForMaskedImageModeling", "AutoBackbone"
    }  # fmt: skip
    assert str(tmp_path) not in hub.files(REPO)["config.json"].decode() and "--" not in str(config["auto_map"])


def test_without_code_there_is_no_auto_map_and_stale_code_is_removed(hub, folder):
    push(folder, REPO, endpoint=hub.url)
    push(folder, REPO, include_code=False, endpoint=hub.url)
    assert set(hub.files(REPO)) == BASE - set(CORE) and b"auto_map" not in hub.files(REPO)["config.json"]


def test_run_folder_is_pushed_as_it_is_and_nothing_else_of_it_is_sent(hub, tiny_model, tmp_path):
    run = tmp_path / "version_0"
    tiny_model.save_pretrained(run / "model")
    for stray in ("model/training_args.bin", "model/optimizer.pt", "last.ckpt", "model/notes.txt", "model/evil.py"):
        (run / stray).parent.mkdir(parents=True, exist_ok=True)
        (run / stray).write_bytes(b"\x80\x04stray")
    facts = TrainingFacts(command="finetune.py fit", curves={"val_loss": [[1, 2.0], [2, 1.0]]}, best_step=2)
    facts.save(run)
    push(run, REPO, endpoint=hub.url)
    assert set(hub.files(REPO)) == BASE | {"training_facts.json", "assets/learning_curves.png"}
    assert b"finetune.py fit" in hub.files(REPO)["README.md"]


def test_test_pictures_of_a_run_are_sent_only_when_they_are_asked_for(hub, tiny_model, tmp_path, capsys):
    run, name = tmp_path / "run", "assets/sample_pictures.png"
    tiny_model.save_pretrained(run / "model")
    (run / "worst_pictures.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"there is no sample_pictures\.png of a run with the model .*; the test of a"):
        push(run, REPO, card=Card(samples=True), endpoint=hub.url)
    (run / "sample_pictures.png").write_bytes(b"\x89PNG drawn")
    push(run, REPO, endpoint=hub.url)
    assert set(hub.files(REPO)) == BASE and name.encode() not in hub.files(REPO)["README.md"]
    push(run, REPO, card=Card(samples=True), endpoint=hub.url)
    assert set(hub.files(REPO)) == BASE | {name} and hub.files(REPO)[name] == b"\x89PNG drawn"
    assert f"![Test pictures with predictions]({name})".encode() in hub.files(REPO)["README.md"]
    for words in (["card", str(run)], ["push", str(run), REPO, "--dry-run"]):
        assert cli.main([*words, "--samples"]) == 0 and f"predictions]({name})" in capsys.readouterr().out
    push(run, REPO, endpoint=hub.url)
    assert set(hub.files(REPO)) == BASE, "the pictures are taken back with the card that shows them"


def test_shards_replace_a_single_file_and_the_stale_one_goes_in_the_same_commit(hub, tiny_model, folder, tmp_path):
    push(folder, REPO, endpoint=hub.url)
    tiny_model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    push(tmp_path / "shards", REPO, endpoint=hub.url)
    names = set(hub.files(REPO))
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names and pushes(hub) == 2
    loaded = SwinHFForImageClassification.from_pretrained(swin_hf.pull(REPO, endpoint=hub.url).path)
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    push(folder, REPO, endpoint=hub.url)
    assert same_as(folder, hub), "the shards and their index must not stay behind"


def test_revision_goes_to_its_branch_and_leaves_main_alone(hub, folder):
    push(folder, REPO, revision="experiments/a", tag="a1", endpoint=hub.url)
    assert same_as(folder, hub, "experiments/a") and hub.files(REPO) == {}
    assert hub.repos[REPO].resolve("a1").id == hub.repos[REPO].branches["experiments/a"]


def test_dry_run_lists_files_and_card_without_the_network(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = push(folder, REPO, dry_run=True, endpoint="http://127.0.0.1:9")
    assert result.commit is None and {file.name for file in result.files} == BASE and "# tiny" in result.card
    assert hub.requests == []


def test_facts_and_pictures_of_an_earlier_push_do_not_stay_beside_other_weights(hub, folder):
    measured = TrainingFacts(
        curves={"val_loss": [[1, 2.0], [2, 1.0]]},
        confusion_matrix=ConfusionMatrix(["a", "b"], [[1, 2], [3, 4]], "test"),
    )
    push(folder, REPO, card=Card(facts=measured), endpoint=hub.url)
    of_the_run = {"training_facts.json", "assets/confusion_matrix.png", "assets/learning_curves.png"}
    assert set(hub.files(REPO)) == BASE | of_the_run
    hub.put(REPO, {"assets/mine.png": b"\x89PNG"})
    push(folder, REPO, endpoint=hub.url)
    assert set(hub.files(REPO)) == BASE | {"assets/mine.png"} and pushes(hub) == 2


# -- image processors -------------------------------------------------------------------------------------------------


def write_processor(folder: Path, **changes) -> bytes:
    values = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 48}} | changes
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def test_processor_is_sent_without_the_code_of_other_repositories(hub, folder):
    clean = write_processor(folder)
    write_processor(folder, auto_map={"AutoImageProcessor": "other/repo--evil.Evil"}, _name_or_path=str(folder))
    push(folder, REPO, endpoint=hub.url)
    assert hub.files(REPO)["preprocessor_config.json"] == clean
    assert not push(folder, REPO, endpoint=hub.url).created
    assert not push(swin_hf.pull(REPO, endpoint=hub.url).path, REPO, endpoint=hub.url).created


def test_given_processor_is_cleaned_too(hub, folder):
    from transformers import ViTImageProcessor

    given = ViTImageProcessor(size={"height": 32, "width": 48})
    given.auto_map = {"AutoImageProcessor": "other/repo--evil.Evil"}
    push(folder, REPO, processor=given, endpoint=hub.url)
    assert b"evil" not in hub.files(REPO)["preprocessor_config.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "EvilProcessor"}, "names the image processor 'EvilProcessor'; it must be a class of"),
        ({"image_processor_type": "pipeline"}, "names the image processor 'pipeline'; it must be a class of"),
        ({"image_processor_type": None}, "names the image processor None"),
        ({"image_processor_type": ["x"]}, "names the image processor .*; it must be a class of transformers"),
    ],
    ids=str,
)
def test_processor_that_is_not_one_of_transformers_is_refused(folder, change, message):
    write_processor(folder, **change)
    with pytest.raises(ValueError, match=f"{message}.*"):
        push(folder, REPO, dry_run=True)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000], ids=["list", "cut", "binary", "deep"])
def test_processor_that_cannot_be_read_is_refused(folder, content):
    (folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"preprocessor_config.json cannot be read \(.*save the image processor again"):
        push(folder, REPO, dry_run=True)


def test_private_repository_is_made_private(hub, folder):
    push(folder, REPO, private=True, endpoint=hub.url)
    assert hub.repos[REPO].private


# -- cards ------------------------------------------------------------------------------------------------------------


def test_card_edited_on_the_hub_is_kept_unless_replaced(hub, folder):
    push(folder, REPO, license="mit", endpoint=hub.url)
    edited = hub.files(REPO)["README.md"] + b"\nMy own words.\n"
    hub.put(REPO, {"README.md": edited})
    result = push(folder, REPO, license="apache-2.0", endpoint=hub.url)
    assert hub.files(REPO)["README.md"] == edited and "--replace-card" in result.notes[0]
    assert {file.name for file in result.files} == BASE - {"README.md"}, "the card was not sent"
    push(folder, REPO, license="apache-2.0", card=Card(replace=True), endpoint=hub.url)
    assert (
        b"My own words" not in hub.files(REPO)["README.md"] and b"license: apache-2.0" in hub.files(REPO)["README.md"]
    )


def test_card_rendered_by_us_is_rendered_anew(hub, folder):
    push(folder, REPO, license="mit", endpoint=hub.url)
    push(folder, REPO, license="apache-2.0", endpoint=hub.url)
    assert b"license: apache-2.0" in hub.files(REPO)["README.md"] and pushes(hub) == 2


def test_own_card_is_sent(hub, folder, tmp_path):
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\nMine.\n")
    push(folder, REPO, card=tmp_path / "card.md", endpoint=hub.url)
    assert hub.files(REPO)["README.md"] == b"---\nlicense: mit\n---\nMine.\n"


# -- faults -----------------------------------------------------------------------------------------------------------

API_STEPS = ("repo_info", "create_repo", "refs", "tree", "validate_yaml", "preupload", "commit", "tag")
STEPS = {
    "basic": (*API_STEPS, "lfs_batch", "lfs_put", "lfs_verify"),
    "multipart": (*API_STEPS, "lfs_batch", "lfs_part", "lfs_complete", "lfs_verify"),
    "xet": (*API_STEPS, "xet_write_token"),
}
PATIENT = ("preupload", "lfs_batch", "lfs_put", "lfs_part", "lfs_complete", "lfs_verify", "xet_write_token")
TRANSIENT = {
    "500": {"kind": "status", "status": 500},
    "502": {"kind": "status", "status": 502},
    "503": {"kind": "status", "status": 503},
    "504": {"kind": "status", "status": 504},
    "429-retry-after": {"kind": "status", "status": 429, "headers": {"Retry-After": "1"}},
    "429-ratelimit": {"kind": "status", "status": 429, "headers": {"ratelimit": '"api";r=0;t=1'}},
    "cut": {"kind": "cut"},
    "lost": {"kind": "lost"},
    "lost-502": {"kind": "lost-502"},
    "late": {"kind": "late"},
}
PERMANENT = {
    "400": {"kind": "status", "status": 400},
    "403": {"kind": "status", "status": 403},
    "413": {"kind": "status", "status": 413},
    "500-for-ever": {"kind": "status", "status": 500, "times": FOR_EVER},
    "cut-for-ever": {"kind": "cut", "times": FOR_EVER},
    "lost-for-ever": {"kind": "lost", "times": FOR_EVER},
}


def check_fault(hub: LoopbackHub, folder: Path, step: str, fault: dict) -> str:
    """Push with a fault; then the commit is there as a whole or not at all, and the repeated command completes it."""
    details = dict(fault)
    hub.fail(step, details.pop("kind"), **details)
    try:
        push(folder, REPO, tag="v1", endpoint=hub.url)
        outcome = "completed by itself"
    except HubError as error:
        assert len(str(error)) < 400 and str(error).count("\n") == 0, "a sentence"
        assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
        outcome = "commit there" if pushes(hub) else "nothing there"
    if fault["kind"] == "late":
        time.sleep(0.5)
    assert pushes(hub) <= 1, "a duplicate commit"
    if pushes(hub):
        assert same_as(folder, hub), "half a commit"
    else:
        assert REPO not in hub.repos or hub.files(REPO) == {}, "files without the commit"
    hub.faults.clear()
    result = push(folder, REPO, tag="v1", endpoint=hub.url)
    assert pushes(hub) == 1 and same_as(folder, hub) and hub.repos[REPO].tags == {"v1": result.commit}
    return outcome


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("commit", "lost"),
        ("commit", "late"),
        ("commit", "503"),
        ("create_repo", "lost-502"),
        ("tag", "lost"),
        ("tree", "cut"),
    ],
)
def test_fault_that_passes_is_overcome(hub, folder, step, fault):
    assert check_fault(hub, folder, step, TRANSIENT[fault]) == "completed by itself"


@pytest.mark.parametrize(
    ("step", "fault", "outcome"),
    [
        ("preupload", "403", "nothing there"),
        ("commit", "500-for-ever", "nothing there"),
        ("commit", "lost-for-ever", "completed by itself"),
        ("tag", "500-for-ever", "commit there"),
    ],
)
def test_fault_that_stays_leaves_all_or_nothing(hub, folder, step, fault, outcome):
    assert check_fault(hub, folder, step, PERMANENT[fault]) == outcome


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*TRANSIENT, *PERMANENT])
@pytest.mark.parametrize(("mode", "step"), [(mode, step) for mode in MODES for step in STEPS[mode]])
def test_every_fault_at_every_step(hub, folder, monkeypatch, mode, step, fault, record_property):
    use_mode(hub, mode, monkeypatch)
    if step in PATIENT and fault.endswith("for-ever"):
        monkeypatch.setattr(remote, "WAITS", ())  # the client alone tries six times, over 23 seconds
    outcome = check_fault(hub, folder, step, (TRANSIENT | PERMANENT)[fault])
    record_property("outcome", outcome)
    print(f"OUTCOME|{mode}|{step}|{fault}|{outcome}")  # noqa: T201 - the table, with -rA
    if fault in TRANSIENT and (step, fault) != ("commit", "late"):
        assert outcome == "completed by itself"


def test_429_on_the_commit_waits_as_long_as_it_is_told(hub, folder):
    hub.fail("commit", "status", status=429, headers={"Retry-After": "1"})
    start = time.monotonic()
    push(folder, REPO, endpoint=hub.url)
    assert time.monotonic() - start > 1 and pushes(hub) == 1


def test_stale_parent_is_not_overwritten(hub, folder):
    hub.create(REPO)
    hub.fail("commit", "stale")
    with pytest.raises(HubError, match="somebody else committed to user/tiny"):
        push(folder, REPO, endpoint=hub.url)
    assert set(hub.files(REPO)) == {"NOTES.md"}
    push(folder, REPO, endpoint=hub.url)
    assert set(hub.files(REPO)) == BASE | {"NOTES.md"} and hub.files(REPO)["NOTES.md"] == b"first!\n"


def test_file_damaged_on_the_server_is_noticed_not_tagged_and_repaired(hub, folder):
    hub.fail("commit", "mangle")
    with pytest.raises(
        HubError, match=r"does not hold what was sent \(.*\), and was not tagged; run the command again"
    ):
        push(folder, REPO, tag="v1", endpoint=hub.url)
    assert hub.repos[REPO].tags == {}
    push(folder, REPO, tag="v1", endpoint=hub.url)
    assert same_as(folder, hub) and list(hub.repos[REPO].tags) == ["v1"]


def test_xet_storage_out_of_reach_leaves_nothing(hub, folder, monkeypatch):
    use_mode(hub, "xet", monkeypatch)
    hub.fail("xet_write_token", "dead-store", times=FOR_EVER)
    with pytest.raises(HubError):
        push(folder, REPO, endpoint=hub.url)
    assert hub.files(REPO) == {}
    hub.faults.clear()
    push(folder, REPO, endpoint=hub.url)
    assert same_as(folder, hub)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["tiny", "a/b/c", "user/", "user/ti ny", "user/-x", "", "user/" + "x" * 97])
def test_malformed_repo_id_is_refused(folder, repo_id):
    with pytest.raises(ValueError, match="is not a repository id; write user/name"):
        push(folder, repo_id, dry_run=True)


@pytest.mark.parametrize(("name", "what"), [("v 1", "tag"), ("a..b", "tag"), ("0" * 40, "tag"), ("-x", "tag")])
def test_malformed_tag_is_refused(folder, name, what):
    with pytest.raises(ValueError, match=f"cannot name a {what}"):
        push(folder, REPO, tag=name, dry_run=True)


def test_no_token_is_a_sentence(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"there is no access token.*hf auth login"):
        push(folder, REPO, endpoint=hub.url)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (READER, "the token does not give access to user/tiny .*, to push use a token that may write to user"),
        (STRANGER, "the token does not give access to user/tiny .*, to push use a token that may write to user"),
        ("hf_nobodyTOKENnobodyTOKEN", "the Hub does not accept the token"),
    ],
    ids=["read-only", "another user", "unknown"],
)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "exists"])
def test_token_that_may_not_write_is_refused(hub, folder, monkeypatch, token, sentence, exists):
    if exists:
        hub.create(REPO)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=sentence):
        push(folder, REPO, endpoint=hub.url)
    assert (REPO in hub.repos) == exists and "lfs_put" not in hub.steps()


def test_existing_tag_is_an_error_before_anything_is_sent(hub, folder, tiny_model, tmp_path):
    push(folder, REPO, tag="v1", endpoint=hub.url)
    tiny_model.classifier.bias.data += 1
    hub.requests.clear()
    with pytest.raises(HubError, match=r"tag v1 of user/tiny exists.*never moved; choose another tag"):
        push(tiny_model, REPO, tag="v1", endpoint=hub.url)
    assert set(hub.steps()) == {"repo_info", "refs", "tree", "resolve"} and pushes(hub) == 1  # it only looked


def test_tag_that_somebody_puts_elsewhere_in_the_meantime_is_reported(hub, folder, monkeypatch):
    old = hub.put(REPO, {"x.txt": b"x"})
    hub.fail("tag", "status", status=503)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: hub.repos[REPO].tags.setdefault("v1", old))
    with pytest.raises(HubError, match="somebody else has just put tag v1 on another"):
        push(folder, REPO, tag="v1", endpoint=hub.url)
    assert hub.repos[REPO].tags == {"v1": old}


def test_revision_that_is_a_tag_is_refused(hub, folder):
    push(folder, REPO, tag="v1", endpoint=hub.url)
    with pytest.raises(HubError, match="v1 is a tag of user/tiny; a branch of that name would hide it"):
        push(folder, REPO, revision="v1", endpoint=hub.url)
    assert set(hub.repos[REPO].branches) == {"main"}


def test_tag_that_is_a_branch_is_refused(hub, folder):
    hub.create(REPO)
    with pytest.raises(HubError, match="main is a branch of user/tiny, which would hide the tag"):
        push(folder, REPO, tag="main", endpoint=hub.url)


def test_existing_tag_refuses_a_new_branch_before_it_is_made(hub, folder):
    push(folder, REPO, tag="v1", endpoint=hub.url)
    with pytest.raises(HubError, match="tag v1 of user/tiny exists and is never moved"):
        push(folder, REPO, tag="v1", revision="dev", endpoint=hub.url)
    assert set(hub.repos[REPO].branches) == {"main"}


@pytest.mark.parametrize(("private", "now"), [(True, "public"), (False, "private")])
def test_other_visibility_than_asked_for_is_refused_before_anything_is_sent(hub, folder, private, now):
    hub.create(REPO, private=not private)
    with pytest.raises(HubError, match=f"exists and is {now}, but a .* push was asked for"):
        push(folder, REPO, private=private, endpoint=hub.url)
    assert hub.steps() == ["repo_info"]


def test_network_down_is_a_sentence(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with pytest.raises(HubError, match=r"the Hub cannot be reached.*check the network"):
        push(folder, REPO, endpoint="http://127.0.0.1:9")


def test_offline_mode_is_a_sentence(hub, folder, offline):
    offline()
    with pytest.raises(HubError, match="offline mode is on"):
        push(folder, REPO, endpoint=hub.url)


def test_disk_full_is_a_sentence(tiny_model):
    with (
        files_of_at_most(5000),
        pytest.raises(OSError, match=r"^/.* cannot be written: the file is larger .*make room.*nothing was sent"),
    ):
        push(tiny_model, REPO, dry_run=True)


def test_storage_quota_of_the_hub_is_a_sentence(hub, folder):
    hub.fail("commit", "status", status=413)
    with pytest.raises(HubError, match="the Hub has no room for user/tiny"):
        push(folder, REPO, endpoint=hub.url)


def test_invalid_metadata_is_found_before_anything_is_uploaded(hub, folder):
    with pytest.raises(ValueError, match=r"tags.*must be a list of strings"):
        push(folder, REPO, card="---\ntags: {a: b}\n---\ntext\n", endpoint=hub.url)
    assert hub.requests == []


def test_metadata_that_only_the_hub_refuses_is_found_before_the_upload(hub, folder):
    with pytest.raises(HubError, match=r"the Hub refuses the card's metadata.*model-index.*top of README.md"):
        push(folder, REPO, card="---\nmodel-index: [{name: x}]\n---\ntext\n", endpoint=hub.url)
    assert not {"preupload", "lfs_batch", "lfs_put", "commit"} & set(hub.steps())


def test_folder_without_a_model_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="there is no folder"):
        push(tmp_path / "nowhere", REPO, dry_run=True)
    shutil.copytree(folder, tmp_path / "runs" / "version_3" / "model")
    with pytest.raises(ValueError, match=r"did you mean .*version_3\?"):
        push(tmp_path / "runs", REPO, dry_run=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        push(folder, REPO, dry_run=True)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).*swin-hf convert"):
        push(folder, REPO, dry_run=True)


def test_missing_card_file_is_refused(folder):
    with pytest.raises(ValueError, match="there is no card"):
        push(folder, REPO, card="no/such/card.md", dry_run=True)


def test_card_that_is_no_text_is_refused(folder, tmp_path):
    (tmp_path / "card.md").write_bytes(b"\xff\xfe---")
    with pytest.raises(ValueError, match=r"the card .*card.md is not UTF-8 text \(.*save it in that encoding"):
        push(folder, REPO, card=tmp_path / "card.md", dry_run=True)
    (folder / "README.md").write_bytes(b"\xff\xfe---")
    with pytest.raises(ValueError, match=r"the card .*README.md is not UTF-8 text"):
        push(folder, REPO, dry_run=True)


@pytest.mark.parametrize("thing", [5, None, torch.nn.Linear(1, 1)], ids=["5", "None", "Linear"])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(ValueError, match=f"{type(thing).__name__} cannot be pushed; give a model of swin_hf"):
        push(thing, REPO, dry_run=True)


def test_model_of_another_family_is_refused(tmp_path):
    from transformers import SwinConfig, SwinForImageClassification

    model = SwinForImageClassification(SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1], window_size=2))
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(ValueError, match="has model_type 'swin', not 'swin_hf' or 'swinv2_hf'; convert"):
            push(source, REPO, dry_run=True)


def test_weights_that_do_not_fit_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    weights["extra"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier.bias is missing; extra is left over"):
        push(folder, REPO, dry_run=True)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        push(folder, REPO, dry_run=True)


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_token_is_in_no_file_log_or_traceback(hub, folder, tmp_path, caplog, capsys, monkeypatch):
    """Everything that leaves this process is searched: files on the server, logs at DEBUG, output, tracebacks."""
    caplog.set_level(logging.DEBUG)
    facts = TrainingFacts(
        command=f"HF_TOKEN={WRITER} finetune.py fit --token {WRITER}", hyper_parameters={"key": WRITER}
    )
    push(folder, REPO, card=Card(facts=facts), tag="v1", endpoint=hub.url)
    assert WRITER in hub.seen_tokens, "the test is void if the token was never used"
    seen = [content for content in hub.files(REPO).values()]
    for step in ("commit", "tag", "preupload", "repo_info"):
        hub.fail(step, "status", status=403)
        try:
            push(folder, REPO, card=Card(facts=TrainingFacts(command=step)), tag=step, endpoint=hub.url)
        except HubError as error:
            seen.append(
                "".join(
                    # Without the frame of this test, which holds the facts that it planted a token in.
                    traceback.TracebackException(
                        type(error), error, error.__traceback__.tb_next, capture_locals=True
                    ).format()
                ).encode()
            )
        hub.faults.clear()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    cli.main(["push", str(folder), "user/other", "--dry-run"])
    output = capsys.readouterr()
    seen += [caplog.text.encode(), output.out.encode(), output.err.encode()]
    seen += [path.read_bytes() for path in Path(tempfile.gettempdir()).glob("swin-hf-*/**/*") if path.is_file()]
    assert len(seen) > 10 and not [text for text in seen if WRITER.encode() in text]
    assert b"HF_TOKEN=<token> finetune.py fit --token <token>" in hub.files(REPO, "v1")["README.md"]


def test_card_with_a_token_is_refused(folder):
    with pytest.raises(ValueError, match=r"README.md holds something that looks like an access token"):
        push(folder, REPO, card="---\nlicense: mit\n---\nhf_abcdefghijklmnopqrstuvwxyzABCDEFGH\n", dry_run=True)


# -- command line -----------------------------------------------------------------------------------------------------


def test_command_line_pushes_and_reports(hub, folder, run_commands):
    again = ["push", str(folder), REPO, "--tag", "v1", "--license", "mit", "--quiet"]
    first, second, refused = run_commands([*again, "--private"], again, ["push", str(folder), "bad id"])
    commit = hub.log(REPO)[0].id
    assert first.code == second.code == 0
    assert f"pushed: {hub.url}/{REPO}/tree/{commit}" in first.out and f"commit {commit}, tag v1" in first.out
    assert "already there" in second.out
    assert refused.code == 2 and "swin-hf push: 'bad id' is not a repository id" in refused.err


# -- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["basic", "xet"])
def test_push_of_swin_tiny_leaves_what_upload_folder_leaves_and_prints_both_times(hub, tmp_path, monkeypatch, mode):
    """Alternating, each on an empty Hub; the client's own upload_folder of the very files that a push makes."""
    use_mode(hub, mode, monkeypatch)
    config = swin_hf.SwinHFConfig.from_preset("swin_tiny_patch4_window7_224")
    SwinHFForImageClassification(config).save_pretrained(tmp_path / "model")
    push(tmp_path / "model", REPO, endpoint=hub.url)
    for name, content in hub.files(REPO).items():
        (tmp_path / "same" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "same" / name).write_bytes(content)
    assert len(load_safetensors((tmp_path / "same" / "model.safetensors").read_bytes())) > 100
    api, times, left = HfApi(endpoint=hub.url), {"push": [], "upload_folder": []}, {}
    for _ in range(5):
        for name in times:
            hub.reset()
            hub.mode = mode
            start = time.perf_counter()
            if name == "push":
                push(tmp_path / "model", REPO, endpoint=hub.url)
            else:
                api.create_repo(REPO)
                api.upload_folder(repo_id=REPO, folder_path=tmp_path / "same")
            times[name].append(time.perf_counter() - start)
            left[name] = hub.files(REPO)
    medians = {name: sorted(values)[2] for name, values in times.items()}
    print(  # noqa: T201 - the figures, with -rA
        f"MEASURED|{mode}|{times}|{medians['push'] / medians['upload_folder']:.2f}"
    )
    assert left["push"] == left["upload_folder"]
