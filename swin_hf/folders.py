"""Folders of pictures: which files are pictures, which folders are splits, and which are classes.

The rule is that of torchvision and timm:

* Splits are folders at the first level whose whole name is in :data:`SPLIT_NAMES` and that hold class folders. Where
  there are none, the folders at the first level are the classes: ``{bus, car, train}`` are three classes.
* A class is a folder. All pictures below it belong to it, those in its sub-folders too.
* A picture is a file with a suffix of :data:`swin_hf.processing.PICTURE_SUFFIXES`. Links are followed.
* All other files are ignored, and a note names them; if most files of a class are such, it is an error.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image
from datasets.table import InMemoryTable

from .processing import PICTURE_SUFFIXES

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_DESCRIPTIONS = (".csv", ".html", ".json", ".jsonl", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")  # of pictures
_TABLES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".tsv")
ARCHIVES = (".7z", ".gz", ".rar", ".tar", ".tgz", ".zip")
UNLABELLED_REMEDY = ", or pre-train without labels: data.reading.labelled false"
_REMEDY = f"convert them, to PNG or JPEG for example (pictures are files with one of {' '.join(PICTURE_SUFFIXES)})"


@dataclass
class PictureFolder:
    """What a folder of pictures holds; the rows of a split are sorted by class and path."""

    splits: dict[str, Dataset] = field(default_factory=dict)  # columns ``image`` (paths) and ``label`` (a ClassLabel)
    class_names: list[str] = field(default_factory=list)  # by class id; empty without labels
    left_out: dict[str, int] = field(default_factory=dict)  # by class: files without such a suffix that may be pictures
    notes: list[str] = field(default_factory=list)  # on files that are not used, or used in an unexpected way


def split_of(name: str) -> str | None:
    """The split that a folder's name means, in upper or lower case: ``train``, ``validation``, ``test``."""
    return next((split for split, names in SPLIT_NAMES.items() if name.strip().lower() in names), None)


def metadata_files(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of the tables of pictures (``metadata.csv``) in a folder and in its direct sub-folders."""
    root = os.fspath(folder)
    folders = [root, *(os.path.join(root, name) for name in _entries(root)[0])]
    return [path for folder in folders for path in _entries(folder)[1] if os.path.basename(path) in METADATA_NAMES]


def is_picture_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether the data files of a folder are pictures rather than tables."""
    files = [path.lower() for path in _files(os.fspath(folder))]
    tables = sum(path.endswith(_TABLES) for path in files if not os.path.basename(path).startswith("metadata."))
    return tables == 0 or sum(map(is_picture, files)) > tables


def list_pictures(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Paths of all pictures below a folder, sorted folder by folder, and notes on the files that are not used."""
    pictures, unused = _pictures_and_others(_files(os.fspath(folder)))
    return pictures, [f"{folder}: not used: {_kinds(unused)}; {_REMEDY}"] if unused else []


def read_folder(folder: str | os.PathLike[str], labelled: bool = True) -> PictureFolder:
    """Read a folder of class folders, or of splits that hold class folders, by the rule of this module.

    Args:
        folder: ``FOLDER/CLASS/PICTURE`` or ``FOLDER/SPLIT/CLASS/PICTURE``. Without splits, all is ``train``.
        labelled: False to take the pictures wherever they are, without labels.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are no pictures or no classes, or most files of a class are not used, or the folders can
            be read in two ways.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{folder} is not a folder (looked in {Path.cwd()})")
    folders, loose = _entries(root)
    files = {name: _files(os.path.join(root, name), [_identity(root)]) for name in folders}
    roots = _split_folders(root, files, labelled)
    if not roots:
        return read_splits({"train": root}, labelled)
    others = {name: files[name] for name in folders if name not in roots.values()}
    notes = _next_to_splits(root, others, sum(len(files[name]) for name in roots.values()))
    notes += _unused(root, loose, "next to the folders of the splits") if labelled else []
    content = read_splits({split: os.path.join(root, name) for split, name in roots.items()}, labelled)
    content.notes = notes + content.notes
    return content


def read_splits(roots: Mapping[str, str], labelled: bool = True) -> PictureFolder:
    """As :func:`read_folder`, from one folder of class folders for each split."""
    content = PictureFolder()
    read = _classes if labelled else _unlabelled
    found = {split: read(os.path.abspath(root), content) for split, root in roots.items()}
    features = Features({"image": Image(decode=False)})
    if labelled:
        content.class_names = sorted({name for classes in found.values() for name in classes})
        features["label"] = ClassLabel(names=content.class_names)
    ids = {name: index for index, name in enumerate(content.class_names)}
    for split, classes in found.items():
        paths = pa.array([path for name in sorted(classes) for path in classes[name]], pa.string())
        columns = {"image": pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])}
        if labelled:
            columns["label"] = pa.array([ids[name] for name in sorted(classes) for _ in classes[name]], pa.int64())
        table = InMemoryTable(pa.table(columns))
        content.splits[split] = Dataset(table, info=DatasetInfo(features=features))
    return content


