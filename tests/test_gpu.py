# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What can only be seen on a GPU. Run with ``pytest -m gpu``."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.ssl4eo.image_records import decode, record_dtype
from torchgeo_softcon.tasks.guard import NonFiniteLossError
from torchgeo_softcon.transforms import MultiCropView, RandomView, WorldCoverMultiLabel

from .helpers import scenes_datamodule
from .tasks import helpers
from .tasks.helpers import Scenes, make_batch, make_loader, make_task, make_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'),
]


def to_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.cuda() for k, v in batch.items()}


@pytest.mark.parametrize('model', ['test_vit', 'resnet18'])
@pytest.mark.parametrize(
    ('make', 'kwargs', 'name'),
    [
        (helpers.make_task, {}, 'projector.layers.0.weight'),
        (helpers.make_dino, {'output_dim': 512}, 'head.last_layer.weight_v'),
    ],
)
def test_loss_and_gradient_agree_with_the_cpu(
    make: Any, kwargs: dict[str, Any], name: str, model: str
) -> None:
    batch = make_batch(8)
    results = []
    for device in ('cpu', 'cuda'):
        task = helpers.make_fixed(make, model=model, **kwargs).to(device)
        loss = task.training_step({k: v.to(device) for k, v in batch.items()}, 0)
        loss.backward()
        grad = task.get_parameter(name).grad
        assert grad is not None
        results.append((loss.cpu(), grad.flatten().cpu()))
    (on_cpu, grad), (on_gpu, other) = results
    torch.testing.assert_close(on_cpu, on_gpu, rtol=1e-3, atol=1e-4)
    assert torch.cosine_similarity(grad, other, dim=0) > 0.999


@pytest.mark.parametrize('mode', ['drop', 'token', 'pixel'])
def test_no_synchronisation_in_a_step(mode: Any, tmp_path: Path) -> None:
    counts: list[int] = []

    class Watched(type(make_task())):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            torch.cuda.synchronize()
            # The first steps allocate, compile, and read the seed
            torch.cuda.set_sync_debug_mode('error' if self.global_step > 2 else 0)
            loss = super().training_step(*args, **kwargs)
            counts.append(self.global_step)
            return loss

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            torch.cuda.set_sync_debug_mode(0)

    task = Watched(
        'test_vit', in_channels=4, size=32, mask_mode=mode, hidden_dim=16, output_dim=8
    )
    trainer = make_trainer(
        tmp_path, accelerator='gpu', precision='bf16-mixed', max_epochs=2
    )
    trainer.fit(task, make_loader(length=32))
    assert max(counts) == 15


@pytest.mark.parametrize('kwargs', [{}, {'in_channels': 3, 'value_range': (0, 1)}])
def test_no_synchronisation_in_a_step_of_dino(
    kwargs: dict[str, Any], tmp_path: Path
) -> None:
    task = helpers.make_dino(**kwargs)
    step, counts = task.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error' if task.global_step > 2 else 0)
        loss = step(*args, **kwargs)
        torch.cuda.set_sync_debug_mode(0)
        counts.append(task.global_step)
        return loss

    task.training_step = training_step  # type: ignore[method-assign]
    trainer = make_trainer(
        tmp_path, accelerator='gpu', precision='bf16-mixed', max_epochs=2
    )
    channels = task.hparams['in_channels']
    trainer.fit(task, make_loader(length=32, channels=channels))
    assert max(counts) == 15


@pytest.mark.parametrize(('channels', 'value_range'), [(3, (0, 1)), (13, None)])
def test_crops_have_the_distribution_of_the_cpu(
    channels: int, value_range: tuple[float, float] | None
) -> None:
    torch.manual_seed(0)
    image = torch.rand(256, channels, 48, 48)
    module = MultiCropView(32, (24, 16), value_range=value_range)
    for cpu, cuda in zip(module(image), module(image.cuda()), strict=True):
        assert cuda.is_cuda
        for moment in (Tensor.mean, Tensor.std):
            torch.testing.assert_close(
                moment(cuda.cpu()), moment(cpu), rtol=0.05, atol=0.01
            )


def test_nan_pixels_stop_the_run(tmp_path: Path) -> None:
    class Spoilt(Scenes):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            sample = super().__getitem__(index)
            if index == 9:
                sample['image'][0, 0, 0] = math.nan
            return sample

    trainer = make_trainer(tmp_path, accelerator='gpu', enable_checkpointing=True)
    with pytest.raises(NonFiniteLossError, match=r'optimizer step 2.*NaN pixels'):
        trainer.fit(make_task(), DataLoader(Spoilt(), batch_size=4))
    assert not list(tmp_path.rglob('*.ckpt'))


def test_negative_labels_stop_the_run(tmp_path: Path) -> None:
    class Spoilt(Scenes):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            sample = super().__getitem__(index)
            return {**sample, 'label': sample['label'] - 1}

    trainer = make_trainer(tmp_path, accelerator='gpu')
    with pytest.raises(ValueError, match='finite and >= 0, got values from -1 to 0'):
        trainer.fit(make_task(), DataLoader(Spoilt(), batch_size=4))


def test_views_have_the_distribution_of_the_cpu() -> None:
    torch.manual_seed(0)
    image = torch.rand(256, 4, 64, 64)
    view = RandomView(32)
    on_cpu, on_gpu = view(image), view(image.cuda()).cpu()
    for statistic in (Tensor.mean, Tensor.std):
        torch.testing.assert_close(
            statistic(on_cpu), statistic(on_gpu), rtol=0.03, atol=0
        )
    plain = RandomView(
        64, (1, 1), (1, 1), 1, 0, jitter_probability=0, grey_probability=0,
        blur_probability=0,
    )  # fmt: skip
    torch.testing.assert_close(plain(image.cuda()).cpu(), image.flip(-1))


def test_labels_from_masks_on_the_device() -> None:
    codes = torch.tensor([0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100])
    mask = codes[torch.randint(12, (8, 64, 64)).clamp(max=4)]
    label = WorldCoverMultiLabel()
    expected = label({'mask': mask})['label']
    torch.cuda.set_sync_debug_mode('error')
    try:
        on_gpu = label({'mask': mask.cuda(non_blocking=True)})['label']
    finally:
        torch.cuda.set_sync_debug_mode(0)
    assert torch.equal(on_gpu.cpu(), expected)


def test_scenes_train_in_bfloat16(scenes: SyntheticScenes, tmp_path: Path) -> None:
    data = scenes_datamodule(scenes, 48, 8, length=32)
    trainer = make_trainer(
        tmp_path, accelerator='gpu', precision='bf16-mixed', max_epochs=2
    )
    trainer.fit(make_task(in_channels=13), datamodule=data)
    assert trainer.callback_metrics['train_loss'].isfinite()
    assert trainer.optimizers[0].defaults['fused'] is True


@pytest.mark.parametrize('dtype', ['uint16', 'float32'])
def test_records_become_the_same_images(dtype: str) -> None:
    sides = {'a': (4, 4), 'b': (24, 24), 'c': (7, 7)}
    records = np.zeros(5, record_dtype({k: (dtype, v) for k, v in sides.items()}))
    rng = np.random.default_rng(0)
    for band, shape in sides.items():
        records[band] = rng.integers(0, 65535, (5, *shape))
    raw = torch.from_numpy(records.view(np.uint8).reshape(5, -1))
    expected = decode(raw, records.dtype, list(sides), 24)
    actual = decode(raw.cuda(), records.dtype, list(sides), 24)
    assert torch.equal(actual.cpu(), expected)
