"""The Containerfiles: what they name exists, nothing runs as root in the last stage, and every version is pinned in one place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import bare_root
import containerfile
import images
import pytest
from containerfile import REPOSITORY, VERSIONS, Stage, Wrong, arguments, path_of, read
from packaging.requirements import Requirement
from packaging.version import Version

from turbo_gguf.cache.types import TURBO
from turbo_gguf.make import presets
from turbo_gguf.make.build import Toolchain
from turbo_gguf.make.toolkits import TOOLKITS, of_preset, rocm
from turbo_gguf.make.toolkits.toolkit import PORTABLE

NAMES = ("cpu", "cuda", "rocm")
WITHOUT = {"vulkan"}  # no image that is pinned here has a glslc with cooperative matrices
TABLE = tomllib.loads(VERSIONS.read_text("utf-8"))


def stages(name: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in read(path_of(name).read_text("utf-8"), arguments(name))}


def test_there_is_one_for_each_toolkit() -> None:
    assert tuple(containerfile.names()) == NAMES == tuple(sorted(TABLE["containers"])) == tuple(sorted(TOOLKITS.keys() - WITHOUT))


@pytest.mark.parametrize("name", NAMES)
def test_stages(name: str) -> None:
    found = stages(name)
    assert list(found) == ["build", "base", "server"]
    assert found["server"].image == "base"
    assert {found["build"].image, found["base"].image} <= set(TABLE["images"].values())


@pytest.mark.parametrize("name", NAMES)
def test_the_last_stage_does_nothing_as_root(name: str) -> None:
    last = stages(name)["server"]
    assert not [step for step in last.steps if step.word == "RUN"]
    uid, gid = bare_root.ids(Path("/nowhere"), last.user)  # a number, so that an orchestrator can see that it is not 0
    assert uid > 999 and gid > 999
    made = " ".join(step.text for step in stages(name)["base"].steps)
    assert f"--uid {uid} " in made
    for folder in last.volumes:
        assert re.search(rf"install -d -o llama -g llama[^&]* {folder}\b", made), folder


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_exists(name: str) -> None:
    found = stages(name)
    for stage in found.values():
        for step in stage.steps:
            if step.word == "COPY" and not step.source:
                assert (REPOSITORY / step.text.split()[0]).exists(), step.text
    copy = next(step for step in found["server"].steps if step.word == "COPY")
    source, target = copy.text.split()
    assert copy.source == "build" and f'cp -a "$bin" {source}' in found["build"].steps[-1].text
    assert Path(found["server"].entrypoint[0]).parent == Path(target)


@pytest.mark.parametrize("name", NAMES)
def test_the_driver_is_asked_for_what_it_has(name: str) -> None:
    step = stages(name)["build"].steps[-1]
    assert "python -m turbo_gguf build --preset ${PRESET} " in " ".join(step.text.split())
    preset = step.variables["PRESET"]
    assert PORTABLE.items() <= presets.preset(preset).options.items()
    assert of_preset(preset).name == name
    targets = re.findall(r"--target (\S+?)[ )]", step.text + " ")
    assert Path(stages(name)["server"].entrypoint[0]).name in targets and len(targets) == 3
    # Downloads are of TURBO_GGUF_HOME, and ccache writes where its mount is.
    assert set(step.mounts) == {f"{step.variables['TURBO_GGUF_HOME']}/downloads", step.variables["CCACHE_DIR"]}


def test_programs_of_a_build_are_installed() -> None:
    """cmake, ninja, a compiler, git and ccache, under the names of Debian and Ubuntu."""
    assert {"cmake", "ninja", "ccache"} <= set(Toolchain.__struct_fields__)
    for name in NAMES:
        text = stages(name)["build"].steps[0].text
        assert {"cmake", "ninja-build", "g++", "git", "ccache", "python3-venv"} <= set(text.split())


def test_architectures_are_ours() -> None:
    wanted = TABLE["containers"]["rocm"]["GPU_TARGETS"].split(";")
    assert wanted == list(rocm.SUPPORTED)
    assert {"gfx1151", "gfx1200"} <= set(wanted)
    version = re.search(r":(\d+)\.(\d+)", TABLE["images"]["rocm"])
    assert version and tuple(map(int, version.groups())) >= (6, 4)  # the first that knows these two
    newest = max(map(int, TABLE["containers"]["cuda"]["CUDAARCHS"].split(";")))
    version = re.search(r":(\d+)\.(\d+)", TABLE["images"]["cuda-build"])
    assert version and newest == 120 and tuple(map(int, version.groups())) >= (12, 8)


@pytest.mark.parametrize("name", NAMES)
def test_the_server_has_our_defaults(name: str) -> None:
    last = stages(name)["server"]
    types = [last.env[f"LLAMA_ARG_CACHE_TYPE_{side}"] for side in "KV"]
    assert types == ["turbo3t", "turbo3t"] and set(types) <= set(TURBO)
    assert last.env["LLAMA_CACHE"] in last.volumes
    assert last.ports == (last.env["LLAMA_ARG_PORT"],)
    assert not [key for key in last.env if key.startswith("TURBO_CACHE_")]  # nothing is switched off


@pytest.mark.parametrize("name", NAMES)
def test_health_is_asked_of_the_server(name: str) -> None:
    last = stages(name)["server"]
    assert last.health.endswith('"http://127.0.0.1:${LLAMA_ARG_PORT}/health"')
    program = last.health.split()[0]
    assert program in stages(name)["base"].steps[0].text.split()
    assert set(last.health_options) == {"interval", "timeout", "start-period", "retries"}


def test_versions_are_in_one_place() -> None:
    """No Containerfile has a tag, a version or a default of an argument."""
    for name in NAMES:
        text = path_of(name).read_text("utf-8")
        assert not re.search(r"==|@sha256|^ARG \w+=", text, re.M)
        assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${BUILD_IMAGE}", "${RUN_IMAGE}", "base"}
    for image in TABLE["images"].values():
        assert re.search(r":\d+\.\d+[\w.-]*$", image), image
    rows = [row for table in TABLE["containers"].values() for row in table.items()]
    assert set(TABLE["images"]) == {value for key, value in rows if key.endswith("_IMAGE")}


def test_what_a_build_imports_is_pinned() -> None:
    pins = TABLE["python"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    ranges = {wanted.name: wanted.specifier for wanted in map(Requirement, project["dependencies"])}
    for package, version in pins.items():
        assert package in ranges and Version(version) in ranges[package]
    look = (
        "import json, sys; import turbo_gguf.cli.build, turbo_gguf.failures; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", look], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) & set(ranges) == set(pins)


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "turbo_gguf", "build", "-h"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: turbo-gguf build")


# --- the scripts ----------------------------------------------------------------------------------------------------------------


def test_the_command_hands_in_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main(["command", "rocm", "--engine", "podman", "--set", "GPU_TARGETS=gfx1100"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("podman build --format docker --file scripts/containers/rocm.Containerfile --tag turbo-gguf:rocm ")
    wanted = set(re.findall(r"^ARG (\w+)$", path_of("rocm").read_text("utf-8"), re.M))
    assert set(re.findall(r"--build-arg '?(\w+)=", line)) == wanted
    assert "--build-arg GPU_TARGETS=gfx1100 " in line


def test_an_unknown_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main(["command", "cpu", "--set", "CUDAARCHS=89"]) == 2
    assert "cpu has no argument CUDAARCHS; it has BUILD_IMAGE" in capsys.readouterr().err


def test_without_an_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(images.shutil, "which", lambda name: None)
    assert images.main(["build", "cpu"]) == 3
    assert "hint: apt-get install podman" in capsys.readouterr().err


def test_a_user_has_the_numbers_of_its_root(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nllama:x:10001:10002::/:/bin/sh\n")
    assert bare_root.ids(tmp_path, "llama") == (10001, 10002)
    with pytest.raises(bare_root.Failed, match="no user nobody"):
        bare_root.ids(tmp_path, "nobody")


def test_a_bare_root_copies_as_a_builder_does(tmp_path: Path) -> None:
    """A file into a folder, a folder over a folder, and from another stage."""
    roots = bare_root.Roots(tmp_path, "", {}, (), {})
    made = roots.work / "stages"
    (tmp_path / "images" / "bookworm").mkdir(parents=True)
    text = (
        "FROM x/debian:12.1 AS one\nCOPY pyproject.toml /src/\nCOPY scripts/containers /src/c\n"
        "FROM x/debian:12.1 AS two\nCOPY --from=one /src/c /d\n"
    )
    for stage in read(text, {}):
        roots.stage(stage, stage.name)
    assert (made / "one/src/pyproject.toml").is_file() and (made / "one/src/c/versions.toml").is_file()
    assert (made / "two/d/versions.toml").is_file() and not (made / "two/src").exists()


def test_options_of_the_server_are_behind_dashes() -> None:
    assert bare_root.behind_dashes(["cpu", "--set", "A=1", "--", "-c", "9", "--"]) == (["cpu", "--set", "A=1"], ["-c", "9", "--"])
    assert bare_root.behind_dashes(["cpu"]) == (["cpu"], [])


def test_what_a_bare_root_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(bare_root.Missing, match=r"x/cuda:12\.8 can't be made here"):
        bare_root.Roots(tmp_path, "", {}, (), {}).image("x/cuda:12.8")


# --- the reader -----------------------------------------------------------------------------------------------------------------

TEXT = """\
ARG IMAGE
FROM ${IMAGE} AS one
ARG WHAT
ENV A=1 B="two words"
WORKDIR /w
# a comment
RUN --mount=type=cache,target=/c \\
    # another
    make ${WHAT} \\
    && true
