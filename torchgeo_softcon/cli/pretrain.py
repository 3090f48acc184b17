# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretrain on whatever a folder holds: ``torchgeo-softcon pretrain``."""

import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .parsers import CommandParser
from .report import last_checkpoint
from .report import main as report

#: Name of the configuration in the folder of a run.
_CONFIG = 'config.yaml'

_OPTIONS = {
    '--out DIR': 'folder of the run, runs/NAME by default',
    '--worldcover DIR': 'tiles of ESA WorldCover, if they are not in the folder',
    '--download': 'get missing tiles of ESA WorldCover under scenes (some 50 MB each)',
    '--dry-run': 'write the configuration, do not train',
}


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        'pretrain',
        'Pretrain an encoder on the images in a folder: scenes, also packed, SSL4EO-S12 in any\n'
        'form, or patches with masks. Says what is there and what it chooses, writes that to\n'
        'RUN/config.yaml for `torchgeo fit`, trains, and ends with a verdict and a report.\n'
        'Goes on with a run that exists. All other options are those of `torchgeo fit`,\n'
        'such as --model.size 96 and --trainer.max_steps 1000.',
        'torchgeo-softcon pretrain images --download',
        allow_abbrev=False,
        usage='%(prog)s DIR [OPTIONS]',
    )
    parser.add_argument('dir', type=Path, metavar='DIR', help='folder with images')
    parser.add_options(_OPTIONS)
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options, others = parser().parse_known_args(args)
    run = options.out or Path('runs') / options.dir.resolve().name
    config_file = run / _CONFIG
    if config_file.exists():
        if others:
            raise ValueError(
                f'{run} exists, and goes on as it was begun: leave out {others[0]}, or give '
                'another --out'
            )
        config = yaml.safe_load(config_file.read_text(encoding='utf-8'))
        config.pop('ckpt_path', None)  # of a run that was killed
        print(f'{run} exists: going on with it')
    else:
        changes = _changes(others)
        if not options.dir.is_dir():
            raise ValueError(f'{options.dir} does not exist, or is not a folder')
        # Not before: help must not wait for it
        from .pretrain_plan import find_data, plan

        found = find_data(options.dir, options.worldcover, options.download, run)
        print(f'{options.dir} has {found.text}')
        config, reasons = plan(found, changes.get('trainer.max_steps'))
        print(*reasons, sep='\n')
        if changes:
            print('As asked:', ', '.join(f'{k} = {v}' for k, v in changes.items()))
        logger = {'save_dir': str(run), 'name': '', 'version': ''}
        config['trainer']['logger']['init_args'] = logger
        _merge(config, changes)
    text = yaml.safe_dump(config, sort_keys=False)
    run.mkdir(parents=True, exist_ok=True)
    config_file.write_text(text, encoding='utf-8')
    print(f'This run is `torchgeo fit --config {shlex.quote(str(config_file))}`')
    if options.dry_run:
        return 0
    try:
        _train(run, config)
    finally:
        # Lightning writes all options there, and the checkpoint that it went on from
        config_file.write_text(text, encoding='utf-8')
    return _finish(run)


def _changes(args: Sequence[str]) -> dict[str, Any]:
    """Read options of ``torchgeo fit``: values by their names."""
    changes: dict[str, Any] = {}
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition('=')
        if not name.startswith(
            ('--model.', '--data.', '--trainer.', '--seed_everything')
        ):
            raise ValueError(
                f'{name} is not an option. See torchgeo-softcon pretrain --help'
            )
        given = value if equals else next(rest, None)
        if given is None:
            raise ValueError(f'{name} needs a value')
        changes[name.removeprefix('--')] = yaml.safe_load(given)
    return changes


def _merge(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set values in a configuration by names such as model.size."""
    for name, value in changes.items():
        *path, last = name.split('.')
        if path and path[0] != 'trainer' and path[1:] != ['init_args']:
            path.insert(1, 'init_args')
        section = config
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value


def _train(run: Path, config: Mapping[str, Any]) -> None:
    """Train, from the last checkpoint if there is one."""
    from .._compat import host_main
    from ..models.checkpoints import read_checkpoint

    args = ['fit', '--config', str(run / _CONFIG)]
    checkpoint = last_checkpoint(run)
    if checkpoint is not None:
        step = read_checkpoint(checkpoint)['global_step']
        if step >= config['trainer']['max_steps']:
            print(f'{checkpoint} is of the last step')
            return
        print(f'Going on from step {step}')
        args += ['--ckpt_path', checkpoint]
        # The logger would delete what was logged until now
        if (log := run / 'metrics.csv').exists():
            log.rename(run / f'metrics-until-{step}.csv')
    # Logs that a checkpoint goes on from have another name by now
    warnings.filterwarnings('ignore', '.*Experiment logs directory')
    host_main(args)


def _finish(run: Path) -> int:
    """Write the report of a run, and say what it means and how to go on."""
    status = report([str(run)])
    checkpoint = last_checkpoint(run)
    if checkpoint is not None:
        name = shlex.quote(checkpoint)
        print(
            'Next:\n'
            f'  torchgeo-softcon embed --checkpoint {name} --out embeddings.parquet\n'
            f'  torchgeo-softcon export {name} --format timm'
        )
    return status
