import subprocess
import sys

from typer.testing import CliRunner

from topk_attention import __version__
from topk_attention.backends import choose_backend, cpu
from topk_attention.cli import app

runner = CliRunner()


def test_info_tells_versions_backends_and_the_registration():
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    assert f"topk_attention  {__version__}" in result.output
    for words in ("python ", "torch ", "transformers ", "cpu ", "threads "):
        assert words in result.output
    assert "chunked       runs here: plain PyTorch" in result.output
    assert f'"auto" uses {choose_backend("auto").name}: ' in result.output
    assert 'attn_implementation="topk"  is registered with transformers' in result.output


def test_info_says_of_every_kind_of_kernels_whether_it_screens_keys(kernels):
    for target in cpu.cpu_targets():
        with cpu.forced_cpu_target(target):
            output = runner.invoke(app, ["info"]).output
        how = "screens keys by products of 8-bit integers" if target in cpu.SCREENING else "scores every key, as only"
        assert f"kernels: {target} in use, which {how}" in output


def test_version_is_the_packages():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"topk-attention {__version__}\n"


def test_help_imports_nothing_heavy_beyond_the_library_itself():
    code = (
        "import sys; from typer.testing import CliRunner; from topk_attention.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([name for name in ('transformers', 'matplotlib', 'psutil') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_without_the_packages_it_needs_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None\nfrom topk_attention.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: typer is not installed; in the folder of the clone: pip install --no-build-isolation '.[cli]'\n"
    )
