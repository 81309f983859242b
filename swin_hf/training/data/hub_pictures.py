"""A data set on the Hub that is a folder of pictures: copied, so that it is read by the rule of every other folder.

``datasets`` would search its paths for the names of splits and drop what does not match.
"""

import functools
import os

from datasets import load_dataset_builder
from datasets.exceptions import DataFilesNotFoundError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from lightning.pytorch.utilities import rank_zero_info

from swin_hf.folders import is_picture, is_picture_folder, list_pictures
from swin_hf.hub.remote import attempt, client, understand


def copy_pictures(dataset: str, data_dir: str | None, revision: str | None, streaming: bool) -> str | None:
    """Copy a folder of pictures, or only the ``data_dir`` in it, from the Hub into the cache.

    Returns:
        The copy, an earlier one where the Hub is out of reach; None for a data set of tables or archives, or one whose
        card says which files are which split.

    Raises:
        HubError: If there is no such data set, or no access to it.
        ValueError: If it is a folder of pictures, and ``streaming``.
    """
    wanted = f"{data_dir.strip('/')}/" if data_dir else ""
    patterns = f"{wanted}*" if wanted else None
    copy = functools.partial(
        snapshot_download, dataset, repo_type="dataset", revision=revision, allow_patterns=patterns
    )
    try:
        info = client().dataset_info(dataset, revision=revision)
    except Exception as error:
        failure = understand(error, dataset)
        if isinstance(error, HfHubHTTPError) and not failure.transient:  # the Hub answered
            raise failure from None
        try:
            folder = copy(local_files_only=True)
        except Exception:
            return None  # `datasets` has a cache of its own
        inside = os.path.join(folder, wanted)
        return folder if is_picture_folder(inside) and list_pictures(inside)[0] else None
    names = [file.rfilename for file in info.siblings or []]
    pictures = [name for name in names if is_picture(name) and name.startswith(wanted)]
    names_files = info.card_data is not None and info.card_data.get("configs") is not None
    if not pictures or names_files or not _is_imagefolder(dataset, data_dir, info.sha):
        return None
    if streaming:
        raise ValueError(
            f"{dataset} is a folder of {len(pictures)} pictures on the Hub, and only tables and archives are read as a"
            " stream; leave reading.streaming out, and the pictures are copied once"
        )
    rank_zero_info(f"{dataset}: a folder of {len(pictures):,} pictures, copied from the Hub")
    return attempt(copy, dataset)


def _is_imagefolder(dataset: str, data_dir: str | None, revision: str | None) -> bool:
    """Whether ``datasets`` takes the pictures for the data, rather than for illustrations of a table."""
    try:
        return bool(load_dataset_builder(dataset, data_dir=data_dir, revision=revision).name == "imagefolder")
    except DataFilesNotFoundError:  # pictures with suffixes, or in folders, that it does not know
        return True
