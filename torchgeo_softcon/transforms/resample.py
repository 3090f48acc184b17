# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Views of images through matrices: crops, flips, blur and colours as one product."""

import torch
from torch import Tensor

#: Rows or columns of a view that a CPU makes at once.
_BLOCK = 48


@torch.no_grad()
def resample(
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    colours: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Resample images, and mix their bands.

    Each view is ``matrix @ (rows @ image @ columns.T) + offset``. A pixel that is not
    finite may spoil the whole view.

    Args:
        image: Images of shape (B, C, H, W), float32.
        rows: Matrix of the rows of each view, shape (B, h, H).
        columns: Matrix of the columns of each view, shape (B, w, W). Its rows sum to 1.
        colours: A *matrix* of shape (B, C, C) and an *offset* of shape (B, C, 1) for the
            bands. None changes nothing.

    Returns:
        Views of shape (B, C, h, w), without gradients.
    """
    form = resample_blocks if image.device.type == 'cpu' else resample_batch
    return form(image, rows, columns, colours)


def resample_batch(
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    colours: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Resample the whole batch at once: nothing waits. As :func:`resample`."""
    # Of all bands at once, so that the matrices need not be repeated for each
    lines = (image.flatten(1, 2) @ columns.mT).unflatten(1, image.shape[1:3])
    view = rows[:, None] @ lines
    if colours is None:
        return view
    matrix, offset = colours
    return torch.baddbmm(offset, matrix, view.flatten(2)).view_as(view)


def resample_blocks(
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    colours: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Resample without the zeros, which are most of a matrix. As :func:`resample`.

    Several times faster on a CPU: of each block of rows or columns of a view, only the
    pixels of the image that contribute to it are read, image by image, so that the cache
    holds what is at hand.
    """
    bands, height, width = image.shape[1], rows.shape[1], columns.shape[1]
    view = image.new_empty(len(image), bands, height, width)
    # A band of ones has the offset as its weight, which saves a pass over the view
    affine = None if colours is None else torch.cat(colours, 2)
    parameters = zip(_blocks(rows), _blocks(columns), strict=True)
    for i, (row_blocks, column_blocks) in enumerate(parameters):
        left = min(low for _, _, low, _ in column_blocks)
        right = max(high for _, _, _, high in column_blocks)
        box = image[i, ..., left:right]
        lines = image.new_empty(bands + 1, height, right - left)
        for start, stop, low, high in row_blocks:
            weight = rows[i, start:stop, low:high].expand(bands, -1, -1)
            torch.bmm(weight, box[:, low:high], out=lines[:bands, start:stop])
        if affine is not None:
            # Here already: the offset survives, as the rows of *columns* sum to 1
            lines[bands] = 1
            lines = (affine[i] @ lines.flatten(1)).view_as(lines[:bands])
        lines, pixels = lines[:bands].flatten(0, 1), view[i].flatten(0, 1)
        for start, stop, low, high in column_blocks:
            weight = columns[i, start:stop, low:high].T
            read = lines[:, low - left : high - left]
            torch.mm(read, weight, out=pixels[:, start:stop])
    return view


def _blocks(matrices: Tensor) -> list[list[tuple[int, int, int, int]]]:
    """Find blocks of rows, and the columns between which each one is not zero."""
    size, pixels = matrices.shape[1:]
    starts = range(0, size, _BLOCK)
    blocks = [matrices[:, start : start + _BLOCK].abs().amax(1) > 0 for start in starts]
    used = torch.stack(blocks, 1).byte()  # (B, blocks, N)
    low, high = used.argmax(2), pixels - used.flip(2).argmax(2)
    return [
        [
            (s, min(s + _BLOCK, size), *span)
            for s, span in zip(starts, spans, strict=True)
        ]
        for spans in torch.stack([low, high], 2).tolist()
    ]


def means(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute the means (B, C) of the bands of the views that :func:`resample` gives."""
    row, column = rows.mean(1, keepdim=True), columns.mean(1, keepdim=True)
    return resample(image, row, column).flatten(1)
