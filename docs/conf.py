"""Settings of Sphinx: ``make docs`` builds the pages into ``build/docs``.

The sources are the repository's Markdown files in their places, so that a relative link works on a code
host and here. ``docs/site_extension.py`` contains the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from stableopt import __version__ as release

project = "stableopt"
author = copyright = "The stableopt developers"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "site_extension",
]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "docs/**.rst", "benchmarks/REPORT.md"]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "runs",
    "stableopt",
    "tests",
    "docs/gallery",
    "docs/_templates",
]
templates_path = [str(Path(__file__).parent / "_templates")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

sphinx_gallery_conf = {
    "examples_dirs": "docs/gallery",
    "gallery_dirs": "docs/auto_gallery",
    "ignore_pattern": "digits_runs",
    "image_scrapers": ("site_extension",),
    "reset_modules": (),
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": (),
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,
    "copyfile_regex": r"",
    "abort_on_example_error": True,
    "parallel": 2,
}

nitpicky = True
nitpick_ignore_regex = [
    # Names of other packages: their inventories need a network.
    (
        "py:.*",
        r"(torch|numpy|np|matplotlib|lightning|transformers|wandb|collections|contextlib|abc|os|pathlib|re|typing)\..*",
    ),
    ("py:.*", r"Axes|Console|Figure|NDArray|SummaryWriter|optional"),
    # Types of keywords and aliases of tuples, whose signatures say enough.
    ("py:class", r"StepOptions|Target"),
    # Modules inside the packages are not public.
    ("py:.*", r"stableopt\.\w+\.[a-z_]+(\..*)?"),
]

html_theme = "furo"
html_title = f"stableopt {release}"
html_math_renderer = "mathml"
html_copy_source = False
