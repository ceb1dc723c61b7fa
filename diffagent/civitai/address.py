"""Web addresses, read by one strict parser before anything is sent to them.

Two parsers that read one address differently are how a check of its host is passed and another
host is asked (``https://site\@other``). So an address is taken apart here, anything odd about its
scheme, host or port is refused, and requests go to what is put together again from the parts.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import quote, urljoin

#: The site's two fronts: the same API, and either may appear in an address it gives.
SITE_HOSTS = ("civitai.com", "civitai.red")
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<target>[/?][^#]*)?(?:#.*)?",
    re.IGNORECASE,
)
_FORBIDDEN = re.compile(r"[\\\x00-\x1f\x7f]")
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # what has a meaning in an address, or is encoded already


class Address(NamedTuple):
    """An http(s) address: its origin ('https://host[:port]', lower case), path and query."""

    origin: str
    host: str
    path: str
    query: str

    @classmethod
    def parse(cls, text: str, base: str = "") -> Address:
        """Read an address, or one that is relative to ``base``.

        Raises:
            ValueError: it is none, or has a user name, or parsers may disagree about it. The
                message does not contain it: an address may hold a secret.
        """
        text = text.strip(" ")
        if _FORBIDDEN.search(text):
            raise ValueError("the address contains a backslash or a control character")
        match = _ADDRESS.fullmatch(quote(urljoin(base, text) if base else text, safe=_SAFE))
        if not match:
            raise ValueError("it is no http(s) address with a plain host, without a user name")
        host = match["host"].lower()
        if host.startswith("["):
            ipaddress.IPv6Address(host[1:-1])
        if int(match["port"] or 0) > 65535:
            raise ValueError("the address has a port above 65535")
        origin = f"{match['scheme'].lower()}://{host}"
        path, _, query = (match["target"] or "").partition("?")
        return cls(
            f"{origin}:{match['port']}" if match["port"] else origin,
            host.strip("[]"),
            path or "/",
            query,
        )

    @property
    def url(self) -> str:
        """The whole address, in the one form that is sent."""
        return f"{self.origin}{self.path}" + (f"?{self.query}" if self.query else "")

    @property
    def is_https(self) -> bool:
        """Whether it cannot be read on the way."""
        return self.origin.startswith("https:")

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_site(self) -> bool:
        """Whether its host is one of the site's fronts or their subdomains."""
        return is_site_host(self.host)


def is_site_host(host: str) -> bool:
    """Whether a host is one of the site's fronts or their subdomains."""
    return any(host == known or host.endswith(f".{known}") for known in SITE_HOSTS)


def origin_of(url: str) -> str:
    """scheme://host[:port] of an address, in lower case; '' when it is none."""
    try:
        return Address.parse(url).origin
    except ValueError:
        return ""


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    try:
        return Address.parse(url).is_loopback
    except ValueError:
        return False
