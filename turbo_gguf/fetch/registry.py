"""Source distributions in the package registry that pip is set up for: which there are, and one of them as a file.

Nothing of a package is run: ``pip download`` would execute the metadata step of a source distribution, and install what that
asks for. So pip is only asked for its settings (:mod:`turbo_gguf.fetch.pip_settings`), and the registry for the files that it has (the
simple repository API, as JSON or HTML; or folders and pages of ``find-links``).
"""

from __future__ import annotations

import hashlib
import html.parser
import http.client
import json
import netrc
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit, urlunsplit

import msgspec
from packaging.utils import InvalidSdistFilename, canonicalize_name, parse_sdist_filename
from packaging.version import InvalidVersion, Version

from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.fetch.pip_settings import Settings, settings

TRIES = 3
"""Attempts at each address: registries and proxies drop connections now and then."""

RETRY_SECONDS = 1.0

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
T = TypeVar("T")

HINT = "check the network and pip's settings (pip config list)"
"""What to look at when the registry does not answer, or knows nothing."""


class Release(msgspec.Struct, frozen=True):
    """A source distribution that can be downloaded."""

    package: str
    version: str
    url: str
    sha256: str = ""  # as the registry states it; "" when it states none
    yanked: bool = False

    @property
    def order(self) -> Version:
        """What versions are sorted by."""
        return Version(self.version)


class _Unreachable(Exception):
    """An address gave no answer; the message has no password."""


def releases(package: str, using: Settings | None = None) -> list[Release]:
    """List the source distributions of a package, newest first.

    Raises:
        EnvironmentMissing: there is no pip, or no index or page could be asked.
    """
    using = using or settings()
    name = canonicalize_name(package)
    found: dict[tuple[str, str], Release] = {}
    failures = []
    sources = [(f"{index.rstrip('/')}/{name}/", _index_page) for index in using.indexes] + [(link, _links_page) for link in using.links]
    for address, read in sources:
        try:
            for release in read(address, package, using):
                found.setdefault((release.version, release.sha256), release)
        except _Unreachable as error:
            failures.append(str(error))
    if failures and not found:
        raise EnvironmentMissing("\n  ".join([f"cannot ask for the versions of {package}:", *failures]), HINT)
    return sorted(found.values(), key=lambda release: release.order, reverse=True)


def newest(versions: Iterable[str]) -> str:
    """The newest of some versions, "" when there is none."""
    return max(versions, key=Version, default="")


def newer(found: Iterable[Release], known: Iterable[str]) -> list[Release]:
    """Of a package's releases those that are newer than all known versions, in their order; without withdrawn ones and previews."""
    latest = Version(newest(known) or "0")
    return [item for item in found if item.order > latest and not item.yanked and not item.order.is_prerelease]


def download(release: Release, target: Path, using: Settings | None = None) -> str:
    """Write the file of a release, and return its sha256.

    Raises:
        EnvironmentMissing: no network, or the transfer broke off again and again.
    """
    using = using or settings()
    target.parent.mkdir(parents=True, exist_ok=True)

    def transfer() -> str:
        total, size = hashlib.sha256(), 0
        with _open(release.url, using) as answer, target.open("wb") as file:
            while chunk := answer.read(1 << 20):
                total.update(chunk)
                size += len(chunk)
                file.write(chunk)
            announced = answer.headers.get("Content-Length")
        if announced and int(announced) != size:
            raise http.client.IncompleteRead(b"", int(announced) - size)
        return total.hexdigest()

    try:
        return _patiently(release.url, transfer)
    except _Unreachable as error:
        raise EnvironmentMissing(f"cannot fetch {release.package} {release.version}: {error}", HINT) from error


def _index_page(address: str, package: str, using: Settings) -> Iterator[Release]:
    """Files on the page that an index has of a package; none when it does not know the package."""
    if urlsplit(address).scheme == "file":
        page = _local(address) / "index.html"
        if page.is_file():
            yield from _releases(_html_links(page.read_text("utf-8"), page.as_uri()), package)
        return
    yield from _releases(_page(address, using), package)


def _links_page(address: str, package: str, using: Settings) -> Iterator[Release]:
    """Files of a folder or page of find-links."""
    local = urlsplit(address).scheme in ("", "file")
    if local and _local(address).is_dir():
        links = [(path.as_uri(), "", False) for path in sorted(_local(address).iterdir())]
        yield from _releases(links, package)
    elif local and _local(address).is_file():
        yield from _releases(_html_links(_local(address).read_text("utf-8"), _local(address).absolute().as_uri()), package)
    elif not local:
        yield from _releases(_page(address, using), package)


