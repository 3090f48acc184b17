# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Declarations of this package, and how TorchGeo learns of them.

TorchGeo reads no entry points: a weight is known when it stands in a dict of
``torchgeo.models.api``, a task or a datamodule is known to the command line by its short
name when it has been imported. Nor does timm, which knows a model when it has been
registered. torch, on the other hand, calls every entry point of the
group ``torch.backends`` at the end of ``import torch``. Ours, :func:`autoload`, imports
nothing then (TorchGeo or Lightning may be half imported at that moment). It only asks to
be told when the modules of TorchGeo are complete, and acts at that time:

* a module that is complete is acted upon at once,
* a module that is not there yet is awaited by a finder in ``sys.meta_path``,
* a module that is being imported is watched, and acted upon at its first use after that.

What to do is read from the entry points of this distribution, so ``pyproject.toml`` is
the only list. Nothing in here may import anything but the standard library: an error in
a ``torch.backends`` entry point would make ``import torch`` fail.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import Enum, EnumType
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.metadata import EntryPoint

#: Set to 0 to keep the automatic activation off. Importing the package still activates.
AUTOLOAD_VARIABLE = 'TORCHGEO_SOFTCON_AUTOLOAD'

_DISTRIBUTION = 'torchgeo-softcon'
_PACKAGE = 'torchgeo_softcon'

#: Host modules, and the group of our entry points that each of them is waiting for.
#: `torchgeo.trainers` is the name of `torchgeo.tasks` before TorchGeo 0.10.
_TRIGGERS = {
    'timm': 'timm.models',
    'timm.models': 'timm.models',
    'torchgeo.models.api': 'torchgeo.weights',
    'torchgeo.models': 'torchgeo.weights',
    'torchgeo.datamodules': 'torchgeo.datamodules',
    'torchgeo.tasks': 'torchgeo.tasks',
    'torchgeo.trainers': 'torchgeo.tasks',
}

#: Host modules that our own modules import. While one of them is half imported, so that
#: it lacks most of its names, ours cannot be imported.
_HOSTS = (*_TRIGGERS, 'torchgeo.datasets')

#: How long a thread waits for the others, in seconds. Only a guard: a child forked in
#: that very moment has nobody to wait for.
_PATIENCE = 60


class _Loader:
    """A module loader that reports when its module has run."""

    def __init__(self, loader: 'Loader') -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        # get_source, is_package, ...: for those who look at the specification only
        if name == '_loader':  # a copy that is not initialized yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Restored before the module runs: nobody shall ever see this loader
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader

        name = module.__name__
        _executed.discard(name)
        self._loader.exec_module(module)
        _executed.add(name)

        if name in _TRIGGERS:
            with _changed:
                _wanted.add(_TRIGGERS[name])
        _settle()


