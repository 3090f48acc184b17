# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from typing import Any

import timm
import torch
from lightly.models.utils import update_momentum
from torch import nn

from torchgeo_softcon.modules.ema import make_teacher, update_ema


def make_student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_teacher_starts_as_the_student_and_follows_it() -> None:
    student = make_student()
    teacher = make_teacher(student)
    expected = []
    for a, b in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad
        assert not b.requires_grad
        expected.append(a.detach().double().clone())

    for step, momentum in enumerate((0.9, 0.99, 1.0)):
        with torch.no_grad():
            for i, parameter in enumerate(student.parameters()):
                parameter.add_(torch.randn(parameter.shape) * (step + 1))
                expected[i] = momentum * expected[i] + (1 - momentum) * parameter
        update_ema(student, teacher, momentum)
        for value, b in zip(expected, teacher.parameters(), strict=True):
            torch.testing.assert_close(b.double(), value, rtol=0, atol=1e-6)


def test_equals_lightly() -> None:
    student = make_student()
    first, second = make_teacher(student), make_teacher(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.7).add_(0.3)
    update_ema(student, first, 0.996)
    update_momentum(student, second, 0.996)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_buffers_are_the_teachers_own() -> None:
    student = make_student()
    teacher = make_teacher(student)
    student(torch.randn(8, 3) + 5)
    update_ema(student, teacher, 0.5)
    assert student.get_buffer('1.running_mean').any()
    assert not teacher.get_buffer('1.running_mean').any()
    teacher.train()(torch.randn(8, 3) + 5)
    assert teacher.get_buffer('1.running_mean').any()


def test_teacher_is_not_random_in_training_mode() -> None:
    names = ('drop_path_rate', 'proj_drop_rate', 'attn_drop_rate')
    options: dict[str, Any] = dict.fromkeys(names, 0.5) | {'num_classes': 0, 'depth': 4}
    student = timm.create_model('vit_tiny_patch16_224', img_size=32, **options).train()
    teacher = make_teacher(student).train()
    image = torch.randn(8, 3, 32, 32)
    assert not torch.equal(student(image), student(image))
    assert torch.equal(teacher(image), teacher(image))
    torch.testing.assert_close(teacher(image), student.eval()(image))
