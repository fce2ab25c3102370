"""ROCm and CUDA on machines of our own making: what is found, what CMake is asked for, and how what is missing reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_machine import World

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.make import presets, toolkits
from turbo_gguf.make.build import ensure_build
from turbo_gguf.make.toolkits import cuda, rocm


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# ROCm


@pytest.fixture
def root(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """ROCm 6.2 with all its parts, and two GPUs."""
    root = tmp_path / "rocm"
    monkeypatch.setenv("ROCM_PATH", str(root))
    world.program("../rocm/bin/hipcc", "echo 'HIP version: 6.2.1'")
    world.program("../rocm/bin/rocm_agent_enumerator", "echo gfx000; echo gfx1100; echo gfx1036; echo gfx1100")
    world.program("../rocm/llvm/bin/clang++", "echo clang")
    for name in ("hip", "hipblas", "rocblas"):
        (root / f"lib/cmake/{name}").mkdir(parents=True)
        (root / f"lib/cmake/{name}/{name}-config.cmake").write_text("")
    return root


def add_gpu(number: int, version: int) -> None:
    """A GPU as the kernel's driver shows it; node 0 is a CPU."""
    node = rocm.TOPOLOGY / str(number)
    node.mkdir(parents=True)
    (node / "properties").write_text(f"cpu_cores_count 0\nsimd_count 96\ngfx_target_version {version}\nvendor_id 4098\n")


def test_rocm_is_built_for_the_gpus_that_are_there(world: World, root: Path) -> None:
    made = ensure_build("rocm", upstream=str(world.source))
    asked = world.ran()[0]
    assert "-DGGML_HIP=ON" in asked
    assert "-DGPU_TARGETS=gfx1036;gfx1100 " in asked
    assert "-DCMAKE_HIP_ARCHITECTURES=gfx1036;gfx1100 " in asked
    assert f"-DCMAKE_HIP_COMPILER={root}/llvm/bin/clang++" in asked
    assert f"-DCMAKE_PREFIX_PATH={root} " in asked
    assert "-DCMAKE_HIP_COMPILER_LAUNCHER=" in asked
    assert "ALL_PAIRS" not in asked
    assert made.compiler == "c++ (fake) 1.0; HIP version: 6.2.1"


def test_the_compiler_is_asked_of_hipconfig(world: World, root: Path) -> None:
    world.program("../llvm-21/bin/clang++", "echo clang")
    world.program("../rocm/bin/hipconfig", f'[ "$1" = -l ] && echo {root.parent}/llvm-21/bin || echo 6.4.43484-9999')
    found = rocm.find()
    assert found == rocm.Rocm(root, (6, 4), root.parent / "llvm-21/bin/clang++")


def test_clang_finds_hip_by_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert presets.environment(presets.preset("rocm-all-pairs")) == {"ROCM_PATH": str(root), "HIP_PATH": str(root), "HIP_PLATFORM": "amd"}
    assert presets.environment(presets.preset("cpu")) == {}
    monkeypatch.setattr(rocm, "path", lambda: Path("/usr"))
    assert "ROCM_PATH" not in presets.environment(presets.preset("rocm")), "Debian's clang then misses its device libraries"


def test_all_pairs_are_a_definition_for_the_gpu_compiler(world: World, root: Path) -> None:
    plain = ensure_build("rocm", upstream=str(world.source))
    made = ensure_build("rocm-all-pairs", upstream=str(world.source))
    assert "-DCMAKE_HIP_FLAGS=-DGGML_TURBO_CUDA_ALL_PAIRS " in world.ran()[2]
    assert made.path != plain.path


