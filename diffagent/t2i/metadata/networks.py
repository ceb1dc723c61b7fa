"""The networks of one picture, however many places of its metadata name each of them.

The prompt's tag has a network's weight, lists of hashes have its hash, and they spell it
differently: with a folder or an ending, an alias, other separators. Every hash in such a list is
that of a network that was loaded, and it was loaded by a tag. So a hash belongs to the tag of the
same name, else to the only one with a similar name, else to the only one that is left. A hash that
belongs to no tag is of a network whose weight is elsewhere: in ADetailer's prompt, say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diffagent.t2i.metadata.generation import Reference
from diffagent.t2i.names import exact_key, file_stem

_SHARED = 10  # digits that all hashes of one kind have
_MAX_PAIRS = 10_000  # of names that are compared with each other


def merge_networks(
    tags: Mapping[str, Reference], listed: Iterable[Reference], hashed: Iterable[Reference]
) -> tuple[tuple[Reference, ...], bool]:
    """Each network once, the prompt's first, and whether all have their own weights.

    Args:
        tags: networks that the prompt loads, by their names in lower case.
        listed: networks with weights.
        hashed: networks with hashes and without weights.
    """
    networks = _Networks(tags)
    for reference in listed:
        networks.add(reference)
    left = [reference for reference in hashed if not networks.add_hash(reference)]
    if len(tags) * len(left) <= _MAX_PAIRS:
        left = [reference for reference in left if not networks.pair_similar(reference)]
    free = networks.free_tags()
    if len(free) == len(left) == 1:
        networks.complete(free[0], left.pop())
    for reference in left:
        networks.insert(reference)
    return networks.references(), not left


class _Networks:
    def __init__(self, tags: Mapping[str, Reference]) -> None:
        self._tags = tags
        self._networks = dict(tags)
        self._keys = {_key(name): name for name in reversed(list(tags))}
        self._hashes = {_digest(use.hash) for use in tags.values() if use.hash}

    def add(self, reference: Reference) -> None:
        """Take in a network of a list that has weights."""
        if not self._add_to_known(reference):
            self.insert(reference)

    def add_hash(self, reference: Reference) -> bool:
        """Take in a hash whose network is known; False if it is not."""
        return self._add_to_known(reference)

    def _add_to_known(self, reference: Reference) -> bool:
        name = _name(reference)
        same = name.casefold() if name.casefold() in self._networks else self._keys.get(_key(name))
        if same is not None:
            self.complete(same, reference)
        return same is not None or not name or _digest(reference.hash) in self._hashes

    def complete(self, name: str, reference: Reference) -> None:
        """Give a network the hash that another place has of it."""
        use = self._networks[name]
        if use.hash is None and reference.hash:  # the tag has the weight, the list the hash
            self._networks[name] = use._replace(hash=reference.hash)
        if reference.hash:
            self._hashes.add(_digest(reference.hash))

    def insert(self, reference: Reference) -> None:
        """Take in a network that no other place has, unless its hash is there by now."""
        name = _name(reference).casefold()
        if name in self._networks or _digest(reference.hash) in self._hashes:
            return
        self._networks[name] = reference
        self._keys.setdefault(_key(name), name)
        if reference.hash:
            self._hashes.add(_digest(reference.hash))

    def free_tags(self) -> list[str]:
        """Tags that no hash belongs to yet."""
        return [name for name in self._tags if self._networks[name].hash is None]

    def pair_similar(self, reference: Reference) -> bool:
        """Whether one free tag has a similar name; it gets the hash."""
        if _digest(reference.hash) in self._hashes:
            return True
        key = _key(_name(reference))
        similar = [name for name in self.free_tags() if _overlap(_key(name), key)]
        if len(similar) == 1:
            self.complete(similar[0], reference)
        return len(similar) == 1

    def references(self) -> tuple[Reference, ...]:
        """All of them."""
        return tuple(self._networks.values())


def _name(reference: Reference) -> str:
    return reference.name or reference.hash or str(reference.version_id or "")


def _overlap(name: str, other: str) -> bool:
    """Whether a name begins or ends with the other."""
    short, long = sorted((name, other), key=len)
    return len(short) >= 3 and (long.startswith(short) or long.endswith(short))


def _key(name: str) -> str:
    """Letters and digits of a file's name; the name itself where it has none."""
    return exact_key(file_stem(name)) or name.casefold()


def _digest(digest: str | None) -> str | None:
    return digest[:_SHARED] if digest else None
