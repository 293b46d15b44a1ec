"""`python -m workers`: the launcher of this host's workers. `python -m workers register`: make a model known.
`python -m workers compress`: make a smaller form of one. `python -m workers health`: whether this host's workers beat.

MOTET_REDIS_URL=… MOTET_URL=… MOTET_TOKEN=… python -m workers --gpus all
python -m workers --cpus 2 --name build-7
python -m workers --gpus 0,1,2+3          three workers; the last owns two GPUs
python -m workers register ./my-model --name my-model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from motet.errors import MotetError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 after a clean end, 2 where the set-up must be mended first."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["register"]:
            from workers.register import main as register

            return register(arguments[1:])
        if arguments[:1] == ["compress"]:
            from workers.compress import main as compress

            return compress(arguments[1:])
        if arguments[:1] == ["health"]:
            from workers.health import main as health

            return health(arguments[1:])
        return _launch(arguments)
    except MotetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _launch(arguments: Sequence[str]) -> int:
    from workers.launcher import launch

    parser = argparse.ArgumentParser(
        prog="python -m workers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpus", type=_count, help="workers on CPU slots; each gets its share of the cores")
    parser.add_argument("--gpus", metavar="all|0,1,2+3", help="a worker per GPU; + joins GPUs to one device")
    parser.add_argument("--name", help="name of this host among the workers (default: its host name)")
    parser.add_argument("--threads", type=_count, help="cores per worker (default: all, shared evenly)")
    options = parser.parse_args(arguments)
    return launch(name=options.name, cpus=options.cpus, gpus=options.gpus, threads=options.threads)


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"got {text}; expected a whole number from 0")
    return count


if __name__ == "__main__":
    sys.exit(main())
