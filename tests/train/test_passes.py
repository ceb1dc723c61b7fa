"""The packed pass against one padded row a candidate, for several architectures."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from trl import DPOConfig, DPOTrainer

from diffagent.agent.lm.format import IGNORED, Example
from diffagent.train import losses
from diffagent.train.collate import RankedPrompt, RRHFCollator, block_mask
from diffagent.train.fit import enable_checkpointing
from diffagent.train.losses import INVALID_REWARD, token_logps
from diffagent.train.passes import packs, response_logps
from diffagent.train.rrhf import batch_loss, with_reference
from diffagent.train.rrhf_config import RRHFConfig
from diffagent.train.tiny_llama import build_tokenizer

torch.set_num_threads(1)
VOCABULARY = 50


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes)))


def gpt2(**changes: Any) -> Any:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, **changes)
    return seeded(lambda: GPT2LMHeadModel(config))


def seeded(build: Callable[[], Any]) -> Any:
    """Weights large enough that a wrong position or mask shows."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def ranked_prompts(count: int = 3) -> list[RankedPrompt]:
    """Candidates of unequal number and length, ties, an invalid one; prompts that were cut."""
    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(n)]

    prompts = []
    for number in range(count):
        prompt, start = tokens(4 + 3 * number), tokens(2)
        answers = [start + tokens(rng.randrange(1, 9)) for _ in range(2 + number)]
        rewards = [float(rng.randrange(3)) for _ in answers[1:]] + [INVALID_REWARD]
        examples = [Example(prompt + a, [IGNORED] * len(prompt) + a) for a in answers]
        short, answer = prompt[:-2], answers[0] + tokens(2)  # a long answer cuts its prompt
        examples.append(Example(short + answer, [IGNORED] * len(short) + answer))
        prompts.append(RankedPrompt(tuple(examples), (*rewards, 1.0)))
    return prompts


