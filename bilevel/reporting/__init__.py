"""A run as one page of HTML that needs no network: what happened, how far it can be trusted, how it was made."""

from bilevel.reporting.page import report

__all__ = ["report"]
