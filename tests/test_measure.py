"""The peak of memory, against sums by hand, and what memory is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bilevel import measure
from bilevel.measure import peak_memory

CPU = torch.device("cpu")
MATRIX = 8 * 100 * 100


def test_what_lives_at_once_is_counted_and_views_are_not() -> None:
    x = torch.ones(100, 100, dtype=torch.float64)
    with peak_memory(CPU) as peak:
        y = x * 2.0
        z = y.T + x.T  # two matrices live; the views hold nothing
        del y
        z = z + 1.0  # the third takes the place of y
        assert z.shape == x.shape
    assert peak.bytes == 2 * MATRIX


def test_the_graph_of_a_derivative_is_counted() -> None:
    x = torch.ones(100, 100, dtype=torch.float64)
    w = torch.ones(100, 100, dtype=torch.float64, requires_grad=True)
    steps = 5
    with peak_memory(CPU) as peak:
        y = x
        for _ in range(steps):
            y = y * w  # saves its input
        total = y.sum()
    # Five products; the sum is one number.
    assert peak.bytes == steps * MATRIX + 8
    assert total.requires_grad


def test_what_was_there_before_is_not_counted() -> None:
    x = torch.ones(100, 100, dtype=torch.float64)
    with peak_memory(CPU) as peak:
        x.add_(1.0)
        assert x.view(-1).shape == (10_000,)
    assert peak.bytes == 0


NEW = ("memory.max", "memory.current", "inactive_file")
OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/user/job", "user", NEW),
        ("0::/", "", NEW),
        ("4:cpu,memory:/user/job", "memory/user/job", OLD),
        ("4:memory:/elsewhere", "memory", OLD),
    ],
)
def test_a_containers_limit_is_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, folder: str, names: tuple[str, str, str]
) -> None:
    """Of both versions of control groups, of this group and of those around it."""
    own, group = tmp_path / "own", tmp_path / "groups" / folder
    group.mkdir(parents=True)
    own.write_text(f"1:name=systemd:/\n{line}\n")
    monkeypatch.setattr(measure, "OWN_GROUPS", own)
    monkeypatch.setattr(measure, "GROUPS", tmp_path / "groups")
    without = measure.free_memory(CPU)
    assert without is not None and without > 2000
    for name, value in zip(names, ("2000", "700", "cache 5\n{} 200\nactive_file 3"), strict=True):
        (group / (name if name in names[:2] else "memory.stat")).write_text(value.format(name))
    assert measure.free_memory(CPU) == 2000 - 700 + 200
    (group / names[0]).write_text("max")
    assert measure.free_memory(CPU) not in (None, 1500)
