"""Build a container with podman or docker, whichever is here, from versions.toml.

    python3 scripts/containers/images.py build cpu                         # image turbo-gguf:cpu
    python3 scripts/containers/images.py build cuda --set CUDAARCHS=89     # for one GPU: much faster
    python3 scripts/containers/images.py command cpu                       # print what would be run

Needs Python 3.11 and nothing else. Exit codes: 3 without podman and docker, else that of the engine.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from containerfile import REPOSITORY, Wrong, arguments, names, path_of

ENGINES = ("podman", "docker")


def command(name: str, engine: str, tag: str, own: dict[str, str]) -> list[str]:
    """The command line that builds a container."""
    # Images in podman's own format have no health check.
    form = ["--format", "docker"] if engine == "podman" else []
    given = [word for key, value in arguments(name, own).items() for word in ("--build-arg", f"{key}={value}")]
    return [engine, "build", *form, "--file", str(path_of(name).relative_to(REPOSITORY)), "--tag", tag, *given, "."]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("build", "command"))
    parser.add_argument("container", choices=names())
    parser.add_argument("--engine", choices=ENGINES, help="[default: the first that is installed]")
    parser.add_argument("--tag", default="", help="name of the image  [default: turbo-gguf:CONTAINER]")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another value of an argument; may be repeated")
    args = parser.parse_args(argv)
    own = dict(item.partition("=")[::2] for item in args.set)
    engine = args.engine or next((name for name in ENGINES if shutil.which(name)), None)
    if engine is None and args.action == "build":
        print("error: neither podman nor docker is installed\nhint: apt-get install podman", file=sys.stderr)
        return 3
    try:
        line = command(args.container, engine or ENGINES[0], args.tag or f"turbo-gguf:{args.container}", own)
    except Wrong as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.action == "command":
        print(shlex.join(line))
        return 0
    return subprocess.run(line, cwd=REPOSITORY, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
