"""The report: an atlas as one page for people, its plots as files, and its gist in a few lines."""

from ctx_jax.atlas.report.summary import summary
from ctx_jax.atlas.report.write import write_report

__all__ = ["summary", "write_report"]
