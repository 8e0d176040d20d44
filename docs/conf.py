"""How the documentation is built."""

import pathlib
import pkgutil

import optax_cl

project = "optax_cl"
author = "The optax_cl authors"
copyright = "The optax_cl authors"
version = release = optax_cl.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"optax_cl {version}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "imported-members": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Differs from the paper"]


def _write_room_pages() -> None:
    """Writes one page for each public module of the package, as it is today."""
    folder = pathlib.Path(__file__).parent / "api" / "rooms"
    folder.mkdir(exist_ok=True)
    pages = {}
    for module in pkgutil.walk_packages(optax_cl.__path__, "optax_cl."):
        path = module.name.removeprefix("optax_cl.")
        if not any(part.startswith("_") for part in path.split(".")):
            pages[folder / f"{path}.md"] = (
                f"# `{module.name}`\n\n"
                f"```{{eval-rst}}\n.. automodule:: {module.name}\n```\n"
            )
    for page in set(folder.glob("*.md")) - pages.keys():
        page.unlink()
    for page, text in pages.items():
        # An untouched page isn't read again.
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def _skip(app, what, name, obj, skip, options):
    """Leaves out what a module merely imports, and fields that nobody described."""
    home = getattr(obj, "__module__", None) or ""
    foreign = (callable(obj) or isinstance(obj, type)) and not (
        home == "optax_cl" or home.startswith("optax_cl.")
    )
    field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if foreign or field else skip


def setup(app):
    _write_room_pages()
    app.connect("autodoc-skip-member", _skip)
