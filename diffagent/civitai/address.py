"""Web addresses, read by one strict parser before anything is sent to them.

When two parsers read one address differently, a check may see one host and the request go to
another (``https://site\@other``). So this module takes an address apart, refuses anything odd about
its scheme, host or port, and requests go to the address that is built from the parts.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import quote, urljoin

from diffagent.errors import ConfigError

#: The site's two fronts: both serve the same API and may appear in its links.
SITE_HOSTS = ("civitai.com", "civitai.red")
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<target>[/?][^#]*)?(?:#.*)?",
    re.IGNORECASE,
)
_FORBIDDEN = re.compile(r"[\\\x00-\x1f\x7f]")
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # characters with a meaning in an address, and encoded ones


class Address(NamedTuple):
    """An http(s) address: its origin ('https://host[:port]', lower case), host, path and query."""

    origin: str
    host: str
    path: str
    query: str

    @classmethod
    def parse(cls, text: str, base: str = "") -> Address:
        """Read an address, or one that is relative to ``base``.

        Raises:
            ValueError: it is no address, has a user name, or parsers may disagree about it. The
                message omits the address, which may hold a secret.
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

    @classmethod
    def on_site(cls, text: str, origin: str) -> Address:
        """Read a path, or an address of either front, as an address on the site at ``origin``.

        Raises:
            ConfigError: it is no address, or one of another host.
        """
        try:
            address = cls.parse(text, origin)
        except ValueError as error:
            raise ConfigError(f"a download address cannot be used: {error}") from None
        if address.origin != origin and not address.is_site:
            raise ConfigError(f"{address.host!r} is not the site; give a path")
        return address._replace(origin=origin)

    @property
    def url(self) -> str:
        """Whole address, in the form that is sent."""
        return f"{self.origin}{self.path}" + (f"?{self.query}" if self.query else "")

    @property
    def is_https(self) -> bool:
        """Whether requests to it are encrypted."""
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
    return any(host == front or host.endswith(f".{front}") for front in SITE_HOSTS)


def origin_of(url: str) -> str:
    """Return scheme://host[:port] of an address, in lower case; '' when it is no address."""
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
