"""What setup.py makes of the CUDA toolkits and architecture lists that it meets, with scripts in the place of nvcc."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

from eroseg_ext.utils import cuda_architectures

ROOT = Path(__file__).parents[1]

# As the real ones: messages on stderr, an error wherever an option or an architecture is not known.
NVCC = """#!/bin/sh
fail() { echo "$1" >&2; exit 1; }
stage=compile
for option; do
  case $option in
    -std=*) case "@standards@" in *${option#-std=}*) ;; *)
      fail "nvcc fatal   : Value '${option#-std=}' is not defined for option 'std'" ;; esac ;;
    -gencode=arch=compute_*) number=${option#*compute_}; number=${number%%,*}
      case " @known@ " in *" $number "*) ;; *)
        fail "nvcc fatal   : Unsupported gpu architecture 'compute_$number'" ;; esac ;;
    --dryrun) stage=dryrun ;;
  esac
done
if [ $stage = dryrun ]; then
  echo '#$ _SPACE_= ' >&2
@told@
else
  case "@lacking@" in ?*) case "$*" in *"-include cuda_bf16.h"*)
    fail "cuda_fp16.h:4100:10: fatal error: @lacking@: No such file or directory" ;; esac ;; esac
  case "@host_error@" in ?*) fail "@host_error@" ;; esac
fi
"""
FROM_12_8 = "80 86 89 90 90a 100 100a 120 120a"
BEFORE_12_8 = "80 86 89 90 90a"


def write_nvcc(path: Path, told: dict[str, str], known: str, standards: str, host_error: str, lacking: str) -> None:
    lines = "\n".join(f"  echo '#$ {name}={value}' >&2" for name, value in told.items())
    text = NVCC.replace("@told@", lines).replace("@known@", known).replace("@standards@", standards)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("@host_error@", host_error).replace("@lacking@", lacking))
    path.chmod(0o755)


def make_toolkit(
    root: Path,
    layout: str = "nvidia",
    *,
    known: str = FROM_12_8,
    standards: str = "c++17 c++20",
    host_error: str = "",
    lacking: str = "",
    headers: bool = True,
    runtime: bool = True,
) -> SimpleNamespace:
    """A toolkit as NVIDIA, conda-forge (installed, and in its build environments) or Debian lay it out."""
    target = "targets/x86_64-linux"
    bin_, include, library = root / "bin", root / target / "include", root / target / "lib"
    if layout == "nvidia":
        told = {
            "TOP": f"{bin_}/..",
            "INCLUDES": f'"-I{bin_}/../{target}/include"  ',
            "LIBRARIES": f'  "-L{bin_}/../{target}/lib/stubs" "-L{bin_}/../{target}/lib"',
        }
    elif layout == "conda":
        top = f"{bin_}/../{target}"
        told = {"TOP": top, "INCLUDES": f'"-I{top}/include"  ', "LIBRARIES": f'  "-L{top}/lib/stubs" "-L{top}/lib"'}
    elif layout == "conda-build":
        include, library = root / "prefix" / target / "include", root / "prefix" / target / "lib"
        top = f"{bin_}/../{target}"
        told = {
            "NVCC_APPEND_FLAGS": f" -I{include} -L{library} -L{library}/stubs",
            "TOP": top,
            "INCLUDES": f'"-I{top}/include"  ',
            "LIBRARIES": f'  "-L{top}/lib/stubs" "-L{top}/lib"',
        }
    elif layout == "pip":  # the profile's target folder is not there
        include, library = root / "include", root / "lib"
        told = {"TOP": f"{bin_}/..", "INCLUDES": f'"-I{bin_}/../{target}/include"  '}
    else:
        include, library = root / "include", root / "lib" / "x86_64-linux-gnu"
        told = {"LIBRARIES": f"  -L{library}/stubs -L{library}"}
    write_nvcc(bin_ / "nvcc", told, known, standards, host_error, lacking)
    for folder, file, there in (
        (include, "cuda_runtime_api.h", headers),
        (library, "libcudart_static.a", runtime),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        if there:
            (folder / file).touch()
    return SimpleNamespace(
        home=root, nvcc=str(bin_ / "nvcc"), include=include, runtime=str(library / "libcudart_static.a")
    )


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py, on a machine without CUDA where the environment asks for nothing."""
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "EROSEG_NO_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.cuda_toolkit.NVIDIAS_NVCC = str(tmp_path / "nothing" / "nvcc")
    module.cuda_toolkit.SYSTEM_INCLUDE = str(tmp_path / "debian" / "include")
    return module


