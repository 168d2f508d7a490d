"""Models of other libraries as they are: transformers from a config, timm where it can be installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import penalties

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("seeded")


def bert() -> Any:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **small)
    return transformers.BertForSequenceClassification(config).double()


def gpt2() -> Any:
    size = {"vocab_size": 11, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)).double()


def batch(kind: str) -> dict[str, Tensor]:
    tokens, mask = torch.randint(11, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    mask[:3, 3:] = 0
    labels = tokens if kind == "gpt2" else torch.randint(3, (6,))
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


MODELS = {"bert": bert, "gpt2": gpt2}


def fit(model: Any, data: dict[str, Tensor]) -> Tensor:
    """Return the cross entropy in float64; the model's own `.loss` is float32 for language models."""
    logits: Tensor = model(data["input_ids"], attention_mask=data["attention_mask"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, -2), data["labels"].flatten())


@pytest.mark.parametrize("kind", MODELS)
def test_layer_wise_decay_of_a_transformer(kind: str) -> None:
    """Attention, dropout, tied weights: unrolled, against central differences of the loop (1e-4: truncation 1e-9)."""
    net, data = MODELS[kind](), batch(kind)
    per = {"head": "classifier.*" if kind == "bert" else "lm_head.*", "rest": "*"}

    def inner(m: Any, h: Any, data: Any) -> Tensor:
        return fit(m, data) + penalties.l2(m, h, per=per)

    def outer(m: Any, h: Any, data: Any) -> Tensor:
        return fit(m.eval(), data)

    def problem(values: Any) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(inner, outer, net, values, bilevel.inner.SGD(lr=0.1, steps=3), data, data)

    values = penalties.strengths(net, 0.1, per)
    found = bilevel.hypergradient(problem(values), "unroll")
    assert found.certificate.verdict == "exact"
    if kind == "gpt2":
        assert found.params.lm_head.weight is found.params.transformer.wte.weight
    ends = []
    for step in (1e-4, -1e-4):
        moved = {key: bilevel.positive(0.1 + step * (key == "head")) for key in per}
        ends.append(bilevel.hypergradient(problem(moved), "unroll").outer_loss)
    assert found.gradient["head"].item() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5, abs=1e-9)


def test_the_head_of_a_transformer_is_trained_alone() -> None:
    net, data = bert().eval(), batch("bert")
    problem = bilevel.BilevelProblem(
        lambda m, h: m(**data).loss + penalties.l2(m, h),
        lambda m, h: m(**data).loss,
        bilevel.parameters(net, "classifier.*"),
        bilevel.positive(0.1),
    )
    found = bilevel.hypergradient(problem)
    assert found.certificate.verdict == "exact"
    pooler = found.params.bert.pooler.dense.weight
    assert torch.equal(pooler, net.bert.pooler.dense.weight) and not pooler.requires_grad
    # Softmax regression on the pooled output has the same solution.
    with torch.no_grad():
        features = net.bert(data["input_ids"], data["attention_mask"]).pooler_output
    head = nn.Linear(16, 3).double()
    plain = bilevel.BilevelProblem(
        lambda m, h: nn.functional.cross_entropy(m(features), data["labels"]) + penalties.l2(m, h),
        lambda m, h: nn.functional.cross_entropy(m(features), data["labels"]),
        head,
        bilevel.positive(0.1),
    )
    assert found.gradient.item() == pytest.approx(bilevel.hypergradient(plain).gradient.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"`inner_loss` returned a SequenceClassifierOutput, expected a scalar Tensor; return its .loss"),
        ({"labels": None}, r"give the model labels=..., and return its .loss"),
        ({"return_dict": False}, r"returned a tuple, .*return the one part of it that is the loss"),
    ],
)
def test_an_output_that_is_no_loss(given: Any, message: str) -> None:
    net, data = bert(), batch("bert") | given
    problem = bilevel.BilevelProblem(lambda m, h: m(**data), lambda m, h: m(**data).loss, net, bilevel.positive(0.1))
    with pytest.raises(bilevel.InvalidTypeError, match=message):
        bilevel.hypergradient(problem)


def test_a_vision_model_of_timm() -> None:
    try:
        import timm  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        pytest.skip(f"timm cannot be imported: {error} (torchvision has no build for every torch)")
    net: Any = timm.create_model("resnet10t", num_classes=3).double()
    x, y = torch.randn(4, 3, 32, 32).double(), torch.tensor([0, 1, 2, 0])

    def outer(m: Any, h: Any) -> Tensor:
        return nn.functional.cross_entropy(m(x), y)

    values, solver = penalties.strengths(net, 1e-3, "layer", on="matrices"), bilevel.inner.SGD(lr=1e-3, steps=2)
    problem = bilevel.BilevelProblem(
        lambda m, h: outer(m, h) + penalties.l2(m, h, on="matrices"), outer, net, values, solver
    )
    assert bilevel.hypergradient(problem, "unroll").certificate.verdict == "exact"
