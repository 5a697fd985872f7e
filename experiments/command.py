"""What the commands of the experiments share: flags, and one line where a person has to correct something."""

import argparse
import sys

from errors import UserError


def parser_of(name, doc):
    """A parser for `python -m experiments.<name>` with the flags that every experiment has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="of default training, in place of the data set's own")
    parser.add_argument("--points", type=int, default=6, help="about so many measurements along a training")
    parser.add_argument("--images", type=int, default=512, help="images generated for every point")
    parser.add_argument("--minutes", type=float, default=240, help="stop after so long; the same command goes on")
    parser.add_argument("--out", default="results", help="directory of everything that is written")
    return parser


def parse(parser, arguments):
    """The options, with the command line as `options.command`."""
    options = parser.parse_args(arguments)
    options.command = sys.argv[1:] if arguments is None else arguments
    return options


def report_errors(name, work):
    """Call work(); returns the exit code, with a person's error said in one line."""
    try:
        work()
    except UserError as error:
        print(f"experiments.{name}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
