"""Make the environment `.venv` from the hash-pinned lock: `python3 -m tools.bootstrap`.

Needs Python 3.11 or newer and its standard library, neither pip nor venv: where no `uv` is installed, its pinned wheel
is fetched from the package index that this machine is configured for (uv's and pip's variables and files, else
PyPI) and checked by SHA-256. Does nothing, quickly, when the environment already is what the lock says.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import html.parser
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tomllib
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from tools.paths import BUILD, IMPORT_ROOTS, PROTOS, ROOT

VENV = ROOT / ".venv"
LOCK = ROOT / "requirements" / "dev.txt"
STAMP = VENV / "virtfleet.stamp"
OLDEST_PYTHON = (3, 11)
OLDEST_UV = (0, 5)
DEFAULT_INDEX = "https://pypi.org/simple"
DOWNLOAD_TIMEOUT_SECONDS = 180.0

UV_WHEELS = {
    "x86_64": (
        "uv-0.13.9-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19",
    ),
    "aarch64": (
        "uv-0.13.9-py3-none-manylinux_2_17_aarch64.manylinux2014_aarch64.musllinux_1_1_aarch64.whl",
        "5435c5ce14a56431208ca0996416d310f1598e8c2c8ba707688985a16bb82dbe",
    ),
}


class BootstrapError(Exception):
    """The environment cannot be made; the text says what the person can do."""


@dataclass
class PackageSource:
    """Where this machine takes packages from, and whom it trusts there."""

    index: str = DEFAULT_INDEX
    extra_indexes: list[str] = field(default_factory=list)
    find_links: list[str] = field(default_factory=list)
    certificates: str = ""

    def uv_environment(self) -> dict[str, str]:
        """Return the variables that make uv use this source; it does not read pip's configuration itself."""
        settings = {"UV_DEFAULT_INDEX": self.index, "UV_SYSTEM_CERTS": "1", "UV_PYTHON_DOWNLOADS": "never"}
        if self.extra_indexes:
            settings["UV_INDEX"] = " ".join(self.extra_indexes)
        if self.find_links:
            settings["UV_FIND_LINKS"] = ",".join(self.find_links)
        if self.certificates:
            settings["SSL_CERT_FILE"] = self.certificates
        return {**os.environ, **settings}


def _pip_settings(environment: dict[str, str], home: Path) -> dict[str, str]:
    """Read pip's settings: files from the least to the most specific, then variables."""
    files = [
        Path("/etc/pip.conf"),
        Path("/etc/xdg/pip/pip.conf"),
        home / ".pip/pip.conf",
        home / ".config/pip/pip.conf",
    ]
    if environment.get("XDG_CONFIG_HOME"):
        files.append(Path(environment["XDG_CONFIG_HOME"]) / "pip/pip.conf")
    if environment.get("PIP_CONFIG_FILE"):
        files.append(Path(environment["PIP_CONFIG_FILE"]))
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.read([path for path in files if path.is_file()])
    settings: dict[str, str] = {}
    for section in ("global", "install", "download"):
        if parser.has_section(section):
            settings.update({key.replace("_", "-"): value for key, value in parser.items(section)})
    for name in ("index-url", "extra-index-url", "find-links", "cert"):
        value = environment.get("PIP_" + name.upper().replace("-", "_"))
        if value:
            settings[name] = value
    return settings


def _uv_settings(environment: dict[str, str], home: Path) -> dict[str, str]:
    """Read uv's index: the user's file wins over the system's, a variable over both."""
    settings: dict[str, str] = {}
    config = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    for path in (Path("/etc/uv/uv.toml"), config / "uv/uv.toml"):
        if path.is_file():
            content = tomllib.loads(path.read_text())
            defaults = [entry["url"] for entry in content.get("index", []) if entry.get("default")]
            url = defaults[0] if defaults else content.get("index-url", content.get("pip", {}).get("index-url", ""))
            if url:
                settings["index-url"] = url
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        if environment.get(name):
            settings["index-url"] = (
                environment[name].rpartition("=")[2] if "=http" in environment[name] else environment[name]
            )
    return settings


def package_source(environment: dict[str, str], home: Path) -> PackageSource:
    """Find out which index and certificates this machine uses."""
    pip = _pip_settings(environment, home)
    uv = _uv_settings(environment, home)
    certificates = next(
        (
            value
            for value in (
                environment.get("SSL_CERT_FILE"),
                pip.get("cert"),
                environment.get("REQUESTS_CA_BUNDLE"),
                environment.get("CURL_CA_BUNDLE"),
            )
            if value and Path(value).is_file()
        ),
        "",
    )
    links = pip.get("find-links", "").split()
    return PackageSource(
        index=(uv.get("index-url") or pip.get("index-url") or DEFAULT_INDEX).rstrip("/"),
        extra_indexes=pip.get("extra-index-url", "").split(),
        find_links=[link for link in links if "://" in link or Path(link).is_dir()],
        certificates=certificates,
    )


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [value for key, value in attrs if key == "href" and value]


