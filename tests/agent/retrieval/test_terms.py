"""N-grams, TF-IDF and BM25 against scikit-learn and formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from diffagent.agent.retrieval.terms import Index, Terms, ngrams

TEXTS = ["a Red star, at night", "blue star star", "(masterpiece:1.2), a blue ring", "日本 の 星"]


def test_cosines_are_those_of_scikit_learn() -> None:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
    train = vectorizer.fit_transform(TEXTS)
    asked = [*TEXTS, "star at night, blue", "unknown"]
    index = Index.fit(TEXTS, "words")
    found = index.similarity(index.terms.counts(asked))
    np.testing.assert_allclose(
        found, (vectorizer.transform(asked) @ train.T).toarray(), rtol=1e-5, atol=1e-6
    )


def test_tokens_keep_case_and_punctuation() -> None:
    assert list(ngrams("A (b", "pairs")) == ["A", "(", "b", "A\x1f(", "(\x1fb"]
    assert list(ngrams("A (b", "words")) == ["a", "b", "a\x1fb"]


def test_rare_terms_are_left_out() -> None:
    terms, counts = Terms.fit(TEXTS, "words", min_texts=2)
    assert set(terms.vocabulary) == {"a", "star", "blue"}
    assert counts.toarray()[1].tolist() == [
        {"a": 0, "star": 2, "blue": 1}[term] for term in terms.vocabulary
    ]
    assert (terms.counts(TEXTS) != counts).nnz == 0


def test_bm25_of_one_term() -> None:
    texts = ["red red", "blue green"]
    index = Index.fit(texts, "words", "bm25")
    [[red, other]] = index.similarity(index.terms.counts(["red"]))
    idf, average = math.log(3 / 2) + 1, 3.0  # a text has its words and one pair
    weight = idf * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / average))
    assert red == pytest.approx(weight / (2.2 * idf), rel=1e-5)
    assert other == 0


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=60), max_size=4))
def test_any_text_has_a_similarity_from_0_to_1(texts: list[str]) -> None:
    for weighting in ("tfidf", "bm25"):
        index = Index.fit(TEXTS, "tokens", weighting)
        found = index.similarity(index.terms.counts(texts))
        assert found.shape == (len(texts), len(TEXTS))
        assert ((found >= 0) & (found <= 1 + 1e-5)).all()


def test_an_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    texts = [*TEXTS, "a lone \ud800 surrogate, control \x00\x1f"]
    index = Index.fit(texts, "tokens")
    index.save(tmp_path, "tokens")
    again = Index.load(tmp_path, "tokens", "tokens")
    asked = ["star \ud800, night", *texts]
    before, after = (i.similarity(i.terms.counts(asked)) for i in (index, again))
    np.testing.assert_array_equal(before, after)
