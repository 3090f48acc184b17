# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import datetime
import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import torch
from lightning.pytorch import LightningModule
from pyproj import CRS, Transformer
from torch import Tensor
from torch.utils.data import DataLoader

from torchgeo_softcon.callbacks import EmbeddingWriter
from torchgeo_softcon.evaluation.embedding_file import EmbeddingRows, make_table
from torchgeo_softcon.evaluation.footprints import footprints
from torchgeo_softcon.storage.resumable import ResumableParquet

from ..tasks.helpers import Scenes, make_task, make_trainer


class Identity(LightningModule):
    """The embedding of an image is its first pixels."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return batch['image'].flatten(1)[:, :6]


class Interrupted(Identity):
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        if batch_idx == 2:
            raise RuntimeError('the power is off')
        return super().predict_step(batch, batch_idx)


def predict(
    path: Path, task: LightningModule | None = None, length: int = 14, **kwargs: Any
) -> EmbeddingWriter:
    writer = EmbeddingWriter(path, **kwargs)
    trainer = make_trainer(path.parent, callbacks=[writer])
    loader = DataLoader(Scenes(length), batch_size=4)
    trainer.predict(task or Identity(), loader, return_predictions=False)
    return writer


def expected(length: int = 14) -> Tensor:
    return torch.stack(
        [Scenes(length)[i]['image'].flatten()[:6] for i in range(length)]
    )


class TestEmbeddingWriter:
    def test_plain_file(self, tmp_path: Path) -> None:
        path = tmp_path / 'new' / 'e.parquet'
        assert predict(path).rows == 14
        frame = pd.read_parquet(path)
        assert list(frame.columns) == ['index', 'embedding', 'label']
        assert frame['index'].tolist() == list(range(14))
        assert np.array_equal(np.stack(frame['embedding']), expected().numpy())
        label = Scenes()[3]['label']
        assert np.array_equal(frame['label'][3], label.numpy())
        assert not (tmp_path / 'new' / 'e.parquet.parts').exists()

    def test_features_of_a_task(self, tmp_path: Path) -> None:
        path = tmp_path / 'e.parquet'
        task = make_task()
        predict(path, task)
        frame = pd.read_parquet(path)
        with torch.no_grad():
            features = task.eval()(Scenes()[5]['image'][None])[0]
        np.testing.assert_allclose(
            frame['embedding'][5], features, rtol=1e-4, atol=1e-5
        )

    def test_refuses_an_existing_file(self, tmp_path: Path) -> None:
        path = tmp_path / 'e.parquet'
        path.write_text('precious')
        with pytest.raises(FileExistsError, match='set overwrite to replace it'):
            predict(path)
        assert path.read_text() == 'precious'
        assert predict(path, overwrite=True).rows == 14

    def test_goes_on_after_an_interruption(self, tmp_path: Path) -> None:
        path = tmp_path / 'e.parquet'
        with pytest.raises(RuntimeError, match='the power is off'):
            predict(path, Interrupted())
        assert not path.exists()
        assert len(list((tmp_path / 'e.parquet.parts').glob('*.parquet'))) == 1
        assert predict(path).rows == 14
        frame = pd.read_parquet(path)
        assert frame['index'].tolist() == list(range(14))
        assert np.array_equal(np.stack(frame['embedding']), expected().numpy())

    def test_parts_of_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / 'e.parquet'
        with pytest.raises(RuntimeError, match='the power is off'):
            predict(path, Interrupted())
        with pytest.raises(ValueError, match=r'run with samples = 14, not 15\. Choose'):
            predict(path, length=15)
        assert predict(path, length=15, overwrite=True).rows == 15

    def test_two_runs_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / 'e.parquet'

        class Second(Identity):
            def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
                with pytest.raises(BlockingIOError, match='another run is writing'):
                    predict(path)
                return super().predict_step(batch, batch_idx)

        assert predict(path, Second()).rows == 14
        assert pd.read_parquet(path)['index'].tolist() == list(range(14))

    def test_another_number_of_rows_than_samples(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, flush = tmp_path / 'e.parquet', EmbeddingRows.flush

        def flush_twice(rows: EmbeddingRows) -> None:
            again = list(rows._held)
            flush(rows)
            rows._held = again
            flush(rows)

        with monkeypatch.context() as patch:
            patch.setattr(EmbeddingRows, 'flush', flush_twice)
            with pytest.raises(ValueError, match='has 28 rows, but there are 14 samp'):
                predict(path)
        assert not path.exists()
        # What was written is not taken for the rows of another run
        assert predict(path, overwrite=True).rows == 14

    def test_features_that_are_none(self, tmp_path: Path) -> None:
        class Silent(Identity):
            def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
                return None

        with pytest.raises(ValueError, match=r'got NoneType.*torchgeo-softcon embed'):
            predict(tmp_path / 'e.parquet', Silent())

    def test_two_processes(self, tmp_path: Path) -> None:
        path = tmp_path / 'e.parquet'
        trainer = make_trainer(
            tmp_path, callbacks=[EmbeddingWriter(path)], strategy='ddp_fork', devices=2
        )
        loader = DataLoader(Scenes(7), batch_size=2)
        trainer.predict(make_task(), loader, return_predictions=False)
        frame = pd.read_parquet(path).sort_values('index', ignore_index=True)
        assert frame['index'].tolist() == list(range(7))
        for i in range(7):
            assert np.array_equal(frame['label'][i], Scenes(7)[i]['label'].numpy())


class Windows:
    """What TorchGeo's datasets have."""

    crs = CRS.from_epsg(32633)


