"""Try a Containerfile without podman or docker: its steps run in bare Debian roots, and its server answers a request.

    sudo python3 scripts/containers/bare_root.py cpu --model model.gguf -- -c 4096    # what follows -- is for llama-server

Each stage is a folder. Images of Debian are made with debootstrap; others can't be tried like this. Steps run in a mount namespace of
their own, as the user and with the variables that the file names, and with its cache mounts. Then the server of the last stage is
started as its user on a root that is read-only but for its volumes, and these are checked, in this order: it runs as no root; its health
check fails before the model is there, and passes afterwards; a completion has text; a calibration is in /cache; it ends when it is told to.

Needs root rights, unshare and debootstrap, and a network. Exit codes: 0 all is well, 1 a step or a check failed, 3 something is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from containerfile import REPOSITORY, Stage, Step, Wrong, arguments, names, path_of, read

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SUITES = {"12": "bookworm", "13": "trixie"}
START_SECONDS = 600
PORT = 18099

# $1: root, $2: "ro" or "rw", $3: folders to mount, a line "FROM TO" each. What is mounted ends with the namespace.
ENTER = """
root=$1 mode=$2 binds=$3
shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
while read -r from to; do
    [ -n "$from" ] || continue
    if [ -d "$from" ]; then mkdir -p "$root$to"; else mkdir -p "$root${to%/*}"; touch "$root$to"; fi
    mount --bind "$from" "$root$to"
done <<<"$binds"
[ "$mode" = rw ] || mount -o remount,bind,ro "$root" "$root"
exec chroot "$@"
"""


class Missing(Exception):
    """This machine lacks something."""


class Failed(Exception):
    """A step or a check failed."""


def note(text: str) -> None:
    """Say what happens."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", file=sys.stderr, flush=True)


STARTED = time.monotonic()


def argv_in(
    root: Path,
    command: Sequence[str],
    *,
    user: str,
    folder: str,
    variables: Mapping[str, str],
    binds: Iterable[tuple[Path, str]],
    mode: str,
) -> list[str]:
    """The command line that runs a command in a root as a user: a name, or UID:GID."""
    uid, gid = ids(root, user)
    listed = "\n".join(f"{source} {target}" for source, target in binds)
    within = [f"--userspec={uid}:{gid}", str(root), "/usr/bin/env", "-i", "-C", folder, f"PATH={PATH}"]
    within += [f"{name}={value}" for name, value in variables.items()]
    # The child is the command itself, so that it can be told to end.
    return ["unshare", "--mount", "--propagation", "private", "bash", "-euc", ENTER, "bash", str(root), mode, listed, *within, *command]


def ids(root: Path, user: str) -> tuple[int, int]:
    """Numbers of a user and of its group."""
    if re.fullmatch(r"\d+:\d+", user):
        uid, gid = user.split(":")
        return int(uid), int(gid)
    rows = (line.split(":") for line in (root / "etc/passwd").read_text("utf-8").splitlines())
    found = next(((int(row[2]), int(row[3])) for row in rows if row[0] == user), None)
    if found is None:
        raise Failed(f"there is no user {user}")
    return found


