# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import base64
import json
import math
import os
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from torchgeo_softcon import SyntheticScenesDataModule
from torchgeo_softcon.__main__ import main
from torchgeo_softcon.callbacks import CollapseMonitor, KNNProbe
from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.evaluation.verdict import Finding
from torchgeo_softcon.export.files import export
from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.models.checkpoints import read_checkpoint
from torchgeo_softcon.report.curves import (
    add_even_spread,
    curve_sections,
    find_logs,
    read_logs,
)
from torchgeo_softcon.report.page import Section, write_page
from torchgeo_softcon.report.pictures import (
    Display,
    feature_similarities,
    label_similarities,
    patch_tokens,
    plot_map,
    plot_neighbours,
    plot_similarities,
    plot_views,
)
from torchgeo_softcon.report.samples import Gallery
from torchgeo_softcon.report.sections import (
    _comparisons,
    has_other_augmentations,
    judge_features,
    load_task,
)
from torchgeo_softcon.tasks import DINOMCTask
from torchgeo_softcon.transforms import MultiCropView, RandomView

from ..tasks.helpers import make_dino, make_loader, make_task, make_trainer

PATCHES = 'tests.callbacks.helpers.PatchesDataModule'


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all logs and a checkpoint."""
    root = tmp_path_factory.mktemp('run')
    patches = import_module('tests.callbacks.helpers').PatchesDataModule
    trainer = make_trainer(
        root,
        logger=CSVLogger(root, name='', version=''),
        callbacks=[KNNProbe(patches(), k=3, linear=True), CollapseMonitor(4)],
        log_every_n_steps=1,
    )
    trainer.fit(make_task(mask_ratio=0.5), make_loader())
    trainer.save_checkpoint(root / 'last.ckpt')
    return root


def texts(figure: Figure) -> str:
    """All that is written in a picture."""
    axes = figure.axes
    words = [t for a in axes for t in (a.get_title(), a.get_title('left'))]
    words += [t for a in axes for t in (a.get_xlabel(), a.get_ylabel())]
    words += [
        t.get_text() for a in axes if (g := a.get_legend()) for t in g.get_texts()
    ]
    return ' '.join([*words, figure.get_supxlabel()])


def plot_curves(log: pd.DataFrame) -> dict[str, Any]:
    return {section.name: section for section in curve_sections({'run': log})}


def words(section: Section) -> str:
    """All that is written beside curves."""
    lines = [line.label for panel in section.panels for line in panel.lines]
    return ' '.join([*lines, *(panel.title for panel in section.panels)])


def load(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """The task of a checkpoint, and what is in the file."""
    content = read_checkpoint(str(checkpoint))
    return load_task(str(checkpoint), content), content


class TestCurves:
    def test_every_metric_is_somewhere(self, run: Path) -> None:
        sections = plot_curves(read_logs(find_logs(run)))
        names = ('losses', 'knn', 'labels', 'spread', 'schedules', 'others')
        assert [name for name in sections if name in names] == list(names)
        assert 'train_loss_soft' in words(sections['losses'])
        for name in ('knn, cls', 'knn, mean', 'linear, cls', 'chance'):
            assert name in words(sections['knn'])
        assert 'effective rank' in words(sections['spread'])
        assert 'learning rate' in words(sections['schedules'])

    def test_values_are_those_of_the_log(self) -> None:
        log = pd.DataFrame({'step': [0, 5, 10], 'train_loss': [3.0, math.nan, 1.0]})
        log['train_loss_chance'] = 2.0
        (panel,) = plot_curves(log)['losses'].panels
        line, chance = panel.lines
        # From the left edge at the top to the right edge at the bottom
        assert line.points == [(56, 14), (334, 172)]
        assert chance.points == [(56, 93), (195, 93), (334, 93)]
        assert (line.dash, chance.dash) == ('', '6 4')
        assert 'train_loss from 3 to 1, step 0 to 10; chance from 2 to 2' in panel.alt
        assert [text for _, text in panel.columns] == ['0', '3', '6', '9']

    def test_even_spread(self) -> None:
        log = pd.DataFrame(
            {'step': [0], 'train_feature_std': [0.04], 'train_loss': 1.0}
        )
        add_even_spread(log, 400)
        (panel,) = plot_curves(log)['spread'].panels
        assert (
            panel.alt
            == 'feature std in the step: train_feature_std 0.04; even spread 0.05'
        )

    def test_probes_have_one_axis(self, run: Path) -> None:
        (panel,) = plot_curves(read_logs(find_logs(run)))['knn'].panels
        assert [text for _, text in panel.rows][:: len(panel.rows) - 1] == ['0', '1']

    def test_two_runs(self) -> None:
        logs = {
            name: pd.DataFrame({'step': [0, 1], 'train_loss': values})
            for name, values in (('a', [4.0, 3.0]), ('b', [4.0, 0.0]))
        }
        logs['b']['only'] = 1.0
        (losses, others) = curve_sections(logs)
        first, second = losses.panels[0].lines
        assert (first.label, second.label) == ('train_loss, a', 'train_loss, b')
        assert first.colour != second.colour
        assert second.points[-1] == (334, 172)  # one scale for both
        assert [line.label for line in others.panels[0].lines] == ['only, b']

    def test_lines_of_reference_are_in_the_panel_of_their_metric(self) -> None:
        log = pd.DataFrame(
            {
                'step': [1, 2, 3],
                'train_loss_soft': [0.9, 0.7, 0.6],
                'train_loss_soft_chance': [0.7, 0.7, 0.7],
                'train_loss_soft_floor': [0.5, 0.5, 0.5],
            }
        )
        (panel,) = plot_curves(log)['losses'].panels
        dashes = {line.label: line.dash for line in panel.lines}
        assert dashes == {'train_loss_soft': '', 'chance': '6 4', 'floor': '2 3'}
        assert all(14 <= y <= 172 for line in panel.lines for _, y in line.points)

    def test_rows_of_one_step_are_one(self, tmp_path: Path) -> None:
        (tmp_path / 'metrics.csv').write_text('step,a,b\n1,2,\n1,,3\n2,4,\n')
        log = read_logs(find_logs(tmp_path))
        assert log['step'].tolist() == [1, 2]
        assert log['b'][0] == 3
        assert math.isnan(log['b'][1])

    def test_newest_run_of_a_folder(self, tmp_path: Path) -> None:
        for number in range(2):
            folder = tmp_path / f'version_{number}'
            folder.mkdir()
            (folder / 'metrics.csv').write_text('step,loss\n1,2\n')
            os.utime(folder / 'metrics.csv', (number + 1, number + 1))
        (tmp_path / 'version_1' / 'labels.csv').write_text('name,label\na,1\n')
        assert find_logs(tmp_path) == [tmp_path / 'version_1' / 'metrics.csv']

    def test_values_that_are_not_finite(self) -> None:
        log = pd.DataFrame({'step': [1, 2], 'train_feature_std': [math.inf] * 2})
        (panel,) = plot_curves(log)['spread'].panels
        assert panel.note == '2 values are not finite'
        assert panel.lines[0].points == []

    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip('tensorboard')
        trainer = make_trainer(
            tmp_path, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1
        )
        trainer.fit(make_task(), make_loader())
        log = read_logs(find_logs(tmp_path))
        assert log['step'].tolist() == list(range(12))
        assert log['train_loss'].notna().all()
        assert 'schedule/lr' in log
        assert 'losses' in plot_curves(log)

    def test_tensorboard_is_not_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / 'events.out.tfevents.1.host.1.0').touch()
        monkeypatch.setitem(sys.modules, 'tensorboard', None)
        with pytest.raises(FileNotFoundError, match=r'TensorBoard only\. Install'):
            find_logs(tmp_path)

    def test_no_logs(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r'has no logs.*CSVLogger'):
            find_logs(tmp_path)
        with pytest.raises(FileNotFoundError, match='does not exist'):
            find_logs(tmp_path / 'none')
        (tmp_path / 'metrics.csv').write_text('epoch,step\n0,1\n')
        with pytest.raises(ValueError, match='no metrics yet'):
            read_logs(find_logs(tmp_path))


class TestPictures:
    def test_one_scale_for_all_images(self) -> None:
        images = torch.linspace(1, 2, 101).repeat(3, 1)[None, :, :, None]
        show = Display(images, ('B', 'G', 'R'))
        assert show.channels == [2, 1, 0]
        colours = show(images[0])
        assert colours.shape == (101, 1, 3)
        assert colours[50, 0] == pytest.approx(0.5)
        assert (colours[:3] == 0).all()
        assert (colours[-3:] == 1).all()
        assert show(2 * images[0])[50, 0] == pytest.approx(1)

    def test_scale_is_that_of_pixels_with_data(self) -> None:
        images = torch.linspace(0.4, 0.6, 100).view(1, 1, 10, 10).repeat(3, 4, 1, 1)
        plain = Display(images).limits
        images[1] = 0  # no data
        images[2] = math.nan  # masked
        assert Display(images).limits == plain
        assert Display(images[1:]).limits == [(0, 1)] * 3

    @pytest.mark.parametrize(('bands', 'expected'), [(2, [0]), (4, [0, 1, 2])])
    def test_bands_without_names(self, bands: int, expected: list[int]) -> None:
        assert Display(torch.rand(2, bands, 4, 4)).channels == expected

    def test_similarities(self) -> None:
        labels = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]])
        expected = torch.tensor([[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 1]])
        torch.testing.assert_close(label_similarities(labels), expected)
        classes = label_similarities(torch.tensor([4, 2, 4]))
        assert torch.equal(classes[0], torch.tensor([1.0, 0, 1]))
        # The mean does not make images alike
        features = torch.tensor([[101.0, 100], [99, 100]])
        torch.testing.assert_close(
            feature_similarities(features), torch.tensor([[1.0, -1], [-1, 1]])
        )

    @pytest.mark.parametrize('kind', ['classes', 'labels'])
    def test_images_of_a_label_are_side_by_side(self, kind: str) -> None:
        classes = torch.arange(12) % 3
        features = torch.nn.functional.one_hot(classes).float()
        labels = classes if kind == 'classes' else features.long()
        noise = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
        figure, (before, rank) = plot_similarities(features, labels, noise)
        assert abs(before) < 0.2
        assert 'embedding similarity at the start' in texts(figure)
        figure, (rank,) = plot_similarities(features, labels)
        for axis in figure.axes[:2]:
            matrix = np.asarray(axis.images[0].get_array())
            same = np.kron(np.eye(3), np.ones((4, 4))) == 1
            assert matrix[same] == pytest.approx(np.ones(48))
            assert (matrix[~same] < 0.1).all()
        # Not 1: the order of pairs of equal similarity is noise
        assert 'rank correlation 0.99' in texts(figure)
        assert rank == pytest.approx(0.99, abs=0.01)

    def test_map(self) -> None:
        """Colours are of the features, and far places are side by side."""
        features = torch.eye(3).repeat_interleave(4, 0)
        centres = [(77 + i % 4 / 100, 28 + i // 8) for i in range(12)]
        figure = plot_map(features, centres)
        near, far = (axis.collections[0] for axis in figure.axes)
        assert np.array(near.get_offsets()).tolist() == [list(c) for c in centres[:8]]
        colours = [tuple(colour) for colour in np.array(near.get_facecolor())[:, :3]]
        assert len({*colours[:4]}) == len({*colours[4:]}) == 1
        assert colours[0] != colours[4]
        assert len(np.array(far.get_offsets())) == 4

    def test_neighbours_are_the_most_similar_others(self) -> None:
        angles = torch.arange(8) * math.pi / 4
        features = torch.stack([angles.cos(), angles.sin()], 1)
        thumbnails = [np.full((2, 2, 3), i / 8) for i in range(8)]
        apart = ~torch.eye(8).bool()
        figure = plot_neighbours(thumbnails, features, torch.arange(8) % 2, apart, 1)
        pictures = [np.array(a.images[0].get_array()) for a in figure.axes if a.images]
        shown = [round(float(picture.max()) * 8) for picture in pictures]
        assert shown[0] == 0
        assert set(shown[1:3]) == {1, 7}
        assert figure.axes[1].get_xlabel() == '0.71 | 0.00'

    def test_neighbours_are_of_other_places(self) -> None:
        features = torch.eye(6)
        features[1] += 0.5 * features[0]  # the same ground at another date
        places = ['a', 'a', 'b', 'c', 'd', 'e']
        gallery = make_gallery(features, torch.arange(6) % 2, places)
        (_, section) = _comparisons(gallery, None)
        assert section.figure is not None
        shown = [
            round(float(np.array(axis.images[0].get_array()).max()) * 8)
            for axis in section.figure.axes
            if axis.images
        ]
        assert shown[0] == 0
        assert 1 not in shown[1:5]
        assert 'five most similar of other places' in section.text
        assert 'Mean label similarity to the nearest neighbour' in section.alt

    @pytest.mark.parametrize('mode', ['drop', 'pixel'])
    def test_masks_are_those_of_the_task(self, mode: Any) -> None:
        task = make_task(size=64, mask_mode=mode, mask_ratio=0.75, mask_patch_size=16)
        hidden = task.mask_view(torch.rand(5, 4, 64, 64)).isnan()
        patches = hidden.unfold(2, 16, 16).unfold(3, 16, 16).float().mean((1, 4, 5))
        assert set(patches.unique().tolist()) == {0, 1}
        assert (patches.flatten(1).sum(1) == 12).all()

    @pytest.mark.parametrize('dino', [False, True])
    def test_boxes_are_where_the_views_are_from(self, dino: bool) -> None:
        task = (
            make_dino(augmentations=MultiCropView(32, (16,))) if dino else make_task()
        )
        # Brightness tells the row and the column
        ramp = torch.arange(48.0).expand(2, 1, 48, 48)
        image = torch.cat([ramp, ramp.mT, ramp, ramp], 1)
        batch = {'image': image, 'label': torch.ones(2, 3)}
        figure = plot_views(task, batch)
        columns = 4 if dino else 3
        assert len(figure.axes) == 2 * columns
        for row in range(2):
            axis, *views = figure.axes[row * columns : (row + 1) * columns]
            boxes = [p for p in axis.patches if isinstance(p, Rectangle)]
            assert len(boxes) == len(views)
            for box, view in zip(boxes, views, strict=True):
                frame = view.spines['left'].get_edgecolor()
                assert frame == pytest.approx(box.get_edgecolor())
                assert -0.5 <= box.get_x() < box.get_x() + box.get_width() <= 47.5
                assert -0.5 <= box.get_y() < box.get_y() + box.get_height() <= 47.5

    def test_patch_tokens(self) -> None:
        image = torch.rand(1, 3, 96, 64)
        vit = create_encoder('test_vit').eval()
        tokens = patch_tokens(vit, image)
        assert tokens is not None
        assert tokens.shape == (1, 6, 4, 64)
        inside = vit.forward_features(image)[:, 1:]  # type: ignore[operator]
        assert torch.equal(tokens.flatten(1, 2), inside)
        resnet = create_encoder('resnet18').eval()
        assert patch_tokens(resnet, image) is None
        large = patch_tokens(resnet, torch.rand(1, 3, 160, 128))
        assert large is not None
        assert large.shape == (1, 5, 4, 512)


class TestPage:
    def test_needs_no_other_file(self, tmp_path: Path) -> None:
        figure = Figure()
        figure.subplots().plot([1, 2])
        log = pd.DataFrame({'step': [0, 9], 'train_loss': [3.0, 1.0]})
        sections = [
            *curve_sections({'run': log}),
            Section('a', 'A & B', 'x < y', figure, 'the "finding"', warning='Mind!'),
            Section('c', 'C', 'None.'),
        ]
        findings = {'run': [Finding('Is it?', False, 'it is <not>')]}
        page = write_page(
            tmp_path / 'new',
            'T<1>',
            {'k': ['<v>']},
            sections,
            findings,
            {'c': 'a: <b>'},
        )
        text = page.read_text()
        assert 'A &amp; B' in text
        assert not re.search(r'<(v|not|b)>', text)
        assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', text)
        (data,) = re.findall(r'base64,([^"]+)"', text)
        assert base64.b64decode(data) == (tmp_path / 'new' / 'a.webp').read_bytes()
        assert 'alt="the &#34;finding&#34;"' in text
        # The verdict is first, and every section can be reached
        assert text.index('it is &lt;not&gt;') < text.index('<svg')
        for name in ('losses', 'a', 'c', 'run'):
            assert f'href="#{name}"' in text
            assert f'id="{name}"' in text
        assert 'name="viewport"' in text
        assert 'prefers-color-scheme: dark' in text

    def test_has_at_most_a_megabyte(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).random((1200, 1200, 3))
        sections = []
        for name in 'abcd':
            figure = Figure((12, 12))
            figure.add_axes((0.0, 0.0, 1.0, 1.0)).imshow(noise)
            sections.append(Section(name, name, name, figure))
        page = write_page(tmp_path, 'T', {}, sections)
        assert page.stat().st_size < 2**20

    @pytest.mark.parametrize('scheme', [0, 1], ids=['light', 'dark'])
    def test_contrast(self, scheme: int, tmp_path: Path) -> None:
        """WCAG AA: 4.5 for text, 3 for curves, on both backgrounds."""
        text = write_page(tmp_path, 'T', {}, []).read_text()
        block = re.findall(r':root \{(.*?)\}', text, re.DOTALL)[scheme]
        colours = dict(re.findall(r'--(\w+): (#\w+)', block))
        for name, least in (
            *((name, 4.5) for name in ('ink', 'soft', 'good', 'bad', 'link')),
            *((f'c{number}', 3.0) for number in range(6)),
        ):
            for ground in ('paper', 'card'):
                light, dark = sorted(
                    (luminance(colours[name]), luminance(colours[ground])), reverse=True
                )
                assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)


def luminance(colour: str) -> float:
    """Relative luminance, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    digits = colour[1:] if len(colour) == 7 else ''.join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def make_gallery(
    features: torch.Tensor, labels: torch.Tensor, places: list[str] | None = None
) -> Gallery:
    """Images of which nothing but features and labels matters."""
    count = len(features)
    thumbnails = [np.full((2, 2, 3), i / 8) for i in range(count)]
    show = Display(torch.rand(3, 3, 2, 2))
    noise = torch.rand(count, 6, generator=torch.Generator().manual_seed(0))
    return Gallery(
        *('val', None, show, features, noise, labels, thumbnails, [], None),
        places=places,
    )