def slices(left: float = 500000, bottom: float = 5540000) -> Any:
    times = slice(pd.Timestamp('2021-06-30'), pd.Timestamp('2021-07-01'), 1)
    return slice(left, left + 640, 10), slice(bottom, bottom + 320, 10), times


class TestFootprints:
    def check(self, place: Any, tolerance: float = 1e-9) -> None:
        to_degrees = Transformer.from_crs(32633, 4326, always_xy=True)
        corners = to_degrees.transform([500000, 500640], [5540000, 5540320])
        west, south, east, north = place.outline.bounds
        assert west == pytest.approx(corners[0][0], abs=1e-5)
        assert east == pytest.approx(corners[0][1], abs=1e-5)
        assert south == pytest.approx(corners[1][0], abs=1e-5)
        assert north == pytest.approx(corners[1][1], abs=1e-5)
        assert place.crs == 'EPSG:32633'
        utc = datetime.UTC
        assert (
            abs(place.start - datetime.datetime(2021, 6, 30, tzinfo=utc)).seconds < 99
        )
        assert abs(place.stop - datetime.datetime(2021, 7, 1, tzinfo=utc)).seconds < 99

    def test_what_a_sampler_asks_for(self) -> None:
        (place,) = footprints({}, [slices()], Windows()) or []
        self.check(place)

    def test_bounds_and_crs_as_in_torchgeo_0_8(self) -> None:
        batch = {'bounds': [slices()], 'crs': [Windows.crs]}
        (place,) = footprints(batch, None, None) or []
        self.check(place)

    def test_bounds_as_in_torchgeo_0_10(self) -> None:
        x, y, t = slices()
        numbers = [x.start, x.stop, 10, y.start, y.stop, 10]
        numbers += [t.start.timestamp(), t.stop.timestamp(), 1]
        batch = {'bounds': torch.tensor([numbers])}
        (place,) = footprints(batch, [0], Windows()) or []
        self.check(place)

    def test_all_times_are_no_time(self) -> None:
        x, y, _ = slices()
        always = slice(pd.Timestamp.min, pd.Timestamp.max, 1)
        (place,) = footprints({}, [(x, y, always)], Windows()) or []
        assert place.start is place.stop is None

    def test_unknown(self) -> None:
        assert footprints({'image': torch.ones(1)}, [0], object()) is None
        # A place without its reference system is none
        assert footprints({'bounds': torch.ones(1, 9)}, [0], object()) is None


def test_footprints_make_it_geoparquet(tmp_path: Path) -> None:
    path = tmp_path / 'e.parquet'
    file = ResumableParquet(path, {})
    with file.open():
        for i, left in enumerate((400000, 500000)):
            places = footprints({}, [slices(left)], Windows())
            file.append('part', make_table([i], torch.ones(1, 3), places))
        file.join(2)
    frame = geopandas.read_parquet(path)
    assert CRS(frame.crs).equals(CRS('OGC:CRS84'))
    assert list(frame.columns) == [
        *('index', 'embedding', 'crs', 'start', 'stop', 'geometry')
    ]
    box = shapely.box(*frame.total_bounds)
    assert box.covers(frame.geometry).all()
    geo = json.loads(pq.read_schema(path).metadata[b'geo'])
    assert geo['columns']['geometry']['bbox'] == list(frame.total_bounds)
    projected = frame.geometry.to_crs(32633)
    assert projected[0].bounds == pytest.approx(
        (400000, 5540000, 400640, 5540320), abs=9
    )
