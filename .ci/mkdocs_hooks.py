"""What `make docs` adds to the pages of flexkern/docs: the two READMEs, the pictures they show, the pages of the API.

None of these is copied into the tree. Links between pages are written as they hold in the repository, and are turned
here into links of the site; a link to a file that the site does not have fails the build.
"""

import logging
import os
import re
from pathlib import Path
from posixpath import normpath, relpath

ROOT = Path(__file__).resolve().parent.parent
DOCS = "flexkern/docs"
BROUGHT = {  # file of the repository: its name in the site
    "README.md": "index.md",
    "kernels/README.md": "kernels.md",
    "bench/results/rooms/sheet.png": "pictures/sheet.png",
    "bench/results/rooms/films.webp": "pictures/films.webp",
    "bench/results/rooms/curves.png": "pictures/curves.png",
    "bench/results/rooms/gallery.png": "pictures/gallery.png",
    "bench/results/demo/soak.png": "pictures/soak.png",
    "bench/results/rooms/four_minutes.png": "pictures/four_minutes.png",
    "bench/results/rooms/an_hour.png": "pictures/an_hour.png",
    "bench/results/evidence/presets.png": "pictures/presets.png",
    "bench/results/evidence/parts.png": "pictures/parts.png",
    "bench/results/evidence/choices.png": "pictures/choices.png",
}
AREAS = {  # a page each: its title, and the modules, classes or functions that it describes
    "engine": (
        "Engine and sessions",
        [
            "flexkern.engine",
            "flexkern.session",
            "flexkern.pipeline",
            "flexkern.model.checkpoint",
            "flexkern.model.protocols",
            "flexkern.noise",
            "flexkern.graphs",
            "flexkern.capture",
            "flexkern.window",
            "flexkern.state",
        ],
    ),
    "parallel": (
        "More than one GPU",
        ["flexkern.parallel.launch", "flexkern.parallel.lead", "flexkern.parallel.split", "flexkern.parallel.memory"],
    ),
    "attention": (
        "Attention functions",
        [
            "flexkern.functional.attention",
            "flexkern.functional.paged_attention",
            "flexkern.functional.frame_turns",
            "flexkern.functional.turn_place",
        ],
    ),
    "policies": (
        "Policies and presets",
        [
            "flexkern.policies.presets",
            "flexkern.policies.position",
            "flexkern.policies.retention",
            "flexkern.policies.noise",
            "flexkern.policies.effect",
        ],
    ),
    "model": (
        "Checkpoints",
        [
            "flexkern.model.weights",
            "flexkern.model.families",
            "flexkern.model.find",
            "flexkern.model.schedule",
            "flexkern.model.text",
            "flexkern.model.vae.decoder",
            "flexkern.model.vae.graphs",
            "flexkern.model.vae.codec",
            "flexkern.model.tiny_decoder",
            "flexkern.model.wan",
        ],
    ),
    "render": ("Rendering to files", ["flexkern.render"]),
    "metrics": (
        "Metrics",
        [
            "flexkern.metrics.measure",
            "flexkern.metrics.curves",
            "flexkern.metrics.sink",
            "flexkern.metrics.weights",
            "flexkern.metrics.video",
        ],
    ),
    "serve": (
        "Serving",
        ["flexkern.serve.server", "flexkern.serve.served", "flexkern.serve.service", "flexkern.serve.telemetry"],
    ),
    "integrations": (
        "Integrations",
        [
            "flexkern.integrations.self_forcing",
            "flexkern.integrations.longlive",
            "flexkern.integrations.diffusers",
            "flexkern.integrations.vae",
        ],
    ),
    "backends": (
        "Backends, cache and plan",
        ["flexkern.backends", "flexkern.backends.choice", "flexkern.memory", "flexkern.cache", "flexkern.plan"],
    ),
    "reference": ("The oracle of the kernels", ["flexkern.kernels.reference", "flexkern.testing"]),
}
STYLE = """\
.md-grid { max-width: 76rem; }
.md-typeset pre > code { font-size: 0.78em; }
.md-typeset table:not([class]) td, .md-typeset table:not([class]) th { padding: 0.45em 0.9em; }
.md-typeset thead:not(:has(th:not(:empty))) { display: none; }
.md-typeset .doc-heading { font-weight: 600; }
.md-typeset div.doc-children { padding-left: 0.9rem; border-left: 0.1rem solid var(--md-default-fg-color--lightest); }
"""
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^```.*?^```|^(?: {4}|\t).*?$|`[^`\n]+`)", re.M | re.S)

logging.getLogger("mkdocs").setLevel(logging.WARNING)  # its own --quiet would hide warnings from --strict, too


def on_config(config):
    """List the pages of the API in the navigation."""
    for entry in config.nav:
        if "API" in entry:
            entry["API"] += [{title: f"api/{name}.md"} for name, (title, _) in AREAS.items()]
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    files.append(File.generated(config, "style.css", content=STYLE))
    for source, target in BROUGHT.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    listed = [
        f"- [{title}]({name}.md): {', '.join(f'`{m}`' for m in modules)}" for name, (title, modules) in AREAS.items()
    ]
    index = "# API\n\nWhat is public, from its docstrings. "
    index += "Shapes use the letters of the [words](../architecture.md#words).\n\n"
    files.append(File.generated(config, "api/index.md", content=index + "\n".join(listed) + "\n"))
    for name, (title, modules) in AREAS.items():
        text = f"# {title}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they hold in the repository become links as they hold in the site; code stays as it is."""
    brought = {target: source for source, target in BROUGHT.items()}
    source = brought.get(page.file.src_uri, f"{DOCS}/{page.file.src_uri}")

    def turned(match):
        before, link, after = match.groups()
        path, hash, anchor = link.partition("#")
        if not path or "://" in path or path.startswith(("mailto:", "/")):
            return match[0]
        aim = normpath(os.path.join(os.path.dirname(source), path))
        aim = BROUGHT.get(aim, aim.removeprefix(f"{DOCS}/") if aim.startswith(f"{DOCS}/") else None)
        if aim is None:
            return match[0]  # unknown to the site: mkdocs says so
        return f"{before}{relpath(aim, os.path.dirname(page.file.src_uri) or '.')}{hash}{anchor}{after}"

    pieces = CODE.split(markdown)
    return "".join(piece if i % 2 else LINK.sub(turned, piece) for i, piece in enumerate(pieces))
