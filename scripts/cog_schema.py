"""Writes .cog/openapi_schema.json from predict.py, which Cog's server needs and only `cog build` makes otherwise.

Like Cog's own generator this reads the source and never imports it.
"""

import argparse
import ast
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVELOPE = Path(__file__).with_name("cog_schema.json")  # what is the same for every predictor, from Cog 0.23

TYPES: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "dict": {"type": "object"},
    "Path": {"type": "string", "format": "uri"},
}
KEYWORDS = {  # of Input(), as in the schema
    "description": "description",
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "accept": "x-cog-accept",
}


def schema(source: str) -> dict[str, Any]:
    """The OpenAPI schema of a predictor's source code.

    Raises:
        ValueError: it uses what this project has not needed so far.
    """
    module = ast.parse(source)
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    predict = next(
        node for node in classes["Predictor"].body if isinstance(node, ast.FunctionDef) and node.name == "predict"
    )
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    result = json.loads(ENVELOPE.read_text())
    components = result["components"]["schemas"]
    properties: dict[str, Any] = {}
    required = []
    arguments = predict.args.args[1:]
    for order, (argument, call) in enumerate(zip(arguments, predict.args.defaults, strict=True)):
        options = _options(call, constants)
        choices = options.pop("choices", None)
        if choices:
            components[argument.arg] = _enumeration(argument.arg, choices)
            kind: dict[str, Any] = {"allOf": [{"$ref": f"#/components/schemas/{argument.arg}"}]}
        else:
            kind = {**_type(argument.annotation), "title": argument.arg.replace("_", " ").title()}
        if "default" not in options:
            required.append(argument.arg)
        elif options["default"] is None:
            kind["nullable"] = True
        properties[argument.arg] = {**kind, **options, "x-order": order}
    components["Input"] = {"title": "Input", "type": "object", "properties": properties}
    if required:
        components["Input"]["required"] = required
    components["Output"] = _output(predict.returns, classes)
    if any(isinstance(decorator, ast.Name) and decorator.id == "streaming" for decorator in predict.decorator_list):
        result["paths"]["/predictions"]["post"]["x-cog-streaming"] = True
    return result


def _options(call: ast.expr, constants: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Input(...), named as in the schema; literals and constants of the same file only."""
    assert isinstance(call, ast.Call)
    options = {}
    for keyword in call.keywords:
        name, value = str(keyword.arg), keyword.value
        literal = constants[value.id] if isinstance(value, ast.Name) else ast.literal_eval(value)
        options[KEYWORDS.get(name, name)] = literal
    return options


def _type(annotation: ast.expr | None) -> dict[str, Any]:
    match annotation:
        case ast.Name(id=name) if name in TYPES:
            return dict(TYPES[name])
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return {"type": "array", "items": _type(item)}
        case ast.Subscript(value=ast.Name(id="Optional"), slice=item):
            return _type(item)
    raise ValueError(f"no schema for the annotation {ast.unparse(annotation) if annotation else None}")


def _enumeration(name: str, choices: list[str]) -> dict[str, Any]:
    return {"title": name, "type": "string", "description": "An enumeration.", "enum": choices}


def _output(annotation: ast.expr | None, classes: dict[str, ast.ClassDef]) -> dict[str, Any]:
    """Iterator[M], where M is a model of the same file."""
    assert isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Name)
    fields = [node for node in classes[annotation.slice.id].body if isinstance(node, ast.AnnAssign)]
    properties = {ast.unparse(field.target): _type(field.annotation) for field in fields}
    for name, kind in properties.items():
        kind["title"] = name.replace("_", " ").title()
    items = {"type": "object", "properties": properties, "required": list(properties)}
    return {"title": "Output", "type": "array", "items": items, "x-cog-array-type": "iterator"}


def main() -> None:
    """Writes the file."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    target = ROOT / ".cog" / "openapi_schema.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(schema((ROOT / "predict.py").read_text()), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
