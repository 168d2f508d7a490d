"""A dry run before a long one: `check` and its report."""

from bilevel.preflight.report import Costs, Finding, Report
from bilevel.preflight.run import check

__all__ = ["Costs", "Finding", "Report", "check"]
