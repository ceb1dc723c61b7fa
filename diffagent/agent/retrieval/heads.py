"""Training of the two heads over models: minutes on a CPU, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from diffagent.agent.retrieval.experts import Bag, ModelToken
from diffagent.agent.retrieval.terms import Floats
from diffagent.agent.retrieval.training_calls import Calls

if TYPE_CHECKING:
    import torch

_BATCH = 128


def fit_bag(
    calls: Calls, tfidf: Any, *, size: int = 96, num_train_epochs: int = 4, seed: int = 0
) -> Bag:
    """`Bag` of training prompts.

    Args:
        calls: of the prompts.
        tfidf: (prompts, terms) sparse, rows of unit length.
        size: of the embeddings.
        num_train_epochs: passes over the prompts.
        seed: of the initial embeddings, the order and the dropout.
    """
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    terms = (0.3 * torch.randn(tfidf.shape[1], size, generator=generator)).requires_grad_()
    models = torch.zeros(len(calls.models), size, requires_grad=True)
    bias = torch.from_numpy(np.log(calls.prior)).requires_grad_()
    optimizers = [
        torch.optim.Adagrad([terms], lr=0.05),
        torch.optim.AdamW([models, bias], lr=0.01, weight_decay=1e-3),
    ]

    def loss(rows: Any, labels: torch.Tensor) -> torch.Tensor:
        part = tfidf[rows]
        hidden = functional.embedding_bag(
            torch.from_numpy(part.indices.astype(np.int64)),
            terms,
            torch.from_numpy(part.indptr[:-1].astype(np.int64)),
            mode="sum",
            per_sample_weights=torch.from_numpy(part.data),
        )
        keep = torch.rand(hidden.shape, generator=generator) >= 0.3
        logits = (hidden * keep / 0.7) @ models.T + bias
        return functional.cross_entropy(logits, labels, label_smoothing=0.05)

    _train(loss, optimizers, calls, num_train_epochs, generator)
    learnt = {"terms": terms.detach().numpy().astype(np.float16)}
    return Bag({**learnt, "models": models.detach().numpy(), "bias": bias.detach().numpy()})


def fit_model_token(
    calls: Calls,
    vectors: Floats,
    cards: Floats,
    *,
    scale: float = 20.0,
    num_train_epochs: int = 8,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> ModelToken:
    """`ModelToken` on the encoder's vectors of the training prompts.

    Args:
        calls: of the prompts.
        vectors: (prompts, d) float32, frozen.
        cards: (models, d) float32, the same encoder's vectors of the models' cards.
        scale: length of the initial embeddings; logits start as ``scale`` times the cosine.
        num_train_epochs: passes over the prompts.
        learning_rate: of AdamW.
        seed: of the order.
    """
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    inputs = torch.from_numpy(vectors)
    models = (scale * torch.from_numpy(cards.copy())).requires_grad_()
    bias = torch.from_numpy(np.log(calls.prior)).requires_grad_()
    optimizer = torch.optim.AdamW([models, bias], lr=learning_rate, weight_decay=1e-3)

    def loss(rows: Any, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(inputs[rows] @ models.T + bias, labels)

    _train(loss, [optimizer], calls, num_train_epochs, generator)
    return ModelToken({"models": models.detach().numpy(), "bias": bias.detach().numpy()})


def _train(
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    optimizers: list[torch.optim.Optimizer],
    calls: Calls,
    num_train_epochs: int,
    generator: torch.Generator,
) -> None:
    import torch

    labels = torch.from_numpy(calls.model)
    for _ in range(num_train_epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(_BATCH):  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss(rows.numpy(), labels[rows]).backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
