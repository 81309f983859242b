"""Results as tables: merged setting by setting, as Markdown for docs/speed.md, and as the table of the README."""

import itertools
import json
from typing import Any

from .peers import PEERS

# Median over minimum of a quiet machine; rounds of 60 ms and more were seen to stay below 1.25 on one.
STEADY = 1.3
UNITS = ("ms", "epoch_s")
MAKES = ("Intel", "AMD")  # as the names of their processors begin
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


def title(setting: dict[str, Any]) -> str:
    """One line that names a setting."""
    named = {"pipeline": "From JPEG to batch", "start": "Start", "loading": "Loading what another library saved"}
    named["replace"] = "Models of transformers on our backbone, inference, fp32, batch 1"
    if setting["section"] in named:
        return named[setting["section"]]
    if setting["section"] == "trainer":
        return "An epoch against transformers' Trainer: {recipe}, {epochs} epochs, {rounds} rounds".format(**setting)
    if setting["section"] == "epoch":
        return "An epoch of {pictures} pictures, {data}, {workers} workers, {rounds} rounds".format(**setting)
    place = f"{setting['preset']}, {setting['device']}, {setting['dtype']}, batch {setting['batch_size']}"
    if setting["section"] == "attention":
        return f"Attention alone: {place}"
    if setting["section"] == "shortcuts":
        return f"Shortcuts on a CPU, {setting['mode']}: {place}"
    return f"{setting['mode'].capitalize()}, {setting['execution']}: {place}"


def merge(known: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with those of the same setting on the same hardware replaced."""

    def key(result: dict[str, Any]) -> str:
        return json.dumps([result["setting"], result["environment"]["hardware"]], sort_keys=True)

    replaced = {key(result) for result in new}
    return [result for result in known if key(result) not in replaced] + new


def is_disturbed(result: dict[str, Any]) -> bool:
    """Whether other programs had the machine too: the median round of someone took far longer than the fastest."""
    pairs = [(row.get(f"median_{unit}", 0), row.get(f"min_{unit}", 0)) for row in result["rows"] for unit in UNITS]
    return any(median > STEADY * fastest for median, fastest in pairs)


def render(results: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    lines = [
        "# Speed",
        "",
        "Written by `python -m benchmarks`; the docstring of `benchmarks` says how things are measured.",
        "",
    ]
    for result in results:
        facts = result["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines += [f"## {title(result['setting'])}", "", f"{facts['hardware']}; {versions}; {facts['date']}."]
        if "ceilings" in result:
            limits = result["ceilings"]
            lines.append(
                f"Limits: {limits['matmul_tflops']} TFLOP/s (matrix product), {limits['copy_gbs']} GB/s (copy)."
            )
        if is_disturbed(result):
            lines.append(f"**Disturbed**: a median is over {STEADY}x its minimum; nothing follows from these numbers.")
        columns = [column for column in result["rows"][0] if column != "difference"] if result["rows"] else []
        lines += ["", "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in result["rows"]]
        lines += [""] + [f"Left out: {name}: {reason}" for name, reason in result["left_out"].items()]
        lines += [""] if result["left_out"] else []
    lines += gains_by_make([result for result in results if result["setting"]["section"] == "shortcuts"])
    return "\n".join(lines).rstrip() + "\n"


def gains_by_make(results: list[dict[str, Any]]) -> list[str]:
    """What each shortcut gains on the processors of each make, of the results of that section."""
    names = dict.fromkeys(row["name"] for result in results for row in result["rows"] if row["name"] != "all")
    lines = ["## Shortcuts on a CPU, by make", "", "| shortcut | make | gains |", "|---|---|---|"]
    for name, make in itertools.product(names, MAKES):
        gains = [
            "{mode} {dtype} batch {batch_size}: {gain}".format(gain=row["the shortcut gains"], **result["setting"])
            for result in results
            for row in result["rows"]
            if row["name"] == name and result["environment"]["hardware"].startswith(make)
        ]
        lines.append(f"| {name.removeprefix('without: ')} | {make} | {', '.join(gains) or 'not measured'} |")
    return lines if names else []


def summary(results: list[dict[str, Any]]) -> str:
    """The README's table: images per second, and how many times faster we are than each peer, as last measured.

    Only models of V1 are in it; docs/speed.md has all.
    """
    models = [result for result in results if result["setting"]["section"] == "models" and result["rows"]]
    models = [result for result in models if not result["setting"]["preset"].startswith("swinv2")]
    latest = max((result["environment"]["date"] for result in models), default="")
    chosen = [result for result in models if not is_disturbed(result) and result["environment"]["date"] == latest]
    lines = []
    for (hardware, date), group in itertools.groupby(
        sorted(chosen, key=lambda result: (result["environment"]["hardware"], result["environment"]["date"])),
        key=lambda result: (result["environment"]["hardware"], result["environment"]["date"]),
    ):
        results_here = list(group)
        versions = ", ".join(f"{k} {v}" for k, v in results_here[0]["environment"]["versions"].items() if k != "python")
        lines += [f"{hardware}; {versions}; {date}.", ""]
        lines += [
            "| Model, setting | ours, images/s | share of limit | " + " | ".join(f"vs {p}" for p in PEERS[1:]) + " |"
        ]
        lines += ["|---|---|---|" + "---|" * len(PEERS[1:])]
        for result in results_here:
            rows = {row["name"]: row for row in result["rows"]}
            setting, ours = result["setting"], rows["swin_hf"]
            name = setting["preset"].split("_patch")[0]
            cells = [
                f"{name}, {setting['mode']}, {setting['execution']}, {setting['dtype']}, batch {setting['batch_size']}"
            ]
            cells += [f"{ours['images_per_s']:g}", f"{ours['share_of_matmul_limit']:.0%}"]
            cells += [f"{rows[p]['ours_is_faster_by']:.2f}x" if p in rows else "-" for p in PEERS[1:]]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    for result in results:
        if result["setting"]["section"] == "trainer" and not is_disturbed(result):
            ours, theirs = result["rows"]
            lines.append(
                "An epoch of {recipe} takes {ours[min_epoch_s]} s, with transformers' Swin under its Trainer "
                "{theirs[min_epoch_s]} s; accuracy after {epochs} epochs from the same weights: {ours[test_accuracy]} "
                "and {theirs[test_accuracy]}.".format(ours=ours, theirs=theirs, **result["setting"])
            )
    return "\n".join(lines).strip()


def write_between(text: str, table: str) -> str:
    """Put a table between the markers of a text.

    Raises:
        ValueError: If the markers are not there once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the table goes between {BEGIN} and {END}; put both into the file, once and in that order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"
