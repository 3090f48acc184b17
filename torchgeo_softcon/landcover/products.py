# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The land-cover products that are known: those here, registered ones, and YAML files."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._checks import require
from .product import LandCoverClass, LandCoverProduct
from .tiles import TileGrid

#: A product, its name, or the path of its YAML file.
ProductLike = str | os.PathLike[str] | LandCoverProduct

_PRODUCTS: dict[str, LandCoverProduct] = {}


def register(product: LandCoverProduct) -> LandCoverProduct:
    """Make a product known by its name in this process, and return it.

    Raises:
        ValueError: If another product has this name, or if a mapping is to an unknown
            product or code.
    """
    known = _PRODUCTS.get(product.name, product)
    require(
        known == product,
        f'name must be unique, got {product.name!r}, which is {known.title!r}: choose '
        'another name',
    )
    _PRODUCTS[product.name] = _check_targets(product)
    return product


def find_product(product: ProductLike) -> LandCoverProduct:
    """Return a product by its name, or from its YAML file.

    Args:
        product: Name of a product that is known, path of a file that ends in .yaml or
            .yml, or a product, which is returned.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the name is unknown, or the file invalid.
    """
    if isinstance(product, LandCoverProduct):
        return _check_targets(product)
    name = os.fspath(product)
    if name.lower().endswith(('.yaml', '.yml')):
        return _read(name)
    require(
        name in _PRODUCTS,
        f'product must be one of {", ".join(_PRODUCTS)} or a .yaml file, got {name!r}: '
        'describe it in a file, or register it',
    )
    return _PRODUCTS[name]


def find_legend(
    product: LandCoverProduct, name: str | None = None
) -> tuple[LandCoverProduct, Mapping[int, int]]:
    """Return the classes to count the pixels of a product in, and the codes in them.

    *name* is that of the product or of one that it has a mapping to. The codes are in the
    order of *product*, by its own.
    """
    if name in (None, product.name):
        return product, {code: code for code in product.codes}
    known = ', '.join([product.name, *product.mappings])
    require(name in product.mappings, f'classes must be one of {known}, got {name!r}')
    mapping = product.mappings[str(name)]
    return _PRODUCTS[str(name)], {code: mapping[code] for code in product.codes}


def _check_targets(product: LandCoverProduct) -> LandCoverProduct:
    """Refuse mappings to products and codes that are unknown."""
    for name, mapping in product.mappings.items():
        require(
            name in _PRODUCTS,
            f'mappings must be to {" or ".join(_PRODUCTS)}, got {name!r}: register that '
            'product first',
        )
        codes = _PRODUCTS[name].codes
        for code, target in mapping.items():
            require(
                target in codes,
                f'mappings.{name}.{code} must be a code of {name}, got {target!r}: choose '
                f'one of {", ".join(map(str, codes))}',
            )
    return product


def _read(path: str | os.PathLike[str]) -> LandCoverProduct:
    """Read a YAML file whose keys are those of :class:`.LandCoverProduct`."""
    try:
        with open(path, encoding='utf-8') as file:
            values = _check_keys(
                'the file', yaml.load(file, _UniqueKeys), LandCoverProduct
            )
        if isinstance(values['classes'], list):
            values['classes'] = [
                LandCoverClass(**_check_keys(f'classes[{i}]', one, LandCoverClass))
                for i, one in enumerate(values['classes'])
            ]
        if values.get('tiles') is not None:
            values['tiles'] = TileGrid(
                **_check_keys('tiles', values['tiles'], TileGrid)
            )
        return _check_targets(LandCoverProduct(**values))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f'{path}: {error}') from error


class _UniqueKeys(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):  # type: ignore[misc]
    """Loads YAML, and refuses keys that come twice instead of taking the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            require(
                key.value not in seen,
                f'the key {key.value} comes twice, again in line '
                f'{key.start_mark.line + 1}: keep one of them',
            )
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


def _check_keys(where: str, content: Any, kind: Any) -> dict[str, Any]:
    """Return a mapping with the keys of a data class, or refuse it."""
    known = inspect.signature(kind).parameters
    needed = [key for key, one in known.items() if one.default is one.empty]
    require(
        isinstance(content, dict),
        f'{where} must be a mapping with {", ".join(needed)}, got {content!r}',
    )
    for key in content:
        require(
            key in known,
            f'{where} has the unknown key {key!r}: keys are {", ".join(known)}',
        )
    for key in needed:
        require(
            key in content,
            f'{where} must have the key {key!r}, got {content!r}: add it',
        )
    return dict(content)


#: Land cover in near real time by Google, at 10 m. Its codes are 0 to 8.
DYNAMICWORLD = register(_read(Path(__file__).with_name('dynamicworld.yaml')))

#: ESA WorldCover, of 2020 and 2021 at 10 m.
WORLDCOVER = register(_read(Path(__file__).with_name('worldcover.yaml')))

#: Class codes of ESA WorldCover in ordinal order, 0 is no data.
WORLDCOVER_CODES = WORLDCOVER.codes

# Those whose classes have mappings to the ones above. The layer LULC of SSL4EO-S12 v1.1 is
# that of esri
for _name in ('esri', 'lcm10', 'cgls', 'corine'):
    register(_read(Path(__file__).with_name(f'{_name}.yaml')))
