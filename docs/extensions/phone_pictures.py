"""Shows a picture's version for a phone on narrow screens: NAME.narrow.png beside NAME.png, where there is one."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx


def add_narrow_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Put the narrow picture behind the wide one. Each has a class, and the style sheet shows one of them."""
    for image in list(doctree.findall(nodes.image)):
        path = Path(image["uri"])
        narrow = path.with_name(f"{path.stem}.narrow{path.suffix}")
        if not (Path(app.env.doc2path(app.env.docname)).parent / narrow).exists():
            continue
        twin = image.deepcopy()
        image["classes"].append("wide-screen")
        twin["uri"] = narrow.as_posix()
        twin["classes"].append("narrow-screen")
        image.parent.insert(image.parent.index(image) + 1, twin)


def setup(app: Sphinx) -> dict[str, bool]:
    # Before Sphinx collects the images that it copies, which it does at the usual priority of 500.
    app.connect("doctree-read", add_narrow_pictures, priority=100)
    return {"parallel_read_safe": True}