USER 7:8
COPY a /b/
FROM one AS two
COPY --from=one /b /b
"""


def test_read() -> None:
    one, two = read(TEXT, {"IMAGE": "i:1", "WHAT": "x"})
    run, copy = one.steps
    assert (one.image, run.text.split(), run.mounts) == ("i:1", ["make", "${WHAT}", "&&", "true"], ("/c",))
    assert (run.user, run.folder) == ("root", "/w")
    assert run.variables == {"WHAT": "x", "A": "1", "B": "two words"}
    assert (copy.user, copy.text, copy.source) == ("7:8", "a /b/", "")
    assert (two.image, two.user, two.folder, two.env["A"], two.arguments) == ("one", "7:8", "/w", "1", {})
    assert (two.steps[0].source, two.steps[0].text) == ("one", "/b /b")


@pytest.mark.parametrize(
    ("text", "given", "what"),
    [
        (TEXT, {"IMAGE": "i"}, "nothing sets the argument WHAT"),
        ("FROM i AS a\nADD x /y\n", {}, "ADD is not known"),
        ("RUN true\n", {}, "RUN before the first FROM"),
        ("FROM ${X} AS a\n", {}, "nothing sets X"),
        ("FROM i AS a\nRUN --network=none true\n", {}, "RUN --network=none is not known"),
    ],
)
def test_what_is_not_known_is_an_error(text: str, given: dict[str, str], what: str) -> None:
    with pytest.raises(Wrong, match=re.escape(what)):
        read(text, given)
