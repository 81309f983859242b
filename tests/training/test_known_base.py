"""The repository behind weights that a run started from on this disk."""

from swin_hf.hub import TrainingFacts
from swin_hf.training.facts import with_known_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_downloaded_model_is_named_by_its_repository(tmp_path):
    folder = tmp_path / "models--user--swin" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    facts = with_known_base(TrainingFacts(base_model=COMMIT), str(folder))
    assert (facts.base_model, facts.base_model_revision) == ("user/swin", COMMIT)


def test_a_run_is_named_by_what_it_started_from(tmp_path):
    folder = tmp_path / "runs" / "digits" / "model"
    folder.mkdir(parents=True)
    assert with_known_base(TrainingFacts(base_model="model"), str(folder)).base_model == "digits"
    TrainingFacts(base_model="user/swin", base_model_revision=COMMIT).save(folder)
    for start in (folder, folder.parent):
        facts = with_known_base(TrainingFacts(base_model="model"), str(start))
        assert (facts.base_model, facts.base_model_revision) == ("user/swin", COMMIT)


def test_what_is_known_stays(tmp_path):
    for facts, start in ((TrainingFacts(), None), (TrainingFacts(base_model="a/b", base_model_revision="1"), "a/b")):
        assert with_known_base(facts, start) == facts