def chosen(setup_py: ModuleType) -> tuple[SimpleNamespace, str]:
    cuda = setup_py.chosen_cuda()
    assert cuda is not None
    return cuda[0], ";".join(map(str, cuda[1]))


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("8.0; 9.0", "8.0;9.0"),
        ("9.0;", "9.0"),
        (" 8.0  8.6\t9.0+PTX ", "8.0;8.6;9.0+PTX"),
        ("", ""),
        (" ; ", ""),
        ("9.0a;10.0f;12.0a+PTX", "9.0a;10.0f;12.0a+PTX"),
        ("7.5;12.1", "7.5;12.1"),
        ("Turing", "7.5+PTX"),
        ("Ampere", "8.0;8.6+PTX"),
        ("Ampere+Tegra", "8.7"),
        ("Ampere+Tegra+PTX", "8.7+PTX"),
        ("Ada;Hopper+PTX", "8.9+PTX;9.0+PTX"),
        ("Blackwell 8.0", "10.0;10.3;12.0;12.1+PTX;8.0"),
    ],
)
def test_lists_are_read(text: str, architectures: str) -> None:
    parsed = cuda_architectures.parse(text)
    assert ";".join(map(str, parsed)) == architectures
    assert cuda_architectures.parse(architectures) == parsed


@pytest.mark.parametrize("entry", ["90", "sm_90", "9.0b", "9.0+ptx", "hopper", "8.0,9.0", "native", "+PTX"])
def test_an_entry_that_is_no_architecture_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST has '.*', wanted numbers such as") as raised:
        cuda_architectures.parse(f"8.0;{entry}")
    assert repr(entry) in str(raised.value)


@pytest.mark.parametrize("name", cuda_architectures.NAMES)
def test_names_mean_what_they_mean_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
    ours = {option for each in cuda_architectures.parse(name) for option in each.nvcc_options()}
    assert ours == set(cpp_extension._get_cuda_arch_flags())