@pytest.mark.parametrize("named", ["gfx1151;gfx1201", "gfx1151,gfx1201", "gfx1151 gfx1201"])
def test_gpu_targets_of_the_environment_win(root: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("GPU_TARGETS", named)
    assert rocm.targets() == ["gfx1151", "gfx1201"]


def test_targets_with_features_and_generic_ones_are_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_TARGETS", "gfx90a:sramecc+:xnack-;gfx11-generic")
    assert rocm.targets() == ["gfx90a:sramecc+:xnack-", "gfx11-generic"]


def test_a_target_without_the_matrix_instructions_of_its_gpu_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_TARGETS", "gfx1100;gfx9-4-generic")
    with pytest.raises(UsageError, match="code for gfx9-4-generic lacks matrix instructions") as caught:
        rocm.targets()
    assert caught.value.hint == "GPU_TARGETS=gfx942"


def test_a_target_that_there_is_not_is_a_usage_error(world: World, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_TARGETS", "7900xtx;gfx1100")
    with pytest.raises(UsageError, match="7900xtx is no AMD architecture") as caught:
        ensure_build("rocm", upstream=str(world.source))
    assert "gfx1100: Radeon RX 7900" in caught.value.hint


def test_amdgpu_arch_is_asked_when_the_enumerator_fails(world: World, root: Path) -> None:
    world.program("../rocm/bin/rocm_agent_enumerator", "exit 1")
    world.program("../rocm/llvm/bin/amdgpu-arch", "echo gfx1201")
    assert rocm.gpus() == ["gfx1201"]


def test_rocminfo_is_asked_last_of_the_tools(world: World, root: Path) -> None:
    world.program("../rocm/bin/rocm_agent_enumerator", "echo gfx000")
    world.program("../rocm/bin/rocminfo", 'echo "  Name:    gfx942"; echo "      Name:   amdgcn-amd-amdhsa--gfx942:sramecc+:xnack-"')
    assert rocm.gpus() == ["gfx942"]


def test_the_kernel_knows_the_gpus_without_rocm(world: World) -> None:
    for number, version in enumerate((0, 110000, 90010, 90402, 110501, 100300)):
        add_gpu(number, version)
    assert rocm.gpus() == ["gfx1030", "gfx1100", "gfx1151", "gfx90a", "gfx942"]


def test_rocm_without_a_gpu_says_how_to_name_one(world: World, root: Path) -> None:
    world.program("../rocm/bin/rocm_agent_enumerator", "echo gfx000")
    with pytest.raises(EnvironmentMissing, match="no AMD GPU found") as caught:
        ensure_build("rocm", upstream=str(world.source))
    assert "GPU_TARGETS=gfx1100" in caught.value.hint
    assert world.ran() == []


def test_an_old_rocm_is_named_with_its_version(world: World, root: Path) -> None:
    (root / ".info").mkdir()
    (root / ".info/version").write_text("5.7.1-98\n")
    with pytest.raises(EnvironmentMissing, match=r"ROCm in \S+ is 5\.7, 6\.1 or newer is needed") as caught:
        ensure_build("rocm", upstream=str(world.source))
    assert caught.value.exit_code == 3


def test_missing_development_files_are_named_with_their_packages(world: World, root: Path) -> None:
    (root / "lib/cmake/hipblas/hipblas-config.cmake").unlink()
    with pytest.raises(EnvironmentMissing, match="lacks the development files of hipblas") as caught:
        ensure_build("rocm", upstream=str(world.source))
    assert caught.value.hint == "apt-get install hipblas-dev"


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ('ID=ubuntu\nVERSION_ID="24.04"\nID_LIKE=debian\n', "apt-get install rocm-hip-sdk"),
        ('ID=debian\nVERSION_ID="12"\n', "apt-get install rocm-hip-sdk"),
        ("ID=debian\nVERSION_CODENAME=sid\n", "apt-get install hipcc libamdhip64-dev libhipblas-dev librocblas-dev"),
        ("ID=fedora\nVERSION_ID=43\n", "dnf install rocm-hip-devel hipblas-devel rocblas-devel"),
        ('ID=cachyos\nID_LIKE="arch"\n', "pacman -S rocm-hip-sdk"),
        ("", "apt-get install rocm-hip-sdk"),
    ],
)
def test_missing_rocm_names_the_packages(world: World, monkeypatch: pytest.MonkeyPatch, release: str, command: str) -> None:
    rocm.OS_RELEASE.write_text(release)
    monkeypatch.setattr(rocm, "path", lambda: None)
    with pytest.raises(EnvironmentMissing, match="ROCm not found") as caught:
        ensure_build("rocm", upstream=str(world.source))
    assert caught.value.hint.endswith(command)
    assert not (world.home / "upstream").exists(), "it is said before anything is fetched"


def test_a_stand_in_is_named_only_where_rocblas_has_no_kernels(root: Path) -> None:
    assert "HSA_OVERRIDE" not in rocm.gpu_notes("gfx1031", root), "nothing is known about rocBLAS"
    (root / "lib/rocblas/library").mkdir(parents=True)
    assert rocm.gpu_notes("gfx1031", root).endswith("build with GPU_TARGETS=gfx1030 and run with HSA_OVERRIDE_GFX_VERSION=10.3.0")
    (root / "lib/rocblas/library/TensileLibrary_gfx1031.co").write_text("")
    assert "HSA_OVERRIDE" not in rocm.gpu_notes("gfx1031", root)
    assert "HSA_OVERRIDE" not in rocm.gpu_notes("gfx906", root), "no other architecture runs its code"
    assert rocm.gpu_notes("gfx1100", root).startswith("Radeon RX 7900")


