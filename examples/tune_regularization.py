"""Tune one weight decay per layer
===============================

Of a network that you already have.

A small MLP on scikit-learn's digits. With 300 training images weight decay matters, and how much each layer wants is
anybody's guess. The gradient finds out in about ten trainings; it would need hardly more for a hundred layers, where a
grid is hopeless.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel

Batch = tuple[Tensor, Tensor]

# --- Data: 300 images to train, 500 to choose the strengths by, the other 997 to see whether we fooled ourselves.
pixels, digits = load_digits(return_X_y=True)
train_x, rest_x, train_y, rest_y = train_test_split(pixels / 16, digits, train_size=300, random_state=0)
valid_x, test_x, valid_y, test_y = train_test_split(rest_x, rest_y, train_size=500, random_state=0)


def batch(images: object, labels: object) -> Batch:
    # float64: the implicit function theorem wants the inner problem solved to many digits, and at this size they
    # cost nothing.
    return torch.tensor(images, dtype=torch.float64), torch.tensor(labels)


train, valid, test = batch(train_x, train_y), batch(valid_x, valid_y), batch(test_x, test_y)

# --- Your network, as you have it: nothing is subclassed, wrapped or patched. The activation is smooth: the
# hypergradient needs second derivatives, and those of ReLU are zero wherever they exist.
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()

# One strength per layer that has weights. `positive` is optimized on a log scale, where strengths live.
decay = {name: bilevel.positive(1e-2) for name, layer in net.named_children() if isinstance(layer, nn.Linear)}


def inner_loss(model: nn.Module, h: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return what training minimizes: cross entropy plus weight decay.

    `model` is your network with the current weights in it. Biases are decayed too: without that, a shift of all output
    biases changes nothing, and the problem has a flat direction that it does not need.
    """
    images, labels = batch
    penalty = sum(h[name.split(".")[0]] * p.square().sum() for name, p in model.named_parameters())
    return cross_entropy(model(images), labels) + penalty / 2


def outer_loss(model: nn.Module, h: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return what we care about: cross entropy on images that training did not see."""
    images, labels = batch
    return cross_entropy(model(images), labels)


# No `inner_solver`: the default, L-BFGS, trains to a gradient 1e-9 times the first one. That is the point of it: the
# implicit method assumes a stationary point, and a thousand steps of SGD or Adam on a network do not get to one. (If
# your loop stops early on purpose, differentiate the loop instead: learn_learning_rate.py.)
problem = bilevel.BilevelProblem(inner_loss, outer_loss, net, decay, inner_data=train, outer_data=valid)


def figures(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return cross entropy and accuracy."""
    with torch.no_grad():
        scores = model(batch[0])
        return cross_entropy(scores, batch[1]).item(), (scores.argmax(1) == batch[1]).double().mean().item()


def main() -> None:
    torch.set_num_threads(1)  # tensors this small are faster without threads that wait for each other
    # Where we start: the network trained with the same strength everywhere.
    before = bilevel.hypergradient(problem)
    # 1% of the first gradient is plenty: validation data do not know the strengths to more digits.
    solution = bilevel.solve(problem, method="implicit", tol=1e-2)

    print(solution.summary(), "\n")
    print(f"{'':<22}{'before':>10}{'after':>10}")
    for name in decay:
        print(
            f"{f'strength of layer {name}':<22}{decay[name].value.item():>10.2e}{solution.hparams[name].item():>10.2e}"
        )
    for kind, data in (("validation", valid), ("test", test)):
        old, new = figures(before.params, data), figures(solution.params, data)
        print(f"{f'{kind} loss':<22}{old[0]:>10.4f}{new[0]:>10.4f}")
        print(f"{f'{kind} accuracy':<22}{old[1]:>10.1%}{new[1]:>10.1%}")

    # The network that we passed is as it was; `solution.apply_()` would write the trained weights into it.
    assert figures(solution.params, valid)[0] < 0.6 * figures(before.params, valid)[0]
    assert figures(solution.params, test)[0] < 0.75 * figures(before.params, test)[0]
    assert solution.converged


if __name__ == "__main__":
    main()