class _Finder:
    """A finder that finds nothing itself, but wraps the loader of some modules."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        # Our own modules, too: see _is_ready
        if fullname not in _TRIGGERS and not fullname.startswith(f'{_PACKAGE}.'):
            return None

        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            find_spec = getattr(finder, 'find_spec', None)
            spec = find_spec and find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, 'exec_module'):
                    spec.loader = cast('Loader', _Loader(spec.loader))
                return cast(ModuleSpec, spec)
        return None


class _Watched(ModuleType):
    """Class of a host module, from its import until it has been acted upon."""

    def __getattribute__(self, name: str) -> Any:
        # The import system asks for dunder names in the middle of an import
        if not name.startswith('__'):
            _settle(wait=True)
        # Not super(): this may be an ordinary module again by now
        return ModuleType.__getattribute__(self, name)


_finder = _Finder()

#: Guards the three below. Never held during an import: the lock of a module and this
#: one, taken in opposite order by two threads, would block both for ever.
_changed = threading.Condition()

#: Groups to act upon as soon as possible.
_wanted: set[str] = set()

#: The thread that is acting, if any.
_owner: int | None = None

#: Modules that have run to their end, though the import system is not done with them.
_executed: set[str] = set()

_reported = False

#: Names that a host has as well, and has been told to have.
_yielded: set[str] = set()


def autoload() -> None:
    """Activate the plugin. torch calls this at the end of ``import torch``.

    Does nothing if the environment variable ``TORCHGEO_SOFTCON_AUTOLOAD`` is 0. Never
    raises.
    """
    if os.environ.get(AUTOLOAD_VARIABLE) != '0':
        install()
    elif _finder not in sys.meta_path:
        # To find this function, torch has imported the package. Forget that, so that an
        # explicit import by the user runs its code again, and activates
        for name in [*sys.modules]:
            if name == _PACKAGE or name.startswith(f'{_PACKAGE}.'):
                del sys.modules[name]


def install() -> None:
    """Tell TorchGeo what this package has, now or as soon as TorchGeo is imported.

    May be called from any thread and any number of times. Never raises.
    """
    try:
        with _changed:
            if _finder in sys.meta_path:
                return
            sys.meta_path.insert(0, cast(Any, _finder))
            _wanted.update(_TRIGGERS[name] for name in _TRIGGERS if name in sys.modules)
        _settle()
    except Exception as error:  # noqa: BLE001, `import torch` must not fail
        _report(error)


def install_unless_silenced() -> None:
    """Activate the plugin, because the package is being imported."""
    # Not if torch imports the package to call autoload(), and the user has opted out
    silenced = os.environ.get(AUTOLOAD_VARIABLE) == '0'
    if not (silenced and _is_half_imported('torch')):
        install()


def callbacks() -> list[Any]:
    """Return callbacks for each trainer of TorchGeo's tasks. Never raises.

    Lightning calls this entry point for each new trainer. There are none without
    TorchGeo's tasks, or if the user has opted out.
    """
    tasks = [name for name, group in _TRIGGERS.items() if group == 'torchgeo.tasks']
    if os.environ.get(AUTOLOAD_VARIABLE) == '0' or sys.modules.keys().isdisjoint(tasks):
        return []
    try:
        ours = import_module(f'{_PACKAGE}.callbacks')
        return [ours.ResizeForWeights(), ours.Terminal()]
    except Exception as error:  # noqa: BLE001, trainers must not fail because of this
        _report(error)
        return []


def declared() -> 'list[tuple[EntryPoint, str | None]]':
    """Load all entry points of this distribution, each with the reason why it fails."""
    result: list[tuple[EntryPoint, str | None]] = []
    for entry_point in sorted(_entry_points(), key=lambda e: (e.group, e.name)):
        error = None
        try:
            entry_point.load()
        except Exception as e:  # noqa: BLE001, the reason is in the result
            error = f'{type(e).__name__}: {e}'
        result.append((entry_point, error))
    return result


def why_inactive() -> str | None:
    """Tell why ``import torch`` does not activate the plugin, None if it does."""
    # We take nothing but 0 for a no, torch takes nothing but 1 for a yes
    if os.environ.get(AUTOLOAD_VARIABLE) == '0':
        return f'{AUTOLOAD_VARIABLE}=0'
    value = os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD', '1')
    if value != '1':
        return f'TORCH_DEVICE_BACKEND_AUTOLOAD={value}'
    if not any(e.group == 'torch.backends' for e in _entry_points()):
        return 'the package is not installed'
    return None


def _entry_points(group: str | None = None) -> 'list[EntryPoint]':
    """Return the entry points of this distribution, of one group or of all."""
    # Not needed in most programs, and slow to import unless torch has done so
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        entry_points = distribution(_DISTRIBUTION).entry_points
    except PackageNotFoundError:  # a source tree that is on the path only
        return []
    return [e for e in entry_points if group in (None, e.group)]


def _settle(wait: bool = False) -> None:
    """Act upon what is wanted, if imports allow it, or *wait* for other threads first."""
    global _owner
    me = threading.get_ident()
    with _changed:
        if _owner == me:  # an import made by the action below
            return
        # A thread that imports something holds a lock, which another one may need. It
        # must not wait: the modules stay watched, until they are used again.
        wait = wait and not _is_importing()
        end = time.monotonic() + _PATIENCE
        while _owner is not None or (_wanted and not _is_ready()):
            if not wait or time.monotonic() > end:
                _watch()
                return
            # Not every import ends with a notification
            _changed.wait(0.1)
        _owner = me

    try:
        while (group := _next()) and _act(group):
            pass
    finally:
        with _changed:
            _owner = None
            _watch()
            _changed.notify_all()


def _next() -> str | None:
    """Return the next group to act upon, None if all is done or it is too early."""
    with _changed:
        # An import may have failed after all
        _wanted.intersection_update(g for n, g in _TRIGGERS.items() if n in sys.modules)
        return min(_wanted) if _wanted and _is_ready() else None


def _act(group: str) -> bool:
    """Load and register the entry points of a group, and tell whether that is over.

    Doing it again, as after a reload of a host module, does no harm.
    """
    failure: Exception | None = None
    try:
        entry_points = _entry_points(group)
        if group == 'torchgeo.weights':  # which has a list of models, too
            entry_points += _entry_points('timm.models')
    except Exception as error:  # noqa: BLE001, damaged metadata
        entry_points, failure = [], error
    for entry_point in entry_points:
        try:
            value = entry_point.load()
            if group == 'torchgeo.weights' and isinstance(value, type):
                _register(value)
            elif group == 'torchgeo.weights':
                _register_builder(value)
            elif group == 'timm.models':
                _register_model(value)
        except Exception as error:  # noqa: BLE001, the reason is in the warning
            failure = failure or error

    with _changed:
        # Another thread has started to import the same, and the import system has given
        # one of us half a module to prevent a deadlock. No fault: act when it is done.
        if failure is not None and not _is_ready():
            return False
        _wanted.discard(group)
    if failure is not None:
        _report(failure)
    return True


class _Joint(EnumType):
    """Type of enums whose members are those of others, each the same object."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return any(instance is member for member in cls._member_map_.values())


