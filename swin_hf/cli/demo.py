"""Serve a web page that shows the classes of a picture, the attention in every window, Grad-CAM, a segmenter's mask.

The page can be reached from this machine only, and needs the extra ``demo``: pip install 'swin-hf[demo]'. Its link "Use
via API" explains how programs use it.
"""

import argparse
import webbrowser

from swin_hf.cli import add_device, pictures_of
from swin_hf.demo import serve
from swin_hf.ranges import Number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``swin-hf demo``."""
    parser.add_argument("model", metavar="MODEL", help="model, see swin-hf --help")
    parser.add_argument("--samples", nargs="+", default=[], metavar="IMAGE", help="pictures or folders to choose from")
    parser.add_argument("--port", type=Number(int, "[1, 65535]"), metavar="N", help="default: the first free from 7860")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--share", action="store_true", help="also give it a public address, through Gradio's servers")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until it is interrupted."""
    samples = pictures_of(args.samples)
    page = serve(args.model, port=args.port, share=args.share, samples=samples, device=args.device, dtype=args.dtype)
    print(f"page: {page.local_url} (Ctrl+C ends it)", flush=True)
    if args.share:
        print(f"public: {page.share_url}" if page.share_url else "Gradio's servers gave no public address", flush=True)
    if args.open and not webbrowser.open(page.local_url):
        print("there is no browser here; open the address in one", flush=True)
    page.block_thread()
    return 0
