import ctypes
import shutil
import subprocess
import zipfile

import pytest

from topk_attention.environment import package_version
from topk_experiments.versions.packages import InstallationError, folder_of
from topk_experiments.versions.without_cuda import stand_in_for_cuda


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """Lets pip find the wheels that it returns a maker of, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def make(name, version, *requires):
        about = f"{name}-{version}.dist-info"
        requirements = "".join(f"Requires-Dist: {one}\n" for one in requires)
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", f"__version__ = {version!r}\n")
            wheel.writestr(
                f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirements}"
            )
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")

    return make


def test_a_version_gets_a_folder_with_what_it_needs_and_others_lack(wheels, tmp_path):
    wheels("oldmodels", "1.2", "numpy>=1", "oldtokens==0.3", "nvidia-cublas==13.1", 'more; extra == "all"')
    wheels("oldtokens", "0.3")
    folder = folder_of("oldmodels", "1.2", tmp_path / "packages")
    assert folder == tmp_path / "packages" / "oldmodels-1.2"
    assert {path.name for path in folder.glob("*.py")} == {"oldmodels.py", "oldtokens.py"}
    (folder / "oldmodels.py").unlink()
    assert folder_of("oldmodels", "1.2", tmp_path / "packages") == folder  # as it is: nothing is installed again
    assert not (folder / "oldmodels.py").exists()


def test_a_version_that_pip_lacks_is_named_and_leaves_no_folder(wheels, tmp_path):
    wheels("oldmodels", "1.2", "oldtokens==0.3")
    with pytest.raises(InstallationError, match=r"oldtokens==0.3 cannot be installed: .*No matching distribution"):
        folder_of("oldmodels", "1.2", tmp_path)
    assert not (tmp_path / "oldmodels-1.2").exists()


def test_the_installed_version_needs_no_folder(tmp_path):
    assert folder_of("torch", package_version("torch").partition("+")[0], tmp_path) is None


@pytest.fixture
def compile_library(tmp_path):
    for tool in ("cc", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")

    def compiled(path, text, *options):
        source = tmp_path / "source.c"
        source.write_text(text)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source, *options], check=True)
        return path

    return compiled


def test_a_library_that_needs_gpus_loads_without_their_libraries(compile_library, tmp_path):
    gpus, lib = tmp_path / "gpus", tmp_path / "torch" / "lib"
    gpus.mkdir()
    lib.mkdir(parents=True)
    (tmp_path / "versions").write_text("GPU_7 { deviceCount; lastErrorString; };")
    needed = compile_library(
        gpus / "libgpu.so.7",
        "int deviceCount(void) { return 3; } const char *lastErrorString(void) { return 0; }",
        "-Wl,-soname,libgpu.so.7",
        f"-Wl,--version-script={tmp_path / 'versions'}",
    )
    plain = compile_library(
        gpus / "libplain.so.1", "int without_version(void) { return 5; }", "-Wl,-soname,libplain.so.1"
    )
    text = """
    int deviceCount(void); const char *lastErrorString(void); int without_version(void);
    int count(void) { return deviceCount(); } char letter(void) { return *lastErrorString(); }
    int (*address)(void) = without_version; int other(void) { return address(); } int sum(void) { return 1 + 1; }
    """
    library = compile_library(lib / "libtorch_gpu.so", text, needed, plain, "-Wl,-z,now", "-Wl,-rpath,$ORIGIN")
    shutil.rmtree(gpus)
    with pytest.raises(OSError, match=r"libgpu\.so\.7"):
        ctypes.CDLL(str(library))
    assert stand_in_for_cuda(tmp_path / "torch") == ["libgpu.so.7", "libplain.so.1"]
    loaded = ctypes.CDLL(str(library))
    assert loaded.sum() == 2
    assert loaded.count() == loaded.other() == 100  # "no device", in CUDA's numbers
    assert loaded.letter() == ord("n")  # the words are there to be read
    assert stand_in_for_cuda(tmp_path / "torch") == []
