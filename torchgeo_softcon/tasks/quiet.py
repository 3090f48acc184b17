# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Lines of Lightning that are not for users of our tasks."""

import logging
import re
import warnings

#: Lines of Lightning that tell users of our tasks nothing: advertisements, and the callback
#: that the plugin adds to every trainer.
_ADVERTS = re.compile(
    r"Tip: For seamless|TPU available: False|entry point 'torchgeo_sof"
)

#: Warnings about what is as it should be: our tasks have validation data for probes only,
#: and the rest is between Lightning and its own dependencies.
_WARNINGS = (
    '.*You passed in a `val_dataloader` but have no `validation_step`',
    '.*`isinstance\\(treespec, LeafSpec\\)` is deprecated',
)

#: Loggers of Lightning that print advertisements, under both names of its package.
_LOGGERS = (
    'lightning.fabric.utilities.registry',
    'lightning.pytorch.utilities.rank_zero',
    'lightning_fabric.utilities.registry',
    'pytorch_lightning.utilities.rank_zero',
)


def _is_for_users(record: logging.LogRecord) -> bool:
    return _ADVERTS.search(record.getMessage()) is None


def silence_adverts() -> None:
    """Keep Lightning from printing what is not for users of our tasks."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_for_users)
    for message in _WARNINGS:
        warnings.filterwarnings('ignore', message)
