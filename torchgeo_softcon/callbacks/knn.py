# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A k-NN and a linear probe of the frozen encoder, during training."""

import math
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset

from .._checks import check_counts, check_positive, check_types, require
from ..datamodules.normalization import use_unit_range
from ..datamodules.protocol import loader_batch_size, trainer_datamodule
from ..evaluation.loop import (
    FOLDS,
    LabelledFeatures,
    collect_labelled,
    encode_batches,
    score_probes,
)
from ..evaluation.probes import knn_scores
from ..evaluation.samples import LabelledSamples, find_places
from .watch import EncoderWatch, gather, log_now, quietly

__all__ = ('KNNProbe', 'knn_scores')

#: By default, a probe has one in so many of the images between two probes. Training
#: encodes an image four times or more (two views, forward and backward, and a teacher).
_SHARE = 30

#: But never fewer images: cross-validated scores of colour statistics on 5,508 patches of
#: Delhi then differ by less than 0.01 (standard deviation) between draws.
_MIN_SAMPLES = 2048


class KNNProbe(EncoderWatch):
    """Measure how well nearest neighbours, and a linear classifier, find labels.

    The loss of self-supervised learning may fall while the features are of no use. This
    encodes labelled images from time to time, and logs ``knn_accuracy`` for class indices
    or ``knn_map`` (mean average precision) for multi-labels, the same of a classifier that
    knows the frequencies of the classes only, as ``..._chance``, and the standard deviation
    over draws of places as ``knn_spread_...``, see :func:`.score_spread`. For Vision
    Transformers, the class token (``..._cls``) and the mean of the patch tokens
    (``..._mean``) are probed side by side. A warning is given once if a score is below that
    before the training by more than its spread.

    For the tasks of this package and TorchGeo's own. The training is the same to the
    bit with and without it. Over several devices, each encodes a part of the images. These
    come as for validation, and must be of the range that the encoder is trained with.

    Images of one place are never on both sides. Where training and validation are the
    same images, they are cross-validated in four parts, divided by place: the *places* of
    :class:`.ImageMaskFolder`, the locations of SSL4EO-S12, and squares of 0.1 degrees of
    data with georeference. Where places are on both sides, or not known, the log says so:
    patches that overlap find each other whatever an encoder has learnt.
    """

    def __init__(
        self,
        data: LightningDataModule | Dataset | None = None,  # type: ignore[type-arg]
        queries: Dataset | None = None,  # type: ignore[type-arg]
        k: int = 20,
        temperature: float = 0.07,
        linear: bool = False,
        every_n_epochs: int = 5,
        every_n_steps: int | None = None,
        max_bank: int | None = None,
        max_queries: int | None = None,
        size: int | None = None,
        unit_range: bool = False,
        encoder: str | None = None,
        prefix: str = '',
    ) -> None:
        """Initialize a new KNNProbe instance.

        Args:
            data: Labelled data: a datamodule, of which the training split becomes the
                bank of features and the validation split the queries, or a dataset for
                the bank. Defaults to the datamodule of the training.
            queries: Labelled dataset for the queries, if *data* is a dataset.
            k: Number of neighbours.
            temperature: Temperature of their votes (0.07 in DINO and DINO-MC).
            linear: Whether to also fit a linear classifier, see
                :func:`~torchgeo_softcon.evaluation.probes.linear_scores`.
            every_n_epochs: Epochs between two probes. There is always one before the
                training, as a reference, and one after the last epoch.
            every_n_steps: Optimizer steps between two probes, instead of epochs.
            max_bank: Largest number of images in the bank. By default, *max_bank* and
                *max_queries* together are a thirtieth of the images between two probes,
                less than 3 % of the cost of the training, but at least 2048: scores of
                fewer differ by more than 0.01 between draws.
            max_queries: Largest number of queries, by default a third of *max_bank*.
            size: Side in pixels to resize images to. Defaults to the *size* of the
                task, if it has one.
            unit_range: Whether to scale the images of *data*, a datamodule of TorchGeo, to
                [0, 1] as SoftCon's authors do, see :class:`.UnitRange`. For encoders that
                are trained on such images, as those of this package's datamodules.
            encoder: Name of the encoder in the task, such as ``backbone_momentum``, by
                default the exported one.
            prefix: What the names of the metrics start with, to tell several probes apart.

        Raises:
            ValueError: If an argument is out of range, or *queries* is missing.
        """
        check_types(KNNProbe.__init__, locals())
        check_counts(
            k=k,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            max_bank=max_bank,
            max_queries=max_queries,
            size=size,
        )
        check_positive(temperature=temperature)
        require(
            max_bank is None or k <= max_bank,
            f'k must be at most max_bank = {max_bank}, got {k}',
        )
        own, kind = isinstance(data, LightningDataModule), type(data).__name__
        require(
            (data is None or own) == (queries is None),
            'queries must be given if, and only if, data is a dataset, got data = '
            f'{kind} and queries = {type(queries).__name__}',
        )
        require(
            own or not unit_range,
            f'unit_range is for a datamodule in data, got data = {kind}. Scale a dataset '
            'by transforms, and the datamodule of the training by UnitRange',
        )

        super().__init__()
        self.data, self.queries = data, queries
        self.k, self.temperature, self.linear = k, temperature, linear
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.max_bank, self.max_queries = max_bank, max_queries
        self.size, self.unit_range = size, unit_range
        self.encoder, self.prefix = encoder, prefix
        self._start: dict[str, float] = {}
        self._warned = False

    @property
    def state_key(self) -> str:
        """Name of the state of this probe in checkpoints."""
        return self._generate_state_key(encoder=self.encoder, prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores before the training, and whether one fell below."""
        return {'start': dict(self._start), 'warned': self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._start, self._warned = state_dict['start'], state_dict['warned']

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the labelled datamodule, if it is one of its own."""
        if stage == 'fit' and isinstance(self.data, LightningDataModule):
            with isolate_rng():
                if trainer.local_rank == 0:
                    self.data.prepare_data()
                trainer.strategy.barrier('KNNProbe')
                self.data.setup('fit')
                if self.unit_range:
                    use_unit_range(self.data)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the data, and probe the encoder before it learns.

        Raises:
            ValueError: If data, task and options do not fit each other.
        """
        with isolate_rng():
            torch.manual_seed(0)  # for samplers that draw
            self._bank, self._queries = self._choose(trainer)
            self._bank.check()
            if self._queries is not None:
                self._queries.check()
        super().on_train_start(trainer, pl_module)
        self._probed_at = -1
        if trainer.global_step == 0:
            log_now(trainer, self.probe(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the encoder if it is time, counted in epochs."""
        done, step = trainer.current_epoch + 1, trainer.global_step
        last = done == trainer.max_epochs or step == trainer.max_steps
        due = self.every_n_steps is None and done % self.every_n_epochs == 0
        if (due or last or trainer.should_stop) and self._probed_at != step:
            values = self.probe(trainer, pl_module)
            log_now(trainer, values)
            pl_module.log_dict(values, logger=False, on_epoch=True, prog_bar=True)

    def look(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any
    ) -> dict[str, float]:
        """Probe the encoder."""
        return self.probe(trainer, pl_module)

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Encode the labelled images and return metrics by name, the same on all ranks."""
        self._probed_at = trainer.global_step
        queries = None
        with quietly(trainer, pl_module):
            bank = self._encode(trainer, pl_module, self._bank)
            if self._queries is not None:
                queries = self._encode(trainer, pl_module, self._queries)
        _check_classes(bank.labels, self._bank.name)
        if queries is not None and self._queries is not None:
            if bank.labels.shape[1:] != queries.labels.shape[1:]:
                raise ValueError(
                    'bank and queries must have labels of one kind, got the shapes '
                    f'{tuple(bank.labels.shape)} and {tuple(queries.labels.shape)}'
                )
            if bank.labels.ndim == 2:
                _check_classes(queries.labels, self._queries.name)

        values, spreads, own = {}, {}, {}
        with torch.autocast(bank.labels.device.type, enabled=False):
            options = (self.k,), self.temperature, self.linear, False
            for score in score_probes(bank, queries, *options):
                rest = f'_{score.feature}' if len(bank.features) > 1 else ''
                if score.method == 'chance':
                    values[f'{self.prefix}knn_{score.metric}_chance'] = score.value
                    continue
                name = f'{self.prefix}{score.method}_{score.metric}{rest}'
                values[name], own[name] = score.value, score.spread
                name = f'{self.prefix}{score.method}_spread_{score.metric}{rest}'
                spreads[name] = score.spread
        self._report(trainer.global_step, values, own)
        return values | spreads

    def _report(
        self, step: int, values: dict[str, float], spreads: dict[str, float]
    ) -> None:
        """Log a line with all scores, and warn once if one is below that of the start."""
        if step == 0:
            self._start = {name: values[name] for name in spreads}
        lines, below = [], []
        for name, spread in spreads.items():
            text = f'{name} {values[name]:.3f} ± {spread:.3f}'
            start = self._start.get(name)
            if step and start is not None:
                text += f' (start {start:.3f})'
                if values[name] < start - spread:
                    below.append(text)
            lines.append(text)
        rank_zero_info(f'KNNProbe, step {step}: {", ".join(lines)}')
        if below and not self._warned:
            self._warned = True
            rank_zero_warn(
                f'The encoder tells labels worse than before the training, at step {step}: '
                f'{", ".join(below)}. If that stays, lower lr, or warm up longer; an '
                'encoder that goes on from weights keeps what it has learnt better with '
                'its batch norm frozen'
            )

    def _choose(
        self, trainer: Trainer
    ) -> tuple[LabelledSamples, LabelledSamples | None]:
        """Choose the images of bank and queries, None to cross-validate the bank."""
        data = trainer_datamodule(trainer) if self.data is None else self.data
        if data is None:
            raise ValueError(
                'KNNProbe needs labelled data: set data to a datamodule or a dataset, or '
                'train with a datamodule'
            )
        if isinstance(data, LightningDataModule):
            bank = LabelledSamples.of_split(data, 'train', 'bank of KNNProbe')
            queries = LabelledSamples.of_split(data, 'val', 'queries of KNNProbe')
            if bank.shares_ground:
                rank_zero_warn(
                    f'bank and queries of KNNProbe are windows of the same ground, which '
                    'neighbours find whatever the encoder has learnt: the scores are too '
                    f'high. Keep ground apart by val_fraction of {type(data).__name__}, '
                    'such as 0.25'
                )
        else:
            bank, queries = (
                LabelledSamples(dataset, range(len(dataset)), f'{name} of KNNProbe')  # type: ignore[arg-type]
                for name, dataset in (('bank', data), ('queries', self.queries))
            )

        count = max(self._images_between(trainer) // _SHARE, _MIN_SAMPLES)
        most = self.max_bank or max(count * 3 // 4, self.k)
        fewer = self.max_queries or max(most // 3, 1)
        same = bank.is_same(queries)
        bank.limit(most + fewer if same else most)
        known = len(bank.indices)
        if same:
            find_places(bank)
            known = known * (FOLDS - 1) // FOLDS
        else:
            queries.limit(fewer)
            find_places(bank, queries)
        require(
            self.k <= known,
            f'k must be at most the number of labelled samples in the bank, {known}, got '
            f'{self.k}. Lower k, or give more samples',
        )
        return bank, None if same else queries

    def _images_between(self, trainer: Trainer) -> int:
        """Count the images that are trained with between two probes, on all ranks."""
        size = loader_batch_size(trainer.train_dataloader) or 1
        epochs = min(max(trainer.max_epochs or 1, 1), self.every_n_epochs)
        batches: float = trainer.num_training_batches * epochs
        if self.every_n_steps is not None:
            batches = self.every_n_steps * trainer.accumulate_grad_batches
        return 0 if math.isinf(batches) else int(batches * size * trainer.world_size)

    def _encode(
        self, trainer: Trainer, pl_module: LightningModule, samples: LabelledSamples
    ) -> LabelledFeatures:
        """Return features and labels of all samples, on every rank."""

        def in_order(values: Tensor) -> Tensor:
            # Rank r has the samples r, r + R, r + 2 R, ..., some at the end twice
            ranks = gather(trainer, values).transpose(0, 1)
            return ranks.flatten(0, 1)[: len(samples.indices)]

        encoded = encode_batches(
            self._encoder,
            samples.batches(trainer.global_rank, trainer.world_size),
            samples.transform,
            pl_module.hparams.get('in_channels'),
            self.size or pl_module.hparams.get('size'),
            pl_module.device,
            cast(torch.dtype, pl_module.dtype),
        )
        return collect_labelled(
            encoded, samples.name, pl_module.device, in_order, samples.places
        )


def _check_classes(labels: Tensor, name: str) -> None:
    """Check that there are classes to tell apart."""
    if len(labels) == 0 or bool((labels == labels[0]).all()):
        seen = 'none of them is known' if len(labels) == 0 else 'all are the same'
        raise ValueError(
            f'the {name} must have labels of at least two classes, but {seen}. Give '
            'other data, or more of it'
        )
