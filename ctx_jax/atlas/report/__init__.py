"""The report: an atlas as one page for people, its plots as files, and its gist in a few lines."""

from ctx_jax.atlas.report.drawing import require_matplotlib
from ctx_jax.atlas.report.summary import summary
from ctx_jax.atlas.report.write import write_report

__all__ = ["require_matplotlib", "summary", "write_report"]