def loss_and_gradients(
    model: Any, prompts: list[RankedPrompt], packed: bool, config: RRHFConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = RRHFCollator(0, packed)(prompts)
    model.zero_grad()
    loss = batch_loss(*response_logps(model, batch), batch, config).total
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize(
    "model",
    [
        llama(),
        llama(attention_bias=True, tie_word_embeddings=True),
        llama(attn_implementation="eager"),
        gpt2(),
        gpt2(attn_implementation="eager"),
    ],
    ids=["llama", "llama-tied", "llama-eager", "gpt2", "gpt2-eager"],
)
def test_packed_and_padded_have_the_same_loss_and_gradients(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * VOCABULARY)  # several chunks
    prompts = ranked_prompts()
    assert packs(model, prompts, 0)
    for config in (RRHFConfig(), RRHFConfig(margin=0.3, pairs="mean", length_normalization=False)):
        ours, our_gradients = loss_and_gradients(model, prompts, True, config)
        theirs, their_gradients = loss_and_gradients(model, prompts, False, config)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert our_gradients.keys() == their_gradients.keys()
        for name, gradient in their_gradients.items():
            scale = gradient.abs().max().item()
            assert torch.allclose(our_gradients[name], gradient, rtol=0, atol=1e-5 * (1 + scale))


def naive_loss(model: Any, prompts: list[RankedPrompt]) -> torch.Tensor:
    """Equations (1) to (4), one candidate, one token and one pair at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt in prompts:
        sums, means = [], []
        for candidate in prompt.candidates:
            logps = model(torch.tensor([candidate.input_ids])).logits[0].log_softmax(-1)
            steps = [logps[t - 1, y] for t, y in enumerate(candidate.labels) if y != IGNORED]
            sums.append(torch.stack(steps).sum())
            means.append(sums[-1] / len(steps))
        for p_i, r_i in zip(means, prompt.rewards, strict=True):
            for p_j, r_j in zip(means, prompt.rewards, strict=True):
                if r_i < r_j and p_i > p_j:
                    total = total + p_i - p_j
        total = total - sums[prompt.rewards.index(max(prompt.rewards))]
    return total / len(prompts)


def test_the_gradient_in_float64_is_that_of_the_naive_loop() -> None:
    model, prompts = gpt2().double(), ranked_prompts()  # Llama's norms are in float32 always
    loss, gradients = loss_and_gradients(model, prompts, True, RRHFConfig())
    model.zero_grad()
    expected = naive_loss(model, prompts)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-7, atol=1e-12), name


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_adapters_and_checkpointed_layers_change_no_gradient(
    share: float,
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = ranked_prompts()
    _, padded = loss_and_gradients(model, prompts, False, RRHFConfig())
    model.train()
    enable_checkpointing(model, share)
    again = [m.gradient_checkpointing for m in model.modules() if hasattr(m, "mlp")]
    assert again == [True, True, share == 1]
    _, packed = loss_and_gradients(model, prompts, True, RRHFConfig())
    assert packed.keys() == padded.keys()
    assert all("lora" in name for name in packed)
    for name, gradient in padded.items():
        assert torch.allclose(packed[name], gradient, atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kept", [0, 7 * 11])
def test_the_gradient_of_chunked_log_probabilities(
    with_bias: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "PROBABILITIES_KEPT", kept)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2 * 11)
    generator = torch.Generator().manual_seed(0)
    kind: Any = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    hidden, weight = torch.randn(7, 5, **kind), torch.randn(11, 5, **kind)
    bias = torch.randn(11, **kind) if with_bias else None
    targets = torch.randint(11, (7,), generator=generator)
    expected = torch.nn.functional.linear(hidden, weight, bias).log_softmax(1)
    assert torch.allclose(
        token_logps(hidden, weight, bias, targets), expected.gather(1, targets[:, None])[:, 0]
    )
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    assert torch.autograd.gradcheck(
        lambda h, w, b=None: token_logps(h, w, b, targets), inputs, raise_exception=True
    )


def test_under_autocast_sums_are_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator, requires_grad=True)
    targets = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(hidden, weight, None, targets)
    assert logps.dtype == torch.float32
    exact = token_logps(hidden, weight, None, targets)
    assert torch.allclose(logps, exact, atol=0.1)
    (ours,) = torch.autograd.grad(logps.sum(), weight)
    (theirs,) = torch.autograd.grad(exact.sum(), weight)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=0.1)


def test_no_token_sees_another_candidate() -> None:
    mask = block_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_the_packed_batch() -> None:
    def example(*answer: int) -> Example:
        return Example([1, 2, *answer], [IGNORED, IGNORED, *answer])

    prompts = [
        RankedPrompt((example(5, 6, 7), example(5, 8)), (0.5, 1.0)),
        RankedPrompt((example(9),), (2.0,)),
    ]
    batch = RRHFCollator(pad_token_id=0)(prompts)
    # The common prefix takes in 5; the last tokens 7, 8, 9 are predicted and not read.
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6], [1, 2, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1], [0, 0, -1, -1]]
    found = zip(*(batch[name].tolist() for name in ("rows", "targets", "owners")), strict=True)
    assert list(found) == [(1, 5, 0), (2, 6, 0), (3, 7, 0), (1, 5, 1), (2, 8, 1), (5, 9, 2)]
    assert batch["mask"].tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    "build",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2)),
        lambda: MambaForCausalLM(
            MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
        ),
        lambda: Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                final_logit_softcapping=1.0,
            )
        ),
    ],
    ids=["alibi", "recurrent", "soft-cap"],
)
def test_models_that_cannot_be_packed_are_found_out(
    build: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(build)
    assert not packs(model, ranked_prompts(), 0)
    assert "packed" in caplog.text
    assert not model.training
    loss, gradients = loss_and_gradients(model, ranked_prompts(), False, RRHFConfig())
    assert loss.isfinite()
    assert gradients


def test_dpo_is_that_of_trl(tmp_path: Path) -> None:
    """The same pairs, tokens and reference model in TRL's DPOTrainer and in ours."""
    tokenizer = build_tokenizer(["a b c d e f"], 300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, **sizes)
    model = seeded(lambda: LlamaForCausalLM(config))
    reference = LlamaForCausalLM(config).eval()
    texts = [
        {"prompt": "a b", "chosen": " c d", "rejected": " e f f"},
        {"prompt": "b", "chosen": " a", "rejected": " c d e"},
    ]
    args = DPOConfig(
        output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False, seed=0
    )
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    expected = trainer.compute_loss(model.eval(), batch).item()

    rows = []
    for ids, mask, answer in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        labels = ids.masked_fill(answer == 0, IGNORED)[mask == 1]
        rows.append(Example(ids[mask == 1].tolist(), labels.tolist()))
    pairs = zip(rows[:2], rows[2:], strict=True)  # TRL: the chosen ones first
    prompts = [RankedPrompt((chosen, rejected), (1.0, 0.0)) for chosen, rejected in pairs]
    collator = RRHFCollator(0)
    ours = collator(with_reference(reference, prompts, collator))
    options = RRHFConfig(loss="dpo", beta=0.3, sft_weight=0)
    found = batch_loss(*response_logps(model, ours), ours, options).total.item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - 0.6931) > 0.01  # not the loss of equal models
