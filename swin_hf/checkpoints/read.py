"""Read weights from files and folders without running anything that is in them."""

import json
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.serialization import safe_globals

from swin_hf.files import WEIGHT_SUFFIXES as SUFFIXES
from swin_hf.model.configuration_swin_hf import CONFIG_BYTES, MOST_PIXELS
from swin_hf.model.resizing import shard_names

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
SPARE_BYTES = 256 * 2**20  # that tensors may claim beyond the size of their file: buffers may share their numbers
Weights = Literal["ema", "raw"]

# What a folder's weights are called, the first that is there is read.
IN_FOLDER = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.pth",
)  # fmt: skip

# Where programs keep the state dict in what they pickle, and its exponential moving average.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_LIGHTNING = "pytorch-lightning_version"
# Prefixes that DistributedDataParallel, AveragedModel and torch.compile put before every key.
_WRAPPED = ("module.", "_orig_mod.")


@dataclass
class Source:
    """Weights and the files in their folder."""

    name: str  # the file or folder, for messages
    state: dict[str, Tensor]  # under the keys of the file
    config_json: dict[str, Any] = field(default_factory=dict)  # in the folder; empty if there is none
    is_folder: bool = False  # whether that ``config.json`` is known to belong to the weights
    preprocessor: dict[str, Any] = field(default_factory=dict)  # ``preprocessor_config.json``; empty if there is none
    training: dict[str, Any] = field(default_factory=dict)  # arguments of the LightningModule that saved a ``.ckpt``
    classes: list[str] = field(default_factory=list)  # names that the file itself holds
    notes: list[str] = field(default_factory=list)  # what was read and left out, in words
    is_borrowed: bool = False  # whether somebody else holds the tensors, so that a model needs copies


class _Ignored:
    """Takes the place of an object that is not a tensor; it forgets everything."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Objects that training programs leave with the weights. They are not imported, let alone run: a plain dictionary or an
# object without content takes their place. Everything else that is neither tensor nor plain data is refused.
_SETTINGS = (
    "yacs.config.CfgNode", "addict.addict.Dict", "mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict",
)  # fmt: skip
_OBJECTS = (
    "argparse.Namespace", "_codecs.encode", "mmengine.logging.history_buffer.HistoryBuffer", "numpy.dtype",
    "numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "pathlib.PosixPath",
    "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
)  # fmt: skip
_STAND_INS: list[Any] = [*((OrderedDict, name) for name in _SETTINGS), *((_Ignored, name) for name in _OBJECTS)]


def read_source(source: str | os.PathLike[str] | Mapping[str, Any], weights: Weights | None = None) -> Source:
    """Read a file (its content decides how), a folder with one, or a state dict, in what training programs wrap it.

    ``weights`` is ``"ema"`` or ``"raw"`` where averaged weights are held as well; None takes what the program that
    wrote them would load.

    Raises:
        ValueError: If it cannot be read safely or holds no state dict; the message says why and what to do.
        OSError: If it is not there or may not be read.
    """
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"weights is {weights!r}; choose 'ema' or 'raw', or leave it out")
    if isinstance(source, Mapping):
        found = unwrap("state dict", source, weights)
        found.is_borrowed = True
        return found
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; check the spelling")
    # Before anything is loaded: the files in the folder of the weights are small, and may already be refused.
    folder = path if path.is_dir() else path.parent
    told, preprocessor = _read_json(folder / CONFIG_NAME), _read_json(folder / PREPROCESSOR_NAME)
    check_processor(preprocessor, folder / PREPROCESSOR_NAME)
    found = _read_folder(path, weights) if path.is_dir() else unwrap(str(path), read_file(path), weights)
    files = [file for file in path.iterdir() if file.suffix in SUFFIXES] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in found.state.values())
    if claimed > size + SPARE_BYTES:  # such as a single number that is seen as millions of rows
        name, largest = max(found.state.items(), key=lambda item: item[1].numel())
        raise ValueError(
            f"{path} has {size:,} bytes, but its tensors claim {claimed:,} ({name} alone is {tuple(largest.shape)}); "
            "save the state dict again with contiguous tensors"
        )
    found.name, found.is_folder = str(path), path.is_dir()
    found.config_json, found.preprocessor = told, preprocessor
    if found.training and not told:  # what our recipes leave next to their checkpoints
        trained = path.parent.parent / "model"
        found.config_json = _read_json(trained / CONFIG_NAME)
        found.preprocessor = _read_json(trained / PREPROCESSOR_NAME)
    return found


def _read_folder(folder: Path, weights: Weights | None) -> Source:
    names = [name for name in IN_FOLDER if (folder / name).is_file()]
    if not names:
        names = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
        if len(names) != 1:
            there = f"{len(names)} of them ({', '.join(names[:5])})" if names else "none"
            raise ValueError(f"{folder}: a folder needs one file of weights ({' '.join(SUFFIXES)}), there is {there}")
    path, state = folder / names[0], {}
    for name in shard_names(path) if path.suffix == ".json" else names[:1]:
        state.update(read_file(folder / name))
    return unwrap(str(path), state, weights)


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, f"{path} is not valid JSON", "repair or remove it") if path.is_file() else {}


def read_object(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The object of a JSON file; ValueError with what, why and the remedy if there is none."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"it has more than {CONFIG_BYTES // 2**20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("the top level is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} ({error}); {remedy}") from None
    return values


def check_processor(values: Mapping[str, Any], path: Path) -> None:
    """Refuse, with a ValueError, an image processor with a size that is not positive, or above ``MOST_PIXELS``."""
    for name in ("size", "crop_size", "pad_size"):
        size = values.get(name)
        values_of: Any = size.values() if isinstance(size, Mapping) else size if isinstance(size, list) else [size]
        sides = [side for side in values_of if side is not None]
        if wrong := [side for side in sides if not isinstance(side, int | float) or not 0 < side < math.inf]:
            raise ValueError(f"{path} has the {name} {str(wrong[0])[:80]!r}; a side is a positive number")
        pixels = math.prod(sides) if len(sides) > 1 else sum(side**2 for side in sides)
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"{path} asks for pictures of {pixels:,} pixels ({name} {str(size)[:80]}); at most {MOST_PIXELS:,} are "
                "made: correct the file, or remove it for the evaluation of the released models"
            )


def read_file(path: Path) -> dict[str, Any]:
    """Read what one file holds, tensors and plain data only; ValueError for code and anything else."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); download or copy it again")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not weights; the download went wrong, repeat it")
    # A JSON header follows an 8-byte length, or the name promises so.
    has_header = len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32
    if has_header or path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); download or copy it again") from error
    if not head.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle alone
        raise ValueError(f"{path} is neither safetensors nor written by torch.save; give the file of the state dict")
    return _read_pickle(path)


