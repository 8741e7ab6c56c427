"""Sphinx extension of the site: table of contents, formulas as MathML, pictures, and checked links.

- README is the first page. Its table of contents is added here, so that a code host does not show it.
- docutils turns formulas into MathML, which browsers draw without an external script.
- The pictures of the gallery are the figures that an example names ``figure``; pyplot is not used.
- A page that links to a missing file or anchor, or loads anything from another site, fails the build.
"""

import re
import shutil
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError
from sphinx.util.nodes import make_refnode
from sphinx_gallery.scrapers import figure_rst

# A pattern lists the matching pages that are not named elsewhere; pages without any match come last.
CONTENTS = """
```{toctree}
:hidden:
:glob:
:caption: Begin

docs/quickstart
docs/reading-margins
docs/diagnosing
docs/auto_gallery/index
```

```{toctree}
:hidden:
:glob:
:caption: Use

docs/models
docs/frameworks
docs/distributed
docs/performance
docs/optimizers
docs/along_the_step
docs/steering
```

```{toctree}
:hidden:
:caption: Understand

docs/theory
docs/limits
docs/paper
docs/reproducing
The report <benchmarks/REPORT>
```

```{toctree}
:hidden:
:caption: Look up

docs/api
docs/defaults
CHANGELOG
CONTRIBUTING
{others}
```
"""
_ELSEWHERE = ("docs/generated/*", "docs/auto_gallery/*")


def _add_contents(app, docname, source):
    if docname == app.config.root_doc:
        named = [docname, *_ELSEWHERE, *(line.strip("<>") for line in CONTENTS.split())]
        pages = sorted(app.env.found_docs)
        others = [page for page in pages if not any(fnmatch(page, name) for name in named)]
        source[0] += CONTENTS.replace("{others}", "\n".join(others))


def _public(app, env, node, contnode):
    """Link a name whose spelling differs from the reference: without its package, or with a module.

    ``stableopt.steering.lr_laws.keep_margin`` is listed as ``stableopt.steering.keep_margin``, and
    ``stableopt.stability.UpdateRule`` as ``stableopt.UpdateRule``.
    """
    parts = node["reftarget"].removeprefix("stableopt.").split(".")
    package, *rest = node["reftarget"].split(".")
    if node.get("refdomain") != "py" or (rest and package.islower() and package != "stableopt"):
        return None
    objects = env.domains.python_domain.objects
    for tail in (parts[-1:], parts[-2:]):
        for end in range(len(parts) - len(tail), -1, -1):
            found = objects.get(".".join(["stableopt", *parts[:end], *tail]))
            if found:
                place = (found.docname, found.node_id)
                return make_refnode(app.builder, node["refdoc"], *place, contnode)
    return None


def _no_type(app, what, name, obj, options, lines):
    """Keep napoleon from reading text before a colon as an attribute's type."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]


def _factories(app, what, name, obj, options, signature, returns):
    """Write a dataclass default factory as ``...``, so that the signature can be parsed and linked."""
    return signature and signature.replace("<factory>", "..."), returns


_UNDER_ACCENT = re.compile(
    r"<munderover>\s*(<mi>\w+</mi>)((?:(?!</?munderover>).)*)"
    r'(<mo stretchy="false">.</mo>)\s*</munderover>',
    re.DOTALL,
)


def _math(translator, node):
    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block)
    # docutils sets the index of an accented letter below it, like the index of a sum.
    translator.body.append(_UNDER_ACCENT.sub(r"<msub><mover>\1\3</mover>\2</msub>", mathml))
    raise nodes.SkipNode


def _get_sg_image_scraper():
    return _figures


def _figures(block, block_vars, gallery_conf):
    figure = block_vars["example_globals"].pop("figure", None)
    if figure is None:
        return ""
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=150)
    return figure_rst([path], gallery_conf["src_dir"], figure.get_suptitle())


class _Page(HTMLParser):
    """The anchors and links of a page, and the files that it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.add(given["href"])
        if given.get("src"):
            self.loaded.add(given["src"])


def broken_links(folder):
    """Return the broken links of the pages in ``folder``, as 'page: link'."""
    pages = {path: _Page(path) for path in folder.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                wrong = link in page.loaded and parts.scheme != "data"
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                known = pages.get(target)
                inside = known is None or not parts.fragment or unquote(parts.fragment) in known.ids
                wrong = not (target.exists() and inside)
            if wrong:
                broken.append(f"{path.relative_to(folder)}: {link}")
    return sorted(broken)


def _finish(app, exception):
    if exception is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    shutil.copy(folder / f"{app.config.root_doc}.html", folder / "index.html")
    if broken := broken_links(folder):
        raise ExtensionError("broken or external links:\n" + "\n".join(broken))


def setup(app):
    """Register the extension with Sphinx."""
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("source-read", _add_contents)
    app.connect("missing-reference", _public)
    app.connect("autodoc-process-signature", _factories)
    app.connect("autodoc-process-docstring", _no_type, priority=400)
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
