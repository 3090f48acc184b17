# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import torch
import torchvision.transforms.v2 as T

from torchgeo_softcon.transforms.views import center_view


def test_is_the_transform_of_dino() -> None:
    image = torch.rand(2, 4, 64, 80)
    both = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224)])
    assert torch.equal(center_view(image, 224), both(image))


def test_nothing_is_resized_that_fits() -> None:
    image = torch.rand(1, 1, 8, 8)
    assert torch.equal(center_view(image, 7), image[..., :7, :7])
