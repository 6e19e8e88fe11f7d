"""The planner as one page without a network: the formulas translated to JavaScript, the constants written in.

The formulas of cost/formulas.py keep to a few kinds of Python, so the page's code is derived from them line by line
and cannot drift; page.html holds only what is the page's own: sliders, bars, contours.
"""

import ast
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from parscale.cost import formulas
from parscale.cost.hardware import HARDWARE
from parscale.cost.model import BANDWIDTH_EFFICIENCY, DTYPES, FLOPS_EFFICIENCY, PAPER_SHAPES, Workload
from parscale.errors import InputError
from parscale.law.fit import fit, law_of
from parscale.law.planner import PAPER_TOKENS, SECOND_STAGE, STREAMS, Search
from parscale.law.runs import CORPORA, paper
from parscale.utils.files import write_text

_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_COMPARISONS = {ast.Gt: ">", ast.GtE: ">=", ast.Lt: "<", ast.LtE: "<=", ast.Eq: "==="}


def write_page(path: str | Path) -> Path:
    """Write the page to `path` (.html), whole or not at all."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"page {str(path)!r} has no suffix of a page: name it .html")
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    page = template.replace("/*FORMULAS*/", to_javascript(formulas)).replace("/*CONSTANTS*/", _constants())
    return write_text(path, page)


def to_javascript(module: ModuleType) -> str:
    """Every function of a module of formulas as JavaScript. ValueError for a kind of Python that is not arithmetic."""
    tree = ast.parse(inspect.getsource(module))
    return "\n".join(_function(node) for node in tree.body if isinstance(node, ast.FunctionDef))


def _constants() -> str:
    """What the page knows, as one JavaScript object."""
    low, high = _range()
    known: dict[str, Any] = {
        "laws": {corpus: _law(corpus) for corpus in CORPORA},
        "hardware": {name: vars(machine) for name, machine in HARDWARE.items()},
        "dtypes": DTYPES,
        "efficiency": {"flops": FLOPS_EFFICIENCY, "bandwidth": BANDWIDTH_EFFICIENCY},
        "prefix": Workload().prefix_tokens,
        "streams": STREAMS,
        "params": {"low": low, "high": high},
        "sizes": {name: shape.params() for name, shape in PAPER_SHAPES.items()},
        "tokens": PAPER_TOKENS,
        "second_stage": SECOND_STAGE,
    }
    return f"const KNOWN = {json.dumps(known)};"


def _law(corpus: str) -> dict[str, float]:
    runs = paper(corpus)
    sizes = [row["params"] for row in runs]
    return fit(runs).coefficients | {"low": min(sizes), "high": max(sizes), "streams": max(r["streams"] for r in runs)}


def _range() -> tuple[float, float]:
    any_budgets: Any = None
    return Search(law_of(CORPORA[0]), Workload(), HARDWARE["a100-80g"], any_budgets, PAPER_TOKENS).range()


def _function(node: ast.FunctionDef) -> str:
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = "\n".join(f"  {_statement(statement)}" for statement in statements)
    return f"function {node.name}({', '.join(a.arg for a in node.args.args)}) {{\n{lines}\n}}"


def _statement(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return f"const {node.targets[0].id} = {_expression(node.value)};"
    if isinstance(node, ast.Return) and node.value is not None:
        return f"return {_expression(node.value)};"
    raise ValueError(f"line {node.lineno} of the formulas is no assignment and no return: {ast.unparse(node)}")


def _expression(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str() | int() | float()):
            return json.dumps(node.value)
        case ast.Name():
            return node.id
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return f"({_expression(node.left)} {_OPERATORS[type(node.op)]} {_expression(node.right)})"
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            return f"({_expression(node.left)} {_COMPARISONS[type(op)]} {_expression(node.comparators[0])})"
        case ast.IfExp():
            return f"({_expression(node.test)} ? {_expression(node.body)} : {_expression(node.orelse)})"
        case ast.Subscript():
            return f"{_expression(node.value)}[{_expression(node.slice)}]"
        case ast.Call(func=ast.Name(id=name)) if not node.keywords:
            arguments = ", ".join(_expression(argument) for argument in node.args)
            return f"{'Math.max' if name == 'max' else name}({arguments})"
        case ast.Dict():
            pairs = (f"{_expression(k)}: {_expression(v)}" for k, v in zip(node.keys, node.values) if k is not None)
            return f"{{{', '.join(pairs)}}}"
    raise ValueError(f"line {node.lineno} of the formulas is not plain arithmetic: {ast.unparse(node)}")
