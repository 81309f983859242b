"""The command ``python -m benchmarks``: measure, print as it goes, and write the tables."""

import argparse
import contextlib
import json
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

import benchmarks
from swin_hf import list_presets
from swin_hf.files import replacing

from .clock import OutOfTime, environment
from .peers import PEERS
from .report import BEGIN, END, merge, render, summary, title, write_between
from .sections import DTYPES, SECTIONS, settings_of
from .together import measure

EPOCH_DATA = ("fashion_mnist", "jpeg_folder")
TINY, BASE_384 = "swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384"


def write_whole(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with replacing(path) as partial:
        partial.write_text(text)


def parse(args: list[str] | None) -> argparse.Namespace:
    """Read the options; what a machine does not have is refused here."""
    parser = argparse.ArgumentParser(
        description=benchmarks.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = ["cuda"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    presets = [TINY] if here == ["cpu"] else [TINY, BASE_384]
    add("--presets", nargs="+", choices=list_presets(), default=presets, metavar="PRESET")
    add("--devices", nargs="+", choices=("cpu", "cuda"), default=here)
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32"] if here == ["cpu"] else ["bf16", "amp"])
    add("--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    add("--executions", nargs="+", choices=("eager", "compiled", "graphs"), default=["eager", "compiled"])
    add("--batch-sizes", nargs="+", type=int, help="default: 1 8 32 on a CPU, 128 256 on a GPU")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    add("--seconds", type=float, default=15.0, help="time for the rounds of one setting")
    add("--limit", type=float, default=900.0, help="seconds after which the run ends and keeps what it has")
    add("--jobs", type=int, default=1, help="settings that build and compile side by side; they are timed one by one")
    add("--build-limit", type=float, default=600.0, help="seconds that such settings may take to build and compile")
    add("--workers", type=int, default=0, help="loader processes of the pipeline and epoch sections")
    add("--recipes", nargs="+", choices=("digits", "fashion_mnist"), default=["digits"], help="of the trainer section")
    add("--trainer-epochs", type=int, default=10, help="epochs of each round of the trainer section")
    add("--trainer-rounds", type=int, default=2, help="how often either side trains")
    add("--epoch-data", nargs="+", choices=EPOCH_DATA, default=list(EPOCH_DATA), help="of the epoch section")
    add("--epoch-pictures", type=int, help="default: 60000 of fashion_mnist, 2000 of jpeg_folder")
    add(
        "--epochs",
        type=int,
        default=1,
        help="epochs of each round of the epoch section; of several, the first warms up",
    )
    add("--pictures", type=int, default=320, help="JPEG files that the pipeline reads")
    add("--json", type=Path, default=Path("docs/speed.json"), help="results, merged into those that are there")
    add("--markdown", type=Path, default=Path("docs/speed.md"), help="the same as tables")
    add("--readme", type=Path, help=f"file whose text between {BEGIN} and {END} becomes the table")
    add("--render-only", action="store_true", help="measure nothing; write the tables from --json")
    options = parser.parse_args(args)
    if "cuda" in options.devices and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --devices cpu measures what is here")
    if "swin_hf" not in options.peers:
        parser.error("--peers must contain swin_hf, which the others are compared with")
    options.turn = contextlib.nullcontext  # in which calls are timed; see together.py
    return options


def main(args: list[str] | None = None) -> int:
    """Measure, print as it goes, and write the tables."""
    options = parse(args)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*Online softmax is disabled.*")  # Inductor on a CPU says so every time

    def stop(*_: object) -> None:
        raise OutOfTime

    results = json.loads(options.json.read_text()) if options.json.is_file() else []
    waiting = [] if options.render_only else list(settings_of(options))
    if hasattr(signal, "setitimer"):  # not on Windows: there the limit is looked at between settings
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, options.limit)
    deadline = time.monotonic() + options.limit
    try:
        for setting, outcome in measure(list(waiting), options):
            waiting.remove(setting)
            if isinstance(outcome, str):
                print(f"not measured, {outcome}: {title(setting)}", flush=True)
                continue
            result = {"setting": setting, "environment": environment(setting["device"]), **outcome}
            results = merge(results, [result])
            write_whole(options.json, json.dumps(results, indent=1) + "\n")
            print("\n".join(render([result]).splitlines()[4:]), flush=True)
            if time.monotonic() > deadline:
                break
    except OutOfTime:
        pass
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    write_whole(options.markdown, render(results))
    if options.readme is not None:
        write_whole(options.readme, write_between(options.readme.read_text(), summary(results)))
    for setting in waiting:
        print(f"not measured, the limit of {options.limit:.0f} s had passed: {title(setting)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