def _open(url: str, source: PackageSource, accept: str = "*/*") -> tuple[bytes, str, str]:
    """Fetch an address; returns content, its type and the address after redirects."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in {"http", "https", "file"}:
        raise BootstrapError(f"cannot fetch {parts.scheme} addresses: {url}")
    headers = {"Accept": accept, "User-Agent": "virtfleet-bootstrap"}
    if parts.username:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    context = ssl.create_default_context(cafile=source.certificates or None)
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_SECONDS, context=context) as answer:
        return answer.read(), answer.headers.get_content_type(), answer.url


def file_links(content: bytes, kind: str, address: str) -> dict[str, str]:
    """Return file name to address for a page of the simple index, in its JSON or HTML form."""
    if kind.endswith("json"):
        found = [file["url"] for file in json.loads(content)["files"]]
    else:
        page = _Links()
        page.feed(content.decode())
        found = page.targets
    absolute = [urllib.parse.urljoin(address, link).partition("#")[0] for link in found]
    return {urllib.parse.unquote(link.rpartition("/")[2]): link for link in absolute}


def _wheel_content(name: str, source: PackageSource) -> bytes:
    for folder in source.find_links:
        if "://" not in folder and (Path(folder) / name).is_file():
            return (Path(folder) / name).read_bytes()
    tried = []
    for index in (source.index, *source.extra_indexes):
        page = f"{index.rstrip('/')}/uv/"
        try:
            links = file_links(*_open(page, source, "application/vnd.pypi.simple.v1+json, text/html;q=0.5"))
            if name in links:
                return _open(links[name], source)[0]
            tried.append("an index without this version")
        except (OSError, urllib.error.URLError) as error:
            tried.append(str(error))
    raise BootstrapError(f"cannot fetch {name} from the configured package index: {'; '.join(tried)}")


def fetch_uv(source: PackageSource) -> Path:
    """Return the pinned uv from `build/uv`, fetched first if it is not there.

    Raises:
        BootstrapError: no wheel for this machine, no index answers, or the content is not the pinned one.
    """
    machine = platform.machine()
    if machine not in UV_WHEELS:
        raise BootstrapError(f"no pinned uv for {machine}: install uv yourself and run this again")
    name, digest = UV_WHEELS[machine]
    target = BUILD / "uv" / digest[:16] / "uv"
    if target.exists():
        return target
    print(f"fetching {name}")
    content = _wheel_content(name, source)
    if hashlib.sha256(content).hexdigest() != digest:
        raise BootstrapError(f"{name} has another SHA-256 than the pinned {digest}: refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    wheel = target.parent / name
    wheel.write_bytes(content)
    with zipfile.ZipFile(wheel) as archive:
        member = next(entry for entry in archive.namelist() if entry.endswith(".data/scripts/uv"))
        partial = target.with_suffix(".part")
        partial.write_bytes(archive.read(member))
    wheel.unlink()
    partial.chmod(0o755)
    partial.rename(target)
    return target


def installed_uv() -> Path | None:
    """Return a uv from PATH that runs and is new enough."""
    found = shutil.which("uv")
    if not found:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    version = re.match(r"uv (\d+)\.(\d+)", done.stdout)
    return Path(found) if version and tuple(map(int, version.groups())) >= OLDEST_UV else None


def distributions() -> list[Path]:
    """List the project files of the tree's own distributions."""
    folders = [PROTOS, *(ROOT / root for root in IMPORT_ROOTS if "/gen/" not in root)]
    return [path for folder in folders if (path := folder / "pyproject.toml").exists()]


def wanted_stamp() -> str:
    """Name what the environment should be: the lock, the tree's distributions, and the Python it was made with."""
    parts = [LOCK, VENV / "pyvenv.cfg", *distributions()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest() + "\n"


def _call(command: list[str | Path], environment: dict[str, str]) -> None:
    done = subprocess.run([str(part) for part in command], env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise BootstrapError(f"failed with exit code {done.returncode}: {' '.join(map(str, command))}")


def write_path_file() -> None:
    """Put every package of the tree on the environment's path."""
    content = "".join(f"{ROOT / root}\n" for root in IMPORT_ROOTS)
    for folder in VENV.glob("lib/python3.*/site-packages"):
        target = folder / "virtfleet.pth"
        if not target.exists() or target.read_text() != content:
            target.write_text(content)


def main() -> int:
    """Make or renew the environment; returns the exit code."""
    if sys.version_info < OLDEST_PYTHON:
        print(
            f"Python 3.11 or newer is needed; this is {platform.python_version()} ({sys.executable})", file=sys.stderr
        )
        return 1
    python = VENV / "bin" / "python"
    try:
        if not (python.exists() and STAMP.exists() and STAMP.read_text() == wanted_stamp()):
            source = package_source(dict(os.environ), Path.home())
            uv = installed_uv() or fetch_uv(source)
            environment = {**source.uv_environment(), "VIRTUAL_ENV": str(VENV)}
            if not python.exists():
                shutil.rmtree(VENV, ignore_errors=True)
                _call([uv, "venv", "--quiet", "--python", sys.executable, VENV], environment)
            lock = ("--require-hashes", "--requirements", LOCK)
            # Compiled once: where PYTHONDONTWRITEBYTECODE is set, every process would do it anew at its start.
            compiled = ("--compile-bytecode", "--quiet", "--python", python)
            _call([uv, "pip", "install", *compiled, *lock], environment)
            # The tree's own distributions, where they lie: their entry points make the commands.
            own = [argument for path in distributions() for argument in ("--editable", path.parent)]
            options = ("--quiet", "--no-deps", "--no-build-isolation", "--offline", "--python", python)
            _call([uv, "pip", "install", *options, *own], environment)
            STAMP.write_text(wanted_stamp())
        write_path_file()
        # What is compiled and unchanged is left alone, in a moment.
        roots = [ROOT / root for root in IMPORT_ROOTS]
        _call([python, "-m", "compileall", "-q", *roots], {**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
    except (BootstrapError, OSError) as error:
        print(f"env: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
