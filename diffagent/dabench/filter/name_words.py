"""Names that share the words which matter: ``Style_deliberate_v2`` is ``Deliberate`` ``v2``.

Two names are as similar as the information of their common words is to that of all their words
(Jaccard's index weighted by inverse document frequency): "mix" and "v1" say little, a made-up
word says nearly everything.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

from diffagent.t2i.names import words

_MAX_CANDIDATES = 2000


class NameWords:
    """Names of things, found by their words. A thing is a number and belongs to a group."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}  # word -> its number
        self._words = array("I")  # of all names, one name after the other
        self._ends = array("I", [0])
        self._owners = array("I")  # name -> thing
        self._groups = array("q")  # name -> group
        self._by_word: list[array[int]] = []  # word -> names
        self._weights: list[float] = []  # of words, while no name is added
        self._size = 0  # groups

    def add(self, owner: int, group: int, names: Iterable[str]) -> None:
        """Give a thing names; those with the same words count once."""
        for bag in {words(name) for name in names}:
            for word in bag:
                number = self._ids.setdefault(word, len(self._ids))
                if number == len(self._by_word):
                    self._by_word.append(array("I"))
                self._by_word[number].append(len(self._owners))
                self._words.append(number)
            self._ends.append(len(self._words))
            self._owners.append(owner)
            self._groups.append(group)
        self._weights = []

    def find(self, name: str, at_least: float) -> tuple[float, list[int]]:
        """(similarity, things) of the most similar name, if that is ``at_least``; else (0, [])."""
        if not self._weights:
            self._weigh()
        bag = words(name)
        known = {self._ids[word]: self._weights[self._ids[word]] for word in bag & self._ids.keys()}
        total = sum(known.values()) + (len(bag) - len(known)) * self._weight(0.5)
        best, owners = at_least, set[int]()
        for candidate in self._candidates(known, total * at_least):
            shared, alone = 0.0, 0.0
            for number in self._words[self._ends[candidate] : self._ends[candidate + 1]]:
                weight = known.get(number)
                if weight is None:
                    alone += self._weights[number]
                else:
                    shared += weight
            similarity = round(shared / (total + alone), 9)
            if similarity > best:
                best, owners = similarity, set()
            if similarity == best:
                owners.add(self._owners[candidate])
        return (best, sorted(owners)) if owners else (0.0, [])

    def _candidates(self, known: dict[int, float], needed: float) -> set[int]:
        """Names that may share words of the weight ``needed``: one of the rarest must be theirs.

        None where these would be too many: what so many names share does not tell them apart.
        """
        found, left = set[int](), sum(known.values())
        for number, weight in sorted(known.items(), key=lambda item: -item[1]):
            if left < needed:
                break
            found.update(self._by_word[number])
            if len(found) > _MAX_CANDIDATES:
                return set()
            left -= weight
        return found

    def _weigh(self) -> None:
        self._size = len(set(self._groups))
        groups = (len({self._groups[name] for name in names}) for names in self._by_word)
        self._weights = [self._weight(count) for count in groups]

    def _weight(self, groups: float) -> float:
        return math.log((self._size + 1) / groups)
