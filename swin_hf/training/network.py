"""The network that a task trains: a new one of a preset, or one that starts from any Swin checkpoint."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from swin_hf.families import TASKS, config_of_preset, family_of
from swin_hf.hub import HubError
from swin_hf.hub.facts import FACTS_NAME, TrainingFacts
from swin_hf.loading import Origin, find_model, load_model, read_foreign_config
from swin_hf.ranges import Options, ranged

_CACHED = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]+)(/|$)")  # what the Hub's clients download


@dataclass(frozen=True)
class Network(Options):
    """What is changed in the network of a preset or a checkpoint, and how it computes.

    Args:
        window_size: Window side in tokens, when another than the preset's or the checkpoint's.
        drop_path_rate: Stochastic depth of the last block, when another than the preset's.
        overrides: Any other field of the configuration, by name.
        attn_implementation: ``eager``, ``sdpa``, ``triton`` or ``auto``; the default is that of the model.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third slower.
        compile: Compile the network in place with ``torch.compile``.
    """

    window_size: int | list[int] | None = None
    drop_path_rate: float | None = ranged(None, "[0, 1)")
    overrides: dict[str, Any] | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False

    def fields(self, **others: Any) -> dict[str, Any]:
        """Fields of the configuration to set: those here, and the others that are not None."""
        size = others.get("image_size")
        if isinstance(size, tuple | list) and len(set(size)) == 1:
            others["image_size"] = size[0]
        others |= {"window_size": self.window_size, "drop_path_rate": self.drop_path_rate}
        return dict(self.overrides or {}) | {name: value for name, value in others.items() if value is not None}

    @property
    def backend(self) -> dict[str, Any]:
        """The attention backend, as transformers' constructors take it."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}


def new_network(task: str, preset: str, fields: dict[str, Any], backend: dict[str, Any]) -> Any:
    """A network with random weights for a task, of the family that has the preset, with these fields set."""
    config = config_of_preset(preset, **fields)
    return family_of(config).model_class(task)._from_config(config, **backend)


def load_network(task: str, path: Path, fields: dict[str, Any], backend: dict[str, Any]) -> tuple[Any, bool]:
    """The network for a task from anyone's Swin of any task on this machine, with these fields set.

    Returns:
        The network, and whether its head is new because none fits.

    Raises:
        ValueError: If the checkpoint cannot be read, or more than the head is missing or of another size.
    """
    stored, wanted = read_foreign_config(path), fields.get("num_channels")
    if wanted not in (None, stored.num_channels):
        rank_zero_info(
            f"the starting point takes {stored.num_channels} channels: their weights are taken in turn for {wanted}, "
            "scaled so that a picture of equal channels keeps its answer"
        )
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **fields, **backend}
    (network, report), _ = load_model(path, task, **options)
    unfit = [str(name[0] if isinstance(name, tuple) else name) for name in report["mismatched_keys"]]
    new = (*TASKS[task].head, "swin.norm.")  # a backbone has no norm after its last stage
    random = [*report["missing_keys"], *unfit]
    missing = [name for name in random if not name.startswith(new)]
    if missing:
        raise ValueError(
            f"the checkpoint does not fit the model: {len(missing)} tensors outside the head are missing or of another "
            f"size ({', '.join(sorted(missing)[:5])}); change only image_size and window_size, or start anew"
        )
    return network, any(name.startswith(tuple(TASKS[task].head)) for name in random)


def resolve(source: str) -> Origin:
    """Where a checkpoint is, and its repository, commit and licence, as far as they are known; or ValueError.

    They are those of the Hub's copy in the cache that a folder is; of a run, those of what it started from itself.
    """
    try:
        origin = find_model(source)
    except HubError as error:
        raise ValueError(str(error)) from error
    path, repo_id, commit = origin.path.resolve(), origin.repo_id, origin.commit
    run = TrainingFacts.load(path) if (path / FACTS_NAME).is_file() else TrainingFacts()
    if repo_id is None and (cached := _CACHED.search(path.as_posix())):
        repo_id, commit = f"{cached[1]}/{cached[2]}", cached[3]
    elif repo_id is None and run.base_model_revision:
        repo_id, commit = run.base_model, run.base_model_revision
    return Origin(origin.path, repo_id, commit, origin.license or run.base_model_license)
