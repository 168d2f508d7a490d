"""Fine-tune a transformer
=======================

With one weight decay for each of its layers.

A BERT of two layers from Hugging Face has learned to read the digits 0 to 4, and shall learn 5 to 9 from sixty
examples. How much should its embeddings, each of its layers and its head be held back? The model is built from a config
(nothing is downloaded) and used as it is; so is the optimizer that trains it in the end, with the settings that were
found.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

import bilevel
from bilevel import penalties

Batch = tuple[Tensor, Tensor]
STEPS, LR = 40, 4e-3  # of fine-tuning

# --- Data: an image becomes a sentence of 16 words, the mean grey values (0 to 16) of its 2 x 2 blocks.
pixels, digits = (torch.tensor(part) for part in load_digits(return_X_y=True))
words = pixels.reshape(-1, 4, 2, 4, 2).mean((2, 4)).round().long().flatten(1)
known, new = digits < 5, digits >= 5
torch.manual_seed(0)
order = torch.randperm(int(new.sum()))
fine, choose, judge = order[:60], order[60:360], order[360:]
# Sixty digits to fine-tune on, 300 to choose the decays by, the other 536 to see whether we fooled ourselves.
train, valid, test = ((words[new][rows], digits[new][rows] - 5) for rows in (fine, choose, judge))

# --- The model: a config that you know, only smaller.
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label={label: str(5 + label) for label in range(5)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
)

# What each decay is for, by patterns of parameter names; the first that fits counts. `groups` could also come from an
# optimizer that you have: penalties.groups(model, optimizer).
groups = {
    "embeddings": "bert.embeddings.*",
    "layer 0": "bert.encoder.layer.0.*",
    "layer 1": "bert.encoder.layer.1.*",
    "head": ["bert.pooler.*", "classifier.*"],
}
# "matrices": neither biases nor the gains of LayerNorm decay, as usual for transformers.
decay = penalties.strengths(model, 1e-2, per=groups, on="matrices")


def loss(net: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy; the model returns a ModelOutput, whose logits these are."""
    return cross_entropy(net(batch[0]).logits, batch[1])


def inner_loss(net: nn.Module, h: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return what fine-tuning minimizes."""
    return loss(net, batch) + penalties.l2(net, h, per=groups, on="matrices")


def outer_loss(net: nn.Module, h: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return what we care about."""
    return loss(net, batch)


def pretrain() -> None:
    """Learn the digits 0 to 4, by a loop like any other, and begin with a new classifier."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(600):
        rows = torch.randint(int(known.sum()), (64,))
        optimizer.zero_grad()
        loss(model, (words[known][rows], digits[known][rows])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    nn.init.normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)


def figures(net: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return cross entropy and accuracy."""
    with torch.no_grad():
        return loss(net, batch).item(), (net(batch[0]).logits.argmax(1) == batch[1]).double().mean().item()


def main() -> None:
    torch.set_num_threads(1)
    pretrain()
    # Forty steps of Adam do not get to a minimum, so it is these steps that are differentiated: method="unroll".
    solver = bilevel.inner.Adam(lr=LR, steps=STEPS)
    problem = bilevel.BilevelProblem(inner_loss, outer_loss, model, decay, solver, train, valid)
    before = bilevel.hypergradient(problem, method="unroll")
    # Nobody knows the decays to a factor of ten, so the outer optimizer takes long steps (in the logarithm of a decay).
    solution = bilevel.solve(
        problem, method="unroll", steps=9, outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.5)
    )

    print(solution.summary(), "\n")
    print(f"{'weight decay of':<22}{'before':>10}{'after':>10}")
    for name, start in decay.items():
        print(f"{name:<22}{start.value.item():>10.2e}{solution.hparams[name].item():>10.2e}")
    for kind, batch in (("validation", valid), ("test", test)):
        old, new = figures(before.params, batch), figures(solution.params, batch)
        print(f"{f'{kind} loss':<22}{old[0]:>10.4f}{new[0]:>10.4f}")
        print(f"{f'{kind} accuracy':<22}{old[1]:>10.1%}{new[1]:>10.1%}")

    # --- Your own loop again, with the decays in the param groups of its optimizer: it ends at the same weights.
    optimizer = torch.optim.Adam(penalties.param_groups(model, solution.hparams, per=groups, on="matrices"), lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, train).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    print(f"{'by torch.optim.Adam':<22}{'':>10}{figures(model, test)[0]:>10.4f}")

    assert figures(solution.params, valid)[0] < 0.97 * figures(before.params, valid)[0]
    assert figures(solution.params, test)[0] < figures(before.params, test)[0]
    assert abs(figures(model, test)[0] - figures(solution.params, test)[0]) < 0.01


if __name__ == "__main__":
    main()
