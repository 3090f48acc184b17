# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What encoders of timm can do in our tasks: the table of examples/README.md.

python -m tests.models.families    # writes it anew
"""

import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchgeo_softcon.models import create_encoder, feature_size, is_vit
from torchgeo_softcon.models.loading import nearest_vit
from torchgeo_softcon.modules.packing import can_pack, encode_crops

README = Path(__file__).parents[2] / 'examples' / 'README.md'
BEGIN, END = '<!-- made by tests/models/families.py -->', '<!-- end of it -->'

#: A small member of each family, which is a module of timm.
MEMBERS = {
    'beit': 'beit_base_patch16_224',
    'byoanet': 'eca_botnext26ts_256',
    'byobnet': 'test_byobnet',
    'cait': 'cait_xxs24_224',
    'coat': 'coat_tiny',
    'convit': 'convit_tiny',
    'convmixer': 'convmixer_768_32',
    'convnext': 'test_convnext',
    'cpubone': 'cpubone_nano',
    'crossvit': 'crossvit_tiny_240',
    'csatv2': 'csatv2',
    'cspnet': 'cs3darknet_focus_s',
    'cspnext': 'cspnext_tiny',
    'davit': 'davit_tiny',
    'deepseek_vit': 'deepseek_vit_412m',
    'deit': 'deit_tiny_patch16_224',
    'densenet': 'densenet121',
    'dla': 'dla34',
    'dpn': 'dpn48b',
    'edgenext': 'edgenext_xx_small',
    'efficientformer': 'efficientformer_l1',
    'efficientformer_v2': 'efficientformerv2_s0',
    'efficientnet': 'test_efficientnet',
    'efficientvim': 'efficientvim_m1',
    'efficientvit_mit': 'efficientvit_b0',
    'efficientvit_msra': 'efficientvit_m0',
    'eva': 'vit_tiny_patch16_dinov3_qkvb',
    'fasternet': 'fasternet_t0',
    'fastvit': 'fastvit_t8',
    'focalnet': 'focalnet_tiny_srf',
    'gcvit': 'gcvit_xxtiny',
    'gemma4_vit': 'gemma4_vit_167m',
    'ghostnet': 'ghostnet_050',
    'hardcorenas': 'hardcorenas_b',
    'hgnet': 'hgnetv2_b0',
    'hiera': 'hiera_tiny_224',
    'hieradet_sam2': 'sam2_hiera_tiny',
    'hrnet': 'hrnet_w18_small',
    'iformer': 'iformer_t',
    'inception_next': 'inception_next_atto',
    'inception_resnet_v2': 'inception_resnet_v2',
    'inception_v3': 'inception_v3',
    'inception_v4': 'inception_v4',
    'lcnetv2': 'lcnetv2_small',
    'levit': 'levit_192',
    'lowformer': 'lowformer_b0',
    'mambaout': 'test_mambaout',
    'maxxvit': 'test_coatnet',
    'metaformer': 'poolformer_s12',
    'mlp_mixer': 'gmixer_12_224',
    'mobilenetv3': 'mobilenetv3_small_050',
    'mobilenetv5': 'mobilenetv5_base',
    'mobilevit': 'mobilevit_xxs',
    'mvitv2': 'mvitv2_tiny',
    'naflexvit': 'naflexvit_base_patch16_gap',
    'nasnet': 'nasnetalarge',
    'nest': 'nest_tiny',
    'nextvit': 'nextvit_small',
    'nfnet': 'test_nfnet',
    'pit': 'pit_xs_224',
    'pnasnet': 'pnasnet5large',
    'pvt_v2': 'pvt_v2_b0',
    'qwen3_vit': 'qwen3_vit_88m',
    'rdnet': 'rdnet_tiny',
    'regnet': 'regnetx_002',
    'repghost': 'repghostnet_050',
    'repvit': 'repvit_m1',
    'res2net': 'res2net50_26w_4s',
    'resnest': 'resnest14d',
    'resnet': 'test_resnet',
    'resnetv2': 'resnetv2_18',
    'rexnet': 'rexnet_100',
    'selecsls': 'selecsls42',
    'senet': 'legacy_seresnet18',
    'sequencer': 'sequencer2d_s',
    'shvit': 'shvit_s1',
    'sknet': 'skresnet18',
    'starnet': 'starnet_s050',
    'swiftformer': 'swiftformer_xs',
    'swin_transformer': 'swin_tiny_patch4_window7_224',
    'swin_transformer_v2': 'swinv2_tiny_window8_256',
    'swin_transformer_v2_cr': 'swinv2_cr_tiny_224',
    'tiny_vit': 'tiny_vit_5m_224',
    'tnt': 'tnt_s_legacy_patch16_224',
    'tresnet': 'tresnet_m',
    'twins': 'twins_svt_small',
    'vgg': 'vgg11',
    'visformer': 'visformer_tiny',
    'vision_transformer': 'test_vit',
    'vision_transformer_hybrid': 'vit_tiny_r_s16_p8_224',
    'vision_transformer_relpos': 'test_vit_relpos',
    'vision_transformer_sam': 'samvit_base_patch16_224',
    'vitamin': 'vitamin_small_224',
    'volo': 'volo_d1_224',
    'vovnet': 'ese_vovnet19b_slim_dw',
    'xception': 'legacy_xception',
    'xception_aligned': 'xception41p',
    'xcit': 'xcit_nano_12_p8_224',
}


def _accepts(name: str, encoder: nn.Module, sizes: tuple[int, ...]) -> bool:
    """Whether an encoder takes crops of these sizes, as the tasks find out."""
    try:
        for size in sizes:
            feature_size(encoder, 3, size, lambda x: encode_crops(encoder, [x])[0])
    except ValueError as error:
        if not (name in str(error) and nearest_vit(name) in str(error)):
            raise RuntimeError(
                'a refusal names the model and one that works'
            ) from error
        return False
    return True


def abilities(name: str, meta: bool = False) -> tuple[str, str, str]:
    """Tell of `mask_mode: drop` (and `token`), of `pixel`, and of crops."""
    with torch.device('meta') if meta else nullcontext():
        encoder: Any = create_encoder(name)
        native = encoder.pretrained_cfg['input_size'][-1]
        pixel = _accepts(name, encoder, (native,))
        crops = _accepts(name, encoder, (224, 184, 84))
    words = ('no', 'yes')
    how = 'packed' if can_pack(encoder) else 'by size'
    return words[is_vit(encoder)], words[pixel], how if crops else 'no'


def abilities_of_all(
    families: Iterable[str] = MEMBERS,
) -> dict[str, tuple[str, str, str]]:
    """Tell it of each family, without memory for parameters where that is possible."""
    found = {}
    for family in families:
        name = MEMBERS[family]
        with suppress(NotImplementedError, RuntimeError):
            found[family] = abilities(name, meta=True)
        if (
            'no' in found.get(family, ('no', 'no'))[1:]
        ):  # which the device may be to blame for
            found[family] = abilities(name)
        print(family, *found[family], file=sys.stderr, flush=True)
    return found


def write(found: dict[str, tuple[str, str, str]]) -> str:
    """Write the table: families that can do the same in one row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for family, able in sorted(found.items()):
        text = f'`{family}`'
        if able[2] == 'no':
            text += f' (rather `{nearest_vit(MEMBERS[family])}`)'
        rows.setdefault(able, []).append(text)
    lines = [
        '| families of timm | `mask_mode: drop`, `token` | `pixel` | crops of DINO-MC |',
        '|---|---|---|---|',
    ]
    for able, families in sorted(
        rows.items(), key=lambda row: (row[0], row[1]), reverse=True
    ):
        lines.append(f'| {", ".join(families)} | {" | ".join(able)} |')
    return '\n'.join(lines)


def read() -> dict[str, tuple[str, str, str]]:
    """Read the table."""
    table = README.read_text().partition(BEGIN)[2].partition(END)[0]
    found = {}
    for row in table.strip().splitlines()[2:]:
        families, *able = (cell.strip() for cell in row.strip('|').split('|'))
        for family in re.findall(r'(?<!rather )`(\w+)`', families):
            found[family] = (able[0], able[1], able[2])
    return found


if __name__ == '__main__':
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f'{before}{BEGIN}\n{write(abilities_of_all())}\n{END}{after}')
