"""An operator for Data-Juicer that makes it measure samples anew after a mapper changed them.

Data-Juicer skips a measurement whose name a sample carries already, so that a second filter of one
kind compares the score of the text before the mapper. This file stands alone, so that plain
`dj-process` can use it:

    custom_operator_paths: [.../synth_agent/stages/forget_measurements.py]
    process:
    - image_captioning_mapper: {...}
    - forget_measurements_mapper: {num_proc: 0}
    - image_text_similarity_filter: {...}
"""
# Annotations stay objects, not strings: Data-Juicer checks a recipe's values against them.

from typing import Any

from data_juicer.ops.base_op import OPERATORS, Mapper
from data_juicer.utils.constant import Fields, HashKeys

FORGOTTEN = (
    Fields.stats,
    HashKeys.hash,
    HashKeys.minhash,
    HashKeys.simhash,
    HashKeys.imagehash,
    HashKeys.line_hashes,
)


@OPERATORS.register_module("forget_measurements_mapper")
class ForgetMeasurementsMapper(Mapper):  # type: ignore[misc]
    """Drops the statistics and hashes that samples carry; texts and pictures stay."""

    def process_single(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return the sample as it is: measurements are dropped for the whole data set."""
        return sample

    def run(self, dataset: Any, **_: Any) -> Any:
        """Return the data set without the columns that hold measurements."""
        return dataset.remove_columns([f for f in FORGOTTEN if f in dataset.column_names])