def _join(first: type[Enum], members: Iterable[Enum]) -> type[Enum]:
    """Make an enum that looks like the *first* and has all *members*."""
    name, bases = first.__name__, (sys.modules['torchvision.models'].WeightsEnum,)
    joint: Any = _Joint(name, bases, _Joint.__prepare__(name, bases))
    joint.__module__ = first.__module__
    for member in members:
        setattr(joint, member.name, member)
        joint._member_names_.append(member.name)
        joint._member_map_[member.name] = member
    return cast(type[Enum], joint)


def _register(weights: type[Enum]) -> None:
    """Make the members of an enum known to TorchGeo by their names and by their model.

    Where TorchGeo has an enum for the model, ours come after its own members.
    """
    api = sys.modules['torchgeo.models.api']
    registry = api._model_weights
    # Callables are keys as well, but are not searched by name
    known = {str(m): m for k, e in registry.items() if isinstance(k, str) for m in e}
    new = [member for member in weights if known.get(str(member), member) is member]
    # TorchGeo takes the first member that matches, which is its own
    _yield('TorchGeo', [str(member) for member in weights if member not in new])
    model = next(iter(weights)).value.meta['model']
    for key in {model, api._model.get(model, model)}:
        theirs = registry.get(key)
        if theirs is None:
            registry[key] = weights
        elif not {*new} <= {*theirs}:
            registry[key] = _join(theirs, dict.fromkeys([*theirs, *new]))


def _register_builder(builder: Any) -> None:
    """Make a model, and the weights for it, known to TorchGeo."""
    api = sys.modules['torchgeo.models.api']
    name = builder.__name__
    if api._model.setdefault(name, builder) is not builder:
        _yield('TorchGeo', [name])
        return
    weights = [api.get_weight(weight) for weight in builder.weights]
    joint = _join(type(weights[0]), weights)
    api._model_weights.update({name: joint, builder: joint})


def _register_model(builder: Any) -> None:
    """Make a model known to timm by its name."""
    models = sys.modules['timm.models']
    name = builder.__name__
    if not models.is_model(name):
        models.register_model(builder)
    elif models.model_entrypoint(name) is not builder:
        _yield('timm', [name])


def _yield(host: str, names: list[str]) -> None:
    """Say once that the host has its own objects of these names."""
    names = [name for name in names if name not in _yielded]
    _yielded.update(names)
    if names:
        warnings.warn(
            f'{host} has its own {", ".join(names)}, which is used instead of that of '
            f'torchgeo-softcon. The latter is in {_PACKAGE}.models',
            UserWarning,
            stacklevel=2,
        )


def _watch() -> None:
    """Watch the host modules that have not been acted upon yet, and no others."""
    for name, group in _TRIGGERS.items():
        module = sys.modules.get(name)
        if module is not None and type(module) in (ModuleType, _Watched):
            module.__class__ = _Watched if group in _wanted else ModuleType


def _is_ready() -> bool:
    """Tell whether our own modules can be, or have been, imported completely.

    Siblings of one that is half imported, because it imports TorchGeo, must wait.
    """
    ours = (name for name in [*sys.modules] if name.startswith(f'{_PACKAGE}.'))
    return not any(_is_half_imported(name) for name in (*_HOSTS, *ours))


def _is_half_imported(name: str) -> bool:
    """Tell whether the code of a module is running right now, in any thread."""
    spec = getattr(sys.modules.get(name), '__spec__', None)
    return bool(getattr(spec, '_initializing', False)) and name not in _executed


def _is_importing() -> bool:
    """Tell whether this thread is in the middle of an import."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != '_find_and_load':
        frame = frame.f_back
    return frame is not None


def _report(error: Exception) -> None:
    """Say once that something is broken."""
    global _reported
    if _reported:
        return
    _reported = True
    message = (
        f'torchgeo-softcon could not be activated, got {error!r}. Run `torchgeo-softcon '
        f'list` to see what is broken, or set {AUTOLOAD_VARIABLE}=0 to silence this'
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # noqa: BLE001, the user's filter or display of warnings raises
        with suppress(Exception):
            print(message, file=sys.stderr)
