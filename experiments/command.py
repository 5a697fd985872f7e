"""What the commands of the experiments share: flags, and one line where a person has to correct something."""

import argparse
import sys

from errors import UserError
from files import lock_directory, make_directory


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def parser_of(name, doc):
    """A parser for `python -m experiments.<name>` with the flags that every experiment has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = "in place of the data set's own"
    parser.add_argument("--steps", type=positive, help=f"of default training, {own}")
    parser.add_argument("--points", type=positive, help=f"about so many measurements along a training, {own}")
    parser.add_argument("--images", type=positive, help=f"images generated for every point, {own}")
    parser.add_argument("--minutes", type=float, default=240, help="stop after so long; the same command goes on")
    parser.add_argument("--out", default="results", help="directory of everything that is written")
    return parser


def parse(parser, arguments):
    """The options, with the command line as `options.command`."""
    options = parser.parse_args(arguments)
    options.command = sys.argv[1:] if arguments is None else arguments
    return options


def take(out):
    """Make the directory of an experiment and take it until the file that is returned is closed; raises DataError."""
    make_directory(out, "out")
    return lock_directory(out, "out")


def report_errors(name, work):
    """Call work(); returns the exit code, with a person's error said in one line."""
    try:
        work()
    except UserError as error:
        print(f"experiments.{name}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
