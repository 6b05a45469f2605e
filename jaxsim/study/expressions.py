"""Arithmetic over the fields of a scenario, for derived fields and constraints: "8 // engine.tensor_parallel_size"."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from jaxsim._core.errors import InputError

_BINARY: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
_UNARY: dict[type, Callable] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_COMPARE: dict[type, Callable] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}
FUNCTIONS: dict[str, Callable] = {
    "min": min, "max": max, "abs": abs, "round": round, "int": int, "floor": math.floor, "ceil": math.ceil,
    "sqrt": math.sqrt, "log2": math.log2, "log10": math.log10}
"""What an expression may call."""

LARGEST_POWER = 64
"""Exponents beyond are refused: they would take the machine's memory, not a field's value."""


class Expression:
    """A formula over dotted fields; `fields` are those it reads."""

    def __init__(self, text: str, where: str):
        """`where` names it in errors. Raises `InputError` for what is not arithmetic."""
        self.text, self.where = text, where
        if not isinstance(text, str):
            raise self._wrong("is not text")
        try:
            self._tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._wrong("is not an expression") from None
        self.fields: set[str] = set()
        self._check(self._tree)

    def _wrong(self, problem: str) -> InputError:
        return InputError(self.where, self.text, problem,
                          "write arithmetic, comparisons, and, or, not, if ... else over fields, with "
                          + ", ".join(FUNCTIONS))

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Name, ast.Attribute)):
            self.fields.add(self._dotted(node))
            return
        children: list[ast.AST]
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool)):
            return
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            children = [node.left, node.right]
        elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            children = [node.operand]
        elif isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
            children = [node.left, *node.comparators]
        elif isinstance(node, ast.BoolOp):
            children = node.values
        elif isinstance(node, ast.IfExp):
            children = [node.test, node.body, node.orelse]
        elif isinstance(node, (ast.List, ast.Tuple)):
            children = node.elts
        elif (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
              and not node.keywords):
            children = node.args
        else:
            raise self._wrong(f"holds {type(node).__name__}, which is not arithmetic")
        for child in children:
            self._check(child)

    def _dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        raise self._wrong("reads something that is no field")

    def __call__(self, field: Callable[[str], Any]) -> Any:
        """Its value; `field` gives the value of a dotted name. Raises `InputError`."""
        try:
            return self._value(self._tree, field)
        except InputError:
            raise
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise self._wrong(f"cannot be computed ({error})") from None

    def _value(self, node: ast.AST, field: Callable[[str], Any]) -> Any:
        if isinstance(node, (ast.Name, ast.Attribute)):
            return field(self._dotted(node))
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BinOp):
            left, right = self._value(node.left, field), self._value(node.right, field)
            if isinstance(node.op, ast.Pow) and abs(right) > LARGEST_POWER:
                raise self._wrong(f"raises to a power beyond {LARGEST_POWER}")
            return _BINARY[type(node.op)](left, right)
        if isinstance(node, ast.UnaryOp):
            return _UNARY[type(node.op)](self._value(node.operand, field))
        if isinstance(node, ast.Compare):
            left = self._value(node.left, field)
            for op, comparator in zip(node.ops, node.comparators, strict=True):
                right = self._value(comparator, field)
                if not _COMPARE[type(op)](left, right):
                    return False
                left = right
            return True
        if isinstance(node, ast.BoolOp):
            is_all = isinstance(node.op, ast.And)
            for each in node.values:
                if bool(self._value(each, field)) != is_all:
                    return not is_all
            return is_all
        if isinstance(node, ast.IfExp):
            return self._value(node.body if self._value(node.test, field) else node.orelse, field)
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self._value(each, field) for each in node.elts]
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        return FUNCTIONS[node.func.id](*(self._value(each, field) for each in node.args))