def test_stand_ins_are_supported_architectures() -> None:
    for name, (target, version) in rocm.STAND_INS.items():
        assert name not in rocm.SUPPORTED
        assert target in rocm.SUPPORTED
        assert target not in rocm.SAME_CODE or rocm.SAME_CODE[target] in rocm.INSPECTED
        assert target == "gfx" + version.replace(".", "")


def test_architectures_are_inspected_or_say_that_they_are_not() -> None:
    assert rocm.INSPECTED == ("gfx1030", "gfx1100", "gfx1151", "gfx1201", "gfx90a", "gfx942")
    assert set(rocm.INSPECTED) | set(rocm.SAME_CODE) == set(rocm.SUPPORTED)
    assert set(rocm.SAME_CODE.values()) <= set(rocm.INSPECTED)
    assert rocm.gpu_notes("gfx1101", None).endswith("; same code as gfx1100, not inspected")
    assert "inspected" not in rocm.gpu_notes("gfx1100", None)
    guide = (Path(__file__).parents[2] / "docs/guides/rocm.md").read_text("utf-8")
    for name, other in rocm.SAME_CODE.items():
        assert f"{name}: same code as {other}, not inspected" in guide


@pytest.mark.parametrize(
    ("name", "options", "architectures"),
    [
        ("cpu", {"GPU_TARGETS": "gfx1100"}, []),
        ("rocm", {"GPU_TARGETS": "gfx1100;gfx1151"}, ["gfx1100", "gfx1151"]),
        ("cuda", {"CMAKE_CUDA_ARCHITECTURES": "90-real"}, ["90-real"]),
        ("cuda", {}, []),
    ],
)
def test_a_toolkit_knows_what_options_build_for(name: str, options: dict[str, str], architectures: list[str]) -> None:
    assert toolkits.TOOLKITS[name].built_for(options) == architectures


