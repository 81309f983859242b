"""Pull against the loopback Hub: one commit, verified, safetensors only, also without the Hub."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, PUSHES
from hub_server import FOR_EVER, READER, STRANGER, use_mode
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from swin_hf import SwinHFBackbone, SwinHFForImageClassification, load_backbone, pull, push
from swin_hf.families import FAMILIES
from swin_hf.hub import Card, HubError, TrainingFacts

pytestmark = PUSHES

REPO = "user/tiny"
CORE = [path.name for path in FAMILIES["swin_hf"].travelling_files("image-classification")]
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", *CORE}


@pytest.fixture
def pushed(hub, tiny_model):
    """A model on the Hub; the requests that brought it there are forgotten."""
    result = push(tiny_model, REPO, tag="v1", endpoint=hub.url)
    hub.requests.clear()
    return result


def files(path: Path) -> set[str]:
    return {file.name for file in path.iterdir() if file.is_file()}


@pytest.mark.parametrize("mode", ["basic", "xet"])
def test_pull_brings_what_loading_needs_and_says_which_commit(hub, tiny_model, monkeypatch, mode):
    use_mode(hub, mode, monkeypatch)
    pushed = push(tiny_model, REPO, card=Card(facts=TrainingFacts(seed=1)), endpoint=hub.url)
    hub.put(REPO, {"notes.txt": b"x", "training_args.bin": b"\x80", "other.py": b"x = 1\n"})
    pulled = pull(REPO, revision=pushed.commit, endpoint=hub.url)
    assert pulled.commit == pushed.commit and files(pulled.path) == FILES | {"training_facts.json"}
    assert files(pull(REPO, endpoint=hub.url).path) == FILES | {"training_facts.json"}


def test_everything_comes_from_the_commit_that_the_revision_stood_for(hub, pushed):
    pulled = pull(REPO, revision="v1", endpoint=hub.url)
    assert pulled.commit == pushed.commit
    *asked, last = [path for step, path, _ in hub.requests if step in ("resolve", "tree")]
    assert all(pushed.commit in path for path in asked)
    assert last.endswith("/resolve/v1/config.json"), "the cached name is updated when everything is there"


def test_second_pull_downloads_nothing(hub, pushed):
    first = pull(REPO, endpoint=hub.url)
    hub.requests.clear()
    assert pull(REPO, endpoint=hub.url) == first and "cdn" not in hub.steps()


def test_local_dir_holds_the_files(hub, pushed, tmp_path, tiny_model):
    pulled = pull(REPO, local_dir=tmp_path / "here", endpoint=hub.url)
    assert pulled.path == tmp_path / "here" and files(pulled.path) >= FILES
    loaded = SwinHFForImageClassification.from_pretrained(pulled.path)
    assert torch.equal(loaded.classifier.weight, tiny_model.classifier.weight)


@pytest.fixture
def versions(hub, tiny_model, tmp_path):
    """v1 in one file with facts of its training, v2 in shards without; their biases differ."""
    first = push(tiny_model, REPO, card=Card(facts=TrainingFacts(seed=1)), tag="v1", endpoint=hub.url)
    tiny_model.classifier.bias.data += 1
    tiny_model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    second = push(tmp_path / "shards", REPO, tag="v2", include_code=False, endpoint=hub.url)
    hub.requests.clear()
    return first.commit, second.commit


def bias(folder: Path) -> torch.Tensor:
    return SwinHFForImageClassification.from_pretrained(folder).classifier.bias


def test_local_dir_holds_one_version_only(hub, versions, tmp_path, tiny_model):
    """from_pretrained prefers a single file to shards: that of another version must not stay."""
    here = tmp_path / "here"
    pull(REPO, revision="v1", local_dir=here, endpoint=hub.url)
    (here / "notes.txt").write_text("mine")
    pull(REPO, revision="v2", local_dir=here, endpoint=hub.url)
    assert not {"model.safetensors", "training_facts.json", *CORE} & files(here)
    assert torch.equal(bias(here), tiny_model.classifier.bias) and (here / "notes.txt").is_file()
    pull(REPO, revision="v1", local_dir=here, endpoint=hub.url)
    assert files(here) == FILES | {"training_facts.json", "notes.txt"}
    assert torch.equal(bias(here), tiny_model.classifier.bias - 1)


def test_failed_pull_removes_nothing_from_local_dir(hub, versions, tmp_path):
    pull(REPO, revision="v1", local_dir=tmp_path / "here", endpoint=hub.url)
    hub.fail("cdn", "status", status=403, times=FOR_EVER)
    with pytest.raises(HubError):
        pull(REPO, revision="v2", local_dir=tmp_path / "here", endpoint=hub.url)
    assert "model.safetensors" in files(tmp_path / "here")
    hub.faults.clear()
    pull(REPO, revision="v1", local_dir=tmp_path / "here", endpoint=hub.url)
    assert files(tmp_path / "here") == FILES | {"training_facts.json"}, "what the failed pull left is known, too"


@pytest.mark.parametrize("pulled_before", [False, True], ids=["own", "changed"])
def test_local_dir_with_a_model_of_somebody_is_refused_before_a_download(hub, versions, tmp_path, pulled_before):
    here = tmp_path / "here"
    here.mkdir()
    if pulled_before:
        pull(REPO, revision="v1", local_dir=here, endpoint=hub.url)
    (here / "model.safetensors").write_bytes(b"mine")
    hub.requests.clear()
    with pytest.raises(
        ValueError, match=r"here holds model.safetensors, which user/tiny does not have.*another folder"
    ):
        pull(REPO, revision="v2", local_dir=here, endpoint=hub.url)
    assert not {"resolve", "cdn"} & set(hub.steps()) and (here / "model.safetensors").read_bytes() == b"mine"


def test_corrupted_download_is_noticed_and_repaired(hub, pushed):
    """The client checks the size only; the same size with one byte changed passes it."""
    hub.fail("cdn", "corrupt")
    pulled = pull(REPO, endpoint=hub.url)
    assert (pulled.path / "model.safetensors").read_bytes() == hub.files(REPO)["model.safetensors"]
    assert hub.steps().count("cdn") == 2


def test_download_that_stays_corrupted_is_refused_and_removed(hub, pushed, tmp_path):
    hub.fail("cdn", "corrupt", times=FOR_EVER)
    with pytest.raises(HubError, match=r"model.safetensors of user/tiny did not arrive as the Hub has it, twice"):
        pull(REPO, local_dir=tmp_path / "here", endpoint=hub.url)
    assert not (tmp_path / "here" / "model.safetensors").exists()
    with pytest.raises(HubError, match=r"did not arrive"):
        pull(REPO, endpoint=hub.url)
    hub.faults.clear()
    assert (pull(REPO, endpoint=hub.url).path / "model.safetensors").is_file()


@pytest.fixture
def sharded(hub, tiny_model, tmp_path):
    """The model on the Hub in shards."""
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    return push(tmp_path / "sharded", REPO, endpoint=hub.url)


@pytest.mark.parametrize("step", ["resolve", "cdn"])
def test_damage_on_the_way_is_never_blamed_on_the_model_and_never_stays(hub, sharded, step):
    """Small files come from the Hub itself, here ``resolve``, shards from its storage."""
    hub.fail(step, "corrupt", times=FOR_EVER)
    with pytest.raises(HubError, match=r"(config.json|model-000).* of user/tiny did not arrive as the Hub has it"):
        pull(REPO, endpoint=hub.url)
    hub.faults.clear()
    folder = pull(REPO, endpoint=hub.url).path
    assert all((folder / name).read_bytes() == hub.files(REPO)[name] for name in files(folder))


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-*.safetensors"])
def test_one_damaged_byte_in_the_cache_is_repaired(hub, sharded, name, place):
    folder = pull(REPO, endpoint=hub.url).path
    (damaged,) = folder.glob(name)
    content = bytearray(damaged.read_bytes())
    content[0 if place == "first" else -3] ^= 0x40
    damaged.resolve().write_bytes(content)
    folder = pull(REPO, endpoint=hub.url).path
    assert damaged.read_bytes() == hub.files(REPO)[damaged.name]
    SwinHFForImageClassification.from_pretrained(folder, strict=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damage_is_not_blamed_on_the_model_offline_either(hub, sharded, offline, name):
    damaged = pull(REPO, endpoint=hub.url).path / name
    damaged.resolve().write_bytes(b"[" + damaged.read_bytes()[1:])
    offline()
    with pytest.raises(HubError, match=rf"{name} of user/tiny is damaged in the cache, and was removed; pull again"):
        pull(REPO)
    assert not damaged.exists()


def test_without_verify_the_corruption_stays(hub, pushed):
    hub.fail("cdn", "corrupt")
    pulled = pull(REPO, verify=False, endpoint=hub.url)
    assert (pulled.path / "model.safetensors").read_bytes() != hub.files(REPO)["model.safetensors"]


@pytest.mark.parametrize("step", ["repo_info", "tree", "resolve", "cdn"])
@pytest.mark.parametrize("fault", [{"kind": "status", "status": 503}, {"kind": "cut"}, {"kind": "half"}], ids=str)
def test_fault_that_passes_is_overcome(hub, pushed, step, fault):
    fault = dict(fault)
    hub.fail(step, fault.pop("kind"), **fault)
    pulled = pull(REPO, endpoint=hub.url)
    assert (pulled.path / "model.safetensors").read_bytes() == hub.files(REPO)["model.safetensors"]


# -- without the Hub --------------------------------------------------------------------------------------------------


def test_offline_the_cache_answers(hub, pushed, offline):
    online = pull(REPO, revision="v1", endpoint=hub.url)
    hub.requests.clear()
    offline()
    assert pull(REPO, revision="v1") == online
    assert pull(REPO, revision=pushed.commit) == online
    assert isinstance(load_backbone(REPO, revision="v1"), SwinHFBackbone) and hub.requests == []
    with pytest.raises(HubError, match=r"offline mode is on .* the cache does not hold user/other"):
        pull("user/other")
    with pytest.raises(HubError, match=r"the cache does not hold user/tiny at v2"):
        pull(REPO, revision="v2")


def test_hub_that_is_down_leaves_the_cache(hub, pushed):
    online = pull(REPO, endpoint=hub.url)
    assert pull(REPO, endpoint="http://127.0.0.1:9") == online
    hub.fail("repo_info", "status", status=503, times=FOR_EVER)
    assert pull(REPO, endpoint=hub.url) == online
    with pytest.raises(HubError, match=r"cannot be reached.*cache does not hold user/other"):
        pull("user/other", endpoint="http://127.0.0.1:9")


def test_pull_that_fails_leaves_the_model_before_it_to_be_found(hub, versions, tmp_path, offline):
    """The name of the branch leads to the new commit only when all of it is there."""
    first, second = versions
    hub.repos[REPO].branches["main"] = first
    assert pull(REPO, endpoint=hub.url).commit == first
    hub.repos[REPO].branches["main"] = second
    hub.fail("cdn", "status", status=403, times=FOR_EVER)
    with pytest.raises(HubError):
        pull(REPO, endpoint=hub.url)
    hub.faults.clear()
    assert pull(REPO, endpoint="http://127.0.0.1:9").commit == first
    assert pull(REPO, endpoint=hub.url).commit == second
    assert pull(REPO, revision="v1", endpoint=hub.url).commit == first
    assert hub.steps().count("repo_info") == 4, "one look-up for each pull"
    offline()
    assert (pull(REPO).commit, pull(REPO, revision="v1").commit) == (second, first)
    code = """