@pytest.mark.parametrize("layout", ["nvidia", "conda", "conda-build", "pip"])
def test_the_parts_of_a_toolkit_are_found(
    layout: str, setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_toolkit(tmp_path / layout, layout)
    monkeypatch.setenv("PATH", str(Path(made.nvcc).parent))
    toolkit, _ = chosen(setup_py)
    assert toolkit == (made.nvcc, ["-isystem", str(made.include)], made.runtime)
    extension = setup_py.cuda_extension(toolkit, cuda_architectures.parse("8.0 9.0+PTX"))
    assert extension.extra_objects == [made.runtime]
    assert str(made.include) in extension.extra_compile_args
    assert ("EROSEG_CUDA_ARCHITECTURES", '"8.0;9.0+PTX"') in extension.define_macros


def test_headers_among_the_systems_own_are_not_named_again(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_toolkit(tmp_path / "debian", "debian")
    monkeypatch.setenv("PATH", str(Path(made.nvcc).parent))
    assert chosen(setup_py)[0] == (made.nvcc, [], made.runtime)


def test_which_toolkit_is_taken(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, on_path, home = (make_toolkit(tmp_path / name) for name in ("usual", "on_path", "home"))
    monkeypatch.setattr(setup_py.cuda_toolkit, "NVIDIAS_NVCC", usual.nvcc)
    assert chosen(setup_py)[0].nvcc == usual.nvcc
    monkeypatch.setenv("PATH", str(Path(on_path.nvcc).parent))
    assert chosen(setup_py)[0].nvcc == on_path.nvcc
    monkeypatch.setenv("CUDA_HOME", str(home.home))
    assert chosen(setup_py)[0].nvcc == home.nvcc
    monkeypatch.setenv("EROSEG_NO_CUDA", "1")
    assert setup_py.chosen_cuda() is None


@pytest.mark.parametrize(
    ("listed", "known", "architectures"),
    [
        ("", FROM_12_8, "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("", BEFORE_12_8, "8.0;8.6;8.9;9.0+PTX"),
        (" ", BEFORE_12_8, "8.0;8.6;8.9;9.0+PTX"),
        ("8.0; 9.0;", BEFORE_12_8, "8.0;9.0"),
        ("9.0a", BEFORE_12_8, "9.0a"),
        ("Hopper", BEFORE_12_8, "9.0+PTX"),
    ],
)
def test_what_the_kernels_are_built_for(
    listed: str, known: str, architectures: str, setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda", known=known).home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert chosen(setup_py)[1] == architectures


def test_what_nvcc_does_not_know_is_told_before_anything_is_compiled(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_toolkit(tmp_path / "cuda", known=BEFORE_12_8)
    monkeypatch.setenv("CUDA_HOME", str(made.home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;10.0f;12.0+PTX")
    with pytest.raises(SystemExit) as raised:
        setup_py.chosen_cuda()
    assert f"TORCH_CUDA_ARCH_LIST has 10.0f, 12.0+PTX, which {made.nvcc} does not know" in str(raised.value)


def test_an_unknown_entry_stops_the_build(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;Hoper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST has 'Hoper', wanted"):
        setup_py.chosen_cuda()


def test_what_is_older_than_the_kernels_is_left_out(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda").home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5; 9.0")
    assert chosen(setup_py)[1] == "9.0"
    assert "7.5 of TORCH_CUDA_ARCH_LIST is left out" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Volta;7.5")
    assert setup_py.chosen_cuda() is None
    told = capsys.readouterr().err
    assert "not built: they need 8.0 or newer, TORCH_CUDA_ARCH_LIST is 'Volta;7.5'" in told
    assert told.count("\n") == 1


HOST_ERROR = "host_config.h:143:2: error: #error -- unsupported GNU version!"


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"standards": "c++17"}, "fails (nvcc fatal   : Value 'c++20' is not defined for option 'std')"),
        ({"host_error": HOST_ERROR}, f"fails ({HOST_ERROR})"),
        ({"lacking": "nv/target"}, "(cuda_fp16.h:4100:10: fatal error: nv/target: No such file or directory)"),
        ({"headers": False}, "has no cuda_runtime_api.h in "),
        ({"runtime": False}, "has no libcudart_static.a in "),
    ],
)
def test_only_a_toolkit_that_was_asked_for_stops_the_build(
    what: dict[str, object],
    why: str,
    setup_py: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = make_toolkit(tmp_path / "cuda", **what)  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", str(Path(made.nvcc).parent))
    assert setup_py.chosen_cuda() is None
    told = capsys.readouterr().err
    assert "the CUDA kernels are not built: " in told
    assert why in told
    assert told.count("\n") == 1
    for name, value in (("CUDA_HOME", str(made.home)), ("TORCH_CUDA_ARCH_LIST", "9.0")):
        with monkeypatch.context() as asked:
            asked.setenv(name, value)
            with pytest.raises(SystemExit) as raised:
                setup_py.chosen_cuda()
        assert why in str(raised.value)
        assert "EROSEG_NO_CUDA=1" in str(raised.value)


def test_without_a_working_nvcc(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup_py.chosen_cuda() is None
    assert "the CUDA kernels are not built: no nvcc is on the PATH" in capsys.readouterr().err
    made = make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit, match=r"there is no .*elsewhere/bin/nvcc: .* EROSEG_NO_CUDA=1"):
        setup_py.chosen_cuda()
    monkeypatch.setenv("CUDA_HOME", str(made.home))
    Path(made.nvcc).write_text("#!/nowhere/sh\n")
    with pytest.raises(SystemExit, match=r"nvcc cannot be run .*: .* EROSEG_NO_CUDA=1"):
        setup_py.chosen_cuda()


CLOCK = itertools.count(int(time.time()) + 1)


def change(path: Path) -> None:
    """Gives the file a later time than any before: a file system's own clock may not have ticked since the last one."""
    path.touch()
    os.utime(path, (now := next(CLOCK), now))


@pytest.fixture
def compile_kernels(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[str]]]:
    """The commands of a build, whose object files depend on their sources and on header.h, which `change` changes."""
    commands: list[list[str]] = []
    change(tmp_path / "header.h")

    def run(command: list[str], check: bool) -> None:
        source, built = (Path(command[command.index(option) + 1]) for option in ("-c", "-o"))
        if source.stem in broken:
            raise subprocess.CalledProcessError(1, command)
        commands.append(command)
        change(built)
        built.with_suffix(".d").write_text(f"{built} : {source} \\\n {tmp_path}/header.h\n")

    broken: set[str] = set()
    monkeypatch.setattr(setup_py.subprocess, "run", run)
    toolkit = setup_py.cuda_toolkit.Toolkit("nvcc-of-conda", ["-isystem", "its-headers"], "")

    def build(architectures: str, fails: str = "") -> list[list[str]]:
        commands.clear()
        broken.clear()
        broken.add(fails)
        made = setup_py.compile_kernels(toolkit, cuda_architectures.parse(architectures), tmp_path / "built")
        assert len(made) == len(KERNELS)
        assert all(Path(built).is_file() for built in made)
        return list(commands)

    return build


KERNELS = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}


def test_the_kernels_are_compiled_by_the_nvcc_that_was_found(compile_kernels: Callable[..., list[list[str]]]) -> None:
    commands = compile_kernels("9.0;Hopper")
    assert len(commands) == len(KERNELS)
    for command in commands:
        assert command[0] == "nvcc-of-conda"
        assert "its-headers" in command
        assert [word for word in command if word.startswith("-gencode")] == [
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_90,code=compute_90",
        ]


def test_a_kernel_is_compiled_again_if_it_would_be_another(
    compile_kernels: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    def compiled(*arguments: str) -> set[str]:
        return {Path(command[command.index("-c") + 1]).stem for command in compile_kernels(*arguments)}

    assert compiled("9.0") == KERNELS
    assert compiled("9.0") == set()
    assert compiled("8.0") == KERNELS
    change(tmp_path / "header.h")
    assert compiled("8.0") == KERNELS
    (tmp_path / "built" / "select.o").unlink()
    assert compiled("8.0") == {"select"}
    change(tmp_path / "header.h")
    with pytest.raises(subprocess.CalledProcessError):
        compile_kernels("8.0", "select")
    assert "select" in compiled("8.0")
    (tmp_path / "header.h").unlink()
    assert compiled("8.0") == KERNELS


@pytest.mark.parametrize("free_threaded", [False, True])
def test_the_limited_api_is_for_pythons_that_have_it(
    free_threaded: bool, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EROSEG_NO_CUDA", "1")
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: int(free_threaded) if name == "Py_GIL_DISABLED" else None
    )
    setup_py.__spec__.loader.exec_module(setup_py)
    monkeypatch.setattr(cpp_extension, "min_supported_cpython", cpp_extension.min_supported_cpython)
    arguments = setup_py.compiled()
    assert [extension.py_limited_api for extension in arguments["ext_modules"]] == [not free_threaded]
    assert arguments["options"] == ({} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}})


def test_the_build_tells_which_torch_it_is_made_with(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EROSEG_NO_CUDA", "1")
    monkeypatch.setattr(cpp_extension, "min_supported_cpython", cpp_extension.min_supported_cpython)
    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", lambda self: None)
    build_ext = setup_py.compiled()["cmdclass"]["build_ext"]
    command = build_ext.__new__(build_ext)
    command.extensions = []
    command.build_extensions()
    assert f"torch {torch.__version__} in {Path(torch.__file__).parent}\n" in capsys.readouterr().err
