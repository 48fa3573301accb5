"""The set-up finds the package index that a machine is configured for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import bootstrap

LINKS = {"uv-1.whl": "https://files.example/p/uv-1.whl", "uv 2.whl": "https://index.example/simple/uv/uv%202.whl"}


@pytest.mark.parametrize(
    ("environment", "index"),
    [
        ({"PIP_INDEX_URL": "https://pip.example/simple/"}, "https://pip.example/simple"),
        ({"PIP_INDEX_URL": "https://pip.example/simple", "UV_INDEX_URL": "https://uv.example"}, "https://uv.example"),
        ({"UV_DEFAULT_INDEX": "corp=https://uv.example/simple"}, "https://uv.example/simple"),
    ],
)
def test_variables_name_the_index(tmp_path: Path, environment: dict[str, str], index: str) -> None:
    assert bootstrap.package_source(environment, tmp_path).index == index


def test_files_name_index_and_certificates_and_variables_win(tmp_path: Path) -> None:
    certificates = tmp_path / "ca.pem"
    certificates.touch()
    pip = tmp_path / "pip.conf"
    pip.write_text(
        f"[global]\nindex-url = https://file.example/%%s\nextra-index-url =\n  https://a\n  https://b\ncert = {certificates}\n"
    )
    source = bootstrap.package_source({"PIP_CONFIG_FILE": str(pip)}, tmp_path)
    assert source.index == "https://file.example/%%s"
    assert source.extra_indexes == ["https://a", "https://b"]
    assert source.certificates == str(certificates)
    assert source.uv_environment()["SSL_CERT_FILE"] == str(certificates)
    assert (
        bootstrap.package_source({"PIP_CONFIG_FILE": str(pip), "PIP_INDEX_URL": "https://v"}, tmp_path).index
        == "https://v"
    )


def test_uv_file_names_the_default_index(tmp_path: Path) -> None:
    (tmp_path / ".config/uv").mkdir(parents=True)
    (tmp_path / ".config/uv/uv.toml").write_text(
        '[[index]]\nurl = "https://a"\n[[index]]\nurl = "https://b/"\ndefault = true\n'
    )
    assert bootstrap.package_source({}, tmp_path).index == "https://b"


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        (
            "application/vnd.pypi.simple.v1+json",
            b'{"files": [{"url": "https://files.example/p/uv-1.whl#x"}, {"url": "uv%202.whl"}]}',
        ),
        (
            "text/html",
            b'<a href="https://files.example/p/uv-1.whl#sha256=0">x</a><a data-y>z</a><a href="uv%202.whl">y</a>',
        ),
    ],
)
def test_pages_of_both_kinds_are_read(kind: str, page: bytes) -> None:
    assert bootstrap.file_links(page, kind, "https://index.example/simple/uv/") == LINKS


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = bootstrap.UV_WHEELS["x86_64"]
    (tmp_path / name).write_bytes(b"not uv")
    monkeypatch.setattr(bootstrap, "BUILD", tmp_path / "build")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(bootstrap.BootstrapError, match="SHA-256"):
        bootstrap.fetch_uv(bootstrap.PackageSource(find_links=[str(tmp_path)]))
    assert not list((tmp_path / "build").rglob("uv"))
