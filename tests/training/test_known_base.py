"""The repository behind weights that a run started from on this disk."""

from swin_hf.hub import TrainingFacts
from swin_hf.training.network import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def weights_in(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_downloaded_model_is_named_by_its_repository(tmp_path):
    folder = weights_in(tmp_path / "models--user--swin" / "snapshots" / COMMIT)
    origin = resolve(str(folder))
    assert (origin.path, origin.repo_id, origin.commit) == (folder, "user/swin", COMMIT)


def test_a_run_is_named_by_what_it_started_from(tmp_path):
    folder = weights_in(tmp_path / "runs" / "digits" / "model")
    assert resolve(str(folder)).repo_id is None
    TrainingFacts(base_model="user/swin", base_model_revision=COMMIT, base_model_license="mit").save(folder)
    for start in (folder, folder.parent):
        origin = resolve(str(start))
        assert (origin.path, origin.repo_id, origin.commit, origin.license) == (folder, "user/swin", COMMIT, "mit")
