# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import pytest
import timm

from torchgeo_softcon.models.loading import nearest_vit
from torchgeo_softcon.tasks import DINOMCTask, SoftConTask

from .families import MEMBERS, abilities, abilities_of_all, read


@pytest.mark.parametrize(
    ('family', 'model'),
    [
        ('vision_transformer', 'test_vit'),
        ('eva', 'vit_tiny_patch16_dinov3_qkvb'),
        ('resnet', 'test_resnet'),
        ('convnext', 'test_convnext'),
        ('convit', 'convit_tiny'),
    ],
)
def test_table_tells_what_is(family: str, model: str) -> None:
    assert read()[family] == abilities(model)


def test_families_of_the_table() -> None:
    assert read().keys() <= MEMBERS.keys()
    assert all(timm.is_model(model) for model in MEMBERS.values())


@pytest.mark.slow
def test_table_of_all_families() -> None:
    assert {*timm.list_modules()} - {'timm_models'} <= MEMBERS.keys()  # which are ours
    table = read()
    assert abilities_of_all(table) == table


@pytest.mark.parametrize(
    ('model', 'nearest'),
    [
        ('beit_base_patch16_224', 'beit3_base_patch16_224'),
        ('dla34', 'vit_small_patch16_224'),
        ('naflexvit_base_patch16_gap', 'vit_base_patch16_gap_224'),
    ],
)
def test_nearest_model(model: str, nearest: str) -> None:
    assert nearest_vit(model) == nearest


def test_refusals_name_a_model_that_works() -> None:
    with pytest.raises(
        ValueError, match=r"'drop' needs .*'test_resnet'.* such as vit_small"
    ):
        SoftConTask('test_resnet', mask_mode='drop')
    with pytest.raises(
        ValueError, match=r'beit_base_patch16_224 does not .*84 x 84.* such'
    ):
        DINOMCTask('beit_base_patch16_224', output_dim=8)
