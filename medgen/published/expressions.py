"""Values that stand in a JSON file as Python text, such as "[100]*len(FACTORS)": worked out without running them. Used by options.py."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

ALLOWED = "numbers, True, False, lists, + - * /, len(...) and names of other options"
MOST_LETTERS = 500
MOST_ENTRIES = 100  # of a list
LARGEST = 1e15
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


class ExpressionError(ValueError):
    """What is wrong with a text, in words; the caller says of which option."""


def evaluate(text: str, value_of: Callable[[str], Any]) -> Any:
    """A number, True, False, or a list of such. `value_of`: another option's value. Raises ExpressionError for everything else."""
    if len(text) > MOST_LETTERS:
        raise ExpressionError(f"it has {len(text)} letters; allowed are {MOST_LETTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except UNREADABLE:
        raise ExpressionError(f"it is no expression; allowed are {ALLOWED}") from None
    return _value(tree.body, value_of)


def _value(node: ast.expr, value_of: Callable[[str], Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return checked(node.value)
    if isinstance(node, ast.Name):
        return value_of(node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return checked([_value(item, value_of) for item in node.elts])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _number(_value(node.operand, value_of), node)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp):
        return checked(_combined(node, _value(node.left, value_of), _value(node.right, value_of)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len" and len(node.args) == 1 and not node.keywords:
        counted = _value(node.args[0], value_of)
        if not isinstance(counted, list):
            raise ExpressionError(f"{ast.unparse(node)}: only a list has a length")
        return len(counted)
    raise ExpressionError(f"{ast.unparse(node)} is not worked out; allowed are {ALLOWED}")


def _combined(node: ast.BinOp, left: Any, right: Any) -> Any:
    """As Python has it: lists are joined by + and repeated by *."""
    if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(node.op, ast.Mult) and isinstance(left, list) != isinstance(right, list):
        entries, times = (left, right) if isinstance(left, list) else (right, left)
        if not isinstance(times, int) or isinstance(times, bool) or not 0 <= times * len(entries) <= MOST_ENTRIES:
            raise ExpressionError(f"{ast.unparse(node)}: a list is repeated by a whole number, to at most {MOST_ENTRIES} entries")
        return entries * times
    first, second = _number(left, node), _number(right, node)
    if isinstance(node.op, ast.Add):
        return first + second
    if isinstance(node.op, ast.Sub):
        return first - second
    if isinstance(node.op, ast.Mult):
        return first * second
    if isinstance(node.op, ast.Div):
        if second == 0:
            raise ExpressionError(f"{ast.unparse(node)} divides by zero")
        return first / second
    raise ExpressionError(f"{ast.unparse(node)} is not worked out; allowed are {ALLOWED}")


def _number(value: Any, node: ast.expr) -> float:
    """An int stays one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExpressionError(f"{ast.unparse(node)}: {value!r} is not a number")
    return value


def checked(value: Any) -> Any:
    """The value itself. Raises ExpressionError if it is too large to mean anything, or no number at all."""
    if isinstance(value, list) and len(value) > MOST_ENTRIES:
        raise ExpressionError(f"a list of {len(value)} entries; allowed are {MOST_ENTRIES}")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise ExpressionError("the number is larger than anything that it could mean")
    return value
