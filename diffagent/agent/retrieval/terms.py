"""Prompts as bags of n-grams, and an index of which training prompts share them.

Nothing of scikit-learn is needed to answer: a vocabulary is a table of terms, an index is a sparse
matrix of postings, and both are read in a fraction of a second.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from diffagent.failures import reading

Floats = npt.NDArray[np.float32]
Kind = Literal["words", "tokens", "pairs"]
Weighting = Literal["tfidf", "bm25"]

#: Kind -> (what a token is, whether case is kept, longest n-gram). "words" is the usual bag of
#: words and word pairs. "tokens" keeps case and punctuation: how a person writes a prompt
#: ("(masterpiece:1.2)", "BREAK") tells of the models which that person uses. "pairs": the
#: same, up to pairs.
KINDS: dict[str, tuple[re.Pattern[str], bool, int]] = {
    "words": (re.compile(r"\w+"), False, 2),
    "tokens": (re.compile(r"\w+|[^\w\s]"), True, 3),
    "pairs": (re.compile(r"\w+|[^\w\s]"), True, 2),
}
_K1, _B = 1.2, 0.75  # of BM25 (Robertson et al. 1994)
_SEPARATOR = "\x1f"


def clean(text: str) -> str:
    """The text with lone surrogates, which no file and no tokeniser takes, replaced."""
    return text.encode(errors="replace").decode()


def ngrams(text: str, kind: Kind) -> Iterator[str]:
    """The n-grams of a text, as often as they occur."""
    pattern, keep_case, longest = KINDS[kind]
    text = clean(text)
    words = pattern.findall(text if keep_case else text.lower())
    for length in range(1, longest + 1):
        for start in range(len(words) - length + 1):
            yield _SEPARATOR.join(words[start : start + length])


class Terms:
    """A vocabulary with the inverse document frequency of each term."""

    def __init__(self, kind: Kind, vocabulary: dict[str, int], idf: Floats) -> None:
        self.kind = kind
        self.vocabulary = vocabulary
        self.idf = idf

    @classmethod
    def fit(cls, texts: Sequence[str], kind: Kind, min_texts: int = 1) -> tuple[Self, Any]:
        """The vocabulary of the texts, and `counts` of them; only terms of ``min_texts`` texts."""
        vocabulary: dict[str, int] = {}
        found = _counts(texts, kind, vocabulary, grow=True)
        frequency = np.bincount(found.indices, minlength=len(vocabulary))
        if min_texts > 1:
            kept = np.flatnonzero(frequency >= min_texts)
            names = list(vocabulary)
            vocabulary = {names[old]: new for new, old in enumerate(kept.tolist())}
            found, frequency = found[:, kept], frequency[kept]
        idf = np.log((1 + len(texts)) / (1 + frequency)) + 1
        return cls(kind, vocabulary, idf.astype(np.float32)), found

    def counts(self, texts: Sequence[str]) -> Any:
        """How often each text has each known term: (texts, terms) sparse float32."""
        return _counts(texts, self.kind, self.vocabulary, grow=False)

    def tfidf(self, counts: Any) -> Any:
        """Rows of unit length with logarithmic term frequencies."""
        weights = counts.copy()
        weights.data = (1 + np.log(weights.data)) * self.idf[weights.indices]
        norms = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=1))).ravel()
        weights.data /= np.repeat(np.maximum(norms, 1e-12), np.diff(weights.indptr))
        return weights.astype(np.float32)

    def save(self, path: Path) -> None:
        """Write the vocabulary as parquet."""
        pl.DataFrame({"term": list(self.vocabulary), "idf": self.idf}).write_parquet(path)

    @classmethod
    def load(cls, path: Path, kind: Kind) -> Self:
        """Read what `save` wrote."""
        with reading(path):
            table = pl.read_parquet(path)
            terms = dict(zip(table["term"].to_list(), range(len(table)), strict=True))
            return cls(kind, terms, table["idf"].to_numpy())


class Index:
    """Texts by their terms: cosine of TF-IDF, or BM25 as a share of what a text could reach."""

    def __init__(self, terms: Terms, weighting: Weighting, postings: Any) -> None:
        self.terms = terms
        self.weighting = weighting
        self.postings = postings  # (terms, texts) sparse

    @classmethod
    def fit(cls, texts: Sequence[str], kind: Kind, weighting: Weighting = "tfidf") -> Self:
        """An index of the texts."""
        terms, counts = Terms.fit(texts, kind)
        weigh = terms.tfidf if weighting == "tfidf" else lambda found: _bm25(found, terms.idf)
        return cls(terms, weighting, weigh(counts).T.tocsr())

    def similarity(self, counts: Any) -> Floats:
        """(queries, texts) from 0 to 1, of `Terms.counts` of the queries."""
        if self.weighting == "tfidf":
            query = self.terms.tfidf(counts)
        else:
            query = counts.copy()
            query.data = self.terms.idf[query.indices] * (_K1 + 1)
            ideal = np.asarray(query.sum(axis=1)).ravel()
            query.data = 1 / np.repeat(np.maximum(ideal, 1e-12), np.diff(query.indptr))
        found: Floats = (query.astype(np.float32) @ self.postings).toarray()
        return found

    def save(self, folder: Path, name: str) -> None:
        """Write NAME.parquet and NAME.safetensors."""
        self.terms.save(folder / f"{name}.parquet")
        save_sparse(self.postings, folder / f"{name}.safetensors")

    @classmethod
    def load(cls, folder: Path, name: str, kind: Kind, weighting: Weighting = "tfidf") -> Self:
        """Read what `save` wrote."""
        terms = Terms.load(folder / f"{name}.parquet", kind)
        return cls(terms, weighting, load_sparse(folder / f"{name}.safetensors"))


def save_sparse(matrix: Any, path: Path) -> None:
    """Write a sparse matrix in compressed rows as safetensors."""
    parts = {"indptr": matrix.indptr.astype(np.int64), "indices": matrix.indices.astype(np.int32)}
    parts |= {"data": matrix.data.astype(np.float32), "shape": np.array(matrix.shape, np.int64)}
    save_file(parts, path)


def load_sparse(path: Path) -> Any:
    """Read what `save_sparse` wrote."""
    from scipy import sparse

    parts = load_file(path)
    shape = tuple(parts["shape"].tolist())
    return sparse.csr_array((parts["data"], parts["indices"], parts["indptr"]), shape=shape)


def _counts(texts: Sequence[str], kind: Kind, vocabulary: dict[str, int], *, grow: bool) -> Any:
    from scipy import sparse

    columns: list[int] = []
    values: list[int] = []
    ends = [0]
    for text in texts:
        for term, count in Counter(ngrams(text, kind)).items():
            place = vocabulary.setdefault(term, len(vocabulary)) if grow else vocabulary.get(term)
            if place is not None:
                columns.append(place)
                values.append(count)
        ends.append(len(columns))
    shape = (len(texts), len(vocabulary))
    data = np.array(values, np.float32)
    return sparse.csr_array((data, np.array(columns, np.int32), np.array(ends)), shape=shape)


def _bm25(counts: Any, idf: Floats) -> Any:
    weights = counts.copy()
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    norm = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1e-12))
    norms = np.repeat(norm, np.diff(counts.indptr))
    weights.data = idf[counts.indices] * counts.data * (_K1 + 1) / (counts.data + norms)
    return weights.astype(np.float32)