def _split_folders(root: str, files: Mapping[str, Sequence[str]], labelled: bool) -> dict[str, str]:
    """Name of the folder of each split; empty where the folders at the first level are the classes."""
    used = [name for name in files if any(map(is_picture, files[name]))]
    named = {name: split for name in used if (split := split_of(name)) is not None}
    deep = set()  # those with most pictures in folders inside of them
    for name in named:
        is_below = [os.path.dirname(path) != os.path.join(root, name) for path in files[name] if is_picture(path)]
        if 2 * sum(is_below) > len(is_below):
            deep.add(name)
    if not deep and (len(named) < len(used) or not named):
        return {}
    if labelled and (flat := [name for name in named if name not in deep]):
        alike, remedy = "", "rename the folder if it is a class"
        if deep:
            other = min(deep)
            alike = f" like {other}"
            remedy = f"give data_files: {{{named[other]}: {os.path.join(root, other)}}} in place of data_dir"
        raise ValueError(
            f"{os.path.join(root, flat[0])} has the name of a split{alike}, but its pictures are not in folders of"
            f" classes, so they have no labels; sort them into {flat[0]}/CLASS/PICTURE, or {remedy}"
        )
    roots: dict[str, str] = {}
    for name in sorted(named):
        if (earlier := roots.setdefault(named[name], name)) != name:
            raise ValueError(f"{root} has two folders for the split {named[name]}, {earlier} and {name}; keep one")
    return roots


def _next_to_splits(root: str, others: Mapping[str, Sequence[str]], in_splits: int) -> list[str]:
    """A note on the folders next to those of the splits; ValueError if they hold more files: all may be classes."""
    held = {name: sum(map(is_picture, files)) for name, files in others.items()}
    names = ", ".join(f"{name} ({count} pictures)" for name, count in held.items() if count)
    if sum(held.values()) > in_splits:
        raise ValueError(
            f"{root}: the folders next to those of the splits hold most of the pictures: {names}; if all folders are"
            " classes, rename the one with the name of a split; otherwise move the others elsewhere"
        )
    return [f"{root}: folders next to the splits are not used: {names}"] if names else []


def _classes(root: str, content: PictureFolder) -> dict[str, list[str]]:
    """Pictures of each class folder; notes on the other files are added to ``content``."""
    folders, loose = _entries(root)
    classes: dict[str, list[str]] = {}
    for name in folders:
        folder = os.path.join(root, name)
        files = _files(folder, [_identity(root)])
        pictures, unused = _pictures_and_others(files)
        lost = [path for path in unused if not path.lower().endswith(_DESCRIPTIONS)]  # they may be pictures
        if len(lost) > len(pictures):
            raise ValueError(
                f"most files of class {name!r} cannot be used ({len(lost)} of {len(lost) + len(pictures)}):"
                f" {_kinds(lost)}; {_REMEDY}, or move the folder out of {root} if it is not a class"
            )
        if not pictures:
            found = f" (found {_kinds(unused)})" if unused else ""
            content.notes.append(f"{root}: folder {name!r} holds no picture{found}, so it is not a class")
            continue
        classes[name] = pictures
        content.left_out[name] = content.left_out.get(name, 0) + len(lost)
        content.notes += _unused(root, unused, f"of {name!r}")
        if nested := [path for path in pictures if os.path.dirname(path) != folder]:
            content.notes.append(
                f"{root}: {len(nested)} pictures of class {name!r} are in folders inside of its folder, such as"
                f" {os.path.relpath(nested[0], root)}; all pictures below a class folder belong to that class"
            )
    if not classes:
        raise ValueError(f"{root}: {_no_classes(loose)}")
    content.notes += _unused(root, loose, "next to the class folders")
    return classes


