"""Statistics of a data set: what every filter would score, kept as a table on disk.

Owns the folder `artifacts/statistics` (called `root` here):
`samples/<data key>.parquet` lists the samples of one data set in their order, and
`columns/<column key>/` holds the scores of one filter under one set of parameters and models, keyed
by the digest of a sample's text and pictures. A changed data set reuses the scores of every sample
that it shares. Scores are written by the analysis stage through `ColumnWriter`, and read through
`StatisticsTable`.
"""

from __future__ import annotations

from synth_agent.statistics.columns import (
    OWN_SOURCES,
    PICTURE_HASHES,
    SOURCES,
    ColumnSpec,
    column_spec,
)
from synth_agent.statistics.files import ColumnWriter, SampleRow, write_samples
from synth_agent.statistics.table import StatisticsTable
from synth_agent.statistics.values import Floats, Integers, Mask, Values

__all__ = [
    "OWN_SOURCES",
    "PICTURE_HASHES",
    "SOURCES",
    "ColumnSpec",
    "ColumnWriter",
    "Floats",
    "Integers",
    "Mask",
    "SampleRow",
    "StatisticsTable",
    "Values",
    "column_spec",
    "write_samples",
]