class TestColours:
    def test_features_that_tell_labels(self) -> None:
        labels = torch.arange(40) % 2
        features = torch.nn.functional.one_hot(labels).float()
        (good,) = judge_features(make_gallery(features, labels))
        assert good.good
        assert good.reason.startswith(
            '1 by the 10 nearest of 40 images of the val split'
        )
        (bad,) = judge_features(make_gallery(torch.rand(40, 2) * 0 + 1, labels))
        assert bad.good is False

    def test_other_dates_of_a_place_do_not_count(self) -> None:
        labels = torch.arange(40) % 2
        features = torch.eye(40)[torch.arange(40) // 2 * 2]  # equal for pairs only
        places = [str(i // 2) for i in range(40)]
        (finding,) = judge_features(make_gallery(features, labels, places))
        assert not finding.reason.startswith('1 by')

    def test_too_few(self) -> None:
        (finding,) = judge_features(make_gallery(torch.eye(4), torch.arange(4) % 2))
        assert finding.good is None


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures('quiet')
class TestCommand:
    def report(self, *args: str) -> tuple[str, set[str]]:
        """Text of the page, and names of the pictures."""
        assert main(['report', *args]) == 0
        (page,) = Path().rglob('report.html')
        pictures = {path.stem for path in page.parent.glob('*.webp')}
        for path in page.parent.glob('*.webp'):
            with Image.open(path) as picture:
                assert min(picture.size) > 100
        return page.read_text(), pictures

    def test_run_and_scenes(self, scenes: SyntheticScenes, tmp_path: Path) -> None:
        task = make_task(in_channels=13)
        trainer = make_trainer(tmp_path, max_epochs=1)
        options: dict[str, Any] = {'root': scenes.root, 'size': 96, 'dates': 2}
        options |= {'patch_size': 48, 'batch_size': 4, 'length': 8}
        trainer.fit(task, SyntheticScenesDataModule(**options))
        trainer.save_checkpoint(tmp_path / 'last.ckpt')
        data = [f'--data.{key}={value}' for key, value in options.items()]
        text, pictures = self.report(
            *('--checkpoint', 'last.ckpt', '--data', 'SyntheticScenesDataModule', *data)
        )
        expected = {
            'views',
            'similarities',
            'map',
            'neighbours',
            'classes',
            'components',
        }
        # Views of 32 pixels, but tokens of images of 48
        assert pictures == expected - {'components'}
        assert 'smaller than 4 x 4' in text
        assert 'bands number 4, 3, 2 as red, green and blue' in text
        assert '(at the start: ' in text
        # Letters of 10 points have 12 pixels, on any screen
        widths = re.findall(r'<img [^>]*width="(\d+)"', text)
        assert len(widths) == len(pictures)
        assert widths[1] == '704'

    def test_run(self, run: Path, tmp_path: Path) -> None:
        out = tmp_path / 'out'
        text, pictures = self.report(str(run), '--data', PATCHES, '--out', str(out))
        curves = {'losses', 'knn', 'spread', 'schedules', 'others'}
        assert pictures == {'views', 'similarities', 'neighbours'}
        assert curves <= set(re.findall('<h2 id="(.*?)"', text))
        assert 'Do features of different images differ?' in text
        assert 'torchgeo-softcon 0.1' in text
        assert 'no masks with codes of ESA WorldCover' in text
        assert 'knn_map_cls' in text

    def test_run_without_checkpoint_or_data(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / 'logs').mkdir()
        (tmp_path / 'logs' / 'metrics.csv').write_bytes(
            (run / 'metrics.csv').read_bytes()
        )
        text, _ = self.report('logs')
        assert 'has no checkpoint' in text
        assert 'id="losses"' in text
        out = ('--out', 'logs/report')
        text, _ = self.report('logs', '--checkpoint', str(run / 'last.ckpt'), *out)
        assert 'The data are not known' in text

    def test_two_runs(self, run: Path, tmp_path: Path) -> None:
        for name in ('a', 'b'):
            (tmp_path / name).mkdir()
            log = (run / 'metrics.csv').read_bytes()
            (tmp_path / name / 'metrics.csv').write_bytes(log)
        (tmp_path / 'b' / 'config.yaml').write_text('seed_everything: 7')
        text, pictures = self.report('a', 'b', '--out', 'out')
        assert not pictures
        assert text.count('<section class="verdict"') == 2
        assert 'Report of a and b' in text
        assert 'seed_everything: 7' in text

    def test_exports_are_no_checkpoints_of_the_run(
        self, run: Path, tmp_path: Path
    ) -> None:
        """TorchGeo's suffix is the same."""
        folder = tmp_path / 'run'
        folder.mkdir()
        for name in ('metrics.csv', 'last.ckpt'):
            (folder / name).write_bytes((run / name).read_bytes())
        (exported, _) = export(folder / 'last.ckpt', 'torchgeo')
        later = (folder / 'last.ckpt').stat().st_mtime + 1
        os.utime(exported, (later, later))
        options = ('--samples', '8', '--data', PATCHES, '--out', 'out')
        text, pictures = self.report(*options, str(folder))
        assert f'<td>{folder / "last.ckpt"}</td>' in text
        assert 'views' in pictures
        (folder / 'last.ckpt').unlink()
        text, _ = self.report(*options, str(folder))
        assert 'has no checkpoint' in text

    def test_run_of_an_unknown_architecture(self, run: Path, tmp_path: Path) -> None:
        folder = tmp_path / 'run'
        folder.mkdir()
        (folder / 'metrics.csv').write_bytes((run / 'metrics.csv').read_bytes())
        content = read_checkpoint(str(run / 'last.ckpt'))
        del content['hyper_parameters']['model']
        torch.save(content, folder / 'last.ckpt')
        text, _ = self.report('run', '--data', PATCHES)
        assert 'last.ckpt does not tell its architecture. Set model' in text
        assert 'id="losses"' in text
        args = ['--checkpoint', 'run/last.ckpt', '--data', PATCHES]
        assert main(['report', 'run', *args]) == 2

    def test_checkpoint_with_numbers_of_numpy(self, run: Path) -> None:
        content = read_checkpoint(str(run / 'last.ckpt'))
        content['callbacks'] = {'Best': {'score': np.float64(1)}}
        torch.save(content, 'a.ckpt')
        args = ('--checkpoint', 'a.ckpt', '--data', PATCHES)
        _, pictures = self.report(*args, '--samples', '8')
        assert 'views' in pictures

    @pytest.mark.parametrize(
        ('args', 'message'),
        [
            (['.'], 'has no logs'),
            (['none'], 'does not exist'),
            ([], 'a report needs the folder of a run, or --checkpoint'),
            (['.', '--split', 'all'], 'split must be one of'),
            (
                ['--checkpoint', 'none.ckpt', '--data', PATCHES],
                'none.ckpt does not exist',
            ),
        ],
    )
    def test_bad_input(
        self, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(['report', *args]) == 2
        assert message in capsys.readouterr().err


class TestAugmentations:
    """Checkpoints do not have them, the configuration of the run does."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.fit(
            make_task(augmentations=RandomView(32, scale=(0.9, 1.0))), make_loader()
        )
        trainer.save_checkpoint(tmp_path / 'checkpoints' / 'last.ckpt')
        return tmp_path / 'checkpoints' / 'last.ckpt'

    def configure(self, folder: Path, augmentations: Any) -> None:
        model = {'class_path': 'torchgeo_softcon.SoftConTask'}
        model['init_args'] = {'augmentations': augmentations}  # type: ignore[assignment]
        (folder / 'config.yaml').write_text(json.dumps({'model': model}))

    def test_of_the_run(self, checkpoint: Path, tmp_path: Path) -> None:
        self.configure(
            tmp_path,
            {
                'class_path': 'torchgeo_softcon.RandomView',
                'init_args': {'size': 32, 'scale': [0.9, 1]},
            },
        )
        with warnings.catch_warnings():
            warnings.filterwarnings('error', 'The checkpoint was made')
            task, content = load(checkpoint)
        assert tuple(task.augmentations.scale) == (0.9, 1)
        assert not has_other_augmentations(content, task)

    @pytest.mark.parametrize(
        'chosen', [None, {'class_path': 'antigravity.View', 'init_args': {}}]
    )
    def test_of_the_task(self, chosen: Any, checkpoint: Path, tmp_path: Path) -> None:
        self.configure(tmp_path, chosen)
        with pytest.warns(UserWarning, match='was made with augmentations'):
            task, content = load(checkpoint)
        assert task.augmentations.scale == (0.2, 1.0)
        assert has_other_augmentations(content, task)

    @pytest.mark.usefixtures('quiet')
    def test_the_page_says_so(self, checkpoint: Path, tmp_path: Path) -> None:
        args = ['--checkpoint', str(checkpoint), '--data', PATCHES]
        with pytest.warns(UserWarning, match='was made with augmentations'):
            assert main(['report', *args]) == 0
        (page,) = tmp_path.rglob('report.html')
        assert 'default augmentations of the task: the run had others' in (
            page.read_text()
        )


def test_dino_without_a_configuration(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(make_dino(), make_loader())
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    assert isinstance(load(tmp_path / 'last.ckpt')[0], DINOMCTask)


def test_no_foreign_class_is_imported(tmp_path: Path) -> None:
    hparams = {'_class_path': 'antigravity.Task', 'model': 'resnet18'}
    torch.save({'hyper_parameters': hparams, 'state_dict': {}}, tmp_path / 'a.ckpt')
    assert load(tmp_path / 'a.ckpt')[0] is None


def test_images_of_unknown_label_are_not_compared() -> None:
    labels = torch.tensor([[1, 0], [0, 0], [0, 1]])
    gallery = make_gallery(torch.arange(3.0)[:, None], labels, ['a', 'b', 'c'])
    known = gallery.labelled()
    assert known.features.flatten().tolist() == [0, 2]
    assert known.labels is not None
    assert known.labels.tolist() == [[1, 0], [0, 1]]
    assert known.places == ['a', 'c']
    assert [float(t.max()) for t in known.thumbnails] == [0, 0.25]
