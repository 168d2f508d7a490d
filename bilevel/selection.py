"""`bilevel.parameters`: which parameters of a module are tuned."""

from __future__ import annotations

from torch import nn

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.patterns import Selection, all_names, fits, near, shown

__all__ = ["Selection", "parameters"]


def parameters(module: nn.Module, *patterns: str) -> Selection:
    """Choose which parameters of a module are the inner variables; the others are constants.

    Losses get the whole module, buffers move in training as they do without, and tied parameters stay tied: a pattern
    that fits any of a tensor's names chooses the tensor.

    Args:
        module: any `nn.Module`.
        patterns: of names as in `module.named_parameters()`, with the wildcards of `fnmatch`: `"head.*"`,
            `"*.bias"`. Of what they fit the parameters that require a gradient are taken. None: all of those.

    Raises:
        BilevelError: a pattern that fits nothing, or frozen parameters only.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> parameters(network, "2.*")
    parameters(Sequential, '2.weight', '2.bias')
    """
    if not isinstance(module, nn.Module):
        raise InvalidTypeError(
            f"parameters(): `module` is a {type(module).__name__}, expected an nn.Module; of tensors give those that "
            "are to be tuned, and let the losses close over the others"
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InvalidTypeError(
                f"parameters(): a pattern is a {type(pattern).__name__}, expected the name of a parameter or a pattern "
                'of names, such as "head.*"'
            )
    trainable = {id(p): p.requires_grad for p in module.parameters()}
    names = all_names(module)
    if not names:
        raise InvalidValueError(f"parameters(): the {type(module).__name__} has no parameters")
    chosen: set[str] = set()
    for pattern in patterns or ("*",):
        fitting = {key: own for key, own in names.items() if any(fits(name, pattern) for name in own)}
        if not fitting:
            raise InvalidValueError(
                f"parameters(): no parameter of the {type(module).__name__} is called {pattern!r}"
                f"{near(pattern, [name for own in names.values() for name in own])}"
            )
        free = [own[0] for key, own in fitting.items() if trainable[key]]
        if not free:
            frozen = shown([own[0] for own in fitting.values()])
            raise InvalidValueError(
                f"parameters(): all parameters that {pattern!r} fits are frozen ({frozen}); unfreeze them with "
                f".requires_grad_(){near(pattern, [own[0] for key, own in names.items() if trainable[key]])}"
            )
        chosen.update(free)
    return Selection(module, [own[0] for own in names.values() if own[0] in chosen])
