"""Learn a learning-rate schedule
==============================

One number per step, by differentiating through the training loop.

A network gets 30 steps of SGD with momentum, no more. Which learning rate should each step use? No implicit method can
say: the minimum that training heads for does not depend on the path. `unroll` differentiates the path itself.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel

Batch = tuple[Tensor, Tensor]

STEPS = 30
GRID = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)  # the constants that a careful person would try

# --- Data: the schedule is learned on validation images, and judged on test images.
pixels, digits = load_digits(return_X_y=True)
train_x, rest_x, train_y, rest_y = train_test_split(pixels / 16, digits, train_size=800, random_state=0)
valid_x, test_x, valid_y, test_y = train_test_split(rest_x, rest_y, train_size=600, random_state=0)
train = torch.tensor(train_x), torch.tensor(train_y)
valid = torch.tensor(valid_x), torch.tensor(valid_y)
test = torch.tensor(test_x), torch.tensor(test_y)

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def loss(model: nn.Module, h: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return cross entropy, for both levels. The learning rate is in neither loss: only the inner solver knows it."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def training(lr: float) -> bilevel.BilevelProblem:
    """Return the problem whose inner loop is SGD; the schedule starts as the constant `lr`."""
    return bilevel.BilevelProblem(
        inner_loss=loss,
        outer_loss=loss,
        params=net,
        # Learning rates live on a log scale. `high` keeps the outer line search from rates that blow training up.
        hparams={"lr": bilevel.positive(lr, shape=(STEPS,), low=1e-3, high=2.0)},
        # A setting may be a function of the hyperparameters and the step. Full batches make the loop deterministic, so
        # that the outer loop can be L-BFGS; with a DataLoader it would be Adam.
        inner_solver=bilevel.inner.SGD(lr=lambda h, step: h["lr"][step], momentum=0.9, steps=STEPS),
        inner_data=train,
        outer_data=valid,
    )


problem = training(0.5)


def curves(schedule: list[float]) -> list[tuple[float, float]]:
    """Train as you would without this library; return validation and test loss after each step."""
    model, losses = copy.deepcopy(net), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for lr in schedule:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss(model, {}, train).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            losses.append((loss(model, {}, valid).item(), loss(model, {}, test).item()))
    return losses


def draw(runs: dict[str, tuple[list[float], list[tuple[float, float]]]]) -> None:
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    steps = range(1, STEPS + 1)
    for name, (schedule, losses) in runs.items():
        above.step(steps, schedule, where="mid", label=name)
        below.plot(steps, [valid_loss for valid_loss, _ in losses], label=name)
    above.set(ylabel="learning rate", ylim=(0, None), title="The schedule ...")
    below.set(ylabel="validation loss", yscale="log", xlabel="inner step", title="... and what it does")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3, which="both")
    figure.savefig("learn_learning_rate.png", dpi=150)


def main() -> None:
    torch.set_num_threads(1)  # tensors this small are faster without threads that wait for each other
    tried = {lr: curves([lr] * STEPS) for lr in GRID}
    best = min(tried, key=lambda lr: tried[lr][-1][0])

    # Start from the best constant, and stop after 20 outer steps: 30 numbers can overfit 600 validation images.
    solution = bilevel.solve(training(best), method="unroll", steps=20)
    schedule = solution.hparams["lr"].tolist()
    learned = curves(schedule)

    print(solution.summary(), "\n")
    print(f"{STEPS} inner steps each{'validation loss':>25}{'test loss':>12}")
    for lr, losses in tried.items():
        mark = "  <- best constant" if lr == best else ""
        print(f"{f'constant {lr:g}':<27}{losses[-1][0]:>15.4f}{losses[-1][1]:>12.4f}{mark}")
    print(f"{'learned schedule':<27}{learned[-1][0]:>15.4f}{learned[-1][1]:>12.4f}")
    draw({f"constant {best:g}": ([best] * STEPS, tried[best]), "learned": (schedule, learned)})

    # torch.optim.SGD with the learned schedule ends where the inner loop of the problem ended.
    assert abs(learned[-1][0] - solution.outer_loss) < 1e-8
    assert learned[-1][0] < 0.8 * tried[best][-1][0]
    assert learned[-1][1] < tried[best][-1][1]


if __name__ == "__main__":
    main()
