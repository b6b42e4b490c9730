import subprocess

from topk_attention import environment as module_under_test
from topk_attention.environment import environment, package_version, source_sha256


def test_the_environment_tells_versions_and_processor():
    here = environment()
    assert {"topk_attention", "torch", "transformers", "python", "cpu", "num_cpus", "commit", "date"} <= set(here)
    assert all(here[name] for name in ("topk_attention", "torch", "python", "system", "cpu", "date"))


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("there-is-no-such-package") is None


def test_a_library_inside_somebody_elses_repository_has_no_commit(tmp_path, monkeypatch):
    module = tmp_path / "site-packages" / "topk_attention" / "environment.py"
    module.parent.mkdir(parents=True)
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(module_under_test, "__file__", str(module))
    assert module_under_test.git_commit() is None


def test_the_hash_of_the_source_changes_with_the_source(tmp_path, monkeypatch):
    module = tmp_path / "topk_attention" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("a = 1")
    monkeypatch.setattr(module_under_test, "__file__", str(module))
    before = source_sha256()
    assert source_sha256() == before
    module.write_text("a = 2")
    assert source_sha256() != before
