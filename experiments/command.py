"""The flags that the commands of the experiments share."""

import argparse
import os
import sys

import startup


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def parser_of(name, doc):
    """A parser for `python -m experiments.<name>` with the flags that every experiment has."""
    parser = startup.Parser(
        prog=f"python -m experiments.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = "in place of the data set's own"
    parser.add_argument("--steps", type=positive, help=f"of default training, {own}")
    parser.add_argument("--points", type=positive, help=f"about so many measurements along a training, {own}")
    parser.add_argument("--images", type=positive, help=f"images generated for every point, {own}")
    parser.add_argument("--minutes", type=float, default=240, help="stop after so long; the same command goes on")
    parser.add_argument(
        "--out", type=os.path.expanduser, default="results", help="directory of everything that is written"
    )
    return parser


def parse(parser, arguments):
    """The options, with the command line as `options.command`."""
    options = parser.parse_args(arguments)
    options.command = sys.argv[1:] if arguments is None else arguments
    return options