import swin_hf, sys
for revision in (None, "v1"):
    model = swin_hf.SwinHFForImageClassification.from_pretrained("user/tiny", revision=revision)
    print(model.classifier.bias.mean().item() > 0.5)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_offline_local_dir_answers(hub, versions, tmp_path, offline):
    first, here = versions[0], tmp_path / "here"
    online = pull(REPO, revision="v1", local_dir=here, endpoint=hub.url)
    assert pull(REPO, local_dir=here, endpoint="http://127.0.0.1:9") == online
    offline()
    assert pull(REPO, local_dir=here) == pull(REPO, revision="v1", local_dir=here) == online
    assert pull(REPO, revision=first, local_dir=here) == online
    for other in ({"repo_id": REPO, "revision": "v2"}, {"repo_id": "user/other"}):
        with pytest.raises(HubError, match=r"offline mode is on .* the cache does not hold"):
            pull(**other, local_dir=here)
    (here / "config.json").write_bytes((here / "config.json").read_bytes() + b"\n")
    with pytest.raises(HubError, match=r"config.json of user/tiny is damaged in .*here; delete .* and pull again"):
        pull(REPO, local_dir=here)
    (here / "config.json").unlink()
    with pytest.raises(HubError, match="the cache does not hold user/tiny"):
        pull(REPO, local_dir=here)