def _no_classes(loose: Sequence[str]) -> str:
    layout = "sort them into one folder for each class, FOLDER/CLASS/PICTURE" + UNLABELLED_REMEDY
    if pictures := [os.path.basename(path) for path in loose if is_picture(path)]:
        some = f"{len(pictures)} picture{'s' if len(pictures) > 1 else ''}, such as {pictures[0]}"
        return f"the folder holds {some}, and no folder with pictures, so there are no labels; {layout}"
    if archives := [os.path.basename(path) for path in loose if path.lower().endswith(ARCHIVES)]:
        return f"the folder holds an archive, {archives[0]}, which is not opened; unpack it"
    found = f"only {_kinds(loose)}" if loose else "nothing"
    return f"the folder and the folders in it hold no picture (found {found}); {layout}, {_REMEDY}"


def _unlabelled(root: str, content: PictureFolder) -> dict[str, list[str]]:
    """All pictures of a folder, as one class without a name."""
    files = _files(root)
    pictures, unused = _pictures_and_others(files)
    if not pictures or sum(not path.lower().endswith(_DESCRIPTIONS) for path in unused) > len(pictures):
        raise ValueError(
            f"{root}: {len(pictures)} of {len(files)} files are pictures; found {_kinds(files) or 'nothing'}; {_REMEDY}"
        )
    content.notes += _unused(root, unused, "in it")
    return {"": pictures}


def _unused(root: str, paths: Sequence[str], where: str) -> list[str]:
    return [f"{root}: files {where} that are not used: {_kinds(paths)}"] if paths else []


def _kinds(paths: Sequence[str]) -> str:
    """Count files by suffix, with an example of each: ``12 .heic (such as cat/1.heic)``."""
    kinds = Counter(map(_kind, paths))
    examples = {_kind(path): path for path in reversed(paths)}
    return ", ".join(
        f"{count} {kind} (such as {'/'.join(Path(examples[kind]).parts[-2:])})" for kind, count in kinds.most_common()
    )


def _kind(path: str) -> str:
    if not os.path.exists(path):
        return "broken links"
    return os.path.splitext(path)[1].lower() or ("links to a folder above" if os.path.isdir(path) else "without suffix")


def is_picture(path: str) -> bool:
    """Whether a file has the suffix of a picture."""
    return path.lower().endswith(PICTURE_SUFFIXES)


def _pictures_and_others(files: Sequence[str]) -> tuple[list[str], list[str]]:
    return [path for path in files if is_picture(path)], [path for path in files if not is_picture(path)]


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders, and paths of the files, directly in a folder; hidden ones (``.name``) are left out."""
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    return [entry.name for entry in entries if entry.is_dir()], [entry.path for entry in entries if not entry.is_dir()]


def _files(folder: str, above: Sequence[tuple[int, int]] = ()) -> list[str]:
    """Paths of all files below a folder, sorted; a link to a folder above it is one path, for a note."""
    if _identity(folder) in above:
        return [folder]
    folders, files = _entries(folder)
    for name in folders:
        files += _files(os.path.join(folder, name), [*above, _identity(folder)])
    return files


def _identity(folder: str) -> tuple[int, int]:
    """Device and inode of a folder: the same for every link to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino
