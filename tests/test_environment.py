import subprocess

import pytest

from topk_attention import environment as module_under_test
from topk_attention.environment import code_sha256, environment, package_version, product_sha256


def test_the_environment_tells_versions_and_processor():
    current = environment()
    assert {"topk_attention", "torch", "transformers", "python", "cpu", "num_cpus", "commit", "date"} <= set(current)
    assert all(current[name] for name in ("topk_attention", "torch", "python", "system", "cpu", "date"))


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("there-is-no-such-package") is None


def test_a_library_inside_another_projects_repository_has_no_commit(tmp_path, monkeypatch):
    module = tmp_path / "site-packages" / "topk_attention" / "environment.py"
    module.parent.mkdir(parents=True)
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(module_under_test, "__file__", str(module))
    assert module_under_test.git_commit() is None


@pytest.mark.parametrize(
    ("content", "changes"),
    [("a = 2", True), ("a = 1  # a comment", False), ('"""A docstring."""\na = 1', False), ("a  =  1", False)],
)
def test_the_hash_changes_with_what_computes_and_not_with_comments(tmp_path, content, changes):
    module = tmp_path / "module.py"
    module.write_text("a = 1")
    before = code_sha256(tmp_path, [module])
    module.write_text(content)
    assert (code_sha256(tmp_path, [module]) != before) == changes


def test_the_hash_covers_names_and_binaries_but_not_the_command_line(tmp_path, monkeypatch):
    for name in ("environment.py", "backends/kernels.so", "cli/commands.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1")
    monkeypatch.setattr(module_under_test, "__file__", str(tmp_path / "environment.py"))
    hashes = [product_sha256()]
    (tmp_path / "cli" / "commands.py").write_text("a = 2")
    assert product_sha256() == hashes[0]
    (tmp_path / "backends" / "kernels.so").write_text("a = 2")
    hashes.append(product_sha256())
    (tmp_path / "environment.py").rename(tmp_path / "another.py")
    hashes.append(product_sha256())
    assert len(set(hashes)) == 3
