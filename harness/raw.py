"""The public import path of what another project's checks read; see ``records/raw_run.py``."""

from q4kd.harness.records.raw_run import RawRun

__all__ = ["RawRun"]