def test_offline_local_dir_with_files_of_two_versions_does_not_answer(hub, versions, tmp_path, offline):
    here = tmp_path / "here"
    pull(REPO, revision="v1", local_dir=here, endpoint=hub.url)
    hub.fail("cdn", "status", status=403, times=FOR_EVER)
    with pytest.raises(HubError):
        pull(REPO, revision="v2", local_dir=here, endpoint=hub.url)
    offline()
    with pytest.raises(HubError, match="the cache does not hold user/tiny"):
        pull(REPO, local_dir=here)


def test_offline_the_cache_is_copied_to_local_dir(hub, versions, tmp_path, offline):
    first, second = versions
    here = tmp_path / "here"
    pull(REPO, revision="v1", endpoint=hub.url), pull(REPO, revision="v2", endpoint=hub.url)
    offline()
    pulled = pull(REPO, revision="v1", local_dir=here)
    assert (pulled.path, pulled.commit) == (here, first)
    assert files(here) == FILES | {"training_facts.json"} and not (here / "model.safetensors").is_symlink()
    pulled = pull(REPO, revision="v2", local_dir=here)
    assert (pulled.path, pulled.commit) == (here, second)
    assert not {"model.safetensors", "training_facts.json", *CORE} & files(here)
    assert pull(REPO, local_dir=here).commit == second


