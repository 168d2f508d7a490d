"""Structure in, structure out, and messages that name the tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor

import bilevel
from problems_variables import scalar, vector


class Layer(NamedTuple):
    """A structure with names."""

    weight: Tensor
    bias: Tensor


STRUCTURES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: vector(1.0, 2.0, 3.0),
    "0-d": lambda: scalar(2.0),
    "matrix": lambda: torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "dict": lambda: {"a": vector(1.0, 2.0), "b": scalar(3.0)},
    "list": lambda: [vector(1.0), vector(2.0, 3.0)],
    "tuple": lambda: (vector(1.0), scalar(3.0)),
    "namedtuple": lambda: Layer(vector(1.0, 2.0), scalar(0.5)),
    "nested": lambda: {
        "layers": [Layer(vector(1.0), scalar(2.0)), (vector(3.0), {"x": scalar(4.0)})],
        "end": vector(5.0),
    },
    "unsorted keys": lambda: {"b": vector(1.0, 2.0), "a": vector(3.0)},
    "keys of numbers": lambda: {1: vector(1.0), 0: scalar(2.0)},
    "an empty part": lambda: {"a": vector(1.0), "b": []},
    "one tensor of no entries": lambda: [vector(1.0), vector()],
}


def same_structure(found: Any, expected: Any) -> None:
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for x, y in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        assert isinstance(x, Tensor)
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def sum_over(f: Callable[[Tensor], Tensor], tree: Any) -> Tensor:
    return sum((f(t).sum() for t in optree.tree_leaves(tree)), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("side", ["params", "hparams"])
def test_structures_go_in_and_come_out(kind: str, side: str) -> None:
    structure, other = STRUCTURES[kind](), scalar(1.5)
    untouched = copy.deepcopy(structure)
    params: Any = structure if side == "params" else other
    hparams: Any = structure if side == "hparams" else other
    seen: list[Any] = []

    def inner_loss(w: Any, h: Any) -> Tensor:
        # w* = (sum of all h) for every entry
        seen.append(w if side == "params" else h)
        return sum_over(lambda t: (t - sum_over(torch.Tensor.clone, h)) ** 2, w)

    problem = bilevel.BilevelProblem(
        inner_loss, lambda w, h: sum_over(lambda t: (t - 1.0) ** 2, w) + sum_over(torch.square, h), params, hparams
    )
    found = bilevel.hypergradient(problem)
    same_structure(found.params, params)
    same_structure(found.gradient, hparams)
    for given in seen:
        same_structure(given, structure)
    sums, entries = float(sum_over(torch.Tensor.clone, hparams)), sum(t.numel() for t in optree.tree_leaves(params))
    for t, h in zip(optree.tree_leaves(found.gradient), optree.tree_leaves(hparams), strict=True):
        torch.testing.assert_close(t, 2.0 * entries * (sums - 1.0) + 2.0 * h, rtol=1e-8, atol=1e-8)

    solution = bilevel.solve(problem, progress=False, steps=20)
    same_structure(solution.params, params)
    same_structure(solution.hparams, hparams)
    for t, before in zip(optree.tree_leaves(structure), optree.tree_leaves(untouched), strict=True):
        assert torch.equal(t, before)
    solution.apply_()
    results: Any = [solution.params, solution.hparams]
    originals: Any = [params, hparams]
    ours, theirs = (optree.tree_leaves(tree) for tree in (results, originals))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"layers": [vector(1.0), 2.0]},
            r"`params` at 'layers.1' is a float, expected a Tensor; write torch.tensor\(2.0\)",
        ),
        ({"a": vector(1.0), "b": None}, r"`params` at 'b' is a NoneType"),
        ({"a": vector(1.0), "b": vector(1.0).float()}, r"params\['b'\] is torch.float32"),
        ({"a.b": vector(1.0), "a": {"b": vector(1.0)}}, r"names \['a.b'\] twice"),
        ({"a": vector(1.0, float("nan"))}, r"params\['a'\] holds NaN"),
    ],
)
def test_messages_name_the_tensor(params: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        bilevel.BilevelProblem(lambda w, h: h, lambda w, h: h, params, scalar(1.0))


def test_the_same_tensor_twice_is_two_variables() -> None:
    # A structure has no notion of tied tensors; each place is a variable of its own.
    w = vector(1.0)
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w[0] - h) ** 2 + (w[1] + h) ** 2).sum(), lambda w, h: (w[0] * w[1]).sum(), [w, w], scalar(2.0)
    )
    found = bilevel.hypergradient(problem)
    assert found.params[0].item() == pytest.approx(2.0)
    assert found.gradient.item() == pytest.approx(-4.0, abs=1e-8)
