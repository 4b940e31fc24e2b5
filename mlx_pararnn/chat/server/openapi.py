"""The description of the server's paths: /openapi.json, and the same as a page that loads nothing."""

import re
from html import escape
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .schema import ChatRequest, CompletionRequest, ImageRequest, ResponsesRequest, TokenizeRequest

# What answers at each path takes; Anthropic's messages are brought into a chat's form by messages.py.
BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": ResponsesRequest,
    "/v1/images/generations": ImageRequest,
    "/tokenize": TokenizeRequest,
}
STYLE = (
    ":root{color-scheme:light dark} body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
    "padding:0 1rem} h2,code{font:1rem ui-monospace,monospace} h2{font-weight:600;margin:2rem 0 .5rem}"
    "table{border-collapse:collapse;width:100%} td,th{text-align:left;vertical-align:top;"
    "padding:.2rem .6rem .2rem 0;border-bottom:1px solid #8884}"
)


def openapi(paths: dict[str, list[str]]) -> dict[str, Any]:
    """The OpenAPI description: `paths` with their methods, and the fields that each takes."""
    kinds = list(dict.fromkeys(BODIES.values()))
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-pararnn serve", "version": version("mlx-pararnn")},
        "paths": {
            path.replace(":path}", "}"): {method: _operation(path, method) for method in methods}
            for path, methods in paths.items()
        },
        "components": {"schemas": schemas["$defs"]},
    }


def docs_page(description: dict[str, Any]) -> str:
    """The description as HTML, without a script."""
    schemas = description["components"]["schemas"]
    parts = []
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            summary = operation.get("summary") or operation["responses"]["200"]["description"]
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(summary)}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            name = body.get("schema", {}).get("$ref", "").rpartition("/")[2]
            if name:
                parts.append(_fields(schemas[name], schemas))
    title = f"{description['info']['title']} {description['info']['version']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content='
        f'"width=device-width"><title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}'
        f'</style><h1>{escape(title)}</h1><p>As JSON: <a href="/openapi.json">/openapi.json</a></p>'
        f"{''.join(parts)}</html>"
    )


def _operation(path: str, method: str) -> dict[str, Any]:
    described = "JSON, or events with `stream`" if method == "post" else path.strip("/") or "the chat page"
    operation: dict[str, Any] = {"responses": {"200": {"description": described}}}
    if method == "post":
        schema: dict[str, Any] = {"type": "object"}
        if path in BODIES:
            operation["summary"] = (BODIES[path].__doc__ or "").splitlines()[0]
            schema = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    parameters = re.findall(r"{(\w+)(?::path)?}", path)
    if parameters:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in parameters
        ]
    return operation


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in required else repr(field.get("default"))
        cells = name, _kind(field, schemas), default
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells))
    return f"<table><tr><th>field<th>type<th>default{''.join(rows)}</table>"


def _kind(field: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A field's type in words, with its bounds."""
    if "$ref" in field:
        inner = schemas[field["$ref"].rpartition("/")[2]]
        return "object of " + ", ".join(inner.get("properties", {}))
    if "anyOf" in field:
        return " or ".join(_kind(option, schemas) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return " or ".join(map(repr, field.get("enum", [field.get("const")])))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(field.get('items', {}), schemas)}"
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    bounds = [f"from {low:g}"] if low is not None else []
    bounds += [f"to {high:g}"] if high is not None else []
    return " ".join([kind, *bounds])