def test_what_keeps_a_user_from_the_gpu_is_told(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    problem = rocm.access_problem()
    assert problem is not None
    assert "amdgpu driver is not loaded" in problem[0]
    rocm.KFD.write_text("")
    assert rocm.access_problem() is None
    monkeypatch.setattr(rocm.os, "access", lambda path, mode: False)  # root may do anything
    problem = rocm.access_problem()
    assert problem is not None
    assert "usermod -aG render,video" in problem[1]


# CUDA


@pytest.fixture
def nvcc(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CUDA 13.0 with all its parts, and an H200."""
    listed = "; ".join(f"echo sm_{number}" for number in (75, 80, 86, 89, 90, 100, 120))
    world.program("../cuda/bin/nvcc", f"[ $1 = --list-gpu-code ] && {{ {listed}; exit; }}; echo 'release 13.0, V13.0.88'")
    world.program("nvidia-smi", "echo 'NVIDIA H200, 9.0'")
    for name in ("include/cublas_v2.h", "lib64/stubs/libcuda.so"):
        path = tmp_path / "cuda" / name
        path.parent.mkdir(parents=True)
        path.write_text("")
    return tmp_path / "cuda/bin/nvcc"


def asked(world: World) -> str:
    ensure_build("cuda", upstream=str(world.source))
    return world.ran()[0] + " "


def test_cuda_is_built_for_the_gpus_that_are_there(world: World, nvcc: Path) -> None:
    made = ensure_build("cuda", upstream=str(world.source))
    line = world.ran()[0] + " "
    assert f"-DCMAKE_CUDA_COMPILER={nvcc} " in line
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real " in line
    assert "cublas" not in line
    assert "NO_VMM" not in line
    assert made.compiler == "c++ (fake) 1.0; release 13.0, V13.0.88"


def test_two_kinds_of_gpus_are_built_for_both(world: World, nvcc: Path) -> None:
    world.program(
        "nvidia-smi", "echo 'NVIDIA GeForce RTX 5090, 12.0'; echo 'NVIDIA GeForce RTX 4090, 8.9'; echo 'NVIDIA GeForce RTX 4090, 8.9'"
    )
    assert cuda.architectures() == ["89-real", "120-real"]


@pytest.mark.parametrize(("variable", "value"), [("CUDAARCHS", "80;90"), ("CUDAARCHS", "sm_80,sm_90"), ("GPU_TARGETS", "8.0 9.0")])
def test_architectures_of_the_environment_win(world: World, nvcc: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert cuda.architectures() == ["80", "90"]


def test_an_architecture_that_there_is_not_is_a_usage_error(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_TARGETS", "gfx1100")
    with pytest.raises(UsageError, match="gfx1100 is no CUDA architecture"):
        cuda.architectures()


def test_without_nvidia_smi_cmake_asks_the_driver(world: World, nvcc: Path) -> None:
    world.drop("nvidia-smi")
    cuda.DEVICE.write_text("")
    assert "-DCMAKE_CUDA_ARCHITECTURES=native " in asked(world)


def test_cuda_without_a_gpu_says_how_to_name_one(world: World, nvcc: Path) -> None:
    world.program("nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9")
    with pytest.raises(EnvironmentMissing, match="no NVIDIA GPU found") as caught:
        ensure_build("cuda", upstream=str(world.source))
    assert "CUDAARCHS=89 make build-cuda" in caught.value.hint


def test_a_gpu_that_the_compiler_does_not_know_is_refused(world: World, nvcc: Path) -> None:
    world.program("nvidia-smi", "echo 'Tesla P40, 6.1'")
    with pytest.raises(EnvironmentMissing, match=r"\(release 13\.0\) does not compile for 61-real; it knows 75, 80") as caught:
        ensure_build("cuda", upstream=str(world.source))
    assert "CUDA 12" in caught.value.hint


def test_an_nvcc_that_can_not_list_is_trusted(world: World, nvcc: Path) -> None:
    world.program("../cuda/bin/nvcc", "[ $1 = --list-gpu-code ] && exit 1; echo 'release 11.2, V11.2.1'")
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real " in asked(world)


def test_cublas_comes_from_a_wheel_where_cuda_lacks_it(world: World, nvcc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cuda/include/cublas_v2.h").unlink()
    monkeypatch.setattr(cuda.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    with pytest.raises(EnvironmentMissing, match=r"lacks cuBLAS \(cublas_v2\.h\)") as caught:
        ensure_build("cuda", upstream=str(world.source))
    assert "pip install nvidia-cublas" in caught.value.hint
    wheel = tmp_path / "site/nvidia/cu13"
    for name in ("include/cublas_v2.h", "lib/libcublas.so.13", "lib/libcublasLt.so.13"):
        (wheel / name).parent.mkdir(parents=True, exist_ok=True)
        (wheel / name).write_text("")
    ensure_build("cuda-all-pairs", upstream=str(world.source))
    line = world.ran()[0] + " "
    assert f"-DCMAKE_CUDA_FLAGS=-DGGML_TURBO_CUDA_ALL_PAIRS -I{wheel}/include " in line
    assert f"-DCUDA_cublas_LIBRARY={wheel}/lib/libcublas.so.13 " in line
    assert f"-DCUDA_cublasLt_LIBRARY={wheel}/lib/libcublasLt.so.13 " in line


def test_the_driver_stands_in_for_its_stub(world: World, nvcc: Path, tmp_path: Path) -> None:
    (tmp_path / "cuda/lib64/stubs/libcuda.so").unlink()
    assert "-DGGML_CUDA_NO_VMM=ON " in asked(world)
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver/libcuda.so.1").write_text("")
    assert cuda.options()["CUDA_cuda_driver_LIBRARY"] == str(tmp_path / "driver/libcuda.so.1")


def test_a_compiler_behind_a_script_is_followed(world: World, nvcc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world.program("nvcc", f'exec {nvcc} "$@"')
    assert cuda.compiler() == world.bin / "nvcc"
    assert cuda.include_folders(world.bin / "nvcc") == [tmp_path / "cuda/include"]


def test_the_compiler_that_is_named_wins(world: World, nvcc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world.program("nvcc", "echo other")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert cuda.compiler() == nvcc


def test_missing_cuda_names_the_package(world: World) -> None:
    with pytest.raises(EnvironmentMissing, match="CUDA compiler not found") as caught:
        ensure_build("cuda", upstream=str(world.source))
    assert "nvidia-cuda-toolkit" in caught.value.hint


def test_the_drivers_version_is_read(world: World) -> None:
    assert cuda.driver_version() == ""
    cuda.DRIVER.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: gcc 13.3.0\n")
    assert cuda.driver_version() == "580.159.04"


# --- the registry ---------------------------------------------------------------------------------------------------------


def test_every_toolkit_is_a_row() -> None:
    names = ["cpu", "cpu-debug", "cpu-portable", "cpu-carried", "vulkan"]
    names += ["rocm", "rocm-all-pairs", "rocm-portable", "rocm-carried", "cuda", "cuda-all-pairs", "cuda-portable", "cuda-carried"]
    assert list(presets.PRESETS) == names
    rows = toolkits.TOOLKITS.values()
    assert len({row.backend for row in rows}) == len(rows) and [row.name for row in rows] == list(toolkits.TOOLKITS)
    for name in names:
        row = toolkits.of_preset(name)
        assert presets.backend_of(name) == row.backend and toolkits.of_device(row.device) is row
        assert row.cmake.items() <= presets.preset(name).options.items()


def test_layers_go_to_a_gpu_where_there_is_one() -> None:
    assert [toolkits.gpu_layers(row.backend) for row in toolkits.TOOLKITS.values()] == [(), *[("-ngl", "999")] * 3]