def _local(address: str) -> Path:
    parts = urlsplit(address)
    return Path(unquote(parts.path)) if parts.scheme == "file" else Path(address).expanduser()


def _page(address: str, using: Settings) -> list[tuple[str, str, bool]]:
    """Address, sha256 and whether it was withdrawn, of each file on a page."""

    def read() -> list[tuple[str, str, bool]]:
        with _open(address, using) as answer:
            kind, base = answer.headers.get_content_type(), _with_login(answer.url, address)
            text = answer.read().decode("utf-8", errors="replace")
        return _json_links(text, base) if kind.endswith("json") else _html_links(text, base)

    return _patiently(address, read, absent=list)


def _json_links(text: str, base: str) -> list[tuple[str, str, bool]]:
    files: list[dict[str, Any]] = json.loads(text)["files"]
    return [(urljoin(base, file["url"]), str((file.get("hashes") or {}).get("sha256", "")), bool(file.get("yanked"))) for file in files]


def _html_links(text: str, base: str) -> list[tuple[str, str, bool]]:
    reader = _Anchors()
    reader.feed(text)
    found = []
    for attributes in reader.found:
        url, fragment = urldefrag(urljoin(base, attributes.get("href") or ""))
        match = re.search(r"sha256=([0-9a-fA-F]{64})", fragment)
        found.append((url, match[1].lower() if match else "", "data-yanked" in attributes))
    return found


class _Anchors(html.parser.HTMLParser):
    """Collects the attributes of links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a link says."""
        if tag == "a":
            self.found.append(dict(attrs))


def _releases(links: list[tuple[str, str, bool]], package: str) -> Iterator[Release]:
    """The links that are source distributions of a package."""
    for url, sha256, yanked in links:
        file = unquote(urlsplit(url).path.rpartition("/")[2])
        try:
            name, version = parse_sdist_filename(file)
        except (InvalidSdistFilename, InvalidVersion):
            continue
        if name == canonicalize_name(package) and file.endswith(".tar.gz"):
            yield Release(package, str(version), url, sha256, yanked)


def _open(address: str, using: Settings) -> Any:
    """Open an address with pip's certificate, proxy and login."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    bare = urlunsplit((parts.scheme, host, quote(unquote(parts.path)), parts.query, ""))
    request = urllib.request.Request(bare, headers={"Accept": _ACCEPT, "User-Agent": "turbo-gguf"})
    login = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    name, password = (unquote(parts.username), unquote(parts.password or "")) if parts.username else _netrc(parts.hostname or "")
    if name:
        login.add_password(None, bare, name, password)
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.HTTPSHandler(context=_tls(parts.hostname or "", host, using)),
        urllib.request.HTTPBasicAuthHandler(login),
        urllib.request.ProxyHandler({"http": using.proxy, "https": using.proxy} if using.proxy else None),
    ]
    return urllib.request.build_opener(*handlers).open(request, timeout=using.timeout)


def _netrc(host: str) -> tuple[str, str]:
    """Name and password of a host in the user's netrc file."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        found = None
    return (found[0], found[2] or "") if found else ("", "")


def _tls(hostname: str, host: str, using: Settings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if using.cert:
        context.load_verify_locations(**({"capath": using.cert} if Path(using.cert).is_dir() else {"cafile": using.cert}))
    if using.client_cert:
        context.load_cert_chain(using.client_cert)
    if hostname in using.trusted or host in using.trusted:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _with_login(address: str, asked: str) -> str:
    """The address of a page with the login that it was asked with: links on the same host need it, too."""
    login = urlsplit(asked).netloc.rpartition("@")[0]
    parts = urlsplit(address)
    same = parts.netloc == urlsplit(asked).netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{login}@{parts.netloc}")) if login and same else address


def _patiently(address: str, act: Callable[[], T], absent: Callable[[], T] | None = None) -> T:
    """Do it, again after a passing failure; ``absent()`` is the answer for what does not exist."""
    parts = urlsplit(address)
    shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    for left in reversed(range(TRIES)):
        try:
            return act()
        except urllib.error.HTTPError as error:
            if error.code == 404 and absent is not None:
                return absent()
            reason, passing = f"{error.code} {error.reason}", error.code >= 500 or error.code == 429
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            reason, passing = str(getattr(error, "reason", "") or error) or type(error).__name__, True
        except (ValueError, KeyError, TypeError) as error:
            reason, passing = f"answer not understood ({error})", False
        if not left or not passing:
            raise _Unreachable(f"{shown}: {reason}")
        time.sleep(RETRY_SECONDS)
    raise AssertionError("unreachable")
