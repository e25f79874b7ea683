"""The pages under ``docs/`` name everything that a user can meet, and their links lead somewhere.

What there is comes from the code itself: most by its syntax tree, the commands' flags from the entry points.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted(DOCS.glob("*.md"))]
#: The page that lists a command's flags.
PAGE_OF = {
    "train-policy": "training",
    "eval-policy": "benchmarks",
    "calibrate": "calibration",
    "plan-placement": "policies",
    "explain-policy": "policies",
    "serve": "serving",
    "serve-worker": "serving",
    "route": "remote",
}


@cache
def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@cache
def trees(folder: str) -> tuple[ast.Module, ...]:
    return tuple(ast.parse(f.read_text(encoding="utf-8")) for f in sorted((ROOT / folder).glob("*.py")))


def nodes(folder: str) -> Iterator[ast.AST]:
    for tree in trees(folder):
        yield from ast.walk(tree)


def strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def fields(file: str) -> dict[str, dict[str, str]]:
    """Fields of the settings classes of a file (below ``_Strict`` or ``Section``): class → field → its annotation."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any(
            isinstance(b, ast.Name) and b.id in ("_Strict", "Section") for b in node.bases
        ):
            own = [x for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
            found[node.name] = {ast.unparse(x.target): ast.unparse(x.annotation) for x in own}
    return found


def test_serving_names_every_metric() -> None:
    there = {s for tree in trees("engine/server") for s in strings(tree) if re.fullmatch(r"(vllm|slalom):[a-z_]+", s)}
    assert len(there) > 30
    listed = set(re.findall(r"`((?:vllm|slalom):[a-z_]+?)(?:_total|_info)?`", page("serving")))
    assert there == listed


def test_serving_names_every_request_header() -> None:
    def reads_headers(node: ast.AST) -> bool:
        return any(isinstance(x, (ast.Name, ast.Attribute)) and "headers" in ast.unparse(x) for x in ast.walk(node))

    there = {s for tree in trees("engine/server") for s in strings(tree) if re.fullmatch(r"x-[a-z-]+", s)}
    for node in nodes("engine/server"):
        if isinstance(node, ast.GeneratorExp) and reads_headers(node):
            there |= set(strings(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("headers.get"):
            there |= set(strings(node.args[0]))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PROXIED":
            there |= set(strings(node.value))
    assert {"x-slo-ttft-ms", "x-slo-class", "forwarded", "origin"} <= there
    assert [name for name in sorted(there) if f"`{name}`" not in page("serving")] == []


def test_serving_names_every_route() -> None:
    there = set()
    for node in nodes("engine/server"):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("get", "post", "put", "delete", "api_route"):
                first = next(iter(node.args), None)
                if isinstance(first, ast.Constant) and str(first.value).startswith("/"):
                    there.add(f"{'GET' if node.func.attr == 'api_route' else node.func.attr.upper()} {first.value}")
    assert {"POST /admin/policy", "GET /metrics"} <= there
    assert [route for route in sorted(there) if f"`{route}`" not in page("serving")] == []


def test_serving_names_every_setting_of_the_guard() -> None:
    classes = fields("policies/guard/config.py")
    there = set()
    for name, annotation in classes["GuardConfig"].items():
        there |= {f"{name}.{inner}" for inner in classes[annotation]} if annotation in classes else {name}
    assert {"deadline_us", "breaker.failures", "log.path"} <= there
    assert [name for name in sorted(there) if f"\n| `{name}` |" not in page("serving")] == []


def test_scenarios_names_every_field() -> None:
    files = ("env/scenario.py", "env/sections.py")
    there = {name for file in files for own in fields(file).values() for name in own}
    assert {"reference_rate", "ttft_factor", "bandwidth_gb_s"} <= there
    assert [name for name in sorted(there) if f"`{name}`" not in page("scenarios")] == []


def test_scenarios_names_every_bundled_one() -> None:
    there = [file.stem for file in (ROOT / "env" / "scenarios").glob("*.yaml")]
    assert [name for name in sorted(there) if f"\n| `{name}`" not in page("scenarios")] == []


def test_policies_names_every_rule() -> None:
    files = (ROOT / "policies").rglob("*.py")
    there = [file.stem for file in files if "\nRULE = " in file.read_text(encoding="utf-8")]
    assert len(there) > 20
    assert [name for name in sorted(there) if f"\n| `{name}` |" not in page("policies")] == []


@pytest.mark.parametrize("command", PAGE_OF)
def test_every_flag_of_a_command_is_on_its_page(command: str) -> None:
    import typer

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts.keys() == PAGE_OF.keys()
    app: Any = importlib.import_module(scripts[command].partition(":")[0]).app
    parameters = typer.main.get_command(app).params
    options = [option for p in parameters for option in (*p.opts, *p.secondary_opts)]
    flags = [option for option in options if option.startswith("--") and option != "--help"]
    assert flags
    assert [flag for flag in flags if f"`{flag}`" not in page(PAGE_OF[command])] == []


@pytest.mark.parametrize("source", PAGES, ids=lambda source: source.name)
def test_every_module_and_file_named_exists(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    modules = [
        name.replace(".", "/") for name in re.findall(r"python -m ((?:eval|train|engine|env|policies)[\w.]*\w)", text)
    ]
    missing = [m for m in modules if not (ROOT / f"{m}.py").is_file() and not (ROOT / m / "__main__.py").is_file()]
    paths = re.findall(r"`((?:engine|policies|env|train|eval|checkpoints|tests)/[\w./-]*)`", text)
    assert missing + [path for path in paths if not (ROOT / path.partition("NAME")[0]).exists()] == []


def anchors(text: str) -> set[str]:
    """Addresses of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("source", PAGES, ids=lambda source: source.name)
def test_every_link_leads_somewhere(source: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", source.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        there = source.parent / file if file else source
        if not there.exists() or (anchor and anchor not in anchors(there.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_the_readme_leads_to_every_page() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        source = waiting.pop()
        if source in seen or source.suffix != ".md":
            continue
        seen.add(source)
        links = re.findall(r"\]\(([^)#\s]+)", source.read_text(encoding="utf-8"))
        waiting += [(source.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) <= seen
