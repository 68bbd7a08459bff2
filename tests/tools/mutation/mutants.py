"""Small changes to a module, one at a time: the operators of mutmut, in every function, decorated or not.

Strings (nearly all are error messages), annotations, decorators and code outside functions are not changed.
"""

import gc
import sys
import types
from pathlib import Path
from typing import NamedTuple

import libcst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

OPERATORS = [(kind, operator) for kind, operator in mutation_operators if operator is not operator_string]


class Mutant(NamedTuple):
    """One change."""

    path: Path
    lines: tuple[int, int]
    """The first and the last line of the changed code."""
    column: int
    function: tuple[int, int]
    """The first and the last line of the outermost function around it."""
    before: str
    after: str
    source: str
    """The whole source of the changed module."""

    def __str__(self):
        return f"{self.path.name}:{self.lines[0]}  {self.before}  ->  {self.after}"


class _Places(libcst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self):
        super().__init__()
        self.found, self._functions = [], []

    def on_visit(self, node):
        if isinstance(node, libcst.Annotation | libcst.Decorator):
            return False
        place = self.get_metadata(PositionProvider, node, None)
        if isinstance(node, libcst.FunctionDef):
            self._functions.append((place.start.line, place.end.line))
        if self._functions and place:
            changes = (new for kind, change in OPERATORS if isinstance(node, kind) for new in change(node))
            self.found += [(node, new, place, self._functions[0]) for new in changes]
        return True

    def on_leave(self, original_node):
        if isinstance(original_node, libcst.FunctionDef):
            self._functions.pop()


def mutants(path):
    """Yield all changes to a file after which it still compiles."""
    wrapper, places = MetadataWrapper(libcst.parse_module(path.read_text())), _Places()
    module = wrapper.module
    wrapper.visit(places)
    seen = set()
    for node, new, place, function in places.found:
        before, after = (" ".join(module.code_for_node(n).split()) for n in (node, new))
        source = module.deep_replace(node, new).code
        if before != after and source not in seen and _compiles(source):
            seen.add(source)
            yield Mutant(path, (place.start.line, place.end.line), place.start.column, function, before, after, source)


def _compiles(source):
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def apply(mutant):
    """Replace the code of the functions of the imported module, wherever they have been imported to."""
    package = "klquant" if mutant.path.parent.name == "klquant" else f"klquant.{mutant.path.parent.name}"
    module = sys.modules[f"{package}.{mutant.path.stem}".removesuffix(".__init__")]
    fresh = types.ModuleType(module.__name__)
    fresh.__dict__.update({name: getattr(module, name) for name in ("__file__", "__package__", "__spec__")})
    exec(compile(mutant.source, str(mutant.path), "exec"), fresh.__dict__)  # noqa: S102
    functions = [f for f in gc.get_objects() if type(f) is types.FunctionType]  # isinstance wakes lazy objects
    new = {f.__code__.co_qualname: f for f in functions if f.__globals__ is fresh.__dict__}
    codes = {name: code for f in new.values() for name, code in _codes(f.__code__)}
    for f in (f for f in functions if f.__globals__ is module.__dict__):
        name = f.__code__.co_qualname
        if name in new:
            f.__defaults__, f.__kwdefaults__ = new[name].__defaults__, new[name].__kwdefaults__
        if name in codes and len(codes[name].co_freevars) == len(f.__code__.co_freevars):
            f.__code__ = codes[name]


def _codes(code):
    yield code.co_qualname, code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)