def _read_pickle(path: Path) -> dict[str, Any]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked, size = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
            names = {Path(name).name for name in archive.namelist()}
        if unpacked > size + SPARE_BYTES:  # torch never compresses what it saves
            raise ValueError(f"{path} has {size:,} bytes, but unpacks to {unpacked:,}; save it again with torch.save")
        if "data.pkl" not in names or "constants.pkl" in names:  # as in an .npz, a program of torch.export or torch.jit
            raise ValueError(f"{path} is an archive, but not one of torch.save; give the file of the state dict")
    try:
        with safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, error)) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or cut short ({reason}); download or copy it again") from error
    if isinstance(content, Mapping):
        return dict(content)
    raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict; save model.state_dict() instead")


def _refusal(path: Path, error: Exception) -> str:
    """Say what a pickle holds that is not read."""
    try:
        with safe_globals(_STAND_INS):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # a file that cannot even be looked at is described by the first error
        names = []
    if names:
        return (
            f"{path} holds code or objects ({', '.join(sorted(names)[:5])}) and was refused unread; nothing of it was "
            "executed. Ask for the weights as safetensors, or where you trust the file save its state dict alone with "
            "torch.save(state_dict, ...)"
        )
    reason = str(error).splitlines()[0]
    if reason.startswith("Weights only load failed"):  # torch goes on with how to read a file that is trusted
        reason = "it is neither safetensors nor tensors alone"
    return f"{path} is not a file of weights that can be read safely ({reason}); ask for the weights as safetensors"


def unwrap(name: str, content: Mapping[str, Any], weights: Weights | None) -> Source:
    """Find the state dict in the top level of what a training program saved under a name; see :func:`read_source`."""
    notes: list[str] = []
    average = next((content[key] for key in _AVERAGES if isinstance(content.get(key), Mapping)), None)
    wrapped = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), average)
    is_averaged = "current_model_state" in content  # written by Lightning's WeightAveraging
    state: Any = content if _is_state(content) else wrapped
    if state is None:
        there = ", ".join(map(str, list(content)[:10])) or "nothing"
        raise ValueError(f"{name} holds no state dict; its top level has {there}")
    if weights == "raw" and is_averaged:
        state = content["current_model_state"]
        notes.append("raw weights of the last step")
    elif weights == "ema" and average is not None:
        state = average
    elif weights == "ema" and not is_averaged:
        raise ValueError(f"{name} holds no averaged weights; leave weights= out")
    elif is_averaged:
        notes.append("averaged weights (EMA)")
    if not _is_state(state) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not _is_state(state):
        strange = sorted(str(key) for key, value in state.items() if not isinstance(value, Tensor))
        raise ValueError(f"{name} holds more than tensors ({', '.join(strange[:5])}); give its state dict alone")
    state = _bare(state)
    training: Any = {}
    inside = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    if _LIGHTNING in content and inside:  # the network is attribute ``model`` of a LightningModule
        if others := len(state) - len(inside):
            notes.append(f"{others} tensors of the LightningModule outside of its network left out")
        state, training = _bare(inside), content.get("hyper_parameters")
    training = dict(training) if isinstance(training, Mapping) else {}
    return Source(name, state, training=training, notes=notes, classes=_classes(content))


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what wrappers of the network added, in whatever order they were put around each other."""
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    for prefix in _WRAPPED:
        if state and all(key.startswith(prefix) for key in state):
            return _bare({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _is_state(content: Mapping[str, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _classes(content: Mapping[str, Any]) -> list[str]:
    """Class names that OpenMMLab keeps in the file."""
    meta: Any = content["meta"] if isinstance(content.get("meta"), Mapping) else {}
    dataset = meta.get("dataset_meta")
    names = dataset.get("classes") if isinstance(dataset, Mapping) else meta.get("CLASSES")
    return [str(name) for name in names] if isinstance(names, list | tuple) else []