def test_copy_from_the_cache_is_known_to_the_next_pull(hub, versions, tmp_path):
    pull(REPO, revision="v1", endpoint=hub.url)
    pull(REPO, revision="v1", local_dir=tmp_path / "here", endpoint="http://127.0.0.1:9")
    hub.requests.clear()
    pull(REPO, revision="v1", local_dir=tmp_path / "here", endpoint=hub.url)
    assert "cdn" not in hub.steps(), "the weights are not downloaded again"
    pull(REPO, revision="v2", local_dir=tmp_path / "here", endpoint=hub.url)
    assert "model.safetensors" not in files(tmp_path / "here")


def test_damage_in_the_cache_is_noticed_offline(hub, pushed, offline):
    weights = pull(REPO, endpoint=hub.url).path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    offline()
    with pytest.raises(HubError, match=r"model.safetensors of user/tiny is damaged in the cache, and was removed"):
        pull(REPO)
    assert not weights.exists()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_missing_private_and_gated_repositories_are_sentences(hub, pushed, monkeypatch):
    with pytest.raises(HubError, match=r"there is no repository user/missing.*check the name"):
        pull("user/missing", endpoint=hub.url)
    with pytest.raises(HubError, match="user/tiny has no such revision"):
        pull(REPO, revision="v9", endpoint=hub.url)
    hub.repos[REPO].private = True
    assert pull(REPO, endpoint=hub.url)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(HubError, match="there is no repository user/tiny that can be seen from here"):
        pull(REPO, endpoint=hub.url)
    hub.repos[REPO].private, hub.repos[REPO].gated = False, True
    hub.put(REPO, {"config.json": hub.files(REPO)["config.json"] + b"\n"})
    with pytest.raises(HubError, match="access to user/tiny is restricted; ask for it"):
        pull(REPO, endpoint=hub.url)
    hub.repos[REPO].allowed.add("stranger")
    assert pull(REPO, endpoint=hub.url)


@pytest.mark.parametrize(("status", "never"), [(403, "may not write"), (500, "sent twice")])
def test_refusal_of_a_pull_does_not_speak_of_writing(hub, pushed, status, never):
    hub.fail("repo_info", "status", status=status, times=FOR_EVER)
    with pytest.raises(HubError) as caught:
        pull(REPO, endpoint=hub.url)
    assert never not in str(caught.value) and "user/tiny" in str(caught.value)