class Roots:
    """Folders of images and stages."""

    def __init__(
        self, work: Path, mirror: str, caches: Mapping[str, Path], binds: Sequence[tuple[Path, str]], env: Mapping[str, str]
    ) -> None:
        self.work, self.mirror, self.caches, self.binds, self.env = work, mirror, caches, binds, env
        self.made: dict[str, Path] = {}

    def image(self, name: str) -> Path:
        """The root of an image of Debian."""
        match = re.search(r"/debian:(\d+)", name)
        if not match or match[1] not in SUITES:
            raise Missing(f"{name} can't be made here: only images of Debian {', '.join(SUITES)} can")
        root = self.work / "images" / SUITES[match[1]]
        if not root.is_dir():
            note(f"debootstrap {root.name}")
            part, log = root.with_suffix(".part"), self.work / "debootstrap.log"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            argv = ["debootstrap", "--variant=minbase", root.name, str(part), self.mirror]
            with log.open("w") as file:
                done = subprocess.run(argv, stdout=file, stderr=file, check=False)
            if done.returncode:
                raise Missing(f"debootstrap failed; log: {log}")
            part.rename(root)
        return root

    def stage(self, stage: Stage, label: str) -> Path:
        """The root of a stage, all of its steps done."""
        parent = self.made.get(stage.image) or self.image(stage.image)
        root = self.work / "stages" / label
        if root.exists():
            shutil.rmtree(root)
        root.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--reflink=auto", parent, root], check=True)
        for number, step in enumerate(stage.steps, 1):
            note(f"{stage.name} {number}/{len(stage.steps)}: {step.word} {step.text[:90]}")
            if step.word == "COPY":
                self._copy(step, root)
            else:
                self._run(step, root)
        self.made[stage.name] = root
        return root

    def _copy(self, step: Step, root: Path) -> None:
        source, target = step.text.split()
        origin = (self.made[step.source] if step.source else REPOSITORY) / source.lstrip("/")
        into = root / target.lstrip("/")
        if target.endswith("/"):
            into /= origin.name
        into.parent.mkdir(parents=True, exist_ok=True)
        if not origin.exists():
            raise Failed(f"COPY {step.text}: {origin} is not there")
        subprocess.run(["cp", "-aT", "--reflink=auto", origin, into], check=True)

    def _run(self, step: Step, root: Path) -> None:
        mounts = []
        for target in step.mounts:
            cache = self.caches.get(target) or self.work / "cache" / target.strip("/").replace("/", "-")
            cache.mkdir(parents=True, exist_ok=True)
            mounts.append((cache, target))
        (root / step.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        argv = argv_in(
            root,
            ["/bin/sh", "-c", step.text],
            user=step.user,
            folder=step.folder,
            variables={"HOME": "/root", **self.env, **step.variables},
            binds=[*self.binds, *mounts],
            mode="rw",
        )
        done = subprocess.run(argv, check=False)
        if done.returncode:
            raise Failed(f"RUN {step.text}: exit code {done.returncode}")


class Server:
    """The server of the last stage, in its root."""

    def __init__(self, root: Path, stage: Stage, work: Path, model: Path) -> None:
        self.root, self.stage, self.log = root, stage, work / "server.log"
        self.variables = {**stage.env, "LLAMA_ARG_PORT": str(PORT), "HOME": "/"}
        self.volumes = work / "volumes"
        binds = [(model, f"/models/{model.name}")]
        for volume in stage.volumes:
            folder = self.volumes / volume.strip("/")
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            # A new volume gets what the image has at its place, owner included.
            subprocess.run(["cp", "-aT", root / volume.lstrip("/"), folder], check=True)
            binds.append((folder, volume))
        self.binds = binds
        self.model = model

    def argv(self, command: Sequence[str]) -> list[str]:
        """A command line as the user of the stage, in its folder."""
        return argv_in(
            self.root,
            command,
            user=self.stage.user,
            folder=self.stage.folder,
            variables=self.variables,
            binds=self.binds,
            mode="ro",
        )

    def healthy(self) -> bool:
        """What the health check says."""
        return subprocess.run(self.argv(["/bin/sh", "-c", self.stage.health]), capture_output=True, check=False).returncode == 0

    @contextmanager
    def running(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start it, and end it."""
        with self.log.open("wb") as log:
            process = subprocess.Popen(self.argv([*self.stage.entrypoint, "-m", self.model.name, *options]), stdout=log, stderr=log)
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(60)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()


def check(server: Server, options: Sequence[str]) -> list[str]:
    """Start the server and look at it; returns what was found.

    Raises:
        Failed: it is not as it should be.
    """
    if server.healthy():
        raise Failed("the health check passes without a server")
    with server.running(*options) as process:
        before = time.monotonic()
        while not server.healthy():
            if process.poll() is not None:
                raise Failed(f"the server ended with {process.returncode}; log: {server.log}")
            if time.monotonic() - before > START_SECONDS:
                raise Failed(f"no health after {START_SECONDS} s; log: {server.log}")
            time.sleep(1)
        found = [f"healthy after {time.monotonic() - before:.0f} s"]
        status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
        owners = set(re.findall(r"^[UG]id:\t(.*)$", status, re.M)[0].split())
        if "0" in owners:
            raise Failed("the server runs as root")
        found.append(f"runs as {', '.join(sorted(owners))}")
        found.append(f"says {complete()!r}")
    if process.returncode:
        raise Failed(f"the server ended with {process.returncode} when it was told to end; log: {server.log}")
    kept = sorted(path.name for path in (server.volumes / "cache").glob("turbo-calibration-*.gguf"))
    if not kept:
        raise Failed("no calibration is in /cache")
    found.append(f"keeps {', '.join(kept)}")
    return found


def complete() -> str:
    """A completion of the server."""
    body = json.dumps({"prompt": "Once upon a time", "n_predict": 12, "temperature": 0}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/completion", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            text: str = json.load(answer)["content"]
    except (urllib.error.URLError, TimeoutError) as error:
        raise Failed(f"no completion: {error}") from error
    if not text.strip():
        raise Failed("a completion without text")
    return text


def pairs(items: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, as a table."""
    return dict(item.partition("=")[::2] for item in items)


def behind_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words before "--", and those behind it, which are options of llama-server."""
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("container", choices=names())
    parser.add_argument("--model", type=Path, default=REPOSITORY / "turbo_gguf/data/model/eval-model.gguf")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build/bare-root", help="folder for roots and logs")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another value of a build argument")
    parser.add_argument("--cache", action="append", default=[], metavar="TARGET=FOLDER", help="folder of a cache mount")
    parser.add_argument(
        "--bind", action="append", default=[], metavar="FOLDER", help="of this machine, seen by steps: certificates, settings"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for steps: a proxy, settings of pip")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="of Debian")
    parser.add_argument("--serve-only", action="store_true", help="take the stages that are there")
    own, options = behind_dashes(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    try:
        for program in ("unshare", "debootstrap", "chroot"):
            if shutil.which(program) is None:
                raise Missing(f"{program} is not installed")
        if os.geteuid():
            raise Missing("bare roots need root rights")
        work, model = args.work.resolve(), args.model.resolve()
        stages = read(path_of(args.container).read_text("utf-8"), arguments(args.container, pairs(args.set)))
        caches = {target: Path(folder).resolve() for target, folder in pairs(args.cache).items()}
        binds = [(Path(folder), folder) for folder in args.bind]
        roots = Roots(work, args.mirror, caches, binds, pairs(args.env))
        if not args.serve_only:
            for stage in stages:
                roots.stage(stage, f"{args.container}-{stage.name}")
        last = work / "stages" / f"{args.container}-{stages[-1].name}"
        for line in check(Server(last, stages[-1], work, model), options):
            note(line)
    except (Missing, Wrong) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