def test_reader_and_nobody_may_pull_what_is_public(hub, pushed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    assert pull(REPO, endpoint=hub.url)
    monkeypatch.delenv("HF_TOKEN")
    assert pull(REPO, endpoint=hub.url)


def test_pickle_only_repository_is_refused_before_a_download(hub):
    hub.put(REPO, {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"})
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).*nothing was downloaded"):
        pull(REPO, endpoint=hub.url)
    assert not {"resolve", "cdn"} & set(hub.steps())


def test_repository_without_a_model_is_refused(hub):
    hub.put(REPO, {"notes.txt": b"x"})
    with pytest.raises(ValueError, match=r"user/tiny holds no config.json"):
        pull(REPO, endpoint=hub.url)
    hub.put(REPO, {"config.json": b"{}"})
    with pytest.raises(ValueError, match=r"user/tiny holds no model.safetensors"):
        pull(REPO, endpoint=hub.url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": -1}, "is not valid: .*embed_dim"),
        ({"embed_dim": "wide"}, "is not valid"),
        ({"depths": [1, 2]}, "is not valid: .*depths"),
        ({"num_heads": [3, 2, 4]}, "is not valid: .*num_heads"),
        ({"embed_dim": 2**20}, "is not valid: embed_dim 1048576.* parameters; a model has at most 10,000,000,000"),
        ({"embed_dim": 1024}, "the weights do not fit config.json"),
        ({"depths": [1, 2 * 10**9, 1]}, "is not valid: depths of stage 2 is 2000000000; it must be at most 500"),
        ({"depths": [1, 400, 1]}, "asks for 402 blocks but the weights hold"),
        ({"depths": [1] * 10**5, "num_heads": [1] * 10**5}, "is not valid: depths has 100000 stages"),
        ({"num_labels": 2 * 10**9}, "is not valid: num_labels is 2000000000; more than 1,000,000 need a name each"),
        ({"mlp_ratio": 1e300}, "is not valid: .*mlp_ratio 1e.300 .* parameters; a model has at most"),
        ({"hidden_act": "nope"}, "hidden_act is 'nope'; it must be an activation of transformers, such as 'gelu'"),
        ({"architectures": "SwinHFModel"}, "is not valid: .*architectures.*'SwinHFModel'"),
        ({"architectures": [["x"]]}, r"is not valid: .*architectures.*\['x'\]"),
        ({"architectures": []}, "names the architecture None; it must be one of"),
        (
            {"transformers_weights": "other.safetensors"},
            "has transformers_weights .*rename the weights to model.safete",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "has quantization_config .*; save the model without quanti"),
        ({"num_labels": 7}, "classifier.bias has shape .5,. where config.json asks for .7,."),
        ({"architectures": ["Evil"]}, "names the architecture 'Evil'; it must be one of"),
    ],
    ids=str,
)
def test_hostile_configuration_is_refused_before_anything_is_allocated(hub, tiny_model, tmp_path, change, message):
    """Also where from_pretrained would be told to ignore mismatched sizes, and would allocate what the file asks."""
    tiny_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    if "num_labels" in change:
        config.pop("id2label"), config.pop("label2id")
    hub.put(REPO, {"config.json": json.dumps(config).encode()})
    hub.put(REPO, {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    with pytest.raises(ValueError, match=message):
        pull(REPO, endpoint=hub.url)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000], ids=["cut", "list", "binary", "deep"])
def test_unreadable_configuration_is_a_sentence(hub, content):
    hub.put(REPO, {"config.json": content, "model.safetensors": b"x"})
    with pytest.raises(ValueError, match=r"config.json cannot be read .*save the model again"):
        pull(REPO, endpoint=hub.url)


def test_huge_configuration_is_refused_unread(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**26)
    with pytest.raises(ValueError, match="it has more than 32 MiB"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.bin", 7], ids=str
)
def test_shard_that_leaves_the_folder_is_refused(hub, tiny_model, tmp_path, name):
    tiny_model.save_pretrained(tmp_path / "model")
    save_file(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "outside.safetensors", {"format": "pt"})
    (tmp_path / "model" / "model.safetensors").unlink()
    index = json.dumps({"metadata": {}, "weight_map": {"classifier.bias": name}})
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    for refused in (lambda: load_backbone(tmp_path / "model"), lambda: push(tmp_path / "model", REPO, dry_run=True)):
        with pytest.raises(ValueError, match=r"points to .*anything else is refused"):
            refused()
    config = (tmp_path / "model" / "config.json").read_bytes()
    hub.put(REPO, {"config.json": config, "model.safetensors.index.json": index.encode()})
    with pytest.raises(ValueError, match=r"points to .*anything else is refused"):
        pull(REPO, endpoint=hub.url)


def test_index_that_names_a_missing_shard_or_is_broken_is_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model-00001-of-00005.safetensors").unlink(missing_ok=True)
    first = sorted(tmp_path.glob("model-0*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=r"which is missing; copy or download the folder again"):
        load_backbone(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json cannot be read"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04pickle", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"{", b"\0" * 64],
    ids=["empty", "pickle", "huge-header", "cut", "zeros"],
)
def test_file_that_is_not_safetensors_is_refused(tiny_model, tmp_path, content):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "..%2Fevil", "/abs.safetensors"])
def test_file_names_of_a_hostile_hub_never_leave_the_folder(hub, pushed, tmp_path, name):
    hub.put(REPO, {name: b"evil"})
    pulled = pull(REPO, local_dir=tmp_path / "deep" / "here", endpoint=hub.url)
    assert files(pulled.path) == FILES and {p.name for p in (tmp_path / "deep").iterdir()} == {"here"}


def test_model_of_another_family_is_pulled_and_verified(hub, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    content = (tmp_path / "model.safetensors").read_bytes()
    hub.put(REPO, {"config.json": b'{"model_type": "swin"}', "model.safetensors": content})
    assert (pull(REPO, endpoint=hub.url).path / "model.safetensors").read_bytes() == content


# -- backbones and the command line -----------------------------------------------------------------------------------


def test_load_backbone_takes_folders_and_repositories(hub, pushed, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    local = load_backbone(tmp_path / "model", out_features=["stage1", "stage3"]).eval()
    remote_one = load_backbone(REPO, revision="v1", endpoint=hub.url, out_indices=[1, 3]).eval()
    with torch.no_grad():
        pixels = torch.randn(1, 3, 32, 48)
        maps = local(pixels).feature_maps
        assert [tuple(m.shape) for m in maps] == [(1, 16, 16, 24), (1, 64, 4, 6)]
        for ours, theirs in zip(maps, remote_one(pixels).feature_maps, strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"is a path, which has no revision 'v1'"):
        load_backbone(tmp_path / "model", revision="v1")
    for missing in ("./nowhere", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"nowhere.* does not exist"):
            load_backbone(missing)


def test_command_line_pulls(pushed, tmp_path, run_commands):
    found, missing = run_commands(
        ["pull", REPO, "--revision", "v1", "--local-dir", str(tmp_path / "x"), "--quiet"],
        ["pull", "user/missing", "--quiet"],
    )
    assert found.code == 0 and found.out.splitlines() == [str(tmp_path / "x"), f"commit {pushed.commit}"]
    assert missing.code == 2 and "swin-hf pull: there is no repository user/missing" in missing.err


def test_a_repository_of_pickles_is_not_reported_to_a_conversion_service(hub, tiny_model, tmp_path):
    """transformers would send its name and the token to a Space; ours refuses, whatever the environment says."""
    tiny_model.config.save_pretrained(tmp_path / "bin")
    torch.save(tiny_model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    api = HfApi(endpoint=hub.url)
    api.create_repo("user/bin")
    api.upload_folder(repo_id="user/bin", folder_path=tmp_path / "bin")
    code = """
import sys, threading
import swin_hf
kind = getattr(sys.modules[sys.argv[1]], sys.argv[2])
try:
    kind.from_pretrained("user/bin")
except OSError as error:
    print("refused" if "does not appear to have a file named model.safetensors" in str(error) else error)
print([thread.name for thread in threading.enumerate() if "conversion" in thread.name])
"""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment.pop("DISABLE_SAFETENSORS_CONVERSION", None)
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, "-c", code, "swin_hf", type(tiny_model).__name__],
        env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["refused", "[]"], done.stderr
    assert not [path for _, path, _ in hub.requests if "discussions" in path or "pytorch_model.bin" in path]
